"""The benchmark of S3 clients: its arithmetic, its table, and one small run from end to end."""

import json

import pytest
from rich.console import Console

pytest.importorskip("torch")
pytest.importorskip("moto")

from bench import s3, s3_table
from bench.memory import OwnPeak
from bench.s3_table import Sample
from bench.stats import Spread

GB = 1_000_000_000


def sample(put_s, get_s, **more):
    return Sample(
        stored_bytes=GB, put_s=put_s, put_cpu_s=3.0, put_server_s=2.0, get_s=get_s, get_cpu_s=1.5,
        get_server_s=0.0, is_same=True, **more,
    )  # fmt: skip


def rows_of(**speeds):
    """Rows with the seconds of a PUT and of a GET of 1 GB, by name."""
    return [
        s3_table.row_of(kind, [sample(*speeds[kind.name])], None)
        for kind in s3.CLIENTS
        if kind.name in speeds
    ]


def test_speeds_are_of_stored_bytes_and_processor_seconds_of_a_gigabyte():
    turns = [sample(4.0, 1.0), sample(2.0, 0.5), sample(1.0, 2.0)]
    half = [turn._replace(stored_bytes=GB // 2) for turn in turns]
    row = s3_table.row_of(s3.choose("boto3")[0], half, None)
    assert row["put_mb_s"] == Spread(250.0, 125.0, 500.0, 3)
    assert row["get_mb_s"] == Spread(500.0, 250.0, 1000.0, 3)
    assert (row["put_cpu_s_per_gb"], row["put_server_s_per_gb"]) == (6.0, 4.0)


def test_the_best_peer_is_neither_ckptd_nor_the_floor():
    speeds = {"floor": (0.1, 0.1), "boto3": (2.0, 1.0), "obstore": (1.0, 4.0), "ckptd": (0.5, 0.5)}
    rows = rows_of(**speeds)
    assert s3_table.best_peer(rows, "put_mb_s") == 1000.0
    assert s3_table.best_peer(rows, "get_mb_s") == 1000.0
    assert s3_table.best_peer(rows_of(floor=(1.0, 1.0)), "put_mb_s") is None


def test_a_failed_peer_is_a_row_and_a_wrong_byte_an_error():
    boto3, ours = s3.choose("boto3,ckptd-client")
    failed = s3_table.row_of(boto3, [], "RuntimeError: no")
    good = s3_table.row_of(ours, [sample(1.0, 1.0)], None)
    assert s3_table.is_sound([failed, good])
    assert not s3_table.is_sound([{**good, "failed": "late"}])
    wrong = s3_table.row_of(boto3, [sample(1.0, 1.0)._replace(is_same=False)], None)
    assert not s3_table.is_sound([wrong])


def test_the_table_has_ratios_memory_over_its_budget_and_says_where_other_bytes_are_stored():
    rows = rows_of(boto3=(2.0, 1.0), ckptd=(1.0, 2.0))
    auto = s3.choose("ckptd-auto")[0]
    less = sample(1.0, 1.0, peak_bytes=auto.budget_bytes * 3 // 2)._replace(stored_bytes=GB // 2)
    rows += [s3_table.row_of(auto, [less], None)]
    rows += [s3_table.row_of(s3.choose("obstore")[0], [], "obstore is not installed")]
    found = {
        "server": "a server", "objects": 1, "object_bytes": GB, "rounds": 1, "cores": 2,
        "versions": {"boto3": "1.0", "moto": None}, "clients": rows,
    }  # fmt: skip
    console = Console(record=True, width=200)
    s3_table.show(console, found)
    text = console.export_text()
    for part in ("2.00x", "0.50x", "1.50x", "3.00 + 2.00", "moto missing", "0.500"):
        assert part in text
    assert "obstore failed: obstore is not installed" in text
    assert "ckptd-auto: OTHER BYTES, 0.50 stored; of the state, put 1000 MB/s" in text


def test_a_strange_name_is_an_error_before_anything_starts(capsys):
    assert s3.main(["--only", "boto3,minio"]) == 2
    assert "no client 'minio'" in capsys.readouterr().err
    assert s3.main(["--endpoint", "http://127.0.0.1:1"]) == 2
    assert "--bucket" in capsys.readouterr().err


def test_nothing_is_watched_without_processes():
    with OwnPeak([], "x") as peak:
        pass
    assert peak.bytes == 0


@pytest.mark.system
def test_two_clients_put_and_get_the_same_bytes(tmp_path, monkeypatch, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_REGION",
                 "AWS_EC2_METADATA_DISABLED", "CKPTD_RUNTIME_DIR", "NO_PROXY", "no_proxy"):  # fmt: skip
        monkeypatch.setenv(name, "before")  # what the run sets is taken back
    path = tmp_path / "s3.json"
    assert s3.main(["--mb", "8", "--rounds", "1", "--only", "ckptd-client,s3fs-pipe",
                    "--json", str(path)]) == 0  # fmt: skip
    found = json.loads(path.read_text())
    assert (found["objects"], found["object_bytes"]) == (4, 2 << 20)
    rows = {row["client"]: row for row in found["clients"]}
    assert rows.keys() == {"ckptd-client", "s3fs-pipe"}
    for row in rows.values():
        assert row["failed"] is None
        assert row["is_same"]
        assert row["stored_bytes"] == 8 << 20
        assert len(row["samples"]) == 1
    assert "round 1/1, ckptd-client: put " in capsys.readouterr().err
