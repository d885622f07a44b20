"""Jobs that come back: on as many ranks or other ones, from damaged roots, or not at all."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.store.base import Store
from tests.fakes.checkpoints import flip_byte
from tests.fakes.jobs import Place, Rank, Ranks, all_do, all_fail, wait_until
from tests.fakes.trainers import assert_all_whole, committed_steps

pytestmark = pytest.mark.system


def start(place: Place, ranks: Ranks, world_size: int, *, seed: int = 1) -> list[Rank]:
    """Give ranks with Checkpointers that have not trained."""
    job = place.job(ranks, world_size, CKPTD_LINGER_S="0.5")
    all_do(job, "build", seed=seed, is_ddp=world_size > 1)
    all_do(job, "open", root=place.root)
    return job


def train_and_save(job: list[Rank], *steps: int) -> dict[int, str]:
    """Train and commit steps; return what rank 0 held at each."""
    digests = {}
    for step in steps:
        all_do(job, "train")
        digests[step] = job[0].do("digest")
        all_do(job, "save", step=step)
        all_do(job, "result", step=step)
    return digests


def kill(place: Place, job: list[Rank]) -> None:
    """End a job and its daemons the hard way."""
    for rank in job:
        rank.kill()
    for pid in place.pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not place.pids(), "all are dead")


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_r3_a_killed_job_goes_on_with_the_same_state_on_other_ranks(
    place: Place, ranks: Ranks, before: int, after: int
) -> None:
    job = start(place, ranks, before)
    digests = train_and_save(job, 1, 2)
    all_do(job, "train")
    all_do(job, "arm", spec="capture.done=kill")
    for rank in job:
        rank.order("save", step=3)
    for rank in job:
        rank.wait()
    kill(place, job)
    again = start(place, ranks, after, seed=2)
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * after
    assert all_do(again, "digest") == [digests[2]] * after
    digests |= train_and_save(again, 3)
    all_do(again, "close")
    store = place.store()
    assert assert_all_whole(store) == [1, 2, 3]
    store.close()
    assert place.temporary_files() == []


def chunks_of(store: Store, step: int) -> list[str]:
    birth = str(StepId(attempt=1, step=step))
    return [e.key for e in store.list(keys.CHUNKS) if e.key.endswith(birth)]


@pytest.mark.parametrize("what", ["chunk", "manifest", "rank manifest"])
def test_r1_r2_a_flipped_byte_sends_all_ranks_to_the_older_checkpoint_loudly(
    place: Place, ranks: Ranks, what: str
) -> None:
    job = start(place, ranks, 2)
    digests = train_and_save(job, 1, 2)
    all_do(job, "close")
    store = place.store()
    newest = StepId(attempt=1, step=2)
    names = {
        "chunk": chunks_of(store, 2)[0], "manifest": keys.checkpoint(newest),
        "rank manifest": keys.rank(newest, 1),
    }  # fmt: skip
    flip_byte(store, names[what], -5)
    again = start(place, ranks, 2, seed=2)
    assert all_do(again, "resume") == [{"step": 1, "attempt": 1}] * 2
    assert all_do(again, "digest") == [digests[1]] * 2
    # A manifest that does not parse is passed over by rank 0, which looks; what it names is
    # missed by every rank.
    assert "NOT WHOLE" in again[0].text or "DAMAGED" in again[0].text
    if what != "manifest":
        assert "NOT WHOLE" in again[1].text
    # It goes on from there, on a line without the damaged step.
    train_and_save(again, 2)
    all_do(again, "close")
    third = start(place, ranks, 1, seed=3)
    assert third[0].do("resume") == {"step": 2, "attempt": 2}
    third[0].do("close")
    done = place.run("verify", place.root, "--data", "--all")
    assert done.returncode == 4
    assert names[what] in done.stdout.replace("\n", "")
    store.close()


def test_r1_where_nothing_is_whole_every_rank_refuses_to_start_from_scratch(
    place: Place, ranks: Ranks
) -> None:
    job = start(place, ranks, 2)
    train_and_save(job, 1)
    all_do(job, "close")
    store = place.store()
    for key in chunks_of(store, 1):
        flip_byte(store, key, -1)
    again = start(place, ranks, 2)
    for said in all_fail(again, "resume"):
        assert said["error"] in ("TornRestoreError", "CorruptError")
        assert "whole" in said["text"]
    store.close()


def test_r1_a_root_that_went_away_is_an_error_on_every_rank(place: Place, ranks: Ranks) -> None:
    job = start(place, ranks, 2)
    train_and_save(job, 1)
    all_do(job, "close")
    again = start(place, ranks, 2)
    shutil.move(place.root, place.root + ".away")
    for said in all_fail(again, "resume"):
        assert said["error"].startswith("Store")
        assert "NotFound" not in said["error"]
    shutil.move(place.root + ".away", place.root)
    assert all_do(again, "resume") == [{"step": 1, "attempt": 1}] * 2


def test_a_fresh_root_holds_nothing_to_resume(place: Place, ranks: Ranks) -> None:
    job = start(place, ranks, 2)
    assert all_do(job, "resume") == [None, None]
    assert all_do(job, "checkpoints") == [[], []]
    all_do(job, "close")


def test_r1_a_job_restarted_from_an_older_step_goes_on_from_its_own_line(
    place: Place, ranks: Ranks
) -> None:
    job = start(place, ranks, 1)
    digests = train_and_save(job, 10, 20, 30)
    job[0].do("close")
    (back,) = start(place, ranks, 1, seed=2)
    assert back.do("resume", step=10) == {"step": 10, "attempt": 1}
    assert back.do("digest") == digests[10]
    digests |= {f"own {k}": v for k, v in train_and_save([back], 15).items()}
    back.kill()
    (again,) = start(place, ranks, 1, seed=3)
    assert again.do("resume") == {"step": 15, "attempt": 2}
    assert again.do("digest") == digests["own 15"]
    # Its line is 15, 10: the abandoned 20 and 30 are not on it.
    assert again.do("checkpoints") == [15, 30, 20, 10]
    again.do("close")
    store = place.store()
    flip_byte(store, keys.checkpoint(StepId(attempt=2, step=15)), -5)
    (last,) = start(place, ranks, 1, seed=4)
    assert last.do("resume") == {"step": 10, "attempt": 1}
    last.do("close")
    store.close()


# --- roots that cannot be used -------------------------------------------------------------------


def refused(place: Place, ranks: Ranks, world_size: int = 2) -> list[dict]:
    job = place.job(ranks, world_size)
    all_do(job, "build")
    return all_fail(job, "open", root=place.root, meeting_timeout_s=20.0)


def test_a_folder_of_other_things_is_refused_at_start_on_every_rank(
    place: Place, ranks: Ranks
) -> None:
    Path(place.root).mkdir()
    (Path(place.root) / "thesis.tex").write_text("mine")
    for said in refused(place, ranks):
        assert said["error"] == "ConfigError"
        assert "thesis.tex" in said["text"]
    assert os.listdir(place.root) == ["thesis.tex"]


def test_r5_a_root_of_a_newer_format_is_refused_at_start(place: Place, ranks: Ranks) -> None:
    Path(place.root).mkdir()
    (Path(place.root) / keys.ROOT_RECORD).write_text('{"format":99}')
    for said in refused(place, ranks):
        assert "99" in said["text"]


def test_l5_a_root_that_cannot_be_written_is_refused_at_start(place: Place, ranks: Ranks) -> None:
    Path(place.root).write_text("a file")
    for said in refused(place, ranks):
        assert place.root in said["text"]


def test_a_root_that_ranks_do_not_share_is_refused_at_start(place: Place, ranks: Ranks) -> None:
    os.mkdir(place.root)
    job = place.job(ranks, 2)
    all_do(job, "build")
    job[1].order("hide", folder=place.root)
    if "error" in job[1].answer():
        pytest.skip("needs the right to mount")
    for rank in job:
        rank.order("open", root=place.root, meeting_timeout_s=20.0)
    assert "value" in job[0].answer()
    said = job[1].answer()
    assert said["error"] == "ConfigError"
    assert "does not see the root that rank 0 sees" in said["text"]


def test_the_newest_step_that_lacks_only_its_commit_is_committed_by_resume(
    place: Place, ranks: Ranks
) -> None:
    job = start(place, ranks, 2)
    digests = train_and_save(job, 1, 2)
    all_do(job, "close")
    store = place.store()
    store.delete(keys.checkpoint(StepId(attempt=1, step=2)))
    assert committed_steps(store) == [1]
    again = start(place, ranks, 2, seed=2)
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * 2
    assert all_do(again, "digest") == [digests[2]] * 2
    assert committed_steps(store) == [1, 2]
    store.close()
