"""A tiny job that trains on the CPU, and Checkpointers in this process for it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ckptd.store.base import Store
from tests.fakes.stores import Op, _Around

WAIT_S = 20.0  # far beyond anything that happens; a test that waits so long has failed


def make_state(seed: int = 1, **more: object) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0, **more}


def train(state: dict[str, Any], steps: int = 1) -> list[float]:
    """Train on noise from torch's global generator; return the losses."""
    losses = []
    for _ in range(steps):
        state["optimizer"].zero_grad()
        loss = state["model"](torch.randn(3, 4)).square().mean()
        loss.backward()
        state["optimizer"].step()
        state["scheduler"].step()
        state["epoch"] += 1
        losses.append(float(loss.detach()))
    return losses


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """Return copies of all that a resume must bring back."""
    found: dict[str, Any] = {f"m.{k}": v.clone() for k, v in state["model"].state_dict().items()}
    for i, held in state["optimizer"].state_dict()["state"].items():
        found |= {f"o.{i}.{k}": torch.as_tensor(v).clone() for k, v in held.items()}
    found["lr"] = torch.tensor(state["optimizer"].param_groups[0]["lr"])
    found["epoch"] = torch.tensor(state["epoch"])
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class GateStore(_Around):
    """Lets no chunk in as long as the gate is shut; raises `error`, if it is set, instead."""

    def __init__(self, inner: Store, gate: Gate) -> None:
        super().__init__(inner)
        self._gate = gate

    def _before(self, op: Op) -> None:
        if op.name == "put_deferred":
            self._gate.pass_through()

    def close(self) -> None:
        """Keep the inner store: it is the test's."""


class Gate:
    """What stands before the store of an engine in this process."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.arrived = threading.Event()
        self._is_open = threading.Event()
        self._is_open.set()

    def shut(self) -> None:
        self.arrived.clear()
        self._is_open.clear()

    def open(self) -> None:
        self._is_open.set()

    def pass_through(self) -> None:
        self.arrived.set()
        assert self._is_open.wait(WAIT_S)
        if self.error is not None:
            raise self.error
