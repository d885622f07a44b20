from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from ckptd.errors import ConfigError, LayoutError, UnsupportedValueError
from ckptd.trainer import rng
from ckptd.trainer.flatten import flatten, survey
from ckptd.trainer.layouts import fingerprints, layout_of, predicted_layout
from ckptd.trainer.rng import RNGState
from ckptd.trainer.values import PerRank


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.embed = nn.Embedding(5, 3)
        self.embed.weight = self.lm_head.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def fqns(state, **options) -> list[str]:
    return [leaf.fqn for leaf in flatten(state, **options).leaves]


def kinds(state) -> dict[str, str]:
    return {leaf.fqn: leaf.kind for leaf in flatten(state).leaves}


def test_leaves_stand_in_fqn_order_and_are_the_live_tensors() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    flat = flatten({"z": torch.ones(1), "model": model})
    names = [leaf.fqn for leaf in flat.leaves]
    assert names == sorted(names)
    live = {f"model.{k}": v for k, v in model.named_parameters()}
    assert all(leaf.tensor is live[leaf.fqn] for leaf in flat.leaves if leaf.fqn != "z")


def test_tied_parameters_are_one_leaf_and_an_alias() -> None:
    flat = flatten({"model": Tied()})
    assert flat.aliases == {"model.lm_head.weight": "model.embed.weight"}
    assert "model.lm_head.weight" not in [leaf.fqn for leaf in flat.leaves]
    assert "model.cache" not in [leaf.fqn for leaf in flat.leaves]


def test_tensors_that_share_storage_are_aliases_only_if_they_are_the_same_view() -> None:
    base = torch.arange(12.0)
    state = {"a": base, "b": base.view(12), "c": base[1:], "d": base.view(3, 4), "e": base[:6]}
    state |= {
        "t": base.view(3, 4).t(),
        "i": base.view(torch.int32),
        "none": base[:0],
        "nil": base[:0],
    }
    assert flatten(state).aliases == {"b": "a"}


def test_a_conjugated_view_is_not_an_alias() -> None:
    z = torch.tensor([1 + 2j])
    assert flatten({"a": z, "b": z.conj()}).aliases == {}


def test_a_parameter_keeps_its_place_when_a_state_dict_holds_it_too() -> None:
    model = nn.Linear(2, 2)
    flat = flatten({"a_copy": model.state_dict(), "model": model})
    assert flat.aliases == {"a_copy.bias": "model.bias", "a_copy.weight": "model.weight"}


def test_kinds() -> None:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.norm(model.embed(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    optimizer.state[model.norm.bias]["odd"] = torch.zeros(7)
    found = kinds({"model": model, "optimizer": optimizer, "x": torch.ones(1)})
    assert found["model.embed.weight"] == "parameter"
    assert found["model.norm.running_mean"] == "buffer"
    assert found["model.norm.num_batches_tracked"] == "buffer"
    assert found["optimizer/model.embed.weight/exp_avg"] == "optimizer"
    assert found["optimizer/model.embed.weight/step"] == "optimizer"
    assert found["optimizer/model.norm.bias/odd"] == "other"
    assert found["x"] == "other"


def test_values_are_taken_at_once() -> None:
    config = {"lr": [1]}
    flat = flatten({"config": config, "n": PerRank(3)})
    config["lr"].append(2)
    assert flat.values == {"config": {"lr": [1]}, "n": {"$per_rank": 3}}


def test_a_collision_of_names_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"a\.b\.weight stands twice"):
        flatten({"a": {"b.weight": torch.ones(1), "b": {"weight": torch.ones(1)}}})
    with pytest.raises(LayoutError, match=r"parts\.bias stands twice"):
        flatten({"parts": [nn.Linear(1, 1), nn.Linear(1, 1)]})


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", 3])
def test_bad_names_of_entries_are_refused(name) -> None:
    for read in (flatten, survey):
        with pytest.raises(ConfigError, match="names are non-empty strings without slashes"):
            read({name: 1})


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (nn.Linear(1, 1), "Linear"),
        ([nn.Linear(1, 1)], "list"),
        (None, "NoneType"),
        ("model", "str"),
    ],
)
def test_a_state_that_is_no_mapping_is_refused_with_an_example(state, kind) -> None:
    for read in (flatten, survey):
        with pytest.raises(
            ConfigError, match=rf'state is a mapping .*{{"model": model}}; this is a {kind}'
        ):
            read(state)


def test_a_list_of_modules_is_one_namespace() -> None:
    first, second = nn.Sequential(nn.Linear(1, 1)), nn.ModuleDict({"1": nn.Linear(1, 1)})
    assert fqns({"model": [first, second]}) == [
        "model.0.bias", "model.0.weight", "model.1.bias", "model.1.weight",
    ]  # fmt: skip


class Extra(nn.Module):
    def __init__(self, value) -> None:
        super().__init__()
        self.value = value
        self.w = nn.Parameter(torch.ones(1))

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, value) -> None:
        self.value = value


def test_extra_state_is_a_value_and_its_tensors_are_leaves() -> None:
    flat = flatten({"model": nn.Sequential(Extra({"scale": torch.ones(2), "n": 3}))})
    assert flat.values["model"] == {
        "extra_state": {
            "model.0._extra_state": {"scale": {"$tensor": "model.0._extra_state.scale"}, "n": 3}
        }
    }
    assert "model.0._extra_state.scale" in [leaf.fqn for leaf in flat.leaves]
    assert "model" not in flatten({"model": nn.Linear(1, 1)}).values


class Stateful:
    def __init__(self, state) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state) -> None:
        self.state = state


def test_small_tensors_of_objects_are_values_and_large_ones_leaves() -> None:
    flat = flatten({"loader": Stateful({"rng": torch.get_rng_state(), "big": torch.zeros(9000)})})
    assert [leaf.fqn for leaf in flat.leaves] == ["loader.big"]
    assert list(flat.values["loader"]["rng"]) == ["$data"]


REFUSED = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "meta": lambda: torch.ones(2, device="meta"),
    "lazy": lambda: nn.LazyLinear(2),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(2)),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
    "mkldnn": lambda: torch.ones(2).to_mkldnn(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_odd_tensors_are_refused_by_name(kind) -> None:
    with pytest.raises(UnsupportedValueError, match=r"^odd\.(x|bias)") as error:
        flatten({"odd": REFUSED[kind]() if kind == "lazy" else {"x": REFUSED[kind]()}})
    assert error.value.fqn.startswith("odd.")


def test_odd_tensors_are_refused_also_where_a_plain_one_was() -> None:
    state = {"a": {"x": torch.eye(2)}}
    before = flatten(state)
    state["a"]["x"] = torch.eye(2).to_sparse()
    with pytest.raises(UnsupportedValueError, match="layout"):
        flatten(state, previous=before)


# --- what is recognised as unchanged -------------------------------------------------------------


def trained() -> dict:
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters())
    model.norm(model.embed(torch.tensor([1, 2]))).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "epoch": 0}


def test_an_unchanged_state_gives_the_same_leaves_and_new_values() -> None:
    state = trained()
    first = flatten(state)
    state["epoch"] = 1
    again = flatten(state, previous=first)
    assert again.leaves is first.leaves
    assert again.signature() == first.signature()
    assert again.values["epoch"] == 1


def change_dtype(state) -> None:
    state["model"].norm.weight.data = state["model"].norm.weight.data.double()


def change_shape(state) -> None:
    state["model"].norm.bias.data = torch.zeros(4)


def freeze(state) -> None:
    state["model"].norm.bias.requires_grad_(False)


def new_state(state) -> None:
    state["optimizer"].state[state["model"].norm.bias]["extra"] = torch.zeros(3)


def drop_state(state) -> None:
    state["optimizer"].state.clear()


def untie(state) -> None:
    state["model"].embed.weight = nn.Parameter(torch.zeros(5, 3))


@pytest.mark.parametrize("change", [change_dtype, change_shape, freeze, new_state, drop_state])
def test_a_changed_layout_is_recognised(change) -> None:
    state = trained()
    first = flatten(state)
    before = layout_of(first)
    change(state)
    again = flatten(state, previous=first)
    assert again.signature() != first.signature()
    assert layout_of(again) == layout_of(flatten(state))
    assert layout_of(again).digest() != before.digest()


def test_untied_tensors_are_recognised_without_new_objects() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    state = {"a": a, "b": a.view(2), "c": b}
    first = flatten(state)
    assert first.aliases == {"b": "a"}
    state["b"].data = torch.full((2,), 7.0)
    again = flatten(state, previous=first)
    assert again.aliases == {}
    assert [leaf.fqn for leaf in again.leaves] == ["a", "b", "c"]


def test_a_replaced_tensor_is_the_one_that_is_saved() -> None:
    state = {"a": torch.zeros(2)}
    first = flatten(state)
    state["a"] = torch.ones(2)
    again = flatten(state, previous=first)
    assert again.leaves[0].tensor is state["a"]
    assert again.signature() == first.signature()


# --- layouts ------------------------------------------------------------------------------------


def test_layout_rows_say_what_the_tensor_is() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    bias, weight = layout_of(flatten({"m": model})).held
    assert (bias.tensor.fqn, bias.tensor.shape, bias.tensor.requires_grad) == (
        "m.bias",
        (2,),
        False,
    )
    assert (weight.tensor.dtype, weight.tensor.device) == ("bfloat16", "cpu")
    assert [str(box) for box in weight.boxes] == ["[0:2, 0:3]"]
    assert not weight.is_replicated


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, fused=True),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "rmsprop plain": torch.optim.RMSprop,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_predicted_layout_is_the_one_after_the_first_step(kind, dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).to(dtype)
    model[0].bias.requires_grad_(False)
    optimizer = OPTIMIZERS[kind](model.parameters())
    state = {"model": model, "optimizer": optimizer}
    predicted = predicted_layout(state, flatten(state))
    model(torch.ones(4, 3, dtype=dtype)).square().sum().backward()
    optimizer.step()
    assert predicted == layout_of(flatten(state))
    assert predicted_layout(state, flatten(state)) == predicted


def test_nothing_is_predicted_for_a_class_that_is_not_known() -> None:
    model = nn.Linear(2, 2)
    state = {"model": model, "optimizer": torch.optim.Adadelta(model.parameters())}
    assert predicted_layout(state, flatten(state)) == layout_of(flatten(state))


# --- fingerprints -------------------------------------------------------------------------------


def prints(tensor) -> int:
    model = nn.Module()
    model.register_parameter("p", nn.Parameter(tensor, requires_grad=False))
    return fingerprints(flatten({"m": model}).leaves)[0]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex128, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (65,), (13, 17), (4, 3, 5, 6)])
def test_fingerprints_see_the_first_and_last_element_and_not_the_memory_format(
    dtype, shape
) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    first, last = tensor.clone(), tensor.clone()
    first.view(-1)[0] = 1
    last.view(-1)[-1] = 1
    assert prints(tensor) == prints(tensor.clone()) != 0
    assert prints(first) != prints(tensor)
    assert prints(last) != prints(tensor)
    if tensor.dim() >= 2:
        values = torch.arange(tensor.numel()).reshape(shape).to(dtype)
        other = values.transpose(0, 1).contiguous().transpose(0, 1)
        assert not other.is_contiguous()
        assert prints(other) == prints(values)


def test_only_parameters_and_optimizer_tensors_are_sampled() -> None:
    flat = flatten({**trained(), "x": torch.ones(2)})
    for leaf, found in zip(flat.leaves, fingerprints(flat.leaves), strict=True):
        assert (found != 0) == (leaf.kind in ("parameter", "optimizer")), leaf.fqn
    holder = nn.ParameterList([nn.Parameter(torch.zeros(0))])
    assert fingerprints(flatten({"m": holder}).leaves) == [0]


class Drawing(Stateful):
    def state_dict(self):
        torch.rand(1)
        return {}


def test_generators_are_taken_last() -> None:
    flat = flatten({"rng": RNGState(), "loader": Drawing({})})
    assert flat.values["rng"] == rng.capture()
    assert list(flat.values) == ["rng", "loader"]
