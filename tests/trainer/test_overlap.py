"""Overlapped saves: whatever writes to the state meanwhile, the bytes are right or the save fails."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from ckptd.errors import SaveFailedError, StateChangedError
from ckptd.trainer.checkpointer import Checkpointer
from ckptd.trainer.copies import DEFER_BYTES, Deferred
from tests.fakes.training import WAIT_S, bits, same

_numbers = itertools.count(1)
WIDTH = 128
assert WIDTH * WIDTH * 4 > DEFER_BYTES


class Held:
    """Keeps deferred copies from beginning until `release`, and tells who waits for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: BaseException | None = None
        self.waiting = threading.Event()
        self._released = threading.Event()
        run, wait = Deferred.run, Deferred.wait

        def held_run(deferred: Deferred) -> None:
            assert self._released.wait(WAIT_S)
            if self.error is not None:
                deferred._is_over.set()
                raise self.error
            run(deferred)

        def told_wait(deferred: Deferred) -> None:
            self.waiting.set()
            wait(deferred)

        monkeypatch.setattr(Deferred, "run", held_run)
        monkeypatch.setattr(Deferred, "wait", told_wait)

    def hold(self) -> None:
        self._released.clear()
        self.waiting.clear()

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


@pytest.fixture
def url() -> str:
    return f"memory://overlap-{next(_numbers)}"


@pytest.fixture
def ckpt(url: str, held: Held) -> Iterator[Checkpointer]:
    ckpt = Checkpointer(url, daemon=False, slots=2, overlap=True)
    yield ckpt
    held.release()
    ckpt._leave()


def make_job(
    optimizer: Callable[[Any], Any] = torch.optim.AdamW, *, model: nn.Module | None = None
) -> dict[str, Any]:
    """Return a state whose weights and moments are large enough to be deferred."""
    torch.manual_seed(1)
    model = model or nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    state = {"model": model, "optimizer": optimizer(model.parameters()), "epoch": 0}
    step(state)
    return state


def step(state: dict[str, Any]) -> None:
    backward(state["model"])
    state["optimizer"].step()


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(4, WIDTH)).square().mean().backward()


def restored(url: str, state: dict[str, Any], step: int) -> dict[str, Any]:
    """Overwrite the live objects and return what a resume brings back."""
    with torch.no_grad():
        for tensor in (*state["model"].parameters(), *state["model"].buffers()):
            tensor.zero_()
    with Checkpointer(url, daemon=False) as again:
        assert again.resume(state, step=step) is not None
    return bits(state)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> None:
    thread.join(WAIT_S)
    assert not thread.is_alive()


# --- optimizers wait ---------------------------------------------------------------------------


class PerParameter(torch.optim.Optimizer):
    """Optimizers that step inside of the backward pass; the container's own `step` does nothing."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        self.optimizers = [torch.optim.AdamW([parameter], lr=0.01) for parameter in parameters]
        for parameter, inner in zip(parameters, self.optimizers, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda _p, o=inner: o.step())
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all, numbered through, as one optimizer's."""
        return {"state": {i: o.state_dict()["state"][0] for i, o in enumerate(self.optimizers)}}


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "one by one": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "in backward": PerParameter,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_p4_every_optimizer_waits_for_the_copy(
    name: str, ckpt: Checkpointer, url: str, held: Held
) -> None:
    state = make_job(OPTIMIZERS[name])
    before = bits(state)
    held.hold()
    handle = ckpt.save(1, state)
    assert not handle.wait_captured(0)
    training = in_thread(lambda: step(state))
    assert held.waiting.wait(WAIT_S)
    assert same(bits(state), before), "nothing has changed yet"
    held.release()
    ended(training)
    assert not same(bits(state), before)
    handle.result(WAIT_S)
    assert same(restored(url, state, 1), before)


def test_p4_forward_passes_go_on_and_buffers_are_those_of_the_save(
    ckpt: Checkpointer, url: str, held: Held
) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    state = make_job(model=model)
    before = bits(state)
    held.hold()
    handle = ckpt.save(1, state)
    for _ in range(3):
        backward(model)  # changes the running statistics
    assert not torch.equal(model[1].running_mean, before["m.1.running_mean"])
    assert not handle.wait_captured(0)
    held.release()
    handle.result(WAIT_S)
    assert same(restored(url, state, 1), before)


def test_a_frozen_model_is_captured_without_any_step(
    ckpt: Checkpointer, url: str, held: Held
) -> None:
    model = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
    weight = model.weight.clone()
    held.release()
    ckpt.save(1, {"model": model}, wait=True)
    model.weight.zero_()
    with Checkpointer(url, daemon=False) as again:
        again.resume({"model": model})
    assert torch.equal(model.weight, weight)


def test_values_are_those_of_the_save(ckpt: Checkpointer, url: str, held: Held) -> None:
    state = make_job()
    held.hold()
    handle = ckpt.save(1, state)
    state["epoch"] = 7
    held.release()
    handle.result(WAIT_S)
    with Checkpointer(url, daemon=False) as again:
        assert again.resume(state).values["epoch"] == 0


# --- what is no optimizer's step -----------------------------------------------------------------


def test_p4_averaged_weights_that_are_swapped_in_by_data_leave_the_old_memory_to_the_copy(
    ckpt: Checkpointer, url: str, held: Held
) -> None:
    state = make_job()
    average = [torch.full_like(p, 3.0) for p in state["model"].parameters()]
    before = bits(state)
    held.hold()
    handle = ckpt.save(1, state)
    for parameter, other in zip(state["model"].parameters(), average, strict=True):
        parameter.data = other
    held.release()
    handle.result(WAIT_S)
    ckpt.save(2, state, wait=True)
    assert same(restored(url, state, 1), before)
    restored(url, state, 2)
    assert all((p == 3.0).all() for p in state["model"].parameters())


@pytest.mark.parametrize("part", [slice(None), slice(0, WIDTH // 2), slice(WIDTH // 2, None)])
@pytest.mark.parametrize("is_by_data", [False, True])
def test_p4_an_edit_during_the_copy_fails_that_snapshot_by_name(
    ckpt: Checkpointer, url: str, held: Held, part: slice, is_by_data: bool
) -> None:
    state = make_job()
    held.hold()
    handle = ckpt.save(1, state)
    weight = state["model"][2].weight
    with torch.no_grad():
        (weight.data if is_by_data else weight)[part].add_(1.0)
    held.release()
    with pytest.raises(StateChangedError, match=r"model\.2\.weight.*fence") as caught:
        handle.result(WAIT_S)
    assert caught.value.fqn == "model.2.weight"
    assert handle.wait_captured(WAIT_S)
    before = bits(state)
    ckpt.save(2, state, wait=True)
    assert [found.step for found in ckpt.checkpoints()] == [2]
    assert same(restored(url, state, 2), before)


def test_d11_a_changed_state_that_nobody_asked_about_is_told_by_the_next_save(
    ckpt: Checkpointer, held: Held
) -> None:
    state = make_job()
    held.hold()
    handle = ckpt.save(1, state)
    with torch.no_grad():
        state["model"][0].weight.zero_()
    held.release()
    assert handle.wait_captured(WAIT_S)
    with pytest.raises(StateChangedError):
        ckpt.save(2, state)
    ckpt.save(3, state, wait=True)
    assert ckpt.wait(WAIT_S)
    assert [found.step for found in ckpt.checkpoints()] == [3, 2]


def test_fence_waits_and_then_anything_may_be_written(
    ckpt: Checkpointer, url: str, held: Held
) -> None:
    state = make_job()
    before = bits(state)
    held.hold()
    handle = ckpt.save(1, state)

    def swap() -> None:
        ckpt.fence()
        with torch.no_grad():
            for parameter in state["model"].parameters():
                parameter.fill_(5.0)

    swapping = in_thread(swap)
    assert held.waiting.wait(WAIT_S)
    assert same(bits(state), before)
    held.release()
    ended(swapping)
    handle.result(WAIT_S)
    assert same(restored(url, state, 1), before)


def test_fence_with_nothing_to_wait_for_returns(url: str, held: Held) -> None:
    held.release()
    for overlap in (False, True):
        with Checkpointer(url, daemon=False, overlap=overlap) as ckpt:
            ckpt.fence()
            ckpt.save(1, make_job(), wait=True)
            ckpt.fence()


# --- one after the other -------------------------------------------------------------------------


def test_the_next_save_waits_for_the_copy_before(ckpt: Checkpointer, held: Held) -> None:
    state = make_job()
    held.hold()
    first = ckpt.save(1, state)
    saving = in_thread(lambda: ckpt.save(2, state))
    time.sleep(0.05)  # whatever comes first, the order of the steps stays
    assert saving.is_alive()
    held.release()
    ended(saving)
    assert first.wait_captured(0)
    assert ckpt.wait(WAIT_S)
    assert [found.step for found in ckpt.checkpoints()] == [2, 1]


def test_close_finishes_what_was_begun(url: str, held: Held) -> None:
    state = make_job()
    ckpt = Checkpointer(url, daemon=False, overlap=True)
    held.hold()
    ckpt.save(1, state)
    closing = in_thread(ckpt.close)
    held.release()
    ended(closing)
    with Checkpointer(url, daemon=False) as again:
        assert [found.step for found in again.checkpoints()] == [1]


def test_a_copy_that_fails_fails_the_save_and_keeps_nobody(ckpt: Checkpointer, held: Held) -> None:
    state = make_job()
    held.error = ZeroDivisionError("no")
    held.hold()
    handle = ckpt.save(1, state)
    held.release()
    step(state)
    with pytest.raises(SaveFailedError, match="ZeroDivisionError"):
        handle.result(WAIT_S)
    held.error = None
    for number in (2, 3, 4):  # the slot came back
        ckpt.save(number, state, wait=True)
    assert [found.step for found in ckpt.checkpoints()] == [4, 3, 2]


# --- what it leaves alone --------------------------------------------------------------------------


def test_generators_of_the_job_are_not_used(ckpt: Checkpointer, held: Held) -> None:
    state = make_job()
    held.release()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    ckpt.save(1, state, wait=True)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert before == after


def test_optimizers_are_let_go_when_it_is_closed(url: str, held: Held) -> None:
    held.release()
    hooks = dict(torch_optimizer._global_optimizer_pre_hooks)
    with Checkpointer(url, daemon=False, overlap=True) as ckpt:
        assert len(torch_optimizer._global_optimizer_pre_hooks) == len(hooks) + 1
        ckpt.save(1, make_job(), wait=True)
    assert dict(torch_optimizer._global_optimizer_pre_hooks) == hooks
    with Checkpointer(url, daemon=False):
        assert dict(torch_optimizer._global_optimizer_pre_hooks) == hooks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_e2_a_forked_child_steps_without_waiting(ckpt: Checkpointer, held: Held) -> None:
    state = make_job(lambda p: torch.optim.SGD(p, lr=0.1, foreach=False))
    held.hold()
    handle = ckpt.save(1, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from 3.12 on
        pid = os.fork()
    if pid == 0:
        state["optimizer"].step()
        os._exit(0)
    deadline = time.monotonic() + WAIT_S
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == (pid, 0)
    held.release()
    handle.result(WAIT_S)


def test_a_state_without_anything_to_defer_is_captured_at_once(
    ckpt: Checkpointer, held: Held
) -> None:
    held.hold()
    handle = ckpt.save(1, {"small": torch.ones(3), "epoch": 1})
    assert handle.wait_captured(0)
    handle.result(WAIT_S)
    assert ckpt.save(2, {"epoch": 2}, wait=True).wait_captured(0)
