from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptd
from tests.system.ddp_worker import build

pytestmark = pytest.mark.system
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the job with two ranks to its end; its root is ``root`` in this folder."""
    folder = tmp_path_factory.mktemp("ddp")
    runtime = folder / "rt"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(HERE / "ddp_worker.py"), str(folder / "root"), str(folder),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CKPTD_RUNTIME_DIR": str(runtime)}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_a_ddp_model_with_batchnorm_comes_back_bit_for_bit_as_rank_0_held_it(
    finished: Path,
) -> None:
    dumps = [torch.load(finished / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    mean = "1.running_mean"
    assert not torch.equal(dumps[0]["model"][mean], dumps[1]["model"][mean]), "the test is void"
    model, optimizer = build()
    model[2].requires_grad_(True)
    state = {"model": torch.nn.DataParallel(model), "optimizer": optimizer}
    with ckptd.Checkpointer(finished / "root", daemon=False) as ckpt:
        resumed = ckpt.resume(state)
    assert resumed is not None
    assert resumed.step == 8
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, dumps[0]["model"][name]), name
    saved = dumps[0]["optimizer"]["state"]
    live = optimizer.state_dict()["state"]
    assert live.keys() == saved.keys()
    for index, entries in saved.items():
        for key, value in entries.items():
            assert torch.equal(live[index][key], value), (index, key)


@pytest.fixture(scope="module")
def saved(finished: Path) -> list[ckptd.Checkpoint]:
    """Return what the job of two ranks committed, newest first."""
    with ckptd.Checkpointer(finished / "root", daemon=False) as ckpt:
        return [c for c in ckpt.checkpoints() if c.world_size == 2]


def test_each_rank_writes_its_share_once_the_layout_is_agreed(
    finished: Path, saved: list[ckptd.Checkpoint]
) -> None:
    for rank in (0, 1):
        written = json.loads((finished / f"{rank}.json").read_text())
        assert abs(written[-1] / saved[0].bytes - 0.5) < 0.05


def test_values_that_differ_between_ranks_are_kept_for_each(
    saved: list[ckptd.Checkpoint],
) -> None:
    assert {"mine", "rng"} <= set(saved[0].differing)


def test_a_changed_layout_costs_bytes_but_no_checkpoint(saved: list[ckptd.Checkpoint]) -> None:
    assert [c.step for c in saved] == [8, 7, 6, 5, 4, 3, 2, 1]
