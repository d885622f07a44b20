"""Saves with a deadline, against daemons made of scripts."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator

import pytest

from ckptd.engine import runner as runner_module
from ckptd.errors import (
    ConfigError,
    SaveFailedError,
    SaveSkippedError,
    SaveUnknownError,
    SlotsBusyError,
)
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import line
from ckptd.pipeline.verify import verify
from ckptd.store.local import LocalStore
from ckptd.store.open import open_store
from ckptd.trainer import checkpointer as checkpointer_module
from ckptd.trainer.checkpointer import Checkpointer
from ckptd.trainer.deadline import Deadline, wait_committed
from ckptd.trainer.handle import Handle
from ckptd.trainer.overlap import Overlap
from ckptd.wire import messages as say
from tests.fakes.jobs import wait_until
from tests.fakes.ports import FakeDaemon, FakePort, Script, commit_all, finished, welcome, written
from tests.fakes.stores import Op, _Around
from tests.fakes.training import bits, make_state, same, train

Start = Callable[..., Checkpointer]
LONG_S = 600.0


def take_all(port: FakePort, message: say.FromTrainer) -> None:
    """Answer as a daemon whose store takes for ever."""
    welcome(port, message)
    if isinstance(message, say.Handoff):
        port.answer(say.Taken(message.step, message.sequence))


def fail_all(port: FakePort, message: say.FromTrainer) -> None:
    """Answer as a daemon whose store is full."""
    take_all(port, message)
    if isinstance(message, say.Handoff):
        word = finished(message.step, message.sequence, "failed", "SaveFailedError", "disk full")
        port.answer(word)


class Trainer:
    """A Checkpointer whose daemon is a script."""

    def __init__(self, root: str, *scripts: Script, **options: object) -> None:
        self.daemon = FakeDaemon(*scripts)
        self.state = make_state()
        train(self.state)
        self.ckpt = Checkpointer(root, **{"slots": 2, **options})

    def save(self, step: int, **options: object) -> Handle:
        return self.ckpt.save(step, self.state, **options)

    def handoffs(self, count: int) -> list[say.Handoff]:
        return self.daemon.until_heard(say.Handoff, count)


@pytest.fixture
def start(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    made: list[Trainer] = []

    def begin(*scripts: Script, **options: object) -> Trainer:
        monkeypatch.setattr(
            checkpointer_module, "open_port", lambda _, wake_fd: made[-1].daemon.open(wake_fd)
        )
        trainer = Trainer.__new__(Trainer)
        made.append(trainer)
        trainer.__init__(str(tmp_path / "root"), *scripts, **options)
        return trainer

    yield begin
    for trainer in made:
        trainer.ckpt._leave()


# --- what `save` does ----------------------------------------------------------------------------


def test_a_save_with_a_deadline_waits_for_the_commit(start) -> None:
    trainer = start(commit_all)
    handle = trainer.save(10, deadline_s=LONG_S)
    assert handle.status == "committed"
    assert handle.is_done
    (handoff,) = trainer.handoffs(1)
    assert 0 < handoff.deadline_s <= LONG_S


def test_a_save_without_one_is_not_urgent_and_waits_for_nothing(start) -> None:
    trainer = start(take_all)
    handle = trainer.save(10)
    assert not handle.is_done
    (handoff,) = trainer.handoffs(1)
    assert handoff.deadline_s is None


def test_when_the_time_is_up_and_no_daemon_has_it_save_returns_and_says_so(start, caplog) -> None:
    trainer = start(welcome)
    with caplog.at_level(logging.WARNING, "ckptd.trainer"):
        handle = trainer.save(10, deadline_s=0.01)
    assert handle.status == "captured"
    assert "step 10: not committed in 0.01 s; no daemon has taken the snapshot" in caplog.text


def test_when_the_time_is_up_and_a_daemon_has_it_save_returns_and_says_so(start, caplog) -> None:
    trainer = start(take_all)
    handle = trainer.save(10)
    wait_until(lambda: handle.status == "handed_off", "the daemon has it")
    with caplog.at_level(logging.WARNING, "ckptd.trainer"):
        assert trainer.save(10, deadline_s=0) is handle
    assert "step 10: not committed in 0 s; the daemon has the snapshot and goes on" in caplog.text
    assert handle.status == "handed_off"


def test_saving_the_step_just_saved_with_a_deadline_waits_for_that_save(start) -> None:
    trainer = start(commit_all)
    handle = trainer.save(10)
    assert trainer.save(10, deadline_s=LONG_S) is handle
    assert handle.status == "committed"
    assert len(trainer.handoffs(1)) == 1, "it is not handed off again"


def test_d11_a_failure_before_the_deadline_raises_once(start) -> None:
    trainer = start(fail_all)
    with pytest.raises(SaveFailedError, match="disk full"):
        trainer.save(10, deadline_s=LONG_S)
    assert trainer.ckpt.wait(LONG_S), "and not again"


def test_a_save_that_waits_raises_when_the_time_is_up(start) -> None:
    trainer = start(take_all)
    with pytest.raises(SaveUnknownError, match=r"step 10: not committed in 0\.01 s") as caught:
        trainer.save(10, wait=True, deadline_s=0.01)
    assert caught.value.step == 10
    trainer.handoffs(1)


def test_p1_a_dead_daemon_does_not_hold_a_save_up_beyond_its_deadline(start) -> None:
    trainer = start()
    trainer.daemon.is_absent = True
    assert trainer.save(10, deadline_s=0.01).status == "captured"
    trainer.daemon.is_absent = False  # it is handed off before this process leaves
    trainer.handoffs(1)


def test_d5_what_a_daemon_had_that_is_gone_is_not_said_to_be_handed_off(start) -> None:
    trainer = start(take_all, welcome)
    handle = trainer.save(10)
    wait_until(lambda: handle.status == "handed_off", "the daemon has it")
    trainer.daemon.ports[0].break_off()
    trainer.daemon.until_heard(say.Handoff, port=1)
    assert handle.status == "captured"


def test_what_a_daemon_had_written_stays_handed_off(start) -> None:
    def write_all(port: FakePort, message: say.FromTrainer) -> None:
        take_all(port, message)
        if isinstance(message, say.Handoff):
            port.answer(written(message.step, message.sequence))

    trainer = start(write_all, welcome)
    handle = trainer.save(10)
    wait_until(lambda: trainer.ckpt._snapshots._shelf.pool.free_count == 2, "it is written")
    trainer.daemon.ports[0].break_off()
    trainer.daemon.until_heard(say.Watch, port=1)
    assert handle.status == "handed_off", "all of it is in the store"


# --- what is queued ------------------------------------------------------------------------------


class SlowStore(_Around):
    """Keeps the chunks of all steps waiting but those of one."""

    is_open = threading.Event()
    quick = 0

    def _before(self, op: Op) -> None:
        if op.name == "put_deferred" and int(op.key.split("-")[1]) != self.quick:
            assert self.is_open.wait(60.0)


def test_an_urgent_save_is_committed_before_all_that_are_queued(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """Four snapshots are as many as are stored at once; each of them holds buffers and threads."""

    def open_slow(url: str, options: dict[str, object] | None = None) -> SlowStore:
        return SlowStore(open_store(url, options))

    SlowStore.is_open.clear()
    SlowStore.quick = 50
    monkeypatch.setattr(runner_module, "open_store", open_slow)
    state = make_state()
    train(state)
    root = str(tmp_path / "root")
    with Checkpointer(root, daemon=False, slots=5) as ckpt:
        queued = [ckpt.save(step, state) for step in (10, 20, 30, 40)]
        train(state)
        before = bits(state)
        handle = ckpt.save(50, state, deadline_s=LONG_S)
        assert handle.status == "committed"
        assert [each.is_done for each in queued] == [False] * 4
        assert [found.step for found in ckpt.checkpoints()] == [50]
        SlowStore.is_open.set()
        assert [each.result(LONG_S).step for each in queued] == [10, 20, 30, 40]
    store = LocalStore(root)
    assert [verify(store, StepId(1, step), is_data=True).is_whole for step in (10, 50)] == [
        True
    ] * 2
    assert [manifest.step for manifest in line(store)] == [50, 40, 30, 20, 10]
    store.close()
    other = make_state(2)
    with Checkpointer(root, daemon=False) as ckpt:
        assert ckpt.resume(other).step == 50
    assert same(bits(other), before)


# --- slots ---------------------------------------------------------------------------------------


def test_p1_waiting_for_a_slot_ends_with_the_deadline(start) -> None:
    trainer = start(take_all, slots=1, busy_timeout_s=LONG_S)
    trainer.save(10)
    with pytest.raises(SlotsBusyError, match=r"no slot got free in 0(\.\d+)? s"):
        trainer.save(20, deadline_s=0.01)


def test_waiting_for_a_slot_ends_before_the_deadline_where_busy_timeout_s_is_shorter(start) -> None:
    trainer = start(take_all, slots=1, busy_timeout_s=0.01)
    # So short a time may be over before a daemon is found, which ends the first save.
    trainer.ckpt._link.begin()
    wait_until(lambda: trainer.ckpt._link._port is not None, "the daemon is there")
    trainer.save(10)
    with pytest.raises(SlotsBusyError, match=r"in 0\.01 s"):
        trainer.save(20, deadline_s=LONG_S)


def test_an_urgent_save_is_not_left_out_where_others_would_be(start, monkeypatch) -> None:
    trainer = start(commit_all, on_busy="skip")
    monkeypatch.setattr(trainer.ckpt._saving._decisions, "_has_room", lambda: False)
    with pytest.raises(SaveSkippedError):
        trainer.save(10).result(0)
    assert trainer.save(20, deadline_s=LONG_S).status == "committed"
    with pytest.raises(SaveSkippedError):
        trainer.save(30).result(0)


def test_an_urgent_save_for_which_there_is_no_slot_says_that_it_is_skipped(start, caplog) -> None:
    trainer = start(take_all, slots=1, on_busy="skip")
    trainer.save(10)
    handle = trainer.save(20, deadline_s=0)
    assert handle.status == "skipped"
    assert "it is skipped" in caplog.text


# --- overlap -------------------------------------------------------------------------------------


def test_with_overlap_an_urgent_save_is_copied_before_save_returns(start, monkeypatch) -> None:
    trainer = start(take_all, overlap=True)
    deferred = []
    monkeypatch.setattr(Overlap, "start", lambda *_: deferred.append(1))
    handle = trainer.save(10, deadline_s=0)
    assert handle.wait_captured(0)
    assert deferred == []
    trainer.handoffs(1)
    monkeypatch.undo()


# --- after a warning -----------------------------------------------------------------------------


def test_after_a_warning_a_save_uses_the_grace_that_is_left(start, monkeypatch) -> None:
    monkeypatch.setenv("CKPTD_GRACE_S", "500")
    trainer = start(commit_all)
    assert not trainer.ckpt.preempted()
    trainer.save(10)
    trainer.ckpt.notify_preemption()
    trainer.save(20)  # nobody was told to stop yet
    while not trainer.ckpt.preempted():
        pass
    assert trainer.save(30).status == "committed"
    assert trainer.save(40, deadline_s=7.0).status == "committed"
    deadlines = [handoff.deadline_s for handoff in trainer.handoffs(4)]
    assert deadlines[:2] == [None, None]
    assert 7.0 < deadlines[2] <= 500.0
    assert deadlines[3] <= 7.0


def test_after_a_warning_a_save_that_waits_waits_for_as_long_as_it_takes(
    start, monkeypatch
) -> None:
    trainer = start(commit_all)
    trainer.ckpt.notify_preemption()
    while not trainer.ckpt.preempted():
        pass
    monkeypatch.setattr(trainer.ckpt._preemption, "grace_left_s", lambda: 0.0)
    assert trainer.save(10, wait=True).status == "committed"
    assert trainer.handoffs(1)[0].deadline_s == 0.0


# --- the deadline --------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1, math.nan, "25", None])
def test_what_is_no_time_is_refused_before_anything_is_saved(start, seconds: object) -> None:
    with pytest.raises(ConfigError, match="deadline_s"):
        Deadline(seconds)
    trainer = start(commit_all)
    if seconds is not None:
        with pytest.raises(ConfigError, match="deadline_s"):
            trainer.save(10, deadline_s=seconds)
    assert trainer.save(10, wait=True).status == "committed"


def test_a_deadline_that_never_comes_travels() -> None:
    assert Deadline(math.inf).left_s() <= 1e7
    assert Deadline(0).left_s() == 0.0


def test_the_time_is_not_up_where_the_word_is_there_already(caplog) -> None:
    handle = Handle(7, 1, lambda _: None)
    handle.resolve(None)
    wait_committed(handle, Deadline(0), must=True)
    wait_committed(handle, Deadline(0), must=False)
    assert caplog.text == ""
