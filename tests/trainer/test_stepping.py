"""The loop that goes on where the job stopped, saves, and stops when told."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from ckptd.errors import ConfigError, SaveFailedError, SaveUnknownError
from ckptd.trainer.checkpointer import Checkpointer
from ckptd.trainer.stepping import Stepping
from tests.fakes.training import WAIT_S, bits, make_state, same, train

_numbers = itertools.count(1)


class Told:
    """Is preempted from the n-th call on."""

    reason = "told"

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.calls = 0

    def ask(self) -> bool:
        self.calls += 1
        return self.at is not None and self.calls >= self.at

    def grace_left_s(self) -> float:
        return 7.0


class Saves:
    """Writes down what is saved."""

    def __init__(self, error: Exception | None = None) -> None:
        self.steps: list[int] = []
        self.details: list[dict[str, Any]] = []
        self.error = error

    def save(self, step: int, **details: Any) -> None:
        self.steps.append(step)
        self.details.append(details)
        if self.error is not None:
            raise self.error


def walk(
    steps: Any, *, told: Told | None = None, after: int | None = None, every: int | None = None
) -> tuple[list[int], list[int]]:
    """Return the steps that are given, and those that are saved."""
    saves = Saves()
    stepping = Stepping(told or Told(), saves.save, every, None)  # type: ignore[arg-type]
    return list(stepping.walk(steps, after)), saves.steps


def test_all_steps_are_given_and_none_saved_by_default() -> None:
    assert walk(range(1, 4)) == ([1, 2, 3], [])


def test_steps_up_to_the_resumed_one_are_left_out() -> None:
    assert walk(range(1, 6), after=3) == ([4, 5], [])
    assert walk(range(3), after=0) == ([1, 2], [])
    assert walk(range(1, 6), after=5, every=1) == ([], [])


def test_multiples_are_saved_and_the_last_step() -> None:
    assert walk(range(1, 8), every=3)[1] == [3, 6, 7]
    assert walk(range(1, 7), every=3)[1] == [3, 6]
    assert walk(range(7), every=3)[1] == [3, 6]
    assert walk(range(1), every=3)[1] == [0]
    assert walk((), every=3) == ([], [])


def test_the_last_step_is_committed_when_the_loop_ends_and_never_left_out() -> None:
    saves = Saves()
    list(Stepping(Told(), saves.save, 2, None).walk(range(1, 5), None))  # type: ignore[arg-type]
    assert [(s, d["wait"]) for s, d in zip(saves.steps, saves.details, strict=True)] == [
        (2, False), (4, True),
    ]  # fmt: skip


def test_a_job_that_is_preempted_saves_the_step_it_did_and_stops() -> None:
    told = Told(at=4)
    assert walk(range(1, 100), told=told, every=3) == ([1, 2, 3], [3])
    assert told.calls == 4, "one before the first step and one after each"


def test_a_job_that_is_preempted_before_its_first_step_does_and_saves_nothing() -> None:
    assert walk(range(1, 100), told=Told(at=1), after=50, every=1) == ([], [])


def test_a_step_that_is_left_early_is_not_saved() -> None:
    saves = Saves()
    for _ in Stepping(Told(), saves.save, 1, None).walk(range(1, 9), None):  # type: ignore[arg-type]
        break
    assert saves.steps == []


def test_the_last_save_waits_within_the_grace_and_metrics_go_along() -> None:
    saves, numbers = Saves(), itertools.count(1)
    stepping = Stepping(Told(at=3), saves.save, 1, lambda: {"n": next(numbers)})  # type: ignore[arg-type]
    assert list(stepping.walk(range(1, 9), None)) == [1, 2]
    assert saves.details == [
        {"metrics": {"n": 1}, "wait": False},
        {"metrics": {"n": 2}, "wait": True, "deadline_s": 7.0},
    ]


def test_a_commit_that_is_not_known_in_time_ends_the_loop_and_a_failed_one_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for error in (SaveUnknownError("the daemon goes on", step=1), SaveFailedError("no", step=1)):
        saves = Saves(error)
        steps = Stepping(Told(at=2), saves.save, None, None).walk(range(1, 9), None)  # type: ignore[arg-type]
        assert next(steps) == 1
        with pytest.raises(
            StopIteration if isinstance(error, SaveUnknownError) else SaveFailedError
        ):
            next(steps)
    assert "the daemon goes on" in caplog.text


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "1"])
def test_every_is_a_number_of_steps(every: Any) -> None:
    with pytest.raises(ConfigError, match="every"):
        walk((), every=every)


# --- with a real Checkpointer --------------------------------------------------------------------


@pytest.fixture
def url() -> Iterator[str]:
    before = signal.getsignal(signal.SIGTERM)
    yield f"memory://stepping-{next(_numbers)}"
    assert signal.getsignal(signal.SIGTERM) is before


def make(url: str, **options: Any) -> Checkpointer:
    return Checkpointer(url, daemon=False, slots=1, **options)


def test_a_job_that_gets_a_signal_saves_and_the_next_one_goes_on_after_that_step(url: str) -> None:
    done = []
    with make(url) as ckpt:
        state = make_state()
        assert ckpt.resume(state) is None
        for step in ckpt.steps(range(1, 1_000_000)):
            train(state)
            done.append(step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        assert ckpt.preempted()
        assert [found.step for found in ckpt.checkpoints()] == [done[-1]]
    with make(url) as ckpt:
        fresh = make_state(seed=7)
        assert ckpt.resume(fresh).step == done[-1]
        assert same(bits(fresh), bits(state))
        ckpt._saving.resumed_from = None  # as if the step had been in memory only, and the first
        steps = ckpt.steps(range(1, 1_000_000), every=1_000)
        assert next(steps) == done[-1] + 1


def test_a_state_may_be_given_and_is_needed(url: str) -> None:
    with make(url) as ckpt:
        with pytest.raises(ConfigError, match="resume"):
            ckpt.steps(range(3))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "nothing was taken over"
        state = make_state()
        for _ in ckpt.steps(range(1, 4), state, every=2, metrics=lambda: {"loss": 1.0}):
            train(state)
        assert ckpt.wait(WAIT_S)
        assert [(found.step, found.metrics) for found in ckpt.checkpoints()] == [
            (3, {"loss": 1.0}), (2, {"loss": 1.0}),
        ]  # fmt: skip


def test_signals_are_left_alone_until_the_loop_asks(url: str) -> None:
    with make(url, stop_signals=["SIGUSR1"]) as ckpt:
        ckpt.prepare(make_state())
        before = signal.getsignal(signal.SIGUSR1)
        assert before is signal.SIG_DFL
        ckpt.steps(range(3))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR1)
        while not ckpt.preempted():
            pass
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("point", ["the body", "a save", "nothing yet"])
def test_a_warning_that_comes_at_another_moment_is_not_lost(
    url: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make(url) as ckpt:
        state = make_state()
        if point == "nothing yet":
            ckpt.notify_preemption("early")
        capture = ckpt._snapshots.capture

        def warned(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return capture(*args, **kwargs)

        if point == "a save":
            monkeypatch.setattr(ckpt._snapshots, "capture", warned)
        last = None
        for step in ckpt.steps(range(1, 1_000_000), state, every=5):
            if point == "the body" and step == 5:
                ckpt.notify_preemption()
            last = step
        assert last is None or last < 1_000_000 - 1
        assert [found.step for found in ckpt.checkpoints()][:1] == ([last] if last else [])
        assert ckpt.preempted()


@pytest.mark.parametrize("names", [["SIGKILL"], ["TERM"], "SIGTERM", [15]])
def test_signals_are_given_by_names_that_can_be_heard(url: str, names: Any) -> None:
    with pytest.raises(ConfigError, match="stop_signals"):
        make(url, stop_signals=names)


def test_a_grace_that_cannot_be_read_is_refused_at_once(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTD_GRACE_S", "soon")
    with pytest.raises(ConfigError, match="CKPTD_GRACE_S"):
        make(url)
