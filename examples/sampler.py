"""A data order that survives any change of the number of ranks: nothing twice, nothing left out.

    torchrun --nproc-per-node 4 examples/sampler.py --root /tmp/run --until 10
    torchrun --nproc-per-node 2 examples/sampler.py --root /tmp/run --until 20

The order of an epoch follows from a seed and the epoch, the same on every rank, and the state is how many
samples of it the *whole job* has trained on. So the state is one number, equal on all ranks, and no rank
keeps anything of its own. What workers of a ``DataLoader`` have fetched ahead does not count, because
`Order.advance` is called after the step, with the global batch.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ckptd

SAMPLES, GLOBAL_BATCH = 96, 12  # a global batch divides by every number of ranks that is used


class Order:
    """The order of the samples, from where the job is; a batch sampler for this rank's `DataLoader`."""

    def __init__(self, samples: int, global_batch: int, rank: int, world_size: int) -> None:
        self.samples, self.global_batch = samples, global_batch
        self.rank, self.world_size = rank, world_size
        self.epoch = self.trained = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's part of each global batch that is left of the epoch."""
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.epoch))
        for start in range(self.trained, self.samples, self.global_batch):
            batch = order[start : start + self.global_batch]
            yield batch[self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        return math.ceil((self.samples - self.trained) / self.global_batch)

    def advance(self) -> None:
        """Count a global batch as trained on; call it on every rank, after the step."""
        self.trained += self.global_batch
        if self.trained >= self.samples:
            self.epoch, self.trained = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "trained": self.trained}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.trained = state["epoch"], state["trained"]


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([float(i)])


def batches(order: Order, dataset: Dataset[Any]) -> Iterator[torch.Tensor]:
    """Yield batches for ever, one epoch after the other."""
    while True:
        yield from DataLoader(dataset, batch_sampler=order, num_workers=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True)
    parser.add_argument("--until", type=int, default=10, help="the step to end at")
    parser.add_argument("--trained-on", help="a folder: which samples each rank trained on")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = Order(SAMPLES, GLOBAL_BATCH, rank, world_size)
    state = {"model": model, "optimizer": optimizer, "order": order}
    with ckptd.Checkpointer(options.root) as ckpt:
        resumed = ckpt.resume(state)
        step = resumed.step if resumed else 0
        trained: list[list[int]] = []
        for batch in batches(order, Numbers()):
            if step == options.until:
                break
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            order.advance()
            step += 1
            trained.append([int(i) for i in batch.flatten()])
            ckpt.save(step, state)
    if options.trained_on:
        Path(options.trained_on, f"{options.until}-{rank}.json").write_text(json.dumps(trained))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
