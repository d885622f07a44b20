"""What a restore may be told: which names, which dtype, and targets without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.errors import ConfigError, LayoutError, MissingTensorError, ShapeMismatchError
from ckptd.trainer.terms import Terms
from tests.fakes.trainer_bytes import restore, save


def net(fill: float, *, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    if device != "meta":
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(fill)
    return model


def with_moments(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


# --- select -------------------------------------------------------------------------------------


def test_select_fills_what_fits_a_pattern_and_leaves_the_rest() -> None:
    saved = save({"model": net(1), "epoch": 3})
    state: dict[str, Any] = {"model": net(5), "epoch": 9}
    _, plan = restore(saved, state, select=["model.0.*", "model.1.running_*"])
    assert torch.equal(state["model"][0].weight, torch.ones(3, 2))
    assert torch.equal(state["model"][1].running_mean, torch.ones(3))
    assert torch.equal(state["model"][1].weight, torch.full((3,), 5.0))
    assert torch.equal(state["model"][2].weight, torch.full((3, 3), 5.0))
    assert (state["epoch"], plan.missing) == (9, [])
    assert "model.2.weight" in plan.unused


def test_the_name_of_an_entry_selects_all_of_it() -> None:
    saved = save({"model": net(1), "epoch": 3})
    state: dict[str, Any] = {"model": net(5), "epoch": 9}
    restore(saved, state, select="epoch")
    assert state["epoch"] == 3
    assert torch.equal(state["model"][0].weight, torch.full((3, 2), 5.0))
    restore(saved, state, select="model")
    assert torch.equal(state["model"][2].weight, torch.ones(3, 3))


def test_what_is_not_selected_may_be_missing_or_of_another_shape() -> None:
    saved = save({"model": nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 10)})})
    model = nn.ModuleDict(
        {"body": nn.Linear(2, 2), "head": nn.Linear(2, 3), "new": nn.Linear(1, 1)}
    )
    restore(saved, {"model": model}, select="model.body.*")
    with pytest.raises(ShapeMismatchError):
        restore(saved, {"model": model})


def test_select_takes_the_state_of_the_parameters_it_names() -> None:
    model = net(1)
    saved = save({"model": model, "optimizer": with_moments(model)})
    back = net(0)
    optimizer = torch.optim.AdamW(back.parameters(), lr=0.1)
    restore(saved, {"model": back, "optimizer": optimizer}, select=["*model.0.*"])
    held = {id(p) for p in optimizer.state}
    assert held == {id(back[0].weight), id(back[0].bias)}


def test_a_pattern_that_fits_nothing_is_refused(tmp_path) -> None:
    with ckptd.Checkpointer(tmp_path / "root", daemon=False) as ckpt:
        ckpt.save(1, {"model": net(1)}, wait=True)
    with pytest.raises(LayoutError, match="fits no name"):
        ckptd.restore(tmp_path / "root", {"model": net(0)}, select="modell.*")


@pytest.mark.parametrize("wrong", [[""], [3], ""])
def test_a_select_that_is_no_pattern_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="select="):
        Terms(select=wrong).check()


# --- dtype --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_dtype_casts_into_live_tensors_of_it(before: torch.dtype, now: torch.dtype) -> None:
    source = nn.Linear(3, 2).to(before)
    saved = save({"model": source})
    live = nn.Linear(3, 2).to(now)
    with pytest.raises(ShapeMismatchError, match="dtype= casts"):
        restore(saved, {"model": live})
    restore(saved, {"model": live}, dtype=now)
    assert live.weight.dtype is now
    assert torch.equal(live.weight, source.weight.to(now))


def test_dtype_neither_casts_integers_nor_another_dtype() -> None:
    saved = save({"n": torch.arange(3), "w": torch.ones(2)})
    with pytest.raises(ShapeMismatchError):
        restore(saved, {"n": torch.zeros(3)}, dtype=torch.float32)
    with pytest.raises(ShapeMismatchError):
        restore(saved, {"w": torch.zeros(2, dtype=torch.float16)}, dtype=torch.bfloat16)


def test_moments_keep_the_dtype_they_were_saved_in() -> None:
    model = net(1)
    saved = save({"model": model, "optimizer": with_moments(model)})
    half = net(0).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(half.parameters())
    restore(saved, {"model": half, "optimizer": optimizer}, dtype=torch.bfloat16)
    assert optimizer.state[half[0].weight]["exp_avg"].dtype is torch.float32


@pytest.mark.parametrize("wrong", [torch.int8, "float32"])
def test_a_dtype_that_is_not_a_floating_one_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="dtype="):
        Terms(dtype=wrong).check()


# --- the meta device ----------------------------------------------------------------------------


def test_a_module_on_the_meta_device_gets_memory_and_contents() -> None:
    saved = save({"model": net(1)})
    model = net(0, device="meta")
    model[2].weight.requires_grad_(False)
    restore(saved, {"model": model})
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert torch.equal(model[0].weight, torch.ones(3, 2))
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False]
    model(torch.ones(4, 2)).sum().backward()


def test_tied_parameters_on_the_meta_device_stay_tied() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    restore(save({"model": tied}), {"model": model})
    assert model["a"].weight is model["b"].weight
    assert not model["b"].weight.is_meta


def test_an_optimizer_of_parameters_that_will_be_replaced_is_refused_before_any_write() -> None:
    model = net(1)
    saved = save({"model": model, "optimizer": with_moments(model)})
    meta = net(0, device="meta")
    state = {"model": meta, "optimizer": torch.optim.AdamW(meta.parameters())}
    with pytest.raises(LayoutError, match=r"optimizer: .*meta device.*to_empty"):
        restore(saved, state)
    assert all(p.is_meta for p in meta.parameters())


def test_a_buffer_that_is_not_saved_and_lies_on_the_meta_device_is_refused_by_name() -> None:
    class Rotary(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("angles", torch.ones(2), persistent=False)

    saved = save({"model": nn.Sequential(Rotary())})
    with torch.device("meta"):
        model = nn.Sequential(Rotary())
    with pytest.raises(LayoutError, match=r"model\.0\.angles") as caught:
        restore(saved, {"model": model})
    assert caught.value.fqn == "model.0.angles"
    assert model[0].weight.is_meta


def test_what_is_missing_on_the_meta_device_is_told_and_stays_there() -> None:
    saved = save({"model": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    with pytest.raises(MissingTensorError):
        restore(saved, {"model": model})
    _, plan = restore(saved, {"model": model}, strict=False)
    assert plan.missing == ["model.b.weight", "model.b.bias"]
    assert not model["a"].weight.is_meta


def test_dtype_leaves_tensors_of_options_and_objects_alone() -> None:
    """A learning rate that is a tensor, and what a loader keeps, are no weights."""

    class Loader:
        def __init__(self) -> None:
            self.state: Any = {"weights": torch.zeros(9000)}

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    def make(dtype: torch.dtype, rate: float) -> dict[str, Any]:
        model = nn.Linear(2, 2).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(rate))
        return {"model": model, "optimizer": optimizer, "loader": Loader()}

    saved = make(torch.float32, 1e-3)
    saved["loader"].state = {"weights": torch.full((9000,), 1e-3)}
    back = make(torch.bfloat16, 1.0)
    restore(save(saved), back, dtype=torch.bfloat16)
    assert back["model"].weight.dtype is torch.bfloat16
    assert torch.equal(back["optimizer"].param_groups[0]["lr"], torch.tensor(1e-3))
    assert torch.equal(back["loader"].state["weights"], saved["loader"].state["weights"])
