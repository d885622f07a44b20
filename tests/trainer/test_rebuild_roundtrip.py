"""A whole way: train, flatten, copy into a slot, read back, rebuild elsewhere, go on training."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from tests.fakes.trainer_bytes import Saved, restore, save


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.norm(self.embed(x)))))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def make(kind: str, seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    net = Net()
    optimizer = OPTIMIZERS[kind](net.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    return {"model": net, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}


def train(state: dict, steps: int, *, first: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 11, (16,), generator=generator)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            state["optimizer"].zero_grad()
            loss = nn.functional.cross_entropy(state["model"](x), (x + 1) % 11)
            loss.backward()
            return loss

        losses.append(float(state["optimizer"].step(closure).detach()))
        state["scheduler"].step()
        state["epoch"] = step
    return losses


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(kind: str) -> None:
    state = make(kind, 1)
    train(state, 4, first=0)
    saved = save(state)
    expected = train(state, 4, first=4)

    other = make(kind, 2)
    found, plan = restore(saved, other)
    assert plan.missing == []
    assert plan.unused == []
    assert found["epoch"] == 3
    assert other["epoch"] == 3
    assert train(other, 4, first=4) == expected
    for a, b in zip(state["model"].parameters(), other["model"].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restoring_over_a_trained_state_goes_on_bit_for_bit(kind: str) -> None:
    state = make(kind, 1)
    train(state, 4, first=0)
    saved = save(state)
    expected = train(state, 4, first=4)
    restore(saved, state)
    assert train(state, 4, first=4) == expected


def test_a_checkpoint_from_before_the_first_step_restores() -> None:
    state = make("adam", 1)
    saved = save(state)
    train(state, 2, first=0)
    restore(saved, state)
    assert not any(state["optimizer"].state.values())


def test_values_survive_json() -> None:
    state = make("adam", 1)
    train(state, 1, first=0)
    saved = save(state)
    assert json.loads(json.dumps(saved.values, allow_nan=False)) == saved.values


def test_the_slot_holds_what_was_there_when_copy_returned() -> None:
    state = make("adam", 1)
    train(state, 2, first=0)
    before = copy.deepcopy(state["model"].state_dict())
    saved = save(state)
    train(state, 1, first=2)
    other = make("adam", 5)
    restore(saved, other)
    for fqn, tensor in other["model"].state_dict().items():
        assert torch.equal(tensor, before[fqn])


def test_a_save_of_what_was_restored_is_the_same_save() -> None:
    state = make("amsgrad", 1)
    train(state, 3, first=0)
    saved = save(state)
    other = make("amsgrad", 2)
    restore(saved, other)
    again = save(other)
    assert isinstance(again, Saved)
    assert again.tensors == saved.tensors
    assert again.bytes_of == saved.bytes_of
    assert again.values == saved.values
    assert again.aliases == {"model.head.weight": "model.embed.weight"}
    assert math.isfinite(train(other, 1, first=3)[0])
