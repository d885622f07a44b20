"""Crash and reconnect, a thousand times: the same daemon, or the same trainer, holds no more after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ckptd.store.root import create_root
from ckptd.units import MIB
from tests.fakes.crashers import MOST_RANKS, SHAPES
from tests.fakes.footprints import Footprint, ask
from tests.fakes.jobs import Daemon, Place, Process, Ranks, Script, wait_until
from tests.fakes.trainers import FakeTrainer, assert_all_whole

BATCH = 50
GROWTH_BYTES = 24 * MIB  # what malloc may keep of one batch or another


class Sample(NamedTuple):
    """What a process holds after so many crashes of its counterpart."""

    crashes: int
    held: Footprint


def crash_trainers(place: Place, count: int) -> Iterator[Sample]:
    """Let trainers die beside one daemon; check after each batch what it holds.

    Raises:
        AssertionError: more than was promised.
    """
    store = place.store()
    create_root(store)
    daemon = place.daemon(CKPTD_TRIM_S="0")
    commit_and_leave(place, daemon, 1)
    base = settled(daemon)
    yield Sample(0, base)
    warm = 0
    for done in range(0, count, BATCH):
        batch = min(BATCH, count - done)
        _run_batch(place, daemon, first=2 + done, count=batch)
        wait_until(lambda: not any(job["open"] for job in ask(daemon.socket)["jobs"]), "all ends")
        wait_until(lambda: Footprint.of(daemon).fds <= base.fds, f"descriptors go, to {base}")
        found = Footprint.of(daemon)
        # Of each rank of a root one arena is kept at most, and nothing of it that nobody can find.
        assert found.arenas <= MOST_RANKS, found
        assert found.mapped_bytes <= found.arena_bytes, found
        warm = warm or found.private_bytes
        assert found.private_bytes < warm + GROWTH_BYTES, found
        yield Sample(done + batch, found)
    commit_and_leave(place, daemon, 2 + count)
    after = settled(daemon)
    assert after.fds <= base.fds, f"{base}, then {after}"
    yield Sample(count, after)
    assert place.temporary_files() == []
    assert_all_whole(store)
    store.close()


def crash_daemons(place: Place, ranks: Ranks, count: int) -> Iterator[Sample]:
    """Kill the daemon of a trainer that goes on, again and again; check what the trainer holds.

    Raises:
        AssertionError: more than was promised.
    """
    daemon = place.daemon()
    (rank,) = place.job(ranks, 1, CKPTD_SOCKET=daemon.socket)
    rank.do("build")
    rank.do("open", root=place.root, slots=2)
    base: Footprint | None = None
    for step in range(1, count + 1):
        rank.do("train")
        rank.do("save", step=step)
        if step % 3:  # sometimes before the handoff, or in the middle, or after all
            wait_until(lambda at=step: rank.do("status", step=at) != "captured", "it is handed off")
        daemon.kill()
        daemon = place.daemon()
        assert rank.do("result", step=step) == step
        found = Footprint.of(rank)
        base = base or found
        assert (found.fds, found.arenas) <= (base.fds, base.arenas), f"{base}, then {found}"
        assert found.mapped_bytes == base.mapped_bytes
        if step in (1, count) or step % BATCH == 0:
            yield Sample(step, found)
    assert sorted(os.listdir(place.runtime)) == ["d.sock", "d.sock.lock"]
    rank.do("close")
    assert place.temporary_files() == []


def commit_and_leave(place: Place, daemon: Daemon, attempt: int) -> None:
    """Save as a job does that ends well: what attempts before it left is of no use any more."""
    with FakeTrainer(daemon.socket, place.root, attempt=attempt, shapes=SHAPES) as trainer:
        trainer.connect().save(10 * attempt, 1)
        assert trainer.outcome(10 * attempt).state == "committed"
        trainer.goodbye()


def settled(daemon: Process) -> Footprint:
    """Wait until no arena is left, and look."""

    def is_empty() -> bool:
        found = Footprint.of(daemon)
        return (found.arenas, found.mapped_bytes) == (0, 0)

    wait_until(is_empty, "all memory of trainers goes")
    return Footprint.of(daemon)


def _run_batch(place: Place, daemon: Daemon, *, first: int, count: int) -> None:
    command = [sys.executable, "-m", "tests.fakes.crashers", daemon.socket, place.root]
    batch = Script(
        [*command, str(first), str(count)], place.env(), place.base / f"crashers-{first}.log"
    )
    place.processes.append(batch)
    assert batch.wait(600.0) == 0, batch.text
