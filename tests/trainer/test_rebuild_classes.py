"""Another optimizer than the one that saved, and live objects that do not take their state."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from ckptd.errors import CorruptError, LayoutError, TornRestoreError
from ckptd.trainer.rebuild import Restorer
from ckptd.trainer.rng import RNGState
from ckptd.trainer.terms import Terms
from tests.fakes.trainer_bytes import Saved, restore, save


def trained(make: Any, *, steps: int = 1) -> dict[str, Any]:
    torch.manual_seed(steps)
    model = nn.Linear(2, 2)
    optimizer = make(model.parameters())
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def wanted(saved: Saved, state: Any, **options: Any) -> Any:
    return Restorer(state, Terms(**options)).wanted(saved.tensors, saved.aliases, saved.values)


def without_class(saved: Saved) -> Saved:
    """As trees were before the class stood in them."""
    values = copy.deepcopy(saved.values)
    for group in values["optimizer"]["groups"]:
        del group["class"]
    return saved._replace(values=values)


class Renamed(torch.optim.AdamW):
    pass


class Longer(torch.optim.AdamW):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults["horizon"] = 3


class Momentum(torch.optim.Optimizer):
    """Not of torch, so that its keys are known only from state that it has."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.5})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter][type(self).__name__] = torch.ones_like(parameter)


class Other(Momentum):
    pass


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5)


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.9)


REFUSED = {
    "momentum into Adam": (
        momentum, torch.optim.Adam,
        (r"optimizer: the checkpoint was saved with torch\.optim\.sgd\.SGD \(momentum_buffer\), this is"
        r" torch\.optim\.adam\.Adam, which needs step, exp_avg, exp_avg_sq: make the same optimizer,"
        r" or leave it out of the state"),
    ),
    "SGD without state into Adam": (
        sgd, torch.optim.Adam,
        r"SGD \(options dampening, momentum, nesterov\).*Adam, which needs options amsgrad, betas,",
    ),
    "Adam into SGD": (torch.optim.Adam, momentum, r"\(exp_avg, exp_avg_sq, step\).*SGD, which needs momentum_buffer"),
    "Adam into RAdam": (torch.optim.Adam, torch.optim.RAdam, r"\(options amsgrad\).*RAdam: make"),
    "a subclass with one more option": (torch.optim.AdamW, Longer, "needs options horizon"),
    "unknown classes by live state": (Momentum, Other, r"Momentum \(Momentum\).*needs Other"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_class_is_refused_before_anything_is_written(case: str) -> None:
    before, now, text = REFUSED[case]
    saved = save(trained(before))
    state = trained(now, steps=2)
    held = copy.deepcopy((state["model"].state_dict(), state["optimizer"].state_dict()))
    with pytest.raises(LayoutError, match=text) as error:
        wanted(saved, state)
    assert error.value.fqn == "optimizer"
    assert str(held) == str((state["model"].state_dict(), state["optimizer"].state_dict()))


def test_into_a_fresh_optimizer_too() -> None:
    for before in (sgd, momentum):
        with pytest.raises(LayoutError, match="SGD"):
            wanted(save(trained(before)), trained(torch.optim.Adam, steps=0))


def test_without_strict_an_optimizer_of_another_class_is_missing_and_left_alone(
    caplog: Any,
) -> None:
    source = trained(momentum)
    source["optimizer"].state["shared"] = 1
    state = trained(torch.optim.Adam, steps=2)
    held = copy.deepcopy(state["optimizer"].state_dict())
    with caplog.at_level(logging.WARNING):
        _, plan = restore(save(source), state, strict=False)
    assert "which needs step, exp_avg" in caplog.text
    assert plan.missing == ["optimizer"]
    assert plan.unused == [
        "optimizer",
        "optimizer/model.bias/momentum_buffer",
        "optimizer/model.weight/momentum_buffer",
    ]
    assert str(held) == str(state["optimizer"].state_dict())
    assert "shared" not in state["optimizer"].state
    assert torch.equal(state["model"].weight, source["model"].weight)


@pytest.mark.parametrize(
    ("before", "now"),
    [(torch.optim.Adam, torch.optim.AdamW), (torch.optim.AdamW, Renamed), (Renamed, Renamed)],
)
def test_a_class_with_the_same_options_and_keys_goes_on(before: Any, now: Any, caplog: Any) -> None:
    source, state = trained(lambda p: before(p, lr=0.25, amsgrad=True)), trained(now, steps=0)
    with caplog.at_level(logging.WARNING):
        _, plan = restore(save(source), state)
    assert plan.missing == plan.unused == []
    held = state["optimizer"].state[state["model"].weight]
    saved = source["optimizer"].state[source["model"].weight]
    assert torch.equal(held["max_exp_avg_sq"], saved["max_exp_avg_sq"])
    assert state["optimizer"].param_groups[0]["lr"] == 0.25
    assert (f"goes on as {now.__module__}.{now.__qualname__}" in caplog.text) is (before is not now)


def test_what_schedulers_leave_in_the_groups_is_no_option_of_a_class() -> None:
    source = trained(torch.optim.Adam)
    torch.optim.lr_scheduler.StepLR(source["optimizer"], 2)
    assert "initial_lr" in source["optimizer"].param_groups[0]
    restore(save(source), trained(torch.optim.AdamW, steps=0))


def test_the_same_class_may_have_other_options() -> None:
    saved = save(trained(torch.optim.AdamW))
    for group in saved.values["optimizer"]["groups"]:
        assert group["class"] == "torch.optim.adamw.AdamW"
        del group["options"]["amsgrad"]  # as an older torch may have saved it
    state = trained(torch.optim.AdamW, steps=0)
    restore(saved, state)
    assert state["optimizer"].param_groups[0]["amsgrad"] is False


def test_a_tree_without_a_class_is_read_and_its_moments_are_still_compared() -> None:
    source, state = trained(torch.optim.AdamW), trained(torch.optim.AdamW, steps=0)
    restore(without_class(save(source)), state)
    held = state["optimizer"].state[state["model"].bias]["exp_avg"]
    assert torch.equal(held, source["optimizer"].state[source["model"].bias]["exp_avg"])
    with pytest.raises(LayoutError, match=r"another optimizer \(momentum_buffer\).*exp_avg"):
        wanted(without_class(save(trained(momentum))), state)


def test_a_tree_without_a_class_may_lack_options_and_hold_more_state() -> None:
    source, state = trained(torch.optim.AdamW), trained(torch.optim.AdamW, steps=0)
    source["optimizer"].state[source["model"].bias]["ema"] = torch.ones(2)
    saved = without_class(save(source))
    for group in saved.values["optimizer"]["groups"]:
        del group["options"]["eps"]
    restore(saved, state)
    assert state["optimizer"].state[state["model"].bias]["ema"].tolist() == [1, 1]


def test_each_of_several_optimizers_is_compared() -> None:
    def make(second: Any) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        return {"m": model, "o": [sgd([model.weight]), second([model.bias])]}

    saved = save(make(torch.optim.Adam))
    assert [group["class"][-4:] for group in saved.values["o"]["groups"]] == [".SGD", "Adam"]
    restore(saved, make(torch.optim.Adam))
    with pytest.raises(LayoutError, match="Adam"):
        wanted(saved, make(sgd))


# --- live objects that do not take their state ---------------------------------------------------


class Stubborn:
    """A loader of a newer version of the program."""

    def state_dict(self) -> dict[str, int]:
        return {"position": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise CorruptError(f"no shard in {state}")


class Broken(torch.optim.SGD):
    def __setstate__(self, state: Any) -> None:
        raise KeyError("step")


class Fussy(nn.Linear):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        raise ValueError(state)


class Frozen(dict):  # type: ignore[type-arg]
    def __setitem__(self, key: str, value: object) -> None:
        raise TypeError(key)


def stubborn() -> dict[str, Any]:
    model = nn.Linear(1, 1)
    return {"loader": Stubborn(), "model": model}


def broken() -> dict[str, Any]:
    model = nn.Linear(1, 1)
    return {"model": model, "opt": Broken(model.parameters(), lr=0.1)}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (stubborn, r"^loader did not take its state \(CorruptError.*no shard"),
        (broken, r"^opt did not take its state \(KeyError\('step'\)"),
        (lambda: {"m": Fussy(1, 1)}, r"^m did not take its state"),
        (lambda: Frozen(epoch=1), r"^epoch did not take its state \(TypeError"),
    ],
)
def test_an_object_that_does_not_take_its_state_is_named_and_no_damage(
    make: Any, text: str
) -> None:
    state = make()
    with pytest.raises(TornRestoreError, match=text) as error:
        restore(save(state), state)
    assert error.value.__cause__ is not None


def test_malformed_generators_are_damage_and_found_before_the_first_write() -> None:
    saved = save({"rng": RNGState()})
    body = saved.values["rng"]["$per_rank"]
    for key, value in (("python", [3, [1], None]), ("torch", 5), ("numpy", [1])):
        tree = {"$per_rank": {**body, key: value}}
        with pytest.raises(CorruptError, match="rng"):
            wanted(saved._replace(values={"rng": tree}), {"rng": RNGState()})
    before = torch.get_rng_state()
    wanted(saved, {"rng": RNGState()})
    assert torch.equal(torch.get_rng_state(), before)


def test_values_of_another_form_at_the_end_set_nothing() -> None:
    state = trained(sgd)
    saved = save(state)
    plan = wanted(saved, state)
    state["optimizer"].param_groups[0]["lr"] = 7.0
    with pytest.raises(CorruptError, match="optimizer"):
        plan.finish({"optimizer": 3})
    assert state["optimizer"].param_groups[0]["lr"] == 7.0
