from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ckptd.errors import LayoutError, UnsupportedValueError
from ckptd.trainer.flatten import flatten
from ckptd.trainer.layouts import layout_of
from ckptd.trainer.wrappers import unwrap
from tests.fakes.trainer_bytes import restore, save


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=0, world_size=1, timeout=dt.timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self, wrap: Any = lambda module: module) -> None:
        super().__init__()
        self.encoder = wrap(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        self.module = nn.Linear(3, 2)  # a name that only looks like a wrapper's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(self.encoder(x))


PLAIN = [
    "model.encoder.0.bias", "model.encoder.0.weight", "model.encoder.1.bias",
    "model.encoder.1.num_batches_tracked", "model.encoder.1.running_mean",
    "model.encoder.1.running_var", "model.encoder.1.weight", "model.module.bias",
    "model.module.weight",
]  # fmt: skip


def compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, OptimizedModule)
    return wrapped


WRAPS = {
    "plain": lambda m: m,
    "data parallel": DataParallel,
    "ddp": DistributedDataParallel,
    "compiled": compiled,
    "compiled ddp": lambda m: compiled(DistributedDataParallel(m)),
    "ddp compiled": lambda m: DistributedDataParallel(compiled(m)),
    "activation": checkpoint_wrapper,
    "activation ddp": lambda m: checkpoint_wrapper(DistributedDataParallel(m)),
    "ddp activation": lambda m: DistributedDataParallel(checkpoint_wrapper(m)),
}


def trained(inner: str, outer: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = WRAPS[outer](Net(WRAPS[inner]))
    optimizer = torch.optim.Adam(model.parameters())
    unwrap(model)(torch.randn(4, 3)).sum().backward() if "compiled" not in inner else None
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("outer", ["plain", "data parallel", "ddp", "compiled", "compiled ddp"])
@pytest.mark.parametrize("inner", WRAPS)
def test_wrappers_do_not_show_in_names_and_any_restores_into_any(inner: str, outer: str) -> None:
    state = trained(inner, outer)
    saved = save(state)
    assert [fqn for fqn in saved.tensors if "/" not in fqn] == PLAIN
    owners = {fqn.split("/")[1] for fqn in saved.tensors if "/" in fqn}
    assert owners == {fqn for fqn in PLAIN if fqn.endswith(("weight", "bias"))}

    plain = {"model": Net(), "optimizer": None}
    plain["optimizer"] = torch.optim.Adam(plain["model"].parameters())
    restore(saved, plain)
    back = trained(inner, outer)
    for tensor in [*back["model"].parameters(), *back["model"].buffers()]:
        tensor.detach().zero_()
    _, plan = restore(save(plain), back)
    assert (plan.missing, plan.unused) == ([], [])
    for a, b in zip(
        state["model"].state_dict().values(), back["model"].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("group")
def test_batch_norm_statistics_under_ddp_are_buffers() -> None:
    model = DistributedDataParallel(Net())
    model(torch.randn(8, 3))
    kinds = {h.tensor.fqn: h.tensor.kind for h in layout_of(flatten({"model": model})).held}
    assert kinds["model.encoder.1.running_mean"] == "buffer"
    assert kinds["model.encoder.1.num_batches_tracked"] == "buffer"
    assert kinds["model.encoder.1.weight"] == "parameter"


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("has_own", [True, False])
def test_fsdp1_shows_the_parameters_in_its_flat_one_by_their_names(has_own: bool) -> None:
    inner = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    wanted = {f"model.0.{k}": v.detach().clone() for k, v in inner.state_dict().items()}
    sharded = FSDP(inner, device_id=torch.device("cpu"), use_orig_params=has_own)
    leaves = flatten({"model": nn.Sequential(sharded)}).leaves
    assert {leaf.fqn for leaf in leaves} == wanted.keys()
    for leaf in leaves:
        assert torch.equal(leaf.parts[0], wanted[leaf.fqn]), leaf.fqn


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")
def test_the_optimizer_of_a_flat_parameter_is_refused_with_what_to_do() -> None:
    sharded = FSDP(nn.Linear(2, 2), device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(sharded.parameters())
    with pytest.raises(UnsupportedValueError, match="use_orig_params=True"):
        flatten({"model": sharded, "optimizer": optimizer})


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore")
def test_extra_state_inside_of_fsdp1_is_refused_by_name() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> int:
            return 1

    sharded = FSDP(nn.Sequential(Extra(2, 2)), device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedValueError, match=r"model\.0\._extra_state"):
        flatten({"model": sharded})


def test_parts_of_a_pipeline_are_one_namespace() -> None:
    first, second = nn.ModuleDict({"0": nn.Linear(2, 2)}), nn.ModuleDict({"1": nn.Linear(2, 2)})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (first, second)]
    for module, optimizer in zip((first, second), optimizers, strict=True):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    saved = save({"model": [first, second], "optimizer": optimizers})
    assert "optimizer/model.1.weight/momentum_buffer" in saved.tensors

    whole = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    restore(saved, {"model": whole, "optimizer": optimizer})
    assert torch.equal(whole[1].weight, second["1"].weight)
    held = optimizer.state[whole[1].weight]["momentum_buffer"]
    assert torch.equal(held, optimizers[1].state[second["1"].weight]["momentum_buffer"])


class Extra(nn.Module):
    """Keeps a value, a tensor, and a copy of a parameter in its state_dict."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.w = nn.Parameter(torch.ones(2))
        self.hidden = torch.zeros(2)

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, value: Any) -> None:
        self.value = value

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed.hidden"] = self.hidden.clone()

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[no-untyped-def]
        if prefix + "packed.hidden" in state_dict:
            self.hidden = state_dict.pop(prefix + "packed.hidden").clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", ["plain", "ddp", "compiled"])
@pytest.mark.parametrize("value", [{"n": 3, "t": torch.arange(3.0)}, torch.arange(4), 7])
def test_what_is_no_live_tensor_goes_through_load_state_dict(wrap: str, value: Any) -> None:
    model = nn.Sequential(WRAPS[wrap](Extra(value)))
    unwrap(model[0]).hidden = torch.tensor([5.0, 6.0])
    saved = save({"model": model})
    assert "model.0.packed.hidden" in saved.tensors
    other = nn.Sequential(Extra(None))
    _, plan = restore(saved, {"model": other})
    assert (plan.missing, plan.unused) == ([], [])
    assert str(other[0].value) == str(value)
    assert other[0].hidden.tolist() == [5.0, 6.0]


def test_a_parameter_of_no_module_is_refused_by_place() -> None:
    model, stray = nn.Linear(2, 2), nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [stray]}], lr=0.1)
    with pytest.raises(LayoutError, match=r"parameter 0 of group 1 \(shape \(3, 4\)\)"):
        flatten({"model": model, "optimizer": optimizer})


class Partial(nn.Linear):
    """Leaves its bias out of its state_dict."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        held = super().state_dict(*args, **kwargs)
        held.pop(kwargs.get("prefix", "") + "bias")
        return held


def test_a_parameter_that_its_module_does_not_save_still_names_its_moments() -> None:
    model = Partial(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names = save({"model": model, "optimizer": optimizer}).tensors
    assert "model.bias" not in names
    assert "optimizer/model.bias/exp_avg" in names
