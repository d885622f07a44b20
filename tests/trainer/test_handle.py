from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from ckptd import errors
from ckptd.errors import (
    CkptdError,
    CorruptError,
    IncompleteError,
    LayoutError,
    ReplicaMismatchError,
    SaveFailedError,
    SaveSkippedError,
    SaveUnknownError,
)
from ckptd.trainer.handle import Handle, error_of
from ckptd.wire.messages import Finished

WAIT_S = 20.0


def handle(load: Callable[[int], object] = lambda step: f"checkpoint {step}") -> Handle:
    return Handle(7, 3, load)


def word(state: str = "failed", kind: str = "SaveFailedError", **more: object) -> Finished:
    fields = {"reason": "because", "fqn": "", "ranks": (), **more}
    return Finished(7, 3, state, kind, **fields)


def test_a_new_handle_is_captured_and_not_done() -> None:
    it = handle()
    assert (it.step, it.sequence, it.is_done) == (7, 3, False)
    assert it.wait_captured(0) is True
    with pytest.raises(SaveUnknownError, match="step 7") as caught:
        it.result(0)
    assert caught.value.step == 7
    assert caught.value.retryable
    assert it.take_untold_error() is None


def test_a_committed_handle_gives_the_checkpoint_again_and_again() -> None:
    it = handle()
    it.resolve(None)
    assert it.is_done
    assert it.result() == it.result(0) == "checkpoint 7"
    assert it.take_untold_error() is None


def test_a_failed_handle_raises_its_reason_again_and_again() -> None:
    it = handle()
    error = SaveFailedError("because", step=7)
    it.resolve(error)
    for _ in range(2):
        with pytest.raises(SaveFailedError) as caught:
            it.result()
        assert caught.value is error


def test_d5_the_first_word_stands() -> None:
    it = handle()
    it.resolve(None)
    it.resolve(SaveFailedError("later", step=7))
    assert it.result() == "checkpoint 7"
    other = handle()
    other.resolve(SaveFailedError("first", step=7))
    other.resolve(None)
    with pytest.raises(SaveFailedError, match="first"):
        other.result()


def test_d11_an_error_is_untold_exactly_once() -> None:
    it = handle()
    it.resolve(SaveFailedError("because", step=7))
    assert isinstance(it.take_untold_error(), SaveFailedError)
    assert it.take_untold_error() is None


def test_an_error_that_the_caller_hears_right_now_is_told() -> None:
    it = handle()
    it.refuse(SaveFailedError("because", step=7))
    assert it.is_done
    assert it.take_untold_error() is None
    with pytest.raises(SaveFailedError, match="because"):
        it.result(0)


def test_saving_a_step_again_that_failed_says_so_although_it_was_told() -> None:
    it = handle()
    it.raise_again()  # nothing is known yet
    it.refuse(SaveFailedError("because", step=7))
    for _ in range(2):
        with pytest.raises(SaveFailedError, match=r"step 7 failed before.*because") as caught:
            it.raise_again()
        assert caught.value.step == 7
    good = handle()
    good.resolve(None)
    good.raise_again()


def test_an_error_raised_by_result_is_told() -> None:
    it = handle()
    it.resolve(SaveFailedError("because", step=7))
    with pytest.raises(SaveFailedError):
        it.result()
    assert it.take_untold_error() is None


def test_a_timeout_is_no_word() -> None:
    it = handle()
    with pytest.raises(SaveUnknownError):
        it.result(0)
    it.resolve(SaveFailedError("because", step=7))
    assert isinstance(it.take_untold_error(), SaveFailedError)


def test_threads_that_wait_all_hear_the_word() -> None:
    it = handle()
    heard: list[object] = []
    threads = [threading.Thread(target=lambda: heard.append(it.result(WAIT_S))) for _ in range(4)]
    for thread in threads:
        thread.start()
    it.resolve(None)
    for thread in threads:
        thread.join(WAIT_S)
    assert heard == ["checkpoint 7"] * 4


# --- the error that a daemon reported ----------------------------------------------------------


def test_a_committed_word_is_no_error() -> None:
    assert error_of(word("committed", "")) is None
    assert error_of(word("committed", "SaveFailedError")) is None


@pytest.mark.parametrize(
    ("state", "kind", "expected"),
    [
        ("failed", "SaveFailedError", SaveFailedError),
        ("skipped", "SaveSkippedError", SaveSkippedError),
        ("unknown", "SaveUnknownError", SaveUnknownError),
        ("failed", "CorruptError", CorruptError),
    ],
)
def test_a_word_becomes_the_error_it_names(state: str, kind: str, expected: type) -> None:
    error = error_of(word(state, kind))
    assert type(error) is expected
    assert error.step == 7
    assert str(error) == "because"


def test_missing_ranks_are_kept() -> None:
    error = error_of(word(kind="IncompleteError", ranks=(1, 3)))
    assert isinstance(error, IncompleteError)
    assert (error.step, error.missing_ranks) == (7, (1, 3))


def test_the_name_and_ranks_of_a_layout_error_are_kept() -> None:
    error = error_of(word(kind="ReplicaMismatchError", fqn="model.weight", ranks=(0, 2)))
    assert isinstance(error, ReplicaMismatchError)
    assert (error.fqn, error.ranks) == ("model.weight", (0, 2))


def test_every_class_of_error_can_be_named_by_a_daemon() -> None:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, CkptdError):
            error = error_of(word(kind=name, fqn="w", ranks=(1,)))
            assert isinstance(error, (errors.CheckpointError, LayoutError)), name
            assert "because" in str(error)


@pytest.mark.parametrize("kind", ["", "Exception", "annotations", "__doc__", "no such", "Iterable"])
def test_s1_what_names_no_error_of_ours_is_a_failed_save(kind: str) -> None:
    error = error_of(word(kind=kind))
    assert type(error) is SaveFailedError
    assert error.step == 7


# --- how far it is -------------------------------------------------------------------------------


def test_the_status_says_how_far_a_save_is() -> None:
    it = handle()
    assert (it.status, it.whereabouts) == ("captured", "no daemon has taken the snapshot")
    it.defer()
    assert (it.status, it.whereabouts) == ("capturing", "the state is still being copied")
    it.captured()
    it.taken()
    assert it.status == "handed_off"
    assert it.whereabouts == "the daemon has the snapshot and goes on"
    it.taken(is_taken=False)
    assert it.status == "captured", "the daemon that had it is gone"
    it.taken()
    it.resolve(None)
    assert it.status == "committed"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SaveFailedError("because", step=7), "failed"),
        (LayoutError("because", fqn="w"), "failed"),
        (errors.DaemonUnavailableError("there is none"), "failed"),
        (SaveSkippedError("because", step=7), "skipped"),
        (SaveUnknownError("because", step=7), "unknown"),
    ],
)
def test_the_status_at_the_end_is_what_became_of_the_save(error: CkptdError, status: str) -> None:
    it = handle()
    it.taken()
    it.resolve(error)
    assert it.status == status
    it.taken(is_taken=False)
    it.resolve(None)
    assert it.status == status


def test_a_save_that_was_left_out_is_skipped_before_the_final_word_too() -> None:
    it = handle()
    it.leave_out()
    assert it.status == "skipped"
    assert not it.is_done


def test_without_a_daemon_nobody_is_said_to_go_on_once_this_process_ends() -> None:
    it = Handle(7, 3, lambda _: None, has_daemon=False)
    assert it.whereabouts == "nobody has taken it"
    it.taken()
    assert "this process still stores the snapshot" in it.whereabouts


def test_a_timeout_says_where_the_snapshot_is() -> None:
    it = handle()
    with pytest.raises(SaveUnknownError, match="no daemon has taken the snapshot"):
        it.result(0)
    it.taken()
    with pytest.raises(SaveUnknownError, match="the daemon has the snapshot and goes on"):
        it.result(0)


def test_waiting_for_the_commit_reads_nothing_and_raises_what_failed() -> None:
    def load(_step: int) -> object:
        raise AssertionError("nobody asked for the checkpoint")

    it = handle(load)
    assert it.wait_committed(0) is False
    it.resolve(None)
    assert it.wait_committed(0) is True
    other = handle(load)
    other.resolve(SaveFailedError("because", step=7))
    with pytest.raises(SaveFailedError, match="because"):
        other.wait_committed()
    assert other.take_untold_error() is None, "whoever waited was told"
