"""Saving in one process: what `save`, handles, `wait` and `close` promise."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ckptd.engine import runner as runner_module
from ckptd.errors import (
    CheckpointNotFoundError,
    CkptdError,
    ConfigError,
    LayoutError,
    SaveFailedError,
    SaveSkippedError,
    SaveUnknownError,
    SlotsBusyError,
    StoreFullError,
    UnsupportedValueError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.pipeline.verify import verify
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.store.open import open_store
from ckptd.trainer.checkpointer import Checkpointer
from ckptd.trainer.link import Pending
from tests.fakes.jobs import wait_until
from tests.fakes.training import WAIT_S, Gate, GateStore, bits, make_state, same, train

_numbers = itertools.count(1)

Make = Callable[..., Checkpointer]


@pytest.fixture
def url() -> str:
    return f"memory://checkpointer-{next(_numbers)}"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()

    def open_gated(url: str, options: dict[str, object] | None = None) -> GateStore:
        return GateStore(open_store(url, options), gate)

    monkeypatch.setattr(runner_module, "open_store", open_gated)
    return gate


@pytest.fixture
def make(url: str, gate: Gate) -> Iterator[Make]:
    made: list[Checkpointer] = []

    def make(**options: object) -> Checkpointer:
        made.append(Checkpointer(**{"url": url, "daemon": False, "slots": 2, **options}))
        return made[-1]

    yield make
    gate.open()
    for ckpt in made:
        ckpt._leave()


def steps(ckpt: Checkpointer) -> list[int]:
    return [found.step for found in ckpt.checkpoints()]


def wait_done(*handles) -> None:
    for handle in handles:
        assert handle._done.wait(WAIT_S)


# --- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "local"])
def test_what_was_saved_is_committed_whole_and_resumes_bit_for_bit(
    kind: str, make: Make, url: str, tmp_path
) -> None:
    root = url if kind == "memory" else str(tmp_path / "root")
    state = make_state(1)
    train(state, 3)
    with make(url=root) as ckpt:
        handle = ckpt.save(3, state, metrics={"loss": 1.5})
        found = handle.result(WAIT_S)
    assert (found.step, found.attempt, found.metrics) == (3, 1, {"loss": 1.5})
    assert handle.captured_bytes > 0
    assert handle.pause_s > 0
    store = MemoryStore.shared(root) if kind == "memory" else LocalStore(root)
    assert verify(store, StepId(1, 3), is_data=True).is_whole

    before = bits(state)
    torch.manual_seed(99)
    losses = train(state, 2)
    other = make_state(2)
    ckpt = make(url=root)
    resumed = ckpt.resume(other)
    assert (resumed.step, resumed.attempt, resumed.metrics) == (3, 1, {"loss": 1.5})
    assert (resumed.missing, resumed.unused, resumed.surplus) == ((), (), ())
    assert resumed.values["epoch"] == 3
    assert same(bits(other), before)
    torch.manual_seed(99)
    assert train(other, 2) == losses
    assert ckpt.attempt.ordinal == 2


def test_p4_what_is_changed_after_save_returned_is_not_in_the_checkpoint(
    make: Make, gate: Gate
) -> None:
    state = make_state()
    train(state)
    before = bits(state)
    ckpt = make()
    gate.shut()
    ckpt.save(1, state)
    assert gate.arrived.wait(WAIT_S)
    with torch.no_grad():
        for parameter in state["model"].parameters():
            parameter.fill_(7.0)
    state["epoch"] = 1000
    gate.open()
    ckpt.close()
    other = make_state(2)
    make().resume(other)
    assert same(bits(other), before)


def test_the_line_goes_from_save_to_save_and_over_a_restart(make: Make) -> None:
    state = make_state()
    with make() as ckpt:
        for step in (1, 2, 3):
            train(state)
            ckpt.save(step, state)
    with make() as ckpt:
        assert ckpt.resume(state, step=2).step == 2
        ckpt.save(3, state)
    found = {c.id: c.previous for c in ckpt.checkpoints()}
    assert found == {
        StepId(1, 1): None,
        StepId(1, 2): str(StepId(1, 1)),
        StepId(1, 3): str(StepId(1, 2)),
        StepId(2, 3): str(StepId(1, 2)),
    }


def test_saving_the_step_just_saved_returns_the_same_handle(make: Make) -> None:
    state = make_state()
    with make() as ckpt:
        first = ckpt.save(1, state)
        assert ckpt.save(1, state) is first
        assert ckpt.save(2, state) is not first
    assert steps(ckpt) == [2, 1]


def test_an_older_step_is_refused_and_harms_nothing(make: Make) -> None:
    state = make_state()
    with make() as ckpt:
        ckpt.save(5, state)
        with pytest.raises(ConfigError, match="steps only grow"):
            ckpt.save(4, state)
        ckpt.save(6, state)
    assert steps(ckpt) == [6, 5]


@pytest.mark.parametrize("step", [-1, 10**12, 1.0, True, "1", None, np.int64(3)])
def test_a_step_that_is_no_step_is_refused(make: Make, step: object) -> None:
    ckpt = make()
    with pytest.raises(ConfigError, match="whole number"):
        ckpt.save(step, make_state())


def test_wait_returns_after_the_commit(make: Make) -> None:
    ckpt = make()
    handle = ckpt.save(1, make_state(), wait=True)
    assert handle.is_done
    assert steps(ckpt) == [1]


def test_d5_wait_with_a_deadline_says_unknown_and_the_step_may_still_be_committed(
    make: Make, gate: Gate
) -> None:
    ckpt = make()
    gate.shut()
    with pytest.raises(SaveUnknownError):
        ckpt.save(1, make_state(), wait=True, deadline_s=0.01)
    gate.open()
    assert ckpt.wait(WAIT_S)
    assert steps(ckpt) == [1]


def test_a_handle_says_unknown_while_the_store_is_slow(make: Make, gate: Gate) -> None:
    ckpt = make()
    gate.shut()
    handle = ckpt.save(1, make_state())
    assert handle.wait_captured()
    assert not handle.is_done
    assert ckpt.wait(0.01) is False
    with pytest.raises(SaveUnknownError, match="step 1"):
        handle.result(0.01)
    gate.open()
    assert handle.result(WAIT_S).step == 1


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_may_be_numbers_of_any_kind_and_not_a_number(make: Make) -> None:
    metrics = {
        "nan": math.nan, "inf": math.inf, "int": 3, "tensor": torch.tensor(1.5),
        "float64": np.float64(2.5), "float32": np.float32(0.5), "bool": True,
    }  # fmt: skip
    with make() as ckpt:
        found = ckpt.save(1, make_state(), metrics=metrics, wait=True).result().metrics
        assert math.isnan(found.pop("nan"))
        assert math.isnan(found.pop("inf"))
        assert found == {
            "int": 3.0, "tensor": 1.5, "float64": 2.5, "float32": 0.5, "bool": 1.0
        }  # fmt: skip
        ckpt.save(2, make_state(), wait=True)


@pytest.mark.parametrize("value", ["1.5", None, torch.ones(2), 10**400, [1]])
def test_a_metric_that_is_no_number_is_refused_by_name_and_the_next_save_works(
    make: Make, value: object
) -> None:
    with make() as ckpt:
        with pytest.raises(ConfigError, match="loss"):
            ckpt.save(1, make_state(), metrics={"loss": value})
        ckpt.save(2, make_state())
    assert steps(ckpt) == [2]


# --- failures ----------------------------------------------------------------------------------


class Odd:
    """Has no safe form."""


def test_a_value_without_a_stored_form_raises_and_ends_the_step_for_all_ranks(
    make: Make, url: str
) -> None:
    state = make_state()
    with make() as ckpt:
        with pytest.raises(UnsupportedValueError) as caught:
            ckpt.save(1, {**state, "odd": {"x": Odd()}})
        assert caught.value.fqn.startswith("odd")
        assert ckpt.wait(WAIT_S)
        store = MemoryStore.shared(url)
        assert store.get(keys.checkpoint(StepId(1, 1)), max_bytes=0) == b""
        assert b"odd" in store.get(keys.rank(StepId(1, 1), 0), max_bytes=10_000)
        ckpt.save(2, state)  # it was told: not once more
    assert steps(ckpt) == [2]


def test_any_error_of_the_state_ends_the_step_for_all_ranks(make: Make, url: str) -> None:
    class Broken:
        def state_dict(self) -> dict[str, object]:
            raise ZeroDivisionError("a bug of the job")

        def load_state_dict(self, held: dict[str, object]) -> None:
            raise NotImplementedError

    state = make_state()
    with make() as ckpt:
        with pytest.raises(ZeroDivisionError):
            ckpt.save(1, {**state, "broken": Broken()})
        assert ckpt.wait(WAIT_S)
        record = MemoryStore.shared(url).get(keys.rank(StepId(1, 1), 0), max_bytes=10_000)
        assert b"a bug of the job" in record
        ckpt.save(2, state)
    assert steps(ckpt) == [2]


def test_d11_a_failed_save_raises_once_in_the_next_one_which_is_handed_off_all_the_same(
    make: Make, gate: Gate
) -> None:
    state = make_state()
    ckpt = make()
    gate.error = StoreFullError("chunks/ab", "the disk is full")
    first = ckpt.save(1, state)
    wait_done(first)
    gate.error = None
    with pytest.raises(SaveFailedError, match="the disk is full"):
        ckpt.save(2, state)
    ckpt.save(3, state)
    ckpt.close()
    assert steps(ckpt) == [3, 2]
    with pytest.raises(SaveFailedError, match="the disk is full"):
        first.result()


def test_d11_each_of_several_failed_saves_is_told(make: Make, gate: Gate) -> None:
    state = make_state()
    ckpt = make(slots=3)
    gate.error = StoreFullError("chunks/ab", "the disk is full")
    gate.shut()
    handles = [ckpt.save(step, state) for step in (1, 2)]
    gate.open()
    wait_done(*handles)
    gate.error = None
    for step, failed in ((3, 1), (4, 2)):
        with pytest.raises(SaveFailedError, match=f"step {failed}:"):
            ckpt.save(step, state)
    ckpt.save(5, state)
    ckpt.close()
    assert steps(ckpt) == [5, 4, 3]


def test_a_failure_that_was_heard_from_the_handle_is_not_told_again(make: Make, gate: Gate) -> None:
    ckpt = make()
    gate.error = StoreFullError("chunks/ab", "the disk is full")
    handle = ckpt.save(1, make_state())
    with pytest.raises(SaveFailedError):
        handle.result(WAIT_S)
    gate.error = None
    ckpt.save(2, make_state())
    ckpt.close()


def test_a_save_that_fails_at_once_is_told_by_the_next_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt = make()

    def refuse(pending: Pending) -> None:
        pending.let_go()
        pending.handle.resolve(ConfigError(f"no daemon takes step {pending.handle.step}"))

    monkeypatch.setattr(ckpt._link, "submit", refuse)
    assert ckpt.save(1, make_state()).is_done
    with pytest.raises(ConfigError, match="takes step 1"):
        ckpt.save(2, make_state())
    with pytest.raises(ConfigError, match="takes step 2"):
        ckpt.close()


@pytest.mark.parametrize("tell", ["wait", "close"])
def test_d11_wait_and_close_tell_what_nobody_heard(make: Make, gate: Gate, tell: str) -> None:
    ckpt = make()
    gate.error = StoreFullError("chunks/ab", "the disk is full")
    ckpt.save(1, make_state())
    with pytest.raises(SaveFailedError, match="the disk is full"):
        getattr(ckpt, tell)()
    ckpt.close()


# --- slots -------------------------------------------------------------------------------------


def test_when_no_slot_gets_free_the_save_raises_and_the_step_is_ended(
    make: Make, gate: Gate
) -> None:
    state = make_state()
    ckpt = make(slots=1, busy_timeout_s=0.02)
    gate.shut()
    ckpt.save(1, state)
    with pytest.raises(SlotsBusyError, match="step 2"):
        ckpt.save(2, state)
    gate.open()
    assert ckpt.wait(WAIT_S)
    ckpt.save(3, state)
    ckpt.close()
    assert steps(ckpt) == [3, 1]


def test_when_no_slot_gets_free_the_step_is_skipped_if_asked_for(
    make: Make, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    state = make_state()
    ckpt = make(slots=1, busy_timeout_s=0.02, on_busy="skip")
    gate.shut()
    ckpt.save(1, state)
    with caplog.at_level(logging.WARNING, "ckptd"):
        skipped = ckpt.save(2, state)
    assert "step 2 skipped" in caplog.text
    gate.open()
    assert ckpt.wait(WAIT_S), "a skipped step is no failure"
    with pytest.raises(SaveSkippedError):
        skipped.result(WAIT_S)
    ckpt.save(3, state)
    ckpt.close()
    assert steps(ckpt) == [3, 1]


def test_a_save_waits_for_a_slot(make: Make, gate: Gate) -> None:
    state = make_state()
    ckpt = make(slots=1)
    gate.shut()
    ckpt.save(1, state)
    threading.Timer(0.05, gate.open).start()
    ckpt.save(2, state)
    ckpt.close()
    assert steps(ckpt) == [2, 1]


def test_prepare_reserves_what_the_first_saves_use(make: Make) -> None:
    state = make_state()
    ckpt = make()
    ckpt.prepare(state)
    ckpt._preparation.join()
    shelf = ckpt._snapshots._shelf
    ckpt.save(1, state)
    train(state)  # moments appear: they were predicted
    ckpt.save(2, state)
    ckpt.close()
    assert ckpt._snapshots._shelf is None
    assert shelf.number == 1
    assert shelf.arena.slots == 2
    assert steps(ckpt) == [2, 1]


def test_a_layout_that_changes_between_saves_needs_no_preparation(make: Make) -> None:
    state = make_state()
    state["model"][0].requires_grad_(False)
    found = {}
    with make() as ckpt:
        for step in range(1, 6):
            if step == 3:
                state["model"][0].requires_grad_(True)  # a layer is unfrozen
            if step == 4:
                state["extra"] = nn.Linear(300, 30)  # and the state outgrows its slots
            if step == 5:
                del state["extra"]
            ckpt.save(step, state)
            found[step] = bits(state)
            train(state)
    assert steps(ckpt) == [5, 4, 3, 2, 1]
    for step, expected in found.items():
        other = make_state(7)
        if step == 4:
            other["extra"] = nn.Linear(300, 30)
        ckpt = make()
        assert ckpt.resume(other, step=step).step == step
        assert same(bits(other), expected)
        ckpt.close()


def test_recipes_made_at_once_on_two_threads_have_different_numbers(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon knows recipes by number: one number for two would mix their tensors up."""
    from ckptd.trainer import snapshots as module

    both = threading.Barrier(2)
    pack = module.pack

    def slow_pack(*args: object, **kwargs: object) -> object:
        packed = pack(*args, **kwargs)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.05)
        return packed

    monkeypatch.setattr(module, "pack", slow_pack)
    ckpt = make()
    state = make_state()
    ckpt.prepare(state)  # the layout with moments, on its thread
    ckpt.save(1, state)  # the one without, here
    ckpt._preparation.join()
    numbers = [cut.recipe.recipe for cut in ckpt._snapshots._cuts.values()]
    assert len(numbers) == 2
    assert len(set(numbers)) == 2
    ckpt.close()


# --- the end -----------------------------------------------------------------------------------


def test_close_waits_for_all_saves_and_may_be_repeated(make: Make) -> None:
    ckpt = make()
    handles = [ckpt.save(step, make_state()) for step in (1, 2, 3)]
    ckpt.close()
    assert all(handle.is_done for handle in handles)
    ckpt.close()
    assert steps(ckpt) == [3, 2, 1]


def test_after_close_nothing_is_saved_or_resumed(make: Make) -> None:
    ckpt = make()
    ckpt.close()
    for use in (
        lambda: ckpt.save(1, make_state()),
        lambda: ckpt.resume(make_state()),
        lambda: ckpt.prepare(make_state()),
    ):
        with pytest.raises(ConfigError, match="closed"):
            use()


def test_a_with_block_that_raises_keeps_its_error_and_finishes_what_was_saved(
    make: Make, gate: Gate
) -> None:
    gate.shut()
    ckpt = make()
    handle = ckpt.save(1, make_state())
    threading.Timer(0.05, gate.open).start()
    with pytest.raises(ZeroDivisionError), ckpt:
        raise ZeroDivisionError
    with contextlib.suppress(SaveUnknownError):  # nobody waited for the word, which may come later
        assert handle.result(0).step == 1
    wait_until(lambda: steps(ckpt) == [1], "what was saved is finished")


def test_e2_a_forked_child_is_refused_and_does_the_parents_one_no_harm(make: Make) -> None:
    ckpt = make()
    ckpt.save(1, make_state(), wait=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            with pytest.raises(ConfigError, match="fork"):
                ckpt.save(2, {})
            with pytest.raises(ConfigError, match="fork"):
                ckpt.resume({})
            ckpt.close()
            ckpt.__exit__(SystemExit, SystemExit(), None)  # as a `with` block in the child does
            ckpt._at_exit()
            assert not ckpt._is_closed
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ckpt.save(2, make_state())
    ckpt.close()
    assert steps(ckpt) == [2, 1]


def test_threads_and_slots_are_gone_after_close(make: Make) -> None:
    before = set(threading.enumerate())
    ckpt = make()
    ckpt.save(1, make_state())
    ckpt.close()
    left = {t.name for t in set(threading.enumerate()) - before if t.name.startswith("ckptd")}
    assert left == set()
    assert ckpt._snapshots._shelf is None


def test_the_handle_of_a_pruned_checkpoint_says_that_it_is_gone(make: Make, url: str) -> None:
    ckpt = make()
    handle = ckpt.save(1, make_state(), wait=True)
    MemoryStore.shared(url).put(keys.checkpoint(StepId(1, 1)), b"")
    with pytest.raises(CheckpointNotFoundError):
        handle.result()


def test_a_root_that_is_not_ours_is_refused_before_anything_is_touched(tmp_path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(CkptdError, match=r"precious\.txt"):
        Checkpointer(tmp_path, daemon=False)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_parameter_that_has_no_name_is_refused_by_save(make: Make) -> None:
    state = make_state()
    del state["model"]
    with make() as ckpt, pytest.raises(LayoutError):
        ckpt.save(1, state)


def test_d11_a_bug_in_a_worker_reaches_whoever_waits(make: Make, gate: Gate) -> None:
    gate.error = ZeroDivisionError("a bug in a worker")
    with pytest.raises(SaveFailedError, match="a bug in a worker"):
        make().save(1, make_state(), wait=True, deadline_s=WAIT_S)


def test_a_pickle_is_stored_if_asked_for_and_opened_only_if_trusted(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "r", daemon=False, allow_pickle=True) as ckpt:
        ckpt.save(1, {"odd": Fraction(1, 3)}).result(60)
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        state: dict[str, object] = {"odd": None}
        with pytest.raises(LayoutError, match="trust_pickle"):
            ckpt.resume(state)
        assert ckpt.resume(state, trust_pickle=True) is not None
        assert state["odd"] == Fraction(1, 3)


def test_a_state_without_tensors_is_saved_and_comes_back(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        ckpt.resume({"epoch": 0})
        ckpt.save(1, {"epoch": 7}).result(60)
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        state = {"epoch": 0}
        ckpt.resume(state)
        assert state["epoch"] == 7


def test_a_step_that_failed_is_not_quietly_taken_for_saved(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        with pytest.raises(LayoutError):
            ckpt.save(1, {"odd": Odd()})
        with pytest.raises(SaveFailedError, match="cannot be saved again"):
            ckpt.save(1, {"epoch": 1})
        assert ckpt.save(2, {"epoch": 1}).result(60).step == 2


def test_a_handle_says_what_it_knows(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        handle = ckpt.save(1, {"epoch": 1})
        handle.result(60)
        assert repr(handle) == "Handle(step=1, durable)"
        said = "Checkpoint(step=1, attempt=1, 0 tensors, 0 B, metrics={})"
        assert repr(handle.result(60)) == said


def test_p5_a_socket_that_cannot_be_used_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(tmp_path / "open"))
    monkeypatch.delenv("CKPTD_SOCKET", raising=False)
    with pytest.raises(ConfigError, match="mode 0755"):
        Checkpointer(tmp_path / "r")


def test_an_interrupt_in_save_fails_that_step_and_frees_its_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path / "r", daemon=False, slots=1) as ckpt:

        def interrupt(*_args: object, **_kwargs: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(ckpt._saving, "_hand_off", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(1, {"w": torch.ones(8)})
        with pytest.raises(SaveFailedError, match="KeyboardInterrupt"):
            ckpt.save(1, {"w": torch.ones(8)}, wait=True)
        assert ckpt.save(2, {"w": torch.ones(8)}, wait=True).is_done
        assert [c.step for c in ckpt.checkpoints()] == [2]


def test_waiting_for_the_step_just_saved_waits(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        handle = ckpt.save(1, {"w": torch.ones(8)})
        assert ckpt.save(1, {"w": torch.ones(8)}, wait=True) is handle
        assert handle.is_done


@pytest.mark.parametrize(
    "value",
    [
        {"extra_state": {"epoch": 3}},
        {"groups": [1, 2], "state_values": {}},
        {"a": ({"b": [{"c": (1,)}]},)},
    ],
)
def test_a_plain_value_that_looks_like_ours_comes_back(tmp_path: Path, value: object) -> None:
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        ckpt.save(1, {"w": torch.ones(3), "meta": value}, wait=True)
    state = {"w": torch.zeros(3), "meta": None}
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        ckpt.resume(state)
    assert state["meta"] == value


def test_s2_a_value_nested_too_deeply_is_refused_by_name(tmp_path: Path) -> None:
    deep: object = 1
    for _ in range(60):
        deep = (deep,)
    with Checkpointer(tmp_path / "r", daemon=False) as ckpt:
        with pytest.raises(LayoutError, match=r"deep.*nested too deeply"):
            ckpt.save(1, {"deep": deep})
        fine: object = 1
        for _ in range(29):
            fine = {0: fine}
        ckpt.save(2, {"fine": fine}, wait=True)
