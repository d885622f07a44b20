from __future__ import annotations

import warnings
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from ckptd.errors import LayoutError, MissingTensorError, ShapeMismatchError, UnsupportedValueError
from ckptd.trainer.flatten import flatten
from tests.fakes.trainer_bytes import restore, save


def step(optimizer: Optimizer, *parameters: torch.Tensor) -> None:
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.5 + i)
    optimizer.step()


def moments(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    return {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in optimizer.state[parameter].items()
    }


def test_fp32_moments_of_bf16_parameters_stay_fp32() -> None:
    model = nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters())
    step(optimizer, model.weight)
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[model.weight][key] = torch.rand(2, 3, dtype=torch.float32)
    saved = save({"m": model, "o": optimizer})
    expected = moments(optimizer, model.weight)

    other = nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    fresh = torch.optim.Adam(other.parameters())
    restore(saved, {"m": other, "o": fresh})
    for key, value in expected.items():
        assert fresh.state[other.weight][key].dtype == value.dtype
        assert torch.equal(fresh.state[other.weight][key], value)


def test_groups_may_be_in_another_order_and_split_otherwise() -> None:
    a = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    decay, rest = [a[0].weight], [a[0].bias, a[1].weight, a[1].bias]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0, "lr": 0.5}]
    )
    step(optimizer, *a.parameters())
    saved = save({"m": a, "o": optimizer})

    b = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    other = torch.optim.AdamW(
        [
            {"params": [b[1].bias, b[1].weight], "name": "norms"},
            {"params": [b[0].weight]},
            {"params": [b[0].bias]},
        ]
    )
    restore(saved, {"m": b, "o": other})
    assert [g["weight_decay"] for g in other.param_groups] == [0.0, 0.3, 0.0]
    assert [g["lr"] for g in other.param_groups] == [0.5, 1e-3, 0.5]
    assert other.param_groups[0]["name"] == "norms"
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])


def test_a_group_whose_parameters_had_different_options_is_refused_before_any_write() -> None:
    a = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [a.weight], "lr": 1.0}, {"params": [a.bias], "lr": 2.0}]
    )
    saved = save({"m": a, "o": optimizer})
    b = nn.Linear(2, 2)
    before = b.weight.clone()
    with pytest.raises(LayoutError, match="different options"):
        restore(saved, {"m": b, "o": torch.optim.SGD(b.parameters(), lr=3.0)})
    assert torch.equal(b.weight, before)


def test_options_of_the_program_stay_and_options_of_the_run_come_back() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(a.parameters(), lr=0.25, betas=(0.5, 0.6), fused=True)
    step(optimizer, *a.parameters())
    other = torch.optim.AdamW(b.parameters(), foreach=True, maximize=True)
    restore(save({"m": a, "o": optimizer}), {"m": b, "o": other})
    group = other.param_groups[0]
    assert (group["lr"], group["betas"], group["maximize"]) == (0.25, (0.5, 0.6), False)
    assert (group["fused"], group["foreach"]) == (None, True)
    step(other, *b.parameters())


def test_a_learning_rate_tensor_is_filled_in_place() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.Adam(
        a.parameters(), lr=torch.tensor(0.25), capturable=False, foreach=False
    )
    saved = save({"m": a, "o": optimizer})
    rate = torch.tensor(0.5)
    other = torch.optim.Adam(b.parameters(), lr=rate, foreach=False)
    restore(saved, {"m": b, "o": other})
    assert other.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25
    plain = torch.optim.Adam(b.parameters(), lr=0.5)
    restore(saved, {"m": b, "o": plain})
    assert plain.param_groups[0]["lr"] == 0.25
    assert type(plain.param_groups[0]["lr"]) is float
    restore(save({"m": b, "o": torch.optim.Adam(b.parameters(), lr=0.125)}), {"m": b, "o": other})
    assert rate.item() == 0.125


def test_frozen_parameters_need_no_state_and_keep_what_they_had() -> None:
    a = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, *a.parameters())
    a[0].requires_grad_(False)  # frozen after it had moments
    saved = save({"m": a, "o": optimizer})
    b = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    b[0].requires_grad_(False)
    other = torch.optim.Adam(b.parameters())
    restore(saved, {"m": b, "o": other})
    assert torch.equal(other.state[b[0].weight]["exp_avg"], optimizer.state[a[0].weight]["exp_avg"])


def test_a_parameter_that_never_had_a_gradient_is_not_missing() -> None:
    a = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, *a[0].parameters())
    saved = save({"m": a, "o": optimizer})
    restore(saved, {"m": a, "o": optimizer})
    assert a[1].weight not in optimizer.state


def test_a_trainable_parameter_whose_moments_were_lost_is_missing() -> None:
    a = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, *a.parameters())
    saved = save({"m": a, "o": optimizer})
    lost = {f: t for f, t in saved.tensors.items() if not f.startswith("o/m.bias/")}
    with pytest.raises(MissingTensorError, match=r"o/m\.bias"):
        restore(saved._replace(tensors=lost), {"m": a, "o": optimizer})
    _, plan = restore(saved._replace(tensors=lost), {"m": a, "o": optimizer}, strict=False)
    assert plan.missing == ["o/m.bias"]


def test_a_new_trainable_parameter_is_missing_and_a_new_frozen_one_is_not() -> None:
    a = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, *a.parameters())
    saved = save({"m": a, "o": optimizer})
    b = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    b[1].bias.requires_grad_(False)
    state = {"m": b, "o": torch.optim.Adam(b.parameters())}
    _, plan = restore(saved, state, strict=False)
    assert plan.missing == ["m.1.weight", "m.1.bias", "o/m.1.weight"]


def test_tied_parameters_have_one_state_under_any_of_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self, *, first: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            setattr(self, first, self.weight)

    a, b = Tied(first="a"), Tied(first="z")
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, a.weight)
    saved = save({"m": a, "o": optimizer})
    assert saved.aliases == {"m.weight": "m.a"}
    other = torch.optim.Adam(b.parameters())
    _, plan = restore(saved, {"m": b, "o": other}, strict=False)
    assert plan.missing == []
    assert torch.equal(other.state[b.weight]["exp_avg"], optimizer.state[a.weight]["exp_avg"])


def test_moments_of_another_shape_are_refused_with_both_shapes() -> None:
    a = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, *a.parameters())
    saved = save({"m": a, "o": optimizer})
    row = saved.tensors["o/m.bias/exp_avg"]
    narrow = msgspec.structs.replace(row, shape=(3,))
    bad = saved._replace(tensors={**saved.tensors, row.fqn: narrow})
    for target in (optimizer, torch.optim.Adam(a.parameters())):
        with pytest.raises(ShapeMismatchError, match=r"\(3,\).*\(2,\)"):
            restore(bad, {"m": a, "o": target})


def test_live_state_is_filled_in_place_where_it_fits() -> None:
    a = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, *a.parameters())
    saved = save({"m": a, "o": optimizer})
    held = optimizer.state[a.weight]["exp_avg"]
    expected = held.clone()
    step(optimizer, *a.parameters())
    restore(saved, {"m": a, "o": optimizer})
    assert optimizer.state[a.weight]["exp_avg"] is held
    assert torch.equal(held, expected)


def test_channels_last_moments_keep_the_format_of_their_parameter() -> None:
    a = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(a.parameters())
    step(optimizer, *a.parameters())
    b = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    other = torch.optim.Adam(b.parameters())
    restore(save({"m": a, "o": optimizer}), {"m": b, "o": other})
    held = other.state[b.weight]["exp_avg"]
    assert held.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(held, optimizer.state[a.weight]["exp_avg"])


def test_state_beside_parameters_and_values_in_state_come_back() -> None:
    a = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    step(optimizer, *a.parameters())
    optimizer.state[a.bias]["count"] = 5
    optimizer.state[a.bias]["history"] = [torch.ones(3), (2, None)]
    optimizer.state["global"] = {"t": torch.arange(2), "n": 1}
    saved = save({"m": a, "o": optimizer})
    other = torch.optim.SGD(a.parameters(), lr=0.1, momentum=0.9)
    restore(saved, {"m": a, "o": other})
    assert other.state[a.bias]["count"] == 5
    assert other.state[a.bias]["history"][0].tolist() == [1, 1, 1]
    assert other.state[a.bias]["history"][1] == (2, None)
    assert other.state["global"]["t"].tolist() == [0, 1]


# --- containers ---------------------------------------------------------------------------------


class Container(Optimizer):
    """As torchtitan: its own state is empty, the inner ones are the truth."""

    def __init__(self, *inner: Optimizer) -> None:
        super().__init__([p for o in inner for g in o.param_groups for p in g["params"]], {})
        self.optimizers = list(inner)

    def state_dict(self) -> Any:
        return {}


class Accelerated(Optimizer):
    """As accelerate: delegates to one optimizer."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()


@pytest.mark.parametrize("wrap", [Container, Accelerated, lambda o: Container(Accelerated(o))])
def test_containers_are_unwrapped_so_that_moments_are_saved(wrap: Any) -> None:
    model = nn.Linear(2, 2)
    inner = torch.optim.Adam(model.parameters())
    step(inner, *model.parameters())
    saved = save({"m": model, "o": wrap(inner)})
    assert "o/m.weight/exp_avg" in saved.tensors
    expected = moments(inner, model.weight)
    fresh = torch.optim.Adam(model.parameters())
    restore(saved, {"m": model, "o": wrap(fresh)})
    assert torch.equal(fresh.state[model.weight]["exp_avg"], expected["exp_avg"])


class Lookahead(Optimizer):
    """Has state of its own beside that of the inner one, and a state_dict that knows both."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], {})
        self.optimizer = inner

    def state_dict(self) -> Any:
        return {
            "slow": [s["slow"] for s in self.state.values()],
            "fast": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Any) -> None:
        self.loaded = state


def test_an_optimizer_with_state_of_its_own_is_believed_as_an_object() -> None:
    model = nn.Linear(2, 2, bias=False)
    inner = torch.optim.Adam(model.parameters())
    step(inner, model.weight)
    outer = Lookahead(inner)
    outer.state[model.weight] = {"slow": torch.ones(2, 2)}
    saved = save({"m": model, "o": outer})
    restore(saved, {"m": model, "o": outer})
    assert outer.loaded["slow"][0].tolist() == [[1, 1], [1, 1]]
    held = outer.loaded["fast"]["state"][0]["exp_avg"]
    assert torch.equal(held, inner.state[model.weight]["exp_avg"])


class Sam(Optimizer):
    """Keeps another optimizer but inherits ``state_dict``: the inner moments would be lost."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], {})
        self.base_optimizer = inner


def test_an_optimizer_that_hides_another_one_is_refused_until_that_is_saved_too() -> None:
    model = nn.Linear(2, 2)
    inner = torch.optim.Adam(model.parameters())
    flatten({"m": model, "o": Sam(inner)})
    step(inner, *model.parameters())
    with pytest.raises(LayoutError, match=r"o: Sam keeps a Adam in \.base_optimizer"):
        flatten({"m": model, "o": Sam(inner)})
    flatten({"m": model, "o": Sam(inner), "inner": inner})


def test_zero_redundancy_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of itself while it imports this
        from torch.distributed.optim import ZeroRedundancyOptimizer
    zero = ZeroRedundancyOptimizer.__new__(ZeroRedundancyOptimizer)
    with pytest.raises(UnsupportedValueError, match="ZeroRedundancyOptimizer"):
        flatten({"o": zero})
    with pytest.raises(UnsupportedValueError, match="ZeroRedundancyOptimizer"):
        flatten({"o": [zero]})
