"""A rank of a small DDP job with BatchNorm, run by torchrun: saves through changes of its layout."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckptd


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(64, 512), nn.BatchNorm1d(512), nn.Linear(512, 512), nn.Linear(512, 8)
    )
    model[2].requires_grad_(False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    torch.manual_seed(100 * step + rank)
    optimizer.zero_grad()
    model(torch.randn(16, 64)).square().sum().backward()
    optimizer.step()


def main(root: str, out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer = build()
    # Statistics are not broadcast: every rank has its own, and only rank 0's may come back.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    state = {"model": wrapped, "optimizer": optimizer, "rng": ckptd.RNGState(), "mine": rank}
    rows = []
    with ckptd.Checkpointer(root) as ckpt:
        assert ckpt.resume(state) is None
        for step in range(1, 9):
            if step == 5:  # a layer is unfrozen: its moments appear with the next optimizer step
                model[2].requires_grad_(True)
                wrapped = DistributedDataParallel(
                    model, broadcast_buffers=False, find_unused_parameters=True
                )
                state["model"] = wrapped
            train(wrapped, optimizer, rank, step)
            handle = ckpt.save(step, state)
            handle.result(60)
            rows.append(handle.captured_bytes)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{out}/{rank}.pt"
    )
    with open(f"{out}/{rank}.json", "w") as file:
        json.dump(rows, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
