"""What all ranks want is read once, and goes to the others over the job's process group."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptd
from tests.system import matrix_layouts as layouts

pytestmark = pytest.mark.system
HERE = Path(__file__).parent
RANKS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save two steps in one process; the second has other contents."""
    folder = tmp_path_factory.mktemp("share")
    job = layouts.build("plain", seed=1)
    with ckptd.Checkpointer(folder / "root", daemon=False) as ckpt:
        for step in (1, 2):
            job.step(step)
            odd = torch.arange(24.0).reshape(4, 6) * step
            big = torch.full((300, 300), float(step), dtype=torch.bfloat16)
            ckpt.save(step, {**job.state, "odd": odd, "big": big}, wait=True)
    return folder / "root"


def restore(root: Path, out: Path, share: str) -> tuple[list[dict[str, Any]], list[Any]]:
    out.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(RANKS), str(HERE / "share_worker.py"), str(root), str(out), share,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]
    tensors = [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    return rows, tensors


def check(tensors: list[Any], root: Path, step: int) -> None:
    loaded = ckptd.load(root, step=step)
    for held in tensors:
        assert torch.equal(held["odd"], loaded["odd"])
        assert torch.equal(held["big"], loaded["big"])
        for fqn, tensor in loaded["model"].items():
            assert torch.equal(held[f"model.{fqn}"], tensor), fqn
        for fqn, state in loaded["optimizer"]["state"].items():
            for key, tensor in state.items():
                assert torch.equal(held[f"optimizer/{fqn}/{key}"], tensor), (fqn, key)


def test_each_rank_reads_a_part_and_all_have_everything(root: Path, tmp_path: Path) -> None:
    rows, tensors = restore(root, tmp_path / "out", "yes")
    check(tensors, root, 2)
    whole = sum(t.numel() for t in tensors[0].values())
    read = [row["elements"] for row in rows]
    assert sum(read) == whole, "nothing is read twice"
    assert min(read) > 0


def test_ranks_of_one_node_read_for_themselves_unless_told(root: Path, tmp_path: Path) -> None:
    rows, tensors = restore(root, tmp_path / "out", "no")
    check(tensors, root, 2)
    whole = sum(t.numel() for t in tensors[0].values())
    assert [row["elements"] for row in rows] == [whole] * RANKS


def test_r2_damage_that_one_rank_reads_sends_all_to_the_older_checkpoint(
    root: Path, tmp_path: Path
) -> None:
    """Nobody passes anything on before all have said that they have read their part."""
    broken = tmp_path / "root"
    shutil.copytree(root, broken)
    chunk = max((broken / "chunks").rglob("*-000000000002-*"), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    rows, tensors = restore(broken, tmp_path / "out", "yes")
    assert [row["step"] for row in rows] == [1] * RANKS
    check(tensors, root, 1)
