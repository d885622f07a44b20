"""How ``root-format1`` was made. Run by hand, once, in this order; what is there is never replaced.

    torchrun --nproc-per-node 2 tests/golden/make_root_format1.py tests/golden/root-format1
    python tests/golden/make_root_format1.py tests/golden/root-format1

Attempt 1 has two ranks: step 1 was written without a split plan, step 2 with one, step 3 failed on
rank 1. Attempt 2 has one rank, resumed from step 2, and wrote step 4.
"""

from __future__ import annotations

import collections
import datetime as dt
import getpass
import json
import pathlib
import random
import socket
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ckptd

VALUES: dict[str, Any] = {
    "plain": [None, True, -1, 1.5, "text", {"key": [0]}],
    "tagged key": {"$tuple": 1},
    "any key": {1: "a", None: "b"},
    "text": "lone surrogate \ud800",
    "big": 1 << 80,
    "floats": [float("nan"), float("inf"), float("-inf")],
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"ab"),
    "complex": complex(1.0, float("inf")),
    "ndarray": np.arange(4, dtype=np.int16).reshape(2, 2),
    "numpy": np.float32(0.5),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([2, 3]),
    "path": pathlib.Path("a/b"),
    "datetime": dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=dt.timezone.utc),
    "date": dt.date(2024, 5, 6),
    "timedelta": dt.timedelta(days=1, seconds=2, microseconds=3),
    "range": range(0, 10, 2),
    "tuple": (1, (2,)),
    "set": {3, 1, 2},
    "frozenset": frozenset({"b", "a"}),
    "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
    "counter": collections.Counter("aab"),
    "defaultdict": collections.defaultdict(list, {"k": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "slice": slice(1, None, 2),
}


class Small(torch.nn.Module):
    """4.3 KiB in its largest tensor, so that two ranks share it; constant rows, so that it shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(44.0).repeat_interleave(25).view(44, 25) / 8)
        self.narrow = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.bfloat16).view(3, 4))
        noise = np.random.default_rng(7).standard_normal(140) * 0.02
        self.frozen = torch.nn.Parameter(torch.tensor(noise).bfloat16(), requires_grad=False)
        self.signs = torch.nn.Parameter(torch.tensor([1.0, -0.0, 3.0]), requires_grad=False)
        self.tied = self.narrow
        self.register_buffer("seen", torch.tensor([[1, 2], [3, 4]]))
        self.register_buffer("empty", torch.empty(0, 3))

    def get_extra_state(self) -> Any:
        return {"version": (1, 0)}

    def set_extra_state(self, state: Any) -> None:
        self.restored_version = state["version"]


def make_state() -> dict[str, Any]:
    """Return a state whose contents follow from nothing but this file."""
    model = Small()
    optimizer = torch.optim.AdamW([model.weight, model.narrow], lr=0.25, weight_decay=0.0)
    return {"model": model, "optimizer": optimizer, "epoch": 0, "values": dict(VALUES),
            "mine": ckptd.PerRank(None), "loss": torch.tensor(0.5, dtype=torch.float64)}  # fmt: skip


def step(state: dict[str, Any], number: int, rank: int) -> None:
    """Take a step with constant gradients; the buffer becomes another one on each rank."""
    for parameter in state["model"].parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    state["optimizer"].step()
    state["model"].seen += 10 * rank + 1
    state["epoch"] = number
    state["mine"] = ckptd.PerRank({"rank": rank, "position": torch.tensor([number, rank])})


def arrays(state: dict[str, Any]) -> dict[str, Any]:
    """Return every tensor by name: dtype, shape, and its elements as pairs of value and count."""
    model, optimizer = state["model"], state["optimizer"]
    named = {
        f"model.{fqn}": t
        for fqn, t in model.state_dict().items()
        if isinstance(t, torch.Tensor) and fqn != "tied"
    }
    named["loss"] = state["loss"]
    for fqn in ("weight", "narrow"):
        for key, tensor in optimizer.state[getattr(model, fqn)].items():
            named[f"optimizer/model.{fqn}/{key}"] = tensor
    return {fqn: [str(t.dtype)[6:], list(t.shape), _runs(t)] for fqn, t in sorted(named.items())}


def _runs(tensor: torch.Tensor) -> list[list[Any]]:
    runs: list[list[Any]] = []
    for value in tensor.detach().reshape(-1).tolist():
        if runs and (runs[-1][0], str(runs[-1][0])) == (value, str(value)):
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _save(ckpt: ckptd.Checkpointer, number: int, state: dict[str, Any], rank: int) -> None:
    step(state, number, rank)
    metrics = {"loss": 1.0 / number, "odd": float("nan")}
    ckpt.save(number, state, metrics=metrics).result(60)


def _two_ranks(root: str, rank: int) -> dict[str, Any]:
    expected = {}
    state = make_state()
    with ckptd.Checkpointer(root, daemon=False) as ckpt:
        state["notes"] = "long " * 15_000  # more than 64 KiB: this step's records are compressed
        _save(ckpt, 1, state, rank)
        expected["1-0001"] = arrays(state)
        del state["notes"]
        assert ckpt._agreement.wait_planned(30)
        _save(ckpt, 2, state, rank)
        expected["2-0001"] = arrays(state)
        if rank == 1:
            state["epoch"] = object()
        try:
            ckpt.save(3, state).result(60)
        except ckptd.errors.CkptdError as error:
            print(rank, type(error).__name__, error)
    return expected


def _one_rank(root: str) -> dict[str, Any]:
    state = {**make_state(), "rng": ckptd.RNGState()}
    del state["values"]
    with ckptd.Checkpointer(root, daemon=False) as ckpt:
        resumed = ckpt.resume(state, strict=False)
        assert resumed is not None
        assert resumed.step == 2
        random.seed(4)
        np.random.seed(4)  # noqa: NPY002
        torch.manual_seed(4)
        _save(ckpt, 4, state, 0)
    return {"4-0002": arrays(state)}


def main(root: str) -> None:
    """Make one attempt, and write down what its checkpoints hold."""
    getpass.getuser, socket.gethostname = lambda: "someone", lambda: "node-0"
    index = pathlib.Path(root).parent / "root-format1.json"
    if not dist.is_torchelastic_launched():
        found = json.loads(index.read_text())
        index.write_text(json.dumps({**found, **_one_rank(root)}, separators=(",", ":")))
        return
    dist.init_process_group("gloo")
    expected = _two_ranks(root, dist.get_rank())
    if dist.get_rank() == 0:
        index.write_text(json.dumps(expected, separators=(",", ":")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
