"""What users of other checkpoint systems complain of, and does not happen here. Others by their place:
14 in system/test_sampler.py, 24 and 32 in test_inheritance.py, layouts in system/test_layouts.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.errors import LayoutError


def net() -> nn.ModuleDict:
    torch.manual_seed(1)
    return nn.ModuleDict(
        {"body": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3), "head": nn.Linear(3, 2)}
    )


def train(model: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model["head"](model["norm"](model["body"](torch.randn(8, 3)))).square().sum().backward()
    optimizer.step()


def groups(model: nn.ModuleDict, *names: str, **options: Any) -> dict[str, Any]:
    return {"params": [p for name in names for p in model[name].parameters()], **options}


def test_pain_5_groups_keep_their_options_and_frozen_parameters_their_state(tmp_path: Path) -> None:
    """Options come back by the parameters in a group, whatever its number; a layer that was frozen after
    it had moments still has them."""
    model = net()
    optimizer = torch.optim.AdamW(
        [groups(model, "body", lr=0.1, betas=(0.5, 0.6)), groups(model, "norm", "head", lr=0.2)]
    )
    train(model, optimizer)
    model["body"].requires_grad_(False)
    train(model, optimizer)
    moment = optimizer.state[model["body"].weight]["exp_avg"].clone()
    with ckptd.Checkpointer(tmp_path / "root", daemon=False) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer}, wait=True)

    fresh = net()
    fresh["body"].requires_grad_(False)
    other = torch.optim.AdamW([groups(fresh, "norm"), groups(fresh, "head"), groups(fresh, "body")])
    resumed = ckptd.restore(tmp_path / "root", {"model": fresh, "optimizer": other})
    assert (resumed.missing, resumed.unused) == ((), ())
    assert [g["lr"] for g in other.param_groups] == [0.2, 0.2, 0.1]
    assert other.param_groups[2]["betas"] == (0.5, 0.6)
    assert torch.equal(other.state[fresh["body"].weight]["exp_avg"], moment)
    assert other.state[fresh["body"].weight]["step"] == 1
    assert other.state[fresh["head"].weight]["step"] == 2


def test_pain_5_a_parameter_that_was_added_is_named_and_not_an_opaque_error(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    with ckptd.Checkpointer(tmp_path / "root", daemon=False) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer}, wait=True)
    larger = net()
    larger["extra"] = nn.Linear(2, 2)
    state = {"model": larger, "optimizer": torch.optim.AdamW(larger.parameters())}
    with pytest.raises(LayoutError, match=r"model\.extra\.weight"):
        ckptd.restore(tmp_path / "root", state)
    resumed = ckptd.restore(tmp_path / "root", state, strict=False)
    assert set(resumed.missing) == {
        "model.extra.weight", "model.extra.bias",
        "optimizer/model.extra.weight", "optimizer/model.extra.bias",
    }  # fmt: skip


def test_pain_31_buffers_that_change_during_the_copy_are_stored_as_they_were(
    tmp_path: Path,
) -> None:
    """A forward pass changes BatchNorm's statistics while weights are still being copied."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    with ckptd.Checkpointer(tmp_path / "root", daemon=False, overlap=True) as ckpt:
        held = {key: value.clone() for key, value in model.state_dict().items()}
        ckpt.save(1, state)
        train(model, optimizer)
    assert not torch.equal(model["norm"].running_mean, held["norm.running_mean"]), (
        "the test is void"
    )
    loaded = ckptd.load(tmp_path / "root")["model"]
    assert all(torch.equal(loaded[key], held[key]) for key in held)
