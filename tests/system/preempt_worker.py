"""A rank of a small job, run by torchrun, that is told to stop.

Rank 0 says what happens, one JSON object a line. At the moment that MOMENT names, all ranks wait
until they are told: before the first step (as if a step compiled for minutes), in an evaluation
between two questions, or in the middle of a save. Without MOMENT they go on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckptd

EVERY = 5


class Voice:
    """Writes to what standard output was; other libraries write there too."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, **what: object) -> None:
        if os.environ["RANK"] == "0":
            self._out.write(json.dumps(what) + "\n")


def build() -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    return {"model": model, "rng": ckptd.RNGState()}


def train(state: dict[str, Any]) -> None:
    """Take a step of data-parallel SGD, by hand: `torch.optim` and DDP take seconds to import."""
    parameters = list(state["model"].parameters())
    loss = state["model"](torch.randn(8, 16)).square().mean()
    gradients = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    dist.all_reduce(gradients)
    with torch.no_grad():
        parts = gradients.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.sub_(part.view_as(parameter), alpha=0.01)


def digest(state: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state["model"].state_dict().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def main(root: str) -> None:
    voice, chosen = Voice(), os.environ.get("MOMENT")
    dist.init_process_group("gloo")
    state = build()
    with ckptd.Checkpointer(root) as ckpt:
        ckpt.preempted()  # from here on a signal is a warning

        def come_to(moment: str) -> None:
            voice.say(at=moment)
            deadline = time.monotonic() + 60
            while moment == chosen and ckpt._preemption._stopping.target is None:
                assert time.monotonic() < deadline, "nobody told this rank to stop"
                time.sleep(0.001)

        capture = ckpt._snapshots.capture

        def capture_later(*args: Any, **settings: Any) -> Any:
            come_to("mid-save")
            return capture(*args, **settings)

        ckpt._snapshots.capture = capture_later  # type: ignore[method-assign]
        resumed = ckpt.resume(state)
        done = resumed.step if resumed else 0
        voice.say(resumed=done, digest=digest(state))
        come_to("start-up")
        for step in ckpt.steps(range(1, 1_000_000), every=EVERY):
            train(state)
            done = step
            if step % EVERY == 2:
                come_to("evaluation")
        voice.say(stopped=done, digest=digest(state), is_preempted=ckpt.preempted())
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
