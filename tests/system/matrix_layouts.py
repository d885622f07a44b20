"""Ways to lay out one small model over the ranks of a job, and what its whole state is then.

Every rank trains on the same batch, so that all layouts compute what one process would.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel

WIDTH, HIDDEN, WORDS = 12, 20, 18


class Block(nn.Module):
    """A layer with what shards oddly: uneven rows, fewer rows than ranks, a buffer, frozen rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.rand(1))
        self.mix = nn.Parameter(torch.rand(5, 3, 2))
        self.frozen = nn.Linear(WIDTH, 7).requires_grad_(False)
        self.register_buffer("decay", torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(self.norm(x)))) * self.gain.sum()
        return x + y + self.frozen(x).mean() + self.mix.square().sum() * self.decay.sum()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.first = Block()
        self.second = Block()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.embed(words))))


def batch(step: int) -> torch.Tensor:
    return torch.randint(WORDS, (4, 6), generator=torch.Generator().manual_seed(step))


class Job(NamedTuple):
    """A model in its wrapper, the state that is saved of it, and its optimizers."""

    model: nn.Module
    state: dict[str, Any]
    optimizers: list[torch.optim.Optimizer]

    def step(self, number: int) -> float:
        words = batch(number)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        out = self.model(words)
        loss = nn.functional.cross_entropy(out.flatten(0, 1), words.roll(1, 1).flatten())
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())

    def evaluate(self) -> None:
        """Leave FSDP's parameters gathered, as an evaluation before a save does."""
        self.model.eval()
        with torch.no_grad():
            self.model(batch(999))
        self.model.train()


def build(name: str, seed: int) -> Job:
    torch.manual_seed(seed)
    net = Net()
    if is_tied(name):
        net.head.weight = net.embed.weight
    return LAYOUTS[name].build(net)


def is_tied(name: str) -> bool:
    """Tell whether input and output embedding are one parameter: another model than without."""
    return name.startswith("tied")


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, foreach=False)


def _simple(wrap: Callable[[Net], nn.Module]) -> Callable[[Net], Job]:
    def make(net: Net) -> Job:
        model = wrap(net)
        optimizer = _adam(model.parameters())
        return Job(model, {"model": model, "optimizer": optimizer}, [optimizer])

    return make


def _fsdp2(net: Net, mesh: Any = None, **options: Any) -> Net:
    mesh = mesh if mesh is not None else init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.first, net.second, net):
        fully_shard(part, mesh=mesh, **options)
    return net


def _fsdp1(**options: Any) -> Callable[[Net], nn.Module]:
    def wrap(net: Net) -> nn.Module:
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        return FullyShardedDataParallel(
            net, device_id=torch.device("cpu"), use_orig_params=True,
            auto_wrap_policy=ModuleWrapPolicy({Block}), **options,
        )  # fmt: skip

    return wrap


def _kept() -> Callable[[Net], nn.Module]:
    return _fsdp1(sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)


def _full_state() -> Callable[[Net], nn.Module]:
    return _fsdp1(sharding_strategy=ShardingStrategy.NO_SHARD)


def _hsdp(net: Net) -> Net:
    shape = (2, dist.get_world_size() // 2)
    return _fsdp2(net, init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def _columns(net: Net) -> Net:
    return _fsdp2(net, shard_placement_fn=lambda p: Shard(p.ndim - 1))


def _tensor_parallel(net: Net, mesh: Any = None) -> Net:
    mesh = mesh if mesh is not None else init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for part in (net.first, net.second):
        parallelize_module(part, mesh, plan)
    return net


def _two_dimensions(net: Net) -> Net:
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    return _fsdp2(_tensor_parallel(net, mesh["tp"]), mesh["dp"])


def _checkpointed(net: Net) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net.first = checkpoint_wrapper(net.first)
    return torch.compile(net, backend="eager")


class _Stage(nn.Module):
    """The modules of one pipeline stage, by the names that they have in the whole model."""

    def __init__(self, net: Net, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, getattr(net, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = part(x)
        return x


class _Pipeline(Job):
    """Two stages that pass activations on and gradients back."""

    def step(self, number: int) -> float:
        words, rank, own = batch(number), dist.get_rank(), self.optimizers[0]
        own.zero_grad()
        between = torch.zeros(*words.shape, WIDTH)
        loss = torch.zeros(())
        if rank == 0:
            out = self.model(words)
            dist.send(out.detach().contiguous(), 1)
            dist.recv(between, 1)
            out.backward(between)
        else:
            dist.recv(between, 0)
            out = self.model(between.requires_grad_())
            loss = nn.functional.cross_entropy(out.flatten(0, 1), words.roll(1, 1).flatten())
            loss.backward()
            dist.send(between.grad, 0)
        own.step()
        loss = loss.detach()
        dist.broadcast(loss, 1)
        return float(loss)

    def evaluate(self) -> None:
        """Do nothing: there is no wrapper that gathers anything."""


def _pipeline(net: Net) -> Job:
    """Let each rank hold one stage, and nothing of the other."""
    stage = _Stage(net, (("embed", "first"), ("second", "head"))[dist.get_rank()])
    optimizer = _adam(stage.parameters())
    return _Pipeline(stage, {"model": stage, "optimizer": optimizer}, [optimizer])


class Layout(NamedTuple):
    """How a layout is made, and the world sizes it is tried at."""

    build: Callable[[Net], Job]
    worlds: tuple[int, ...]


LAYOUTS: dict[str, Layout] = {
    "plain": Layout(_simple(lambda net: net), (1,)),
    "DataParallel": Layout(_simple(DataParallel), (1,)),
    "compiled": Layout(_simple(_checkpointed), (1,)),
    "tied": Layout(_simple(lambda net: net), (1,)),
    "tied DDP": Layout(_simple(DistributedDataParallel), (2,)),
    "tied FSDP2": Layout(_simple(_fsdp2), (2, 4)),
    "DDP": Layout(_simple(DistributedDataParallel), (2, 3)),
    "FSDP2": Layout(_simple(_fsdp2), (2, 3, 4)),
    "FSDP2 columns": Layout(_simple(_columns), (2,)),
    "FSDP2 kept": Layout(_simple(lambda net: _fsdp2(net, reshard_after_forward=False)), (2,)),
    "FSDP1": Layout(_simple(_fsdp1()), (2, 3)),
    "FSDP1 kept": Layout(_simple(_kept()), (2,)),
    "FSDP1 full": Layout(_simple(_full_state()), (2,)),
    "HSDP": Layout(_simple(_hsdp), (4,)),
    "TP": Layout(_simple(_tensor_parallel), (2, 4)),
    "FSDP2 + TP": Layout(_simple(_two_dimensions), (4,)),
    "pipeline": Layout(_pipeline, (2,)),
}


def names_at(world_size: int) -> list[str]:
    """Return the layouts that are tried at a world size."""
    return [name for name, layout in LAYOUTS.items() if world_size in layout.worlds]


def sources_for(world_size: int, sources: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return which layouts, each with the world size that saved it, are restored at a world size.

    All of them at one and two ranks; at more the larger ones, to keep the suite short.
    """
    if os.environ.get("CKPTD_MATRIX") == "full":
        return sources
    return [(name, world) for name, world in sources if world_size <= 2 or world > 2]


def everything() -> list[tuple[str, int]]:
    """Return all layouts with the world sizes that they are saved at."""
    return [(name, world) for name, layout in LAYOUTS.items() for world in layout.worlds]


def pairs() -> list[tuple[str, str]]:
    """Return all source and target layouts that are tried, each as ``name-world``."""
    return [
        (f"{source}-{saved}", f"{target}-{world}")
        for target, world in everything()
        for source, saved in sources_for(world, everything())
        if is_tied(source) == is_tied(target)
    ]


def whole(job: Job) -> dict[str, torch.Tensor]:
    """Gather the whole tensors of what this rank saves, by the names they have in checkpoints."""
    found: dict[str, torch.Tensor] = {}
    model, optimizer = job.state["model"], job.state["optimizer"]
    if isinstance(model, FullyShardedDataParallel):
        return _whole_fsdp1(model, optimizer)
    names: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        fqn = ".".join(p for p in key.split(".") if p not in _WRAPPERS)
        names.setdefault(id(tensor), fqn)
        found[f"model.{fqn}"] = _full(tensor)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            found[f"optimizer/model.{names[id(parameter)]}/{key}"] = _full(value)
    return found


def _whole_fsdp1(
    model: FullyShardedDataParallel, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """Put the parts of moments together: each rank has a run of a parameter's elements.

    ``FullyShardedDataParallel.optim_state_dict`` is of no use: on the CPU with parameters of their own it
    returned the second moments under the name of the first (seen in torch 2.13).
    """
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    found = {f"model.{key}": value for key, value in tensors.items()}
    own = {}
    for name, parameter in model.named_parameters():
        fqn = name.replace("_fsdp_wrapped_module.", "")
        own[fqn] = {key: value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    for fqn in own:
        held = [state[fqn] for state in everyone if state[fqn]]
        for key, first in held[0].items() if held else ():
            parts = [state[key].flatten() for state in held]
            is_part = first.dim() > 0 and first.numel() < tensors[fqn].numel()
            whole = torch.cat(parts) if is_part else first
            found[f"optimizer/model.{fqn}/{key}"] = (
                whole.view(tensors[fqn].shape) if first.dim() else first
            )
    return found


_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module"}


def _full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def table() -> str:
    """Return what is tried into what as a Markdown table, with world sizes; it stands in the docs.

    All pairs are tried with ``CKPTD_MATRIX=full``.
    """
    names = list(LAYOUTS)
    lines = ["| saved as, by so many ranks | restored into: " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for source in names:
        worlds = ", ".join(map(str, LAYOUTS[source].worlds))
        cells = [
            ", ".join(map(str, LAYOUTS[target].worlds))
            if is_tied(source) == is_tied(target)
            else "-"
            for target in names
        ]
        lines.append(f"| {source} ({worlds}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)
