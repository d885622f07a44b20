"""Several ranks, one step: it is committed for all of them or for none, and everyone hears why."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

from ckptd.model.box import Box
from ckptd.model.keys import StepId
from tests.fakes.jobs import Place, Script, wait_until
from tests.fakes.trainers import (
    SHAPES,
    FakeTrainer,
    assert_all_whole,
    assert_holds,
    committed_steps,
    contents,
)

pytestmark = pytest.mark.system


@contextmanager
def job(place: Place, world_size: int = 2, **options: Any) -> Iterator[list[FakeTrainer]]:
    """Connect all ranks of a job to a daemon."""
    with ExitStack() as stack:
        ranks = [
            FakeTrainer(place.socket(), place.root, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        for trainer in ranks:
            stack.enter_context(trainer)
            trainer.connect()
        yield ranks


def refused(place: Place, ranks: list[FakeTrainer], step: int) -> Any:
    """Check that all ranks hear the same refusal and that nothing is listed; return it."""
    words = [trainer.outcome(step) for trainer in ranks]
    assert words[0] is not None
    assert words[0].state == "failed"
    assert all(
        (word.kind, word.reason, word.fqn, word.ranks)
        == (words[0].kind, words[0].reason, words[0].fqn, words[0].ranks)
        for word in words
    )
    store = place.store()
    assert step not in committed_steps(store)
    store.close()
    return words[0]


def test_d9_a_missing_rank_ends_the_step_with_its_number(place: Place) -> None:
    place.daemon()
    with job(place, 3, commit_timeout_s=3.0) as ranks:
        for trainer in ranks[:2]:
            trainer.save(10, 1)
        word = refused(place, ranks, 10)
        assert (word.kind, word.ranks) == ("IncompleteError", (2,))
        assert "step 10" in word.reason
        assert "rank 2" in word.reason
        for trainer in ranks:
            trainer.save(20, 2)
        assert all(trainer.outcome(20).state == "committed" for trainer in ranks)


def test_d11_a_rank_that_cannot_deliver_is_heard_by_all_at_once(place: Place) -> None:
    place.daemon()
    with job(place, commit_timeout_s=600.0) as ranks:
        ranks[0].save(10, 1)
        ranks[1].forfeit(10, 1, "optimizer.lr is a socket")
        word = refused(place, ranks, 10)
        assert (word.kind, word.ranks) == ("SaveFailedError", (1,))
        assert "optimizer.lr is a socket" in word.reason


def test_d9_two_saves_of_one_step_are_never_mixed(place: Place) -> None:
    place.daemon()
    with job(place) as ranks:
        ranks[0].save(10, 1)
        ranks[1].save(10, 2)
        assert "sequence" in refused(place, ranks, 10).reason


def test_d9_other_plans_are_never_mixed(place: Place) -> None:
    place.daemon()
    with job(place) as ranks:
        ranks[1].hang_up()
        with FakeTrainer(
            place.socket(), place.root, rank=1, world_size=2, chunk_bytes=256 << 10
        ) as other:
            ranks[0].save(10, 1)
            other.connect().save(10, 1)
            assert "plans" in refused(place, [ranks[0], other], 10).reason


def test_d9_a_hole_names_tensor_box_and_step(place: Place) -> None:
    place.daemon()
    share = ((0, Box((0,), (50,))), (1, Box((0, 0), (299, 1000))), (2, Box((0,), (50,))))
    with FakeTrainer(place.socket(), place.root, share=share) as trainer:
        trainer.connect().save(10, 1)
        word = refused(place, [trainer], 10)
        assert word.fqn == "model.big"
        assert "[299:300, 0:1000]" in word.reason


def test_d9_ranks_that_disagree_about_a_shape_name_the_tensor(place: Place) -> None:
    place.daemon()
    shapes = {**SHAPES, "model.big": (301, 1000)}
    with job(place, is_planned=False) as ranks:
        ranks[1].hang_up()
        with FakeTrainer(
            place.socket(), place.root, rank=1, world_size=2, shapes=shapes, is_planned=False
        ) as other:
            ranks[0].save(10, 1)
            other.connect().save(10, 1)
            assert refused(place, [ranks[0], other], 10).fqn == "model.big"


def test_d9_replicas_that_differ_name_tensor_and_ranks(place: Place) -> None:
    place.daemon()
    with job(place, 3, is_planned=False) as ranks:
        for trainer in ranks:
            samples = [7, 8 + (trainer.rank == 1), 9]
            trainer.fingerprints = np.array(samples, "<u8").tobytes()
            trainer.save(10, 1)
        word = refused(place, ranks, 10)
        assert (word.kind, word.fqn, word.ranks) == ("ReplicaMismatchError", "model.big", (1,))


def test_a_step_that_failed_is_left_out_of_the_line(place: Place) -> None:
    place.daemon()
    with job(place) as ranks:
        for step, sequence in ((10, 1), (20, 2), (30, 3)):
            ranks[0].save(step, sequence)
            if step == 20:
                ranks[1].forfeit(step, sequence)
            else:
                ranks[1].save(step, sequence)
            for trainer in ranks:
                trainer.outcome(step)
    store = place.store()
    assert assert_all_whole(store) == [10, 30]
    store.close()


# --- ranks that die ------------------------------------------------------------------------------

# A rank whose forked child, like a data loader's, keeps the socket open when it is killed.
_MORTAL = """
import json, os, sys, time
repository, socket, root, deed = sys.argv[1:]
sys.path.insert(0, repository)
from tests.fakes.trainers import FakeTrainer
trainer = FakeTrainer(socket, root, rank=1, world_size=2, commit_timeout_s=600.0)
trainer.connect()
if deed == "offer":
    trainer.save(10, 1)
if deed != "alone" and os.fork() == 0:
    time.sleep(600)
print(json.dumps({"ready": True}), flush=True)
time.sleep(600)
"""


def mortal(place: Place, deed: str) -> Script:
    """Start rank 1 as a process of its own; return when it has done its deed."""
    repository = place.env()["PYTHONPATH"]
    command = [sys.executable, "-c", _MORTAL, repository, place.socket(), place.root, deed]
    script = Script(command, place.env(), place.base / "mortal.log")
    place.processes.append(script)
    script.until("ready")
    return script


def kill_orphans(place: Place, *keep: int) -> None:
    for pid in set(place.pids()) - set(keep):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("deed", ["alone", "with a child that holds its socket"])
def test_k1_e2_a_rank_that_dies_before_its_handoff_is_named(place: Place, deed: str) -> None:
    daemon = place.daemon()
    with FakeTrainer(
        place.socket(), place.root, rank=0, world_size=2, commit_timeout_s=600.0
    ) as trainer:
        trainer.connect()
        other = mortal(place, deed)
        trainer.save(10, 1)
        other.kill()
        word = refused(place, [trainer], 10)
        assert word.ranks == (1,)
        assert "its process ended" in word.reason
        kill_orphans(place, daemon.pid)


def test_d6_a_snapshot_handed_off_by_a_rank_that_died_is_committed(place: Place) -> None:
    daemon = place.daemon(failpoints="chunk.put=stop")
    with FakeTrainer(
        place.socket(), place.root, rank=0, world_size=2, commit_timeout_s=600.0
    ) as trainer:
        trainer.connect()
        other = mortal(place, "offer")
        wait_until(daemon.is_stopped, "the daemon stops in the snapshot of rank 1")
        other.kill()
        daemon.send(signal.SIGCONT)
        trainer.save(10, 1)
        assert trainer.outcome(10).state == "committed"
        kill_orphans(place, daemon.pid)
    store = place.store()
    assert assert_all_whole(store) == [10]
    assert_holds(store, StepId(attempt=1, step=10), contents(10))
    store.close()


# --- several nodes -------------------------------------------------------------------------------


@contextmanager
def two_nodes(place: Place) -> Iterator[tuple[FakeTrainer, FakeTrainer]]:
    """Give rank 0 on node a and rank 1 on node b, not connected yet."""
    one = FakeTrainer(place.socket("a"), place.root, rank=0, world_size=2)
    two = FakeTrainer(place.socket("b"), place.root, rank=1, world_size=2)
    with one, two:
        yield one, two


def test_daemons_of_two_nodes_commit_together(place: Place) -> None:
    place.daemon("a")
    place.daemon("b")
    with two_nodes(place) as (one, two):
        for trainer in (one, two):
            trainer.connect()
        for step in range(10, 60, 10):
            for trainer in (two, one) if step % 20 else (one, two):
                trainer.save(step, step // 10)
            for trainer in (one, two):
                assert trainer.outcome(step).state == "committed"
    store = place.store()
    assert assert_all_whole(store) == [10, 20, 30, 40, 50]
    assert_holds(store, StepId(attempt=1, step=50), contents(50))
    store.close()


@pytest.mark.parametrize("point", ["rank.put", "rank.done", "commit.put", "commit.done"])
def test_d6_the_committing_node_dies_and_its_next_daemon_commits(place: Place, point: str) -> None:
    first = place.daemon("a", failpoints=f"{point}=kill")
    place.daemon("b")
    with two_nodes(place) as (one, two):
        for trainer in (one, two):
            trainer.connect().save(10, 1)
        assert first.wait() == -9
        assert one.outcome(10) is None
        place.daemon("a")
        one.connect().offer(10)
        for trainer in (one, two):
            assert trainer.outcome(10).state == "committed"
    store = place.store()
    assert assert_all_whole(store) == [10]
    store.close()


def test_d6_the_other_node_dies_and_its_next_daemon_delivers(place: Place) -> None:
    place.daemon("a")
    second = place.daemon("b", failpoints="rank.put=kill")
    with two_nodes(place) as (one, two):
        for trainer in (one, two):
            trainer.connect().save(10, 1)
        assert second.wait() == -9
        place.daemon("b")
        two.connect().offer(10)
        for trainer in (one, two):
            assert trainer.outcome(10).state == "committed"


def test_d11_a_refusal_on_one_node_is_heard_on_the_other(place: Place) -> None:
    place.daemon("a")
    place.daemon("b")
    with two_nodes(place) as (one, two):
        for trainer in (one, two):
            trainer.connect()
        one.save(10, 1)
        two.forfeit(10, 1, "no memory")
        for trainer in (one, two):
            word = trainer.outcome(10)
            assert word.state == "failed"
            assert "no memory" in word.reason


def test_d9_a_rank_missing_on_another_node_is_named(place: Place) -> None:
    place.daemon("a")
    with FakeTrainer(
        place.socket("a"), place.root, rank=0, world_size=2, commit_timeout_s=3.0
    ) as trainer:
        trainer.connect().save(10, 1)
        word = trainer.outcome(10)
        assert (word.kind, word.ranks) == ("IncompleteError", (1,))


def test_l9_one_job_started_twice_by_mistake_commits_each_step_once(place: Place) -> None:
    place.daemon("a")
    place.daemon("b")
    with (
        FakeTrainer(place.socket("a"), place.root) as one,
        FakeTrainer(place.socket("b"), place.root) as two,
    ):
        for trainer in (one, two):
            trainer.connect()
        for step in range(10, 60, 10):
            for trainer in (one, two):
                trainer.save(step, step // 10)
            words = {trainer.outcome(step).state for trainer in (one, two)}
            assert words == {"committed"}
    store = place.store()
    assert assert_all_whole(store) == [10, 20, 30, 40, 50]
    store.close()
