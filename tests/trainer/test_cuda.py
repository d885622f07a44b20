"""What only a GPU shows: page-locked slots, copies on a side stream, restores onto the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptd
from ckptd.errors import StateChangedError
from ckptd.trainer.checkpointer import Checkpointer
from tests.fakes.training import WAIT_S

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")

_numbers = itertools.count(1)
WIDTH = 512


def make_job(*, is_parallel: bool = False) -> dict[str, Any]:
    torch.manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
    model: nn.Module = nn.Sequential(*layers).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    if is_parallel:
        model = nn.DataParallel(model)
    state = {"model": model, "optimizer": optimizer}
    step(state)
    return state


def step(state: dict[str, Any]) -> None:
    state["optimizer"].zero_grad()
    state["model"](torch.randn(16, WIDTH, device="cuda")).square().mean().backward()
    state["optimizer"].step()


def bits(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {f"m.{k}": v.clone() for k, v in state["model"].state_dict().items()}
    for i, held in state["optimizer"].state_dict()["state"].items():
        found |= {f"o.{i}.{k}": v.clone() for k, v in held.items()}
    torch.cuda.synchronize()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(params=[False, True], ids=["blocking", "overlap"])
def ckpt(request: pytest.FixtureRequest) -> Iterator[Checkpointer]:
    url = f"memory://cuda-{next(_numbers)}"
    with Checkpointer(url, daemon=False, overlap=request.param) as ckpt:
        yield ckpt


def prepare(ckpt: Checkpointer, state: dict[str, Any]) -> None:
    ckpt.prepare(state)
    ckpt._preparation.join()


def restored(ckpt: Checkpointer, state: dict[str, Any], number: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for tensor in state["model"].state_dict().values():
            tensor.zero_()
    with Checkpointer(ckpt.options.url, daemon=False) as again:
        again.resume(state, step=number)
    return bits(state)


@pytest.mark.parametrize("is_prepared", [True, False])
@pytest.mark.parametrize("is_parallel", [False, True])
def test_d2_training_goes_on_and_the_bytes_are_those_of_the_save(
    ckpt: Checkpointer, is_prepared: bool, is_parallel: bool
) -> None:
    state = make_job(is_parallel=is_parallel)
    if is_prepared:
        prepare(ckpt, state)
    expected = {}
    for number in range(1, 6):
        expected[number] = bits(state)
        ckpt.save(number, state)
        step(state)
    assert ckpt.wait(WAIT_S)
    assert all(tensor.is_cuda for tensor in state["model"].state_dict().values())
    for number, before in expected.items():
        assert same(restored(ckpt, state, number), before)


def test_slots_are_page_locked_and_copies_do_not_wait(ckpt: Checkpointer) -> None:
    state = make_job()
    prepare(ckpt, state)
    shelf = ckpt._snapshots._shelf
    assert shelf is not None
    assert shelf.is_pinned
    place = torch.frombuffer(shelf.arena.slot(0).view, dtype=torch.uint8)
    assert place.is_pinned()


def test_an_overlapped_save_does_not_wait_for_the_gpu() -> None:
    url = f"memory://cuda-{next(_numbers)}"
    with Checkpointer(url, daemon=False, overlap=True) as ckpt:
        state = make_job()
        prepare(ckpt, state)
        ckpt.save(1, state, wait=True)
        before = bits(state)
        torch.cuda._sleep(1 << 32)  # cycles: seconds
        busy = torch.cuda.current_stream().record_event()
        ckpt.save(2, state)
        assert not busy.query()
        step(state)
        assert ckpt.wait(WAIT_S)
        assert same(restored(ckpt, state, 2), before)


def test_p4_fence_orders_writes_on_the_stream_that_makes_them() -> None:
    url = f"memory://cuda-{next(_numbers)}"
    with Checkpointer(url, daemon=False, overlap=True) as ckpt:
        state = make_job()
        prepare(ckpt, state)
        before = bits(state)
        ckpt.save(1, state)
        ckpt.fence()
        with torch.no_grad():
            for parameter in state["model"].parameters():
                parameter.fill_(5.0)
        assert ckpt.wait(WAIT_S)
        assert same(restored(ckpt, state, 1), before)


def test_p4_a_write_without_a_fence_is_right_or_told() -> None:
    url = f"memory://cuda-{next(_numbers)}"
    with Checkpointer(url, daemon=False, overlap=True) as ckpt:
        state = make_job()
        before = bits(state)
        handle = ckpt.save(1, state)
        with torch.no_grad():
            for parameter in state["model"].parameters():
                parameter.fill_(5.0)
        told = None
        try:
            handle.result(WAIT_S)
        except StateChangedError as error:
            told = error.fqn
        assert told is not None or same(restored(ckpt, state, 1), before)


def test_a_checkpoint_of_a_gpu_opens_without_one(ckpt: Checkpointer) -> None:
    state = make_job()
    expected = bits(state)
    ckpt.save(1, state, wait=True)
    plain = make_job()
    plain["model"] = plain["model"].cpu()
    plain["optimizer"] = torch.optim.AdamW(plain["model"].parameters(), lr=0.01)
    with Checkpointer(ckpt.options.url, daemon=False) as again:
        again.resume(plain)
    for key, tensor in plain["model"].state_dict().items():
        assert torch.equal(tensor, expected[f"m.{key}"].cpu())


# --- layouts ------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


def sharded_job(mesh: Any, seed: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).cuda()
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}
    step(state)
    return state


def test_fsdp2_on_a_gpu_is_saved_restored_and_opened_without_it(ckpt: Checkpointer, mesh) -> None:
    state = sharded_job(mesh, 1)
    ckpt.save(1, state)
    step(state)  # waits for a copy that is under way
    ckpt.wait()
    loaded = ckptd.load(ckpt.options.url, map_location="cpu")
    back = sharded_job(mesh, 2)
    ckptd.restore(ckpt.options.url, back)
    for fqn, parameter in back["model"].named_parameters():
        assert parameter.device.type == "cuda"
        assert torch.equal(parameter.full_tensor().cpu(), loaded["model"][fqn])
        moment = back["optimizer"].state[parameter]["exp_avg"].full_tensor().cpu()
        assert torch.equal(moment, loaded["optimizer"]["state"][f"model.{fqn}"]["exp_avg"])


def test_a_module_on_the_meta_device_comes_up_on_the_gpu(ckpt: Checkpointer) -> None:
    state = make_job()
    ckpt.save(1, {"model": state["model"]}, wait=True)
    with torch.device("meta"):
        fresh = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        )
    ckptd.restore(ckpt.options.url, {"model": fresh})
    assert {p.device.type for p in fresh.parameters()} == {"cuda"}
    assert all(map(torch.equal, fresh.state_dict().values(), state["model"].state_dict().values()))
