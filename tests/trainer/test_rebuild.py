from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from ckptd.errors import (
    ConfigError,
    CorruptError,
    LayoutError,
    MissingTensorError,
    ShapeMismatchError,
    UnsupportedValueError,
)
from ckptd.model.box import Box
from ckptd.trainer.rebuild import Restorer
from ckptd.trainer.rng import RNGState
from ckptd.trainer.terms import Terms
from ckptd.trainer.values import PerRank
from tests.fakes.trainer_bytes import Saved, restore, save


class Loader:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def wanted(saved: Saved, state: Any, **options: Any) -> Any:
    return Restorer(state, Terms(**options)).wanted(saved.tensors, saved.aliases, saved.values)


# --- checks come first -----------------------------------------------------------------------


def test_r4_a_mismatch_anywhere_is_found_before_the_first_write() -> None:
    saved = save({"a": nn.Linear(2, 2), "z": nn.Linear(3, 2)})
    a, z = nn.Linear(2, 2), nn.Linear(4, 2)
    before = a.weight.clone()
    with pytest.raises(ShapeMismatchError, match=r"z\.weight.*\(2, 3\).*\(2, 4\)") as error:
        wanted(saved, {"a": a, "z": z})
    assert error.value.fqn == "z.weight"
    assert torch.equal(a.weight, before)


def test_another_dtype_is_refused_by_both_names() -> None:
    saved = save({"m": nn.Linear(2, 2).to(torch.bfloat16)})
    with pytest.raises(ShapeMismatchError, match=r"m\.weight.*bfloat16.*float32"):
        wanted(saved, {"m": nn.Linear(2, 2)})


def test_what_is_missing_raises_or_is_listed_and_left_alone() -> None:
    saved = save({"m": nn.Linear(2, 2, bias=False), "epoch": 1})
    model = nn.Linear(2, 2)
    bias = model.bias.clone()
    state = {
        "m": model,
        "epoch": 0,
        "step": 7,
        "loader": Loader(5),
        "rng": RNGState(),
        "p": PerRank(1),
    }
    with pytest.raises(MissingTensorError, match=r"m\.bias"):
        wanted(saved, state)
    found, plan = restore(saved, state, strict=False)
    assert sorted(plan.missing) == ["loader", "m.bias", "p", "rng", "step"]
    assert torch.equal(model.bias, bias)
    assert found == {"epoch": 1}
    assert state["step"] == 7
    assert state["loader"].state == 5


def test_a_shape_that_differs_is_missing_where_not_strict() -> None:
    saved = save({"m": nn.Linear(2, 3)})
    model = nn.Linear(2, 2)
    _, plan = restore(saved, {"m": model}, strict=False)
    assert sorted(plan.missing) == ["m.bias", "m.weight"]


def test_what_nobody_wants_is_unused() -> None:
    saved = save(
        {"m": nn.Linear(2, 2), "ema": {"w": torch.ones(1)}, "epoch": 3, "loader": Loader([1]),
         "t": torch.ones(1)}
    )  # fmt: skip
    found, plan = restore(saved, {"m": nn.Linear(2, 2)})
    assert plan.unused == ["ema", "ema.w", "epoch", "loader", "t"]
    assert found == {"epoch": 3, "loader": [1]}


def test_an_entry_of_another_kind_is_missing_and_its_stored_form_unused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    _, plan = restore(save({"m": model, "o": 3}), {"m": model, "o": optimizer}, strict=False)
    assert (plan.missing, plan.unused) == (["o"], ["o"])
    assert optimizer.param_groups[0]["lr"] == 0.5
    saved = save({"m": model, "o": optimizer})
    state = {"m": model, "o": 3}
    _, plan = restore(saved, state, strict=False)
    assert (plan.missing, plan.unused, state["o"]) == (["o"], ["o"], 3)


def test_what_nobody_asked_for_is_damage_where_it_is_malformed_and_left_out_where_pickled() -> None:
    saved = save({"x": lambda_free, "epoch": 1}, allow_pickle=True)
    found, plan = restore(saved, {"epoch": 0})
    assert (found, plan.unused) == ({"epoch": 1}, ["x"])
    with pytest.raises(CorruptError):
        wanted(saved._replace(values={"epoch": 1, "y": {"$int": "x"}}), {"epoch": 0})


def test_a_dtype_that_this_torch_lacks_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptd.trainer import stored

    saved = save({"t": torch.ones(1, dtype=torch.float16)})
    monkeypatch.setattr(stored, "DTYPES", {})
    with pytest.raises(LayoutError, match="t: this torch has no dtype float16"):
        wanted(saved, {"t": None})


def test_a_damaged_value_is_found_before_the_first_write() -> None:
    saved = save({"epoch": 1})
    with pytest.raises(CorruptError):
        wanted(saved._replace(values={"epoch": {"$int": "x"}}), {"epoch": 0})
    with pytest.raises(UnsupportedValueError, match="trust_pickle"):
        wanted(save({"x": lambda_free}, allow_pickle=True), {"x": 0})


def lambda_free() -> None: ...


def test_pickles_open_where_they_are_trusted() -> None:
    saved = save({"x": lambda_free}, allow_pickle=True)
    found, _ = restore(saved, {"x": 0}, trust_pickle=True)
    assert found["x"] is lambda_free


HOSTILE = [
    {"groups": 1, "state_values": {}}, {"groups": [1], "state_values": {}},
    {"groups": [{}], "state_values": {}}, {"groups": [{"params": [1], "options": {}}], "state_values": {}},
    {"groups": [{"params": ["m.bias"], "options": 1}], "state_values": {}},
    {"groups": [], "state_values": 1}, {"groups": [], "state_values": [1]},
    {"groups": [{"params": ["m.bias", "m.weight"], "options": {}, "idle": 3}], "state_values": {}},
    {"groups": [{"params": ["m.bias", "m.weight"], "options": {}}], "state_values": {"m.bias": 1}},
    {"groups": [{"params": ["m.bias", "m.weight"], "options": {}}], "state_values": {}, "shared": 1},
]  # fmt: skip


@pytest.mark.parametrize("tree", HOSTILE, ids=str)
def test_a_hostile_optimizer_value_is_corrupt_and_found_before_the_first_write(tree: Any) -> None:
    model = nn.Linear(2, 2)
    state = {"m": model, "o": torch.optim.SGD(model.parameters(), lr=0.1)}
    saved = save(state)
    with pytest.raises(CorruptError, match="o: the stored value is not that of an optimizer"):
        wanted(saved._replace(values={"o": tree}), state)


# --- values ----------------------------------------------------------------------------------


def test_plain_values_are_returned_and_assigned() -> None:
    saved = save({"epoch": 3, "cfg": {"a": (1, 2)}, "ids": [1, 2]})
    state: dict[str, Any] = {"epoch": 0, "cfg": {"a": None, "mine": 1}, "ids": []}
    cfg = state["cfg"]
    found, _ = restore(saved, state)
    assert state == {"epoch": 3, "cfg": {"a": (1, 2), "mine": 1}, "ids": [1, 2]}
    assert state["cfg"] is cfg
    assert found["epoch"] == 3


def test_a_state_that_cannot_be_changed_still_gets_its_values_back() -> None:
    from types import MappingProxyType

    saved = save({"epoch": 3})
    found, _ = restore(saved, MappingProxyType({"epoch": 0}))
    assert found == {"epoch": 3}


def test_per_rank_values_and_objects_get_their_own_back() -> None:
    saved = save({"seed": PerRank(5), "loader": PerRank(Loader({"rng": torch.arange(4)}))})
    loader = Loader(None)
    state = {"seed": PerRank(0), "loader": PerRank(loader)}
    found, _ = restore(saved, state)
    assert found["seed"] == 5
    assert state["seed"].value == 5
    assert loader.state["rng"].tolist() == [0, 1, 2, 3]
    assert state["loader"].value is loader


def test_finish_takes_the_values_of_this_rank_and_leaves_what_is_not_among_them() -> None:
    saved = save({"epoch": 3, "loader": Loader([0]), "seed": PerRank(1)})
    loader = Loader("mine")
    state = {"epoch": 0, "loader": loader, "seed": PerRank(9)}
    plan = wanted(saved, state)
    assert plan.finish({"epoch": 4}) == {"epoch": 4}
    assert loader.state == "mine"
    assert state["seed"].value == 9


def test_state_dicts_are_filled_in_place_and_get_what_is_new() -> None:
    model = nn.Linear(2, 2)
    ema = OrderedDict(weight=model.weight.detach() + 1, meta={"decay": 0.9, "n": torch.tensor(4)})
    saved = save({"ema": ema})
    weight = torch.zeros(2, 2)
    target: dict[str, Any] = {"weight": weight, "meta": {"decay": 0.0}}
    restore(saved, {"ema": target})
    assert target["weight"] is weight
    assert torch.equal(weight, ema["weight"])
    assert target["meta"]["decay"] == 0.9
    assert target["meta"]["n"].item() == 4


def test_a_state_dict_restores_into_a_module_and_back() -> None:
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(a.weight)
    restore(save({"m": dict(a.state_dict())}), {"m": b})
    assert torch.equal(a.weight, b.weight)
    held = {k: torch.zeros_like(v) for k, v in a.state_dict().items()}
    restore(save({"m": a}), {"m": held})
    assert torch.equal(held["weight"], a.weight)


def test_a_tensor_is_filled_in_place_and_a_placeholder_is_replaced() -> None:
    saved = save({"t": torch.arange(3), "u": torch.arange(2)})
    live = torch.zeros(3, dtype=torch.int64)
    state: dict[str, Any] = {"t": live, "u": None}
    restore(saved, state)
    assert state["t"] is live
    assert live.tolist() == [0, 1, 2]
    assert state["u"].tolist() == [0, 1]


def test_schedulers_come_after_optimizers_and_generators_last() -> None:
    order: list[str] = []

    class Model(nn.Linear):
        def get_extra_state(self) -> int:
            return 1

        def set_extra_state(self, _: int) -> None:
            order.append("module")

    class Sgd(torch.optim.SGD):
        def __setstate__(self, state: Any) -> None:
            order.append("optimizer")
            super().__setstate__(state)

    class Steps(torch.optim.lr_scheduler.StepLR):
        def load_state_dict(self, state: Any) -> None:
            order.append("scheduler")
            super().load_state_dict(state)

    class Noisy(Loader):
        def load_state_dict(self, _: Any) -> None:
            order.append("loader")
            torch.rand(5)

    model = Model(2, 2)
    optimizer = Sgd(model.parameters(), lr=0.1)
    state = {
        "rng": RNGState(),
        "loader": Noisy(1),
        "s": Steps(optimizer, 2),
        "o": optimizer,
        "m": model,
    }
    saved = save(state)
    expected = torch.rand(3)
    order.clear()
    restore(saved, state)
    assert order == ["module", "optimizer", "scheduler", "loader"]
    assert torch.equal(torch.rand(3), expected)


SCHEDULERS = {
    "multi": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 4]),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 0.5**n),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[2],
    ),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=3),
}


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # some of torch's schedulers warn of their own calls
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_torchs_schedulers_go_on(kind: str) -> None:
    def make() -> tuple[dict[str, Any], list[float]]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
        return {"m": model, "o": optimizer, "s": SCHEDULERS[kind](optimizer)}, []

    def run(state: dict[str, Any], steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            state["o"].step()
            state["s"].step(*([1.0] if kind == "plateau" else []))
            rates.append(float(state["o"].param_groups[0]["lr"]))
        return rates

    state, _ = make()
    run(state, 3)
    saved = save(state)
    expected = run(state, 5)
    other, _ = make()
    restore(saved, other)
    assert run(other, 5) == expected


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        {"m.old.": "m.new.", "m.old.bias": "m.new.bias"},
        lambda fqn: fqn.replace(".old.", ".new."),
    ],
)
def test_rename_moves_parameters_and_their_moments(rename: Any) -> None:
    def make(name: str) -> dict[str, Any]:
        model = nn.ModuleDict({name: nn.Linear(2, 2)})
        optimizer = torch.optim.Adam(model.parameters())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        return {"m": model, "o": optimizer}

    a, b = make("old"), make("new")
    with pytest.raises(MissingTensorError):
        wanted(save(a), b)
    _, plan = restore(save(a), b, rename=rename)
    assert (plan.missing, plan.unused) == ([], [])
    p, q = a["m"]["old"].weight, b["m"]["new"].weight
    assert torch.equal(p, q)
    assert torch.equal(a["o"].state[p]["exp_avg"], b["o"].state[q]["exp_avg"])


def test_rename_onto_one_name_is_refused() -> None:
    with pytest.raises(LayoutError, match="two tensors"):
        wanted(save({"m": nn.Linear(1, 1)}), {"m": nn.Linear(1, 1)}, rename=lambda _: "m.bias")


class Tied(nn.Module):
    def __init__(self, *, is_tied: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3))
        self.b = self.a if is_tied else nn.Parameter(torch.randn(3))


def test_tied_restores_into_untied_and_back() -> None:
    tied, loose = Tied(is_tied=True), Tied(is_tied=False)
    restore(save({"m": tied}), {"m": loose})
    assert torch.equal(loose.a, tied.a)
    assert torch.equal(loose.b, tied.a)
    nn.init.zeros_(loose.b)
    _, plan = restore(save({"m": loose}), {"m": tied})
    assert torch.equal(tied.a, loose.a)
    assert plan.unused == ["m.b"]


def test_an_alias_of_a_filled_tensor_is_not_missing() -> None:
    tied = Tied(is_tied=True)
    held = {"b": torch.arange(3.0)}
    _, plan = restore(save({"m": held}), {"m": tied})
    assert plan.missing == []
    assert tied.a.tolist() == [0, 1, 2]


# --- where fresh tensors go ----------------------------------------------------------------------


def on_cuda(saved: Saved) -> Saved:
    import msgspec

    rows = {f: msgspec.structs.replace(t, device="cuda:9") for f, t in saved.tensors.items()}
    return saved._replace(tensors=rows)


@pytest.mark.parametrize(
    "where",
    [
        None,
        "cpu",
        torch.device("cpu"),
        {"cuda:9": "cpu"},
        lambda _s, _l: None,
        lambda storage, _l: storage,
    ],
)
def test_a_tensor_of_a_device_that_is_not_here_goes_where_map_location_says(where: Any) -> None:
    state: dict[str, Any] = {"t": None}
    restore(on_cuda(save({"t": torch.ones(2)})), state, map_location=where)
    assert state["t"].device.type == "cpu"


def test_map_location_moves_fresh_tensors_only() -> None:
    saved = on_cuda(save({"t": torch.ones(2), "m": nn.Linear(1, 1)}))
    state: dict[str, Any] = {"t": None, "m": nn.Linear(1, 1)}
    _, plan = restore(saved, state, map_location="meta")
    assert state["t"].is_meta
    assert {t.fqn: t.tensor.device.type for t in plan.targets} == {
        "m.bias": "cpu", "m.weight": "cpu",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="cuda:9"):
        wanted(saved, {"t": None}, map_location=lambda *_: "x")


# --- writing -----------------------------------------------------------------------------------


def test_boxes_may_be_written_from_many_threads() -> None:
    source = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64)
    saved = save({"t": source})
    live = torch.zeros(64, 64).t()
    plan = wanted(saved, {"t": live})
    boxes = [Box((i, j), (i + 8, j + 16)) for i in range(0, 64, 8) for j in range(0, 64, 16)]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda box: plan.write(
                    0, box, source[box.slices((0, 0))].contiguous().numpy().tobytes()
                ),
                boxes,
            )
        )
    assert torch.equal(live, source)


@pytest.mark.parametrize(
    "wrap", [bytes, bytearray, memoryview, lambda raw: memoryview(b"x" + raw)[1:]]
)
def test_any_buffer_may_be_written(wrap: Any) -> None:
    live = torch.zeros(2, 3)
    plan = wanted(save({"t": live}), {"t": live})
    plan.write(0, Box((0, 1), (2, 3)), wrap(torch.arange(4.0).numpy().tobytes()))
    assert live.tolist() == [[0, 0, 1], [0, 2, 3]]


def test_a_box_or_length_that_does_not_fit_is_refused() -> None:
    live = torch.zeros(4)
    plan = wanted(save({"t": live}), {"t": live})
    for box, raw in (
        (Box((0,), (5,)), bytes(20)),
        (Box((0,), (4,)), bytes(12)),
        (Box((), ()), bytes(4)),
    ):
        with pytest.raises(ValueError, match="box"):
            plan.write(0, box, raw)


def test_parameters_are_written_without_a_graph_and_stay_the_same_objects() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    saved = save({"m": nn.Linear(2, 2)})
    restore(saved, {"m": model})
    assert model.weight is weight
    assert weight.requires_grad
    assert weight.grad_fn is None
