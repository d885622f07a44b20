from __future__ import annotations

import msgspec
import pytest

from ckptd.engine import events as ev
from ckptd.engine.jobs import Job
from ckptd.engine.lifetime import TRIM_S
from ckptd.engine.memory import KEEP_S
from ckptd.engine.steps import GIVE_UP_S
from ckptd.model.keys import StepId
from ckptd.pipeline.commit import Verdict
from ckptd.wire import messages as say
from tests.fakes.engines import Bench, handoff, hello, of, recipe, said

WAITING = Verdict("waiting", ranks=(1,))
FAILED = Verdict("failed", "SaveFailedError", "because")


def test_one_rank_goes_from_handoff_to_committed(bench: Bench) -> None:
    bench.join(1)
    assert said(say.Welcome, bench.effects)
    assert len(of(ev.Store, bench.say(1, handoff(10, 1)))) == 1
    (put,) = of(ev.PutRank, bench.store(10, 1))
    assert (put.record.step, put.record.rank, put.record.previous) == (10, 0, None)
    effects = bench.put(10, 1)
    assert said(say.Written, effects, 1)
    assert of(ev.Try, effects)
    (finished,) = said(say.Finished, bench.judge(10))
    assert finished.state == "committed"


def test_d3_no_rank_manifest_before_its_chunks_and_no_commit_before_the_rank_manifest(
    bench: Bench,
) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    bench.tick(5)
    assert not of(ev.PutRank, bench.effects)
    bench.store(10, 1)
    bench.tick(5)
    assert not of(ev.Try, bench.effects)


def test_all_local_ranks_are_awaited_before_the_store_is_asked(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.write(1, 10, 1, rank=0)
    bench.tick(5)
    assert not of(ev.Try, bench.effects)
    assert of(ev.Try, bench.write(2, 10, 1, rank=1))


def test_rank_0s_daemon_asks_again_and_again_with_longer_pauses_for_remote_ranks(
    bench: Bench,
) -> None:
    bench.join(1, rank=0, world_size=2)
    assert of(ev.Try, bench.write(1, 10, 1))
    pauses = []
    for _ in range(8):
        before = bench.now
        bench.judge(10, WAITING)
        due = bench.engine.next_due()
        assert due is not None
        bench.now = due
        assert of(ev.Try, bench.tick())
        pauses.append(bench.now - before)
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1 < pauses[-1] <= 1.0


@pytest.mark.parametrize(("rank", "world_size", "silence_s"), [(1, 2, 45), (1, 3, 40), (2, 3, 50)])
def test_other_daemons_poll_the_commit_key_and_take_over_after_a_silence(
    bench: Bench, rank: int, world_size: int, silence_s: float
) -> None:
    bench.join(1, rank, world_size)
    effects = bench.write(1, 10, 1, rank)
    assert of(ev.Poll, effects)
    assert not of(ev.Try, effects)
    bench.judge(10, WAITING)
    effects = bench.tick(silence_s - 0.5)
    assert of(ev.Poll, effects)
    assert not of(ev.Try, effects)
    bench.judge(10, WAITING)
    assert of(ev.Try, bench.tick(0.5))


def test_d9_a_part_that_never_comes_ends_the_step_with_its_name(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.write(1, 10, 1)
    bench.judge(10, WAITING)
    (end,) = of(ev.End, bench.tick(61))
    assert end.verdict.kind == "IncompleteError"
    assert end.verdict.ranks == (1,)
    assert "step 10" in end.verdict.reason
    assert "rank 1" in end.verdict.reason


def test_d11_a_failed_part_dooms_the_step_and_every_rank_hears_of_it(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.write(1, 10, 1)
    bench.say(2, handoff(10, 1))
    effects = bench.on(ev.PartFailed(bench.part(10, 1, 1), "no space left"))
    (end,) = of(ev.End, effects)
    assert [(o.rank, o.state) for o in end.outcomes] == [(1, "failed")]
    assert not said(say.Finished, effects), "failed is said only after the tombstone"
    effects = bench.judge(10, end.verdict)
    assert len(said(say.Finished, effects)) == 2
    assert "no space left" in said(say.Finished, effects)[0].reason
    assert bench.engine.tally.failed == 1


def test_a_rank_that_forfeits_ends_the_step_for_all(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.write(1, 10, 1)
    (end,) = of(ev.End, bench.say(2, say.Forfeit(10, 1, "skipped", "no slot")))
    assert end.verdict.state == "skipped"
    effects = bench.judge(10, end.verdict)
    assert {m.kind for m in said(say.Finished, effects)} == {"SaveSkippedError"}
    assert (bench.engine.tally.skipped, bench.engine.tally.failed) == (1, 0)


def test_a_part_that_comes_after_the_verdict_is_answered_at_once(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.say(2, say.Forfeit(10, 1, "failed", "refused a value"))
    bench.judge(10, FAILED)
    effects = bench.say(1, handoff(10, 1))
    assert not of(ev.Store, effects)
    assert said(say.Written, effects, 1)
    assert said(say.Finished, effects, 1)[0].reason == "because"


def test_rank_0_names_the_checkpoint_before_only_once_it_is_decided(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1, previous=str(StepId(1, 5))))
    bench.say(1, handoff(20, 2, slot=1))
    assert not of(ev.PutRank, bench.store(20, 2)), "step 10 is still open"
    bench.store(10, 1)
    bench.put(10, 1)
    (put,) = of(ev.PutRank, bench.judge(10))
    assert put.record.step == 20
    assert put.record.previous == str(StepId(1, 10))


def test_a_step_that_failed_is_not_on_the_line(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1, previous=str(StepId(1, 5))))
    bench.say(1, handoff(20, 2, slot=1))
    bench.store(20, 2)
    bench.on(ev.PartFailed(bench.part(10, 1), "x"))
    (put,) = of(ev.PutRank, bench.judge(10, FAILED))
    assert put.record.previous == str(StepId(1, 5))


def test_ranks_other_than_0_do_not_wait_for_earlier_steps(bench: Bench) -> None:
    bench.join(1, rank=1, world_size=2)
    bench.say(1, handoff(10, 1))
    bench.say(1, handoff(20, 2, slot=1))
    assert of(ev.PutRank, bench.store(20, 2, rank=1))


def test_a_trainer_that_dies_before_its_handoff_ends_the_open_step(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.write(1, 10, 1)
    (end,) = of(ev.End, bench.on(ev.Gone(2, is_dead=True)))
    assert end.outcomes[0].rank == 1
    bench.judge(10, end.verdict)
    (end,) = of(ev.End, bench.say(1, handoff(20, 2)))
    assert end.step.id.step == 20, "later steps of the attempt are hopeless too"


def test_a_lost_connection_of_a_living_trainer_ends_nothing(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.write(1, 10, 1)
    bench.on(ev.Gone(2, is_dead=False))
    bench.judge(10, WAITING)
    assert not of(ev.End, bench.effects)
    bench.join(3, rank=1, world_size=2)
    assert of(ev.Try, bench.write(3, 10, 1, rank=1))


def test_d6_a_snapshot_of_a_dead_trainer_is_finished_and_committed(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    effects = bench.on(ev.Gone(1, is_dead=True))
    assert not of(ev.Release, effects), "its memory is still being read"
    effects = bench.store(10, 1)
    assert not of(ev.Release, effects), "its memory is kept for who comes after it"
    assert of(ev.PutRank, effects)
    assert of(ev.Try, bench.put(10, 1))
    bench.judge(10)
    assert bench.engine.tally.committed == 1
    assert of(ev.Release, bench.tick(KEEP_S))


def test_memory_is_not_released_while_it_is_read_even_after_the_verdict(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.say(1, handoff(10, 1))
    bench.say(2, say.Forfeit(10, 1, "failed", "x"))
    bench.judge(10, FAILED)
    bench.say(1, say.Goodbye())
    assert not of(ev.Release, bench.effects)
    effects = bench.store(10, 1)
    assert of(ev.Release, effects)
    assert not of(ev.PutRank, effects)


def test_a_new_arena_replaces_the_old_one_once_nothing_is_read_from_it(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    assert not of(ev.Release, bench.say(1, say.Arena(2, 2, 16384)))
    assert of(ev.Release, bench.store(10, 1)) == [ev.Release(1, 1)]


def test_d6_a_watch_after_a_new_start_brings_the_verdict(bench: Bench) -> None:
    bench.join(1)
    effects = bench.say(1, say.Watch(10, 1, None))
    assert of(ev.Try, effects)
    assert said(say.Finished, bench.judge(10))[0].state == "committed"


def test_a_store_that_takes_nothing_makes_the_outcome_unknown(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    (end,) = of(ev.End, bench.on(ev.PartFailed(bench.part(10, 1), "gone")))
    for _ in range(100):
        effects = bench.on(ev.Undecided(end.step, "no answer"))
        if said(say.Finished, effects):
            break
        bench.tick(1.1)
    (finished,) = said(say.Finished, effects)
    assert finished.state == "unknown"
    assert bench.now - 100 >= GIVE_UP_S
    assert bench.engine.tally.unknown == 1


@pytest.mark.parametrize(
    "bad",
    [
        msgspec.structs.replace(hello(), protocol=99),
        msgspec.structs.replace(hello(), rank=5),
        msgspec.structs.replace(hello(), world_size=0),
        msgspec.structs.replace(hello(), attempt=0),
        msgspec.structs.replace(hello(), attempt=10_000),
        msgspec.structs.replace(hello(), commit_timeout_s=0.0),
    ],
)
def test_s6_a_hello_that_makes_no_sense_is_refused(bench: Bench, bad: say.Hello) -> None:
    effects = bench.say(1, bad)
    assert said(say.Refused, effects)
    assert of(ev.Drop, effects)
    assert not bench.engine.clients


def test_p5_another_job_cannot_take_an_attempt_over(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    effects = bench.say(2, msgspec.structs.replace(hello(1, 2), token="other"))
    assert "another job" in said(say.Refused, effects)[0].reason


@pytest.mark.parametrize(
    "message",
    [
        handoff(10, 1),
        msgspec.structs.replace(handoff(10, 1), recipe=7),
        msgspec.structs.replace(handoff(10, 1), arena=7),
        msgspec.structs.replace(handoff(10, 1), slot=2),
        msgspec.structs.replace(handoff(10, 1), step=1 << 47),
        msgspec.structs.replace(handoff(10, 1), values=b"[1]"),
        msgspec.structs.replace(handoff(10, 1), values=b"{" * 100_000),
        msgspec.structs.replace(handoff(10, 1), previous="../../etc"),
    ],
)
def test_s6_a_handoff_that_refers_to_nothing_drops_the_client(
    bench: Bench, message: say.Handoff
) -> None:
    if message == handoff(10, 1):  # before anything was announced
        bench.say(1, hello())
        bench.on(ev.Opened(1))
    else:
        bench.join(1)
    effects = bench.say(1, message)
    assert said(say.Refused, effects)
    assert not of(ev.Store, effects)


def test_s6_messages_before_the_hello_or_the_welcome_are_refused(bench: Bench) -> None:
    assert said(say.Refused, bench.say(1, recipe()))
    bench.say(2, hello())
    assert said(say.Refused, bench.say(2, say.Watch(1, 1, None)))


def test_a_root_that_cannot_be_opened_is_told_to_the_trainer(bench: Bench) -> None:
    bench.say(1, hello())
    effects = bench.on(ev.Opened(1, "CheckpointNotFoundError", "no ckptd root at /root"))
    assert said(say.Refused, effects)[0].kind == "CheckpointNotFoundError"
    assert of(ev.Drop, effects)


def test_settle_waits_for_what_an_earlier_attempt_handed_off(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    bench.join(2, attempt=2)
    assert not said(say.Settled, bench.say(2, say.Settle()))
    bench.store(10, 1)
    bench.put(10, 1)
    assert said(say.Settled, bench.judge(10), 2)


def test_settle_waits_neither_for_later_attempts_nor_for_other_roots(bench: Bench) -> None:
    bench.join(1, attempt=3)
    assert of(ev.Store, bench.say(1, handoff(10, 1)))
    bench.join(2, root="/other")
    assert of(ev.Store, bench.say(2, handoff(10, 1)))
    bench.join(3, attempt=2)
    assert said(say.Settled, bench.say(3, say.Settle()), 3)


def test_settle_does_not_wait_for_ranks_that_nobody_hears_of(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.write(1, 10, 1)
    bench.on(ev.Gone(1, is_dead=False))
    bench.judge(10, WAITING)
    bench.join(2, attempt=2)
    assert said(say.Settled, bench.say(2, say.Settle()))


def test_settle_does_not_wait_for_a_part_that_waits_for_a_step_of_such_ranks(bench: Bench) -> None:
    """The daemon of rank 1 is dead: neither step will ever be whole, and nobody here can hurry."""
    bench.join(1, rank=0, world_size=2)
    bench.write(1, 10, 1)
    bench.judge(10, WAITING)
    bench.say(1, handoff(20, 2))
    assert not of(ev.PutRank, bench.store(20, 2)), "it is to name step 10, if that is committed"
    bench.on(ev.Gone(1, is_dead=True))
    bench.join(2, rank=0, world_size=1, attempt=2)
    assert said(say.Settled, bench.say(2, say.Settle()))


def test_the_report_is_json_without_storage_options(bench: Bench) -> None:
    bench.say(1, msgspec.structs.replace(hello(), storage_options={"secret": "canary"}))
    bench.on(ev.Opened(1))
    bench.say(1, say.Arena(1, 2, 8192))
    bench.say(1, recipe())
    bench.say(1, handoff(10, 1))
    (report,) = said(say.Report, bench.say(9, say.Ask()))
    body = msgspec.json.decode(report.body)
    assert body["jobs"][0]["open"][0]["parts"] == {"0": "storing"}
    assert b"canary" not in report.body


def test_an_engine_that_drains_ends_when_it_is_done_and_nobody_is_here(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    assert not of(ev.Exit, bench.on(ev.StopAsked(bench.now + 30)))
    assert not of(ev.Exit, bench.on(ev.Gone(1, is_dead=True)))
    bench.store(10, 1)
    bench.put(10, 1)
    assert of(ev.Exit, bench.judge(10)) == [ev.Exit(0)]


def test_p6_a_drain_that_takes_too_long_ends_with_another_code(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.StopAsked(bench.now + 30))
    assert of(ev.Exit, bench.tick(31)) == [ev.Exit(6)]


def test_the_engine_leaves_after_the_last_goodbye() -> None:
    bench = Bench(linger_s=600)
    assert not of(ev.Exit, bench.tick())
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    assert not of(ev.Exit, bench.say(1, say.Goodbye()))
    assert of(ev.Exit, bench.say(2, say.Goodbye()))


def test_the_engine_lingers_after_a_client_vanished() -> None:
    bench = Bench(linger_s=600)
    bench.join(1)
    bench.on(ev.Gone(1, is_dead=True))
    assert not of(ev.Exit, bench.tick(599))
    assert of(ev.Exit, bench.tick(2))


def test_a_goodbye_replaces_an_earlier_vanishing_only_if_someone_came_after_it() -> None:
    bench = Bench(linger_s=600)
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.on(ev.Gone(1, is_dead=True))
    assert not of(ev.Exit, bench.say(2, say.Goodbye()))
    bench.join(3, attempt=2)
    assert of(ev.Exit, bench.say(3, say.Goodbye()))


def test_closed_steps_are_forgotten_in_the_end() -> None:
    job = Job("/root", 1, 1, "t")
    for step in range(200):
        opened = job.step_of(step, step + 1, 0.0, hello())
        job.close(opened, FAILED)
    assert len(job.closed) == 64
    assert min(job.closed).step == 136, "the newest are kept"


def test_a_lonely_engine_that_is_a_service_stays(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, say.Goodbye())
    assert not of(ev.Exit, bench.tick(1e6))


def test_memory_is_kept_from_snapshot_to_snapshot_and_given_back_once_after_a_while(
    bench: Bench,
) -> None:
    bench.join(1)
    assert not of(ev.Idle, bench.tick(TRIM_S + 1)), "there is none yet"
    for step in (10, 20):
        bench.write(1, step, step // 10)
        bench.judge(step)
        assert not of(ev.Idle, bench.tick(TRIM_S - 1))
    assert bench.engine.next_due() == pytest.approx(bench.now + 1)
    assert of(ev.Idle, bench.tick(2)) == [ev.Idle()]
    assert not of(ev.Idle, bench.tick(TRIM_S + 1))
