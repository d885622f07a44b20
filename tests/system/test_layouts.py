"""Every layout into every other: saved by real ranks, restored by real ranks, bit for bit.

``CKPTD_MATRIX=full`` runs also the pairs that a short suite leaves out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptd
from tests.system import matrix_layouts as layouts
from tests.system.matrix_worker import expected

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parent.parent.parent
WORLDS = (1, 2, 3, 4)

Rows = dict[tuple[str, str], list[str]]


def run(world_size: int, what: str, folder: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(world_size),
        str(Path(__file__).parent / "matrix_worker.py"), what, str(folder),
    ]  # fmt: skip
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY),
        "CKPTD_RUNTIME_DIR": str(folder / "rt"),
    }  # fmt: skip
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save all layouts; each root, and what was whole in it, is named after layout and world size."""
    folder = tmp_path_factory.mktemp("layouts")
    for world_size in WORLDS:
        run(world_size, "save", folder)
    return folder


@pytest.fixture(scope="module")
def rows(saved: Path) -> Rows:
    """Restore them; by source and target what went wrong on some rank."""
    found: Rows = {}
    for world_size in WORLDS:
        run(world_size, "restore", saved)
        for rank in range(world_size):
            for source, target, problem in json.loads(
                (saved / f"rows-{world_size}-{rank}.json").read_text()
            ):
                found.setdefault((source, target), []).append(problem)
    return found


@pytest.mark.parametrize(("source", "target"), layouts.pairs())
def test_r3_what_one_layout_saved_another_goes_on_with(
    rows: Rows, source: str, target: str
) -> None:
    problems = rows[source, target]
    assert len(problems) == int(target[-1]), "some rank did not try"
    assert problems == [""] * len(problems)


@pytest.mark.parametrize(
    ("name", "world_size"), [pair for pair in layouts.everything() if pair[1] > 1]
)
def test_what_ranks_saved_opens_in_one_process_without_them(
    saved: Path, name: str, world_size: int
) -> None:
    source = f"{name}-{world_size}"
    loaded = ckptd.load(saved / source)
    wanted = expected(saved, source)
    model = {f"model.{fqn}": tensor for fqn, tensor in loaded["model"].items()}
    state = {
        f"optimizer/{fqn}/{key}": tensor
        for fqn, held in loaded["optimizer"]["state"].items()
        for key, tensor in held.items()
    }
    assert (model | state).keys() == wanted.keys()
    for fqn, tensor in (model | state).items():
        assert torch.equal(tensor, wanted[fqn]), fqn
    assert loaded["optimizer"]["groups"][0]["lr"] == 0.01
