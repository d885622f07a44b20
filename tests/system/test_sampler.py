from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from examples.sampler import GLOBAL_BATCH, SAMPLES

pytestmark = pytest.mark.system
SCRIPT = Path(__file__).parent.parent.parent / "examples/sampler.py"


def test_pain_14_no_sample_is_repeated_or_left_out_from_4_to_2_to_3_ranks(tmp_path: Path) -> None:
    """The worked example, through an epoch and into the next, each time resumed by another world."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CKPTD_RUNTIME_DIR": str(tmp_path / "rt")}
    found: list[list[int]] = []
    steps = 0
    for world_size, until in ((4, 3), (2, 6), (3, 11)):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(world_size), str(SCRIPT),
            "--root", str(tmp_path / "root"), "--until", str(until), "--trained-on", str(tmp_path),
        ]  # fmt: skip
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        ranks = [
            json.loads((tmp_path / f"{until}-{rank}.json").read_text())
            for rank in range(world_size)
        ]
        assert all(len(rank) == until - steps for rank in ranks), (
            "each resumed where the last ended"
        )
        found += [sorted(chain.from_iterable(batch)) for batch in zip(*ranks, strict=True)]
        steps = until
    per_epoch = SAMPLES // GLOBAL_BATCH
    for epoch in range(2):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
        for i, batch in enumerate(found[epoch * per_epoch : (epoch + 1) * per_epoch]):
            assert batch == sorted(order[i * GLOBAL_BATCH : (i + 1) * GLOBAL_BATCH])
    assert len(found) == 11
