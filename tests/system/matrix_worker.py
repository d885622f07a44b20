"""A rank that saves a model in every layout of its world size, or restores every one into each.

``save``: for each layout, three steps, then a checkpoint, and beside it the whole tensors and the loss
of the next step. ``restore``: each of those into each layout of this world size.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import ckptd
from tests.system import matrix_layouts as layouts

STEPS = 3


def save(folder: Path) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    for name in layouts.names_at(world_size):
        job = layouts.build(name, seed=1)
        for number in range(STEPS):
            job.step(number)
        job.evaluate()
        place = folder / f"{name}-{world_size}"
        with ckptd.Checkpointer(place, daemon=False) as ckpt:
            ckpt.prepare(job.state)
            ckpt.save(STEPS, job.state, wait=True, deadline_s=60)
        tensors = layouts.whole(job)
        loss = job.step(STEPS)
        torch.save({"tensors": tensors, "loss": loss}, folder / f"{name}-{world_size}-{rank}.pt")


def expected(folder: Path, source: str) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a source, those of all ranks together."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{source}-[0-9].pt")):
        found |= torch.load(path, weights_only=True)["tensors"]
    return found


def restore(folder: Path) -> None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    rows = []
    for saved, world in layouts.sources_for(world_size, layouts.everything()):
        source = f"{saved}-{world}"
        wanted = expected(folder, source)
        loss = torch.load(folder / f"{source}-0.pt", weights_only=True)["loss"]
        for name in layouts.names_at(world_size):
            if layouts.is_tied(name) != layouts.is_tied(source):
                continue
            job = layouts.build(name, seed=2)
            if len(rows) % 2:  # the others are as new: no moments, nothing was ever gathered
                job.step(100)
                job.evaluate()
            problem = ""
            try:
                ckptd.restore(folder / source, job.state)
                got = layouts.whole(job)
                wrong = [k for k, v in got.items() if k not in wanted or not same(v, wanted[k])]
                problem = f"differ: {wrong[:3]}" if wrong else ""
                if not problem:
                    after = job.step(STEPS)
                    is_same = (
                        after == loss if source == f"{name}-{world_size}" else close(after, loss)
                    )
                    problem = "" if is_same else f"loss {after} instead of {loss}"
            except Exception:  # noqa: BLE001 - a row of the table
                problem = traceback.format_exc()
            rows.append([source, f"{name}-{world_size}", problem])
    (folder / f"rows-{world_size}-{rank}.json").write_text(json.dumps(rows))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * abs(other)


def main(what: str, folder: str) -> None:
    dist.init_process_group("gloo")
    {"save": save, "restore": restore}[what](Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
