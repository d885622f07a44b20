"""Real ranks that are warned: all stop at the same step, which is committed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.fakes.jobs import Place, Rank, Ranks, all_do, wait_until
from tests.fakes.trainers import assert_all_whole

pytestmark = pytest.mark.system


def start(
    place: Place, ranks: Ranks, world_size: int, *, is_ddp: bool = True, **env: str
) -> list[Rank]:
    """Give ranks that train in a loop of `steps`, and have taken some."""
    job = place.job(ranks, world_size, CKPTD_LINGER_S="0.1", **env)
    all_do(job, "build", is_ddp=is_ddp)
    all_do(job, "open", root=place.root)
    all_do(job, "prepare")
    for number, rank in enumerate(job):
        rank.order("walk", beacon=str(place.base / f"at-{number}"))
    beacons = [place.base / f"at-{number}" for number in range(world_size)]
    wait_until(lambda: all(map(Path.exists, beacons)), "all ranks train")
    return job


def stopped_at(ranks: list[Rank]) -> list[int]:
    said = [rank.answer() for rank in ranks]
    assert all("value" in each for each in said), said
    return [each["value"] for each in said]


def committed(place: Place) -> list[int]:
    store = place.store()
    try:
        return assert_all_whole(store)
    finally:
        store.close()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGTERM to all", "a file", "a command"])
def test_a_warning_to_one_rank_stops_all_at_the_same_step_and_that_is_committed(
    place: Place, ranks: Ranks, how: str
) -> None:
    stop = place.base / "stop"
    world_size = 4 if how == "SIGTERM" else 2
    job = start(place, ranks, world_size, CKPTD_STOP_FILE=str(stop) if how == "a file" else "")
    if how == "a file":
        stop.touch()
    elif how == "a command":
        wait_until(lambda: place.run("preempt", place.root).returncode == 0, "a rank is told")
    else:
        for rank in job if how == "SIGTERM to all" else [job[-1]]:
            rank.send(signal.Signals[how.split(maxsplit=1)[0]])
    (step,) = set(stopped_at(job))
    assert step > 3
    assert committed(place) == [step]
    all_do(job, "close")
    assert [rank.end() for rank in job] == [0] * world_size


def test_ranks_do_not_wait_for_a_dead_one_beyond_the_deadline(place: Place, ranks: Ranks) -> None:
    """Without collectives, so that nothing else tells them. What they save lacks a part."""
    job = start(place, ranks, 3, is_ddp=False, CKPTD_GRACE_S="1")
    job[2].kill()
    job[1].send(signal.SIGTERM)
    for rank in job[:2]:
        rank.answer()  # the last step, or that the save of it failed: they may be at different ones
        assert "rank 2 did not say within 0.5 s" in rank.text
    assert committed(place) == []


def test_a_signal_before_the_first_question_kills_as_ever(place: Place, ranks: Ranks) -> None:
    """A script that never asks has no use for a warning."""
    (rank,) = place.job(ranks, 1, CKPTD_LINGER_S="0.1")
    rank.do("build")
    rank.do("open", root=place.root)
    rank.do("prepare")
    rank.send(signal.SIGTERM)
    assert rank.wait() == -signal.SIGTERM
