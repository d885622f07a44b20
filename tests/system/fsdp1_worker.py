"""A rank of an FSDP1 job with what is odd about it: state that is no tensor, a unit without gradients."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import ckptd


class Momentum(torch.optim.Optimizer):
    """Counts its steps in a plain number, as many do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["m"] = state.get("m", torch.zeros_like(p)) + p.grad
                p.sub_(group["lr"] * state["m"])


def net(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})


def sharded(seed: int) -> tuple[nn.Module, Momentum]:
    inner = net(seed)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return inner["b"](inner["a"](x))

    inner.forward = forward
    model = FullyShardedDataParallel(
        inner, device_id=torch.device("cpu"), use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
    )  # fmt: skip
    return model, Momentum(model.parameters())


def train(model: nn.Module, optimizer: Momentum) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def main(root: str, out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, optimizer = sharded(1)
    for _ in range(2):
        train(model, optimizer)
    with ckptd.Checkpointer(root, daemon=False) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer}, wait=True)

    plain = net(2)
    other = Momentum(plain.parameters())
    ckptd.restore(root, {"model": plain, "optimizer": other})
    steps = {n: other.state[p].get("step") for n, p in plain.named_parameters()}

    back, again = sharded(3)
    resumed = ckptd.restore(root, {"model": back, "optimizer": again})
    chosen, _ = sharded(4)
    ckptd.restore(root, {"model": chosen}, select="model.b.bias")
    train(model, optimizer)
    train(back, again)
    bias = chosen.state_dict()["b.bias"]
    same = all(torch.equal(x, back.state_dict()[k]) for k, x in model.state_dict().items())
    row = {
        "steps": steps, "missing": resumed.missing, "same": same,
        "bias": torch.equal(bias, ckptd.load(root)["model"]["b.bias"]),
    }  # fmt: skip
    Path(out, f"{rank}.json").write_text(json.dumps(row))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
