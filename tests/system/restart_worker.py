"""A rank of a small job, run by torchrun with --max-restarts, that waits to be killed.

Rank 0 says what happens, one JSON object a line; each start says once that a step is
committed, with the pids of all ranks. The start that finds STARTS starts behind it ends by itself.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckptd
from tests.system.preempt_worker import Voice, digest, train


def build() -> dict[str, Any]:
    torch.manual_seed(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    return {"model": nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 16)), "rng": ckptd.RNGState()}


def pids() -> list[int]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, os.getpid())
    return found


def main(root: str, starts: str) -> None:
    voice = Voice()
    dist.init_process_group("gloo")
    state = build()
    with ckptd.Checkpointer(root) as ckpt:
        resumed = ckpt.resume(state)
        step = resumed.step if resumed else 0
        source = resumed.source if resumed else None
        voice.say(resumed=step, source=source, digest=digest(state))
        train(state)
        step += 1
        ckpt.save(step, state, wait=True)
        everybody = pids()  # which is a barrier too
        voice.say(saved=step, digest=digest(state), pids=everybody)
        if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(starts):
            time.sleep(60)
            raise AssertionError("nobody killed this rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
