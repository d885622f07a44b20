import itertools
import json
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from ckptd.model import keys
from ckptd.model.keys import CHUNKS, StepId
from ckptd.pipeline.catalog import read_manifest
from ckptd.store.open import open_store
from tests.fakes.checkpoints import PLAIN, flip_byte, write_checkpoint

FIRST, LEFT, NEWEST = StepId(1, 1000), StepId(1, 2000), StepId(2, 1500)
LONG = "model.layers.0." + "a_module_with_a_rather_long_name." * 4 + "weight"
NOTHING = "no-such-folder/run"
NUMBERS = itertools.count()
VALUES = [{"epoch": 3, "rng": [1, 2]}, {"epoch": 3, "rng": [3, 4]}]


@pytest.fixture
def root():
    """Return the URL of a store in memory that no other test uses."""
    return f"memory://cli-{next(NUMBERS)}"


@pytest.fixture
def store(root):
    store = open_store(root)
    write_checkpoint(store, FIRST, PLAIN, metrics={"loss": 2.5})
    write_checkpoint(store, LEFT, PLAIN, previous=FIRST)
    write_checkpoint(
        store, NEWEST, PLAIN | {LONG: np.zeros((512, 8), np.float32)}, previous=FIRST,
        world_size=2, values=VALUES, metrics={"loss": 1.25, "acc": 0.5}, aliases={"tied": LONG},
    )  # fmt: skip
    return store


def test_ls_shows_the_newest_first_and_marks_the_line(ckptd, root, store):
    result = ckptd("ls", root)
    assert result.exit_code == 0
    head, *rows = result.stdout.splitlines()
    assert head.split() == [
        "checkpoint", "committed", "age", "bytes", "stored", "ratio", "ranks", "metrics",
    ]  # fmt: skip
    assert [row.split()[:2] for row in rows][0::2] == [["*", "1500-0002"], ["*", "1000-0001"]]
    assert rows[1].split()[0] == "2000-0001"
    assert rows[0].endswith("loss=1.25 acc=0.5")


def test_ls_json_is_one_document(ckptd, root, store):
    document = json.loads(ckptd("ls", root, "--json").stdout)
    rows = document["checkpoints"]
    assert [(r["step"], r["attempt"], r["is_on_line"]) for r in rows] == [
        (1500, 2, True),
        (2000, 1, False),
        (1000, 1, True),
    ]
    assert rows[0]["metrics"] == {"loss": 1.25, "acc": 0.5}
    assert rows[0]["world_size"] == 2
    assert rows[0]["damage"] is None
    assert rows[0]["bytes"] == read_manifest(store, NEWEST).raw_bytes


def test_a_metric_that_is_no_number_is_nan_for_people_and_null_for_programs(ckptd, root):
    write_checkpoint(open_store(root), FIRST, PLAIN, metrics={"loss": None})
    assert "loss=nan" in ckptd("ls", root).stdout
    assert "nan" in ckptd("show", root).stdout
    for command in ("ls", "show"):
        document = json.loads(ckptd(command, root, "--json").stdout)
        assert document.get("checkpoints", [document])[0]["metrics"] == {"loss": None}


def test_ls_of_an_empty_root_says_so(ckptd, root):
    open_store(root).put(keys.ROOT_RECORD, b'{"format": 1}')
    assert "no checkpoints yet" in ckptd("ls", root).stdout
    assert json.loads(ckptd("ls", root, "--json").stdout)["checkpoints"] == []


def test_ls_marks_a_damaged_manifest_and_ends_with_4(ckptd, root, store):
    flip_byte(store, keys.checkpoint(LEFT), 5)
    result = ckptd("ls", root)
    assert result.exit_code == 4
    assert "2000-0001 is damaged" in result.stdout
    result = ckptd("ls", root, "--json")
    assert result.exit_code == 4
    assert keys.checkpoint(LEFT) in json.loads(result.stdout)["checkpoints"][1]["damage"]


def test_show_shows_tensors_and_values(ckptd, root, store):
    result = ckptd("show", root)
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert lines[LONG].split()[1:] == ["[512,", "8]", "float32", "16.0", "KiB", "cpu", "yes"]
    assert lines["optimizer.step"].split()[1:] == ["[]", "int64", "8", "B", "cpu", "no"]
    assert lines["tied"].split()[1:] == ["=", LONG]
    assert lines["4"].startswith("4 tensors")
    assert "differs between ranks" in lines["rng"]
    assert "differs" not in lines["epoch"]


def test_show_takes_a_step_of_the_line_or_any(ckptd, root, store):
    assert json.loads(ckptd("show", root, "--step", "1000", "--json").stdout)["step"] == 1000
    left = ckptd("show", root, "--step", "2000")
    assert left.exit_code == 3
    assert left.stdout == ""
    assert "2000-0001" in left.stderr
    assert ckptd("show", root, "--step", "2000-0001").exit_code == 0
    assert ckptd("show", root, "--step", "twelve").exit_code == 2


def test_show_json_holds_everything(ckptd, root, store):
    document = json.loads(ckptd("show", root, "--json").stdout)
    assert document["values"] == VALUES[0]
    assert document["differing"] == ["rng"]
    assert document["aliases"] == {"tied": LONG}
    assert {t["fqn"]: t["shape"] for t in document["tensors"]}[LONG] == [512, 8]


def test_verify_of_whole_checkpoints_ends_with_0(ckptd, root, store):
    assert "whole" in ckptd("verify", root).stdout
    result = ckptd("verify", root, "--all", "--data", "--json")
    assert result.exit_code == 0
    checkpoints = json.loads(result.stdout)["checkpoints"]
    assert [c["step"] for c in checkpoints] == [1500, 2000, 1000]
    assert all(c["is_whole"] and c["is_data"] and c["damage"] == [] for c in checkpoints)


def test_verify_names_damage_and_ends_with_4(ckptd, root, store):
    (entry, *_) = [e for e in store.list(CHUNKS) if str(FIRST) in e.key]
    flip_byte(store, entry.key, entry.bytes - 1)
    assert ckptd("verify", root, "--all").exit_code == 0
    assert ckptd("verify", root, "--data").exit_code == 0
    result = ckptd("verify", root, "--all", "--data")
    assert result.exit_code == 4
    assert "DAMAGED" in result.stdout
    assert entry.key in result.stdout
    result = ckptd("verify", root, "--step", "1000", "--data", "--json")
    assert result.exit_code == 4
    (damage,) = json.loads(result.stdout)["checkpoints"][0]["damage"]
    assert damage["key"] == entry.key
    assert damage["tensors"]


def test_verify_takes_all_or_a_step_not_both(ckptd, root, store):
    result = ckptd("verify", root, "--all", "--step", "1000")
    assert result.exit_code == 2
    assert "exclude" in result.stderr


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_what_is_no_root_is_not_found(ckptd, command):
    result = ckptd(command, NOTHING, "--json")
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr.startswith("ckptd: ")


def test_usage_errors_end_with_2(ckptd, root):
    assert ckptd("lss", root).exit_code == 2
    assert ckptd("ls").exit_code == 2
    assert ckptd("ls", "ftp://host/run").exit_code == 2


def test_exit_codes_are_in_every_help(ckptd):
    for args in ([], ["ls"], ["show"], ["verify"]):
        result = ckptd(*args, "--help")
        assert result.exit_code == 0
        assert "4 damage found" in result.stdout


def test_names_from_a_store_cannot_steer_the_terminal(ckptd, root):
    store = open_store(root)
    write_checkpoint(
        store, FIRST, PLAIN, metrics={"\x1b]0;owned\x07": 1.0, "[red]x[/red]": 2.0},
        values={"\x1b[2J": "\x1b[2J\u202e"},
    )  # fmt: skip
    for command in ("ls", "show"):
        output = ckptd(command, root).stdout
        assert "\x1b" not in output
        assert "\u202e" not in output
        assert "[red]x[/red]" in output


HOSTILE = [
    b"x",
    b"{}",
    b"\x80\x04\x95",
    b"PK\x03\x04",
    b"[" * 100_000,
    b'{"record":"manifest","record":"manifest"}',
    b"\xef\xbb\xbf{}",
    b"\x28\xb5\x2f\xfd" + b"\xff" * 9,
]
CHANGES = [
    {"step": -1},
    {"step": 1.0},
    {"step": True},
    {"world_size": 10**30},
    {"previous": "../../etc/passwd"},
    {"ranks": []},
    {"tensors": [["a", "float32", [1 << 60, 1 << 60], "parameter", True, "cpu"]]},
    {"tensors": [["a", "object", [1], "parameter", True, "cpu"]]},
    {"tensors": [["a\u001b", "float32", [1], "parameter", True, "cpu"]]},
    {"aliases": {"a": "b"}},
    {"raw_bytes": -1},
    {"metrics": {"loss": "low"}},
    {"surprise": 1},
]


@pytest.mark.parametrize("data", [*HOSTILE, *CHANGES], ids=lambda case: str(case)[:60])
@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_j_hostile_manifests_end_with_4(ckptd, root, store, data, command):
    if isinstance(data, dict):
        plain = store.get(keys.checkpoint(NEWEST), max_bytes=1 << 20)
        data = msgspec.json.encode(msgspec.json.decode(plain) | data)
    store.put(keys.checkpoint(NEWEST), data)
    result = ckptd(command, root)
    assert result.exit_code == 4
    assert keys.checkpoint(NEWEST) in result.output


@pytest.mark.parametrize("data", HOSTILE[:4], ids=lambda case: str(case)[:60])
def test_j_hostile_rank_manifests_end_with_4(ckptd, root, store, data):
    store.put(keys.rank(NEWEST, 0), data)
    assert ckptd("ls", root).exit_code == 0
    assert ckptd("show", root).exit_code == 4
    assert ckptd("verify", root).exit_code == 4


def test_python_m_prints_help_without_torch_numpy_or_a_store():
    code = (
        "import sys, runpy; sys.argv = ['ckptd', '--help']\n"
        "try: runpy.run_module('ckptd', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'fsspec', 'ckptd.store'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verify" in done.stdout


def test_the_command_ends_with_the_exit_code_of_the_error():
    done = subprocess.run(
        [sys.executable, "-m", "ckptd", "ls", NOTHING],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("ckptd: no ckptd root")
    assert len(done.stderr.splitlines()) == 1
