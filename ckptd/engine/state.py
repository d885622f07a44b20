"""The daemon's decisions: events in, effects out, no I/O, no clock of its own.

One thread owns an engine. `on` takes an event and the time of a monotonic clock and returns what
must be done; the answers come back as events.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptd.engine import events as ev
from ckptd.engine.clients import Client, JobKey, problem_with
from ckptd.engine.events import Effect, Event, PartKey
from ckptd.engine.jobs import Job, forget_older, replace
from ckptd.engine.lifetime import TRIM_S, Lifetime
from ckptd.engine.replies import decode_values, finished, refuse
from ckptd.engine.report import report
from ckptd.engine.steps import Closed, Part, Step
from ckptd.engine.tally import Tally
from ckptd.errors import DaemonUnavailableError, ProtocolError, SaveUnknownError
from ckptd.pipeline.commit import Verdict, new_outcome
from ckptd.wire import messages as say


class Engine:
    """All jobs that one daemon serves; `linger_s` and `trim_s` as in `Lifetime`."""

    def __init__(self, *, linger_s: float | None, trim_s: float = TRIM_S) -> None:
        self.jobs: dict[JobKey, Job] = {}
        self.clients: dict[int, Client] = {}
        self.tally = Tally()
        self.lifetime = Lifetime(linger_s, trim_s)

    # --- events --------------------------------------------------------------------------------

    def on(self, event: Event, now: float) -> list[Effect]:
        """Take an event; return what must be done because of it."""
        effects = list(self._dispatch(event, now))
        effects += self._due(now)
        return effects

    @property
    def is_draining(self) -> bool:
        """Tell whether new work is refused."""
        return self.lifetime.is_draining

    def next_due(self) -> float | None:
        """Return when the engine wants a `Tick`, on the clock given to `on`; None if never."""
        times = [*(step.next_due() for step in self._steps()), self.lifetime.next_due()]
        return min((due for due in times if due is not None), default=None)

    def _dispatch(self, event: Event, now: float) -> Iterator[Effect]:
        if isinstance(event, ev.Said):
            yield from self._said(event, now)
        elif isinstance(event, ev.Gone):
            yield from self._gone(event)
        elif isinstance(event, ev.Opened):
            yield from self._opened(event)
        elif isinstance(event, ev.ChunksStored):
            yield from self._chunks_stored(event)
        elif isinstance(event, ev.RankPut):
            yield from self._rank_put(event)
        elif isinstance(event, ev.PartFailed):
            yield from self._part_failed(event)
        elif isinstance(event, ev.Judged):
            yield from self._judged(event, now)
        elif isinstance(event, ev.Undecided):
            yield from self._undecided(event, now)
        elif isinstance(event, ev.StopAsked):
            self.lifetime.stop(event.deadline)

    def _said(self, event: ev.Said, now: float) -> Iterator[Effect]:
        message = event.message
        if isinstance(message, say.Hello):
            yield from self._hello(event.client, message)
            return
        if isinstance(message, say.Ask):
            yield ev.Send(event.client, say.Report(report(self, now)))
            return
        client = self.clients.get(event.client)
        if client is None:
            yield from refuse(event.client, "the first message must be a hello")
            return
        try:
            yield from self._answers(client, message, now)
        except ProtocolError as error:
            yield from self._expel(client, str(error))

    def _answers(self, client: Client, message: say.FromTrainer, now: float) -> Iterator[Effect]:
        if isinstance(message, say.Arena):
            client.give_arena(message)
            yield from self._let_go(client)
        elif isinstance(message, say.Recipe):
            client.add_recipe(message)
        elif isinstance(message, say.Handoff):
            yield from self._handoff(client, message, now)
        elif isinstance(message, say.Watch):
            yield from self._watch(client, message, now)
        elif isinstance(message, say.Forfeit):
            yield from self._forfeit(client, message, now)
        elif isinstance(message, say.Settle):
            client.is_settling = True
        elif isinstance(message, say.Goodbye):
            yield from self._gone(ev.Gone(client.number, is_dead=False), is_goodbye=True)

    # --- clients -------------------------------------------------------------------------------

    def _hello(self, number: int, hello: say.Hello) -> Iterator[Effect]:
        problem = problem_with(hello)
        job = self.jobs.get((hello.root, hello.attempt))
        is_taken = job is not None and job.is_of_another(hello) and not self._replace(job)
        if number in self.clients:
            yield from self._expel(self.clients[number], "a second hello on one connection")
            return
        if problem:
            yield from refuse(number, problem)
            return
        if self.is_draining or is_taken:
            why = f"attempt {hello.attempt} of this root belongs to another job that is still here"
            reason = "the daemon is stopping" if self.is_draining else why
            yield from refuse(number, reason, DaemonUnavailableError.__name__)
            return
        for old in list(self.clients.values()):
            if old.is_here and (old.job, old.hello.rank) == (
                (hello.root, hello.attempt),
                hello.rank,
            ):
                yield ev.Drop(old.number)
                yield from self._gone(ev.Gone(old.number, is_dead=False))
        client = Client(number, hello)
        self.clients[number] = client
        self.lifetime.came()
        yield ev.Open(number, hello)

    def _opened(self, event: ev.Opened) -> Iterator[Effect]:
        client = self.clients.get(event.client)
        if client is None:
            return
        hello = client.hello
        if event.kind:
            yield from self._expel(client, event.reason, event.kind)
            return
        job = self.jobs.setdefault(
            client.job, Job(hello.root, hello.attempt, hello.world_size, hello.token)
        )
        job.welcome(hello.rank)
        forget_older(self.jobs, hello, {client.job for client in self.clients.values()})
        yield ev.Send(client.number, say.Welcome())

    def _replace(self, job: Job) -> bool:
        """Forget a job whose attempt another one has claimed, if nothing of it is left at work."""
        is_used = any(
            client.is_here or client.reading
            for client in self.clients.values()
            if client.job == (job.root, job.attempt)
        )
        return not is_used and replace(self.jobs, job)

    def _gone(self, event: ev.Gone, *, is_goodbye: bool = False) -> Iterator[Effect]:
        client = self.clients.get(event.client)
        if client is not None and client.is_here:
            client.is_here = client.is_settling = False
            if not is_goodbye:
                self.lifetime.vanished()
                if client.job in self.jobs:
                    self.jobs[client.job].note_vanished(client.hello.rank, client.number)
            yield from self._let_go(client)
        if event.is_dead:
            for job in self.jobs.values():
                job.note_dead(event.client)

    def _expel(
        self, client: Client, reason: str, kind: str = ProtocolError.__name__
    ) -> Iterator[Effect]:  # fmt: skip
        """Tell a client why, and end its connection; the socket's side reports no end of its own."""
        yield from refuse(client.number, reason, kind)
        yield from self._gone(ev.Gone(client.number, is_dead=False))

    def _let_go(self, client: Client) -> Iterator[Effect]:
        """Release arenas that are no longer needed, and forget a client that left nothing behind."""
        yield from client.release()
        if not client.is_here and not client.arenas:
            self.clients.pop(client.number, None)

    # --- parts ---------------------------------------------------------------------------------

    def _handoff(self, client: Client, handoff: say.Handoff, now: float) -> Iterator[Effect]:
        job = self._job(client)
        recipe = client.recipe_of(handoff)
        step_id = job.step_id(handoff.step)
        values = decode_values(handoff.values)
        job.hear_of(handoff.previous)
        if step_id in job.closed:
            yield from self._late(client, handoff.sequence, job.closed[step_id])
            return
        if self.is_draining and step_id not in job.steps:
            yield from self._expel(
                client, "the daemon is stopping", DaemonUnavailableError.__name__
            )
            return
        step = job.step_of(handoff.step, handoff.sequence, now, client.hello)
        if step.sequence != handoff.sequence:
            return  # its word comes with the step's verdict
        if client.hello.rank in step.parts:
            yield from self._again(client, step, handoff)
            return
        key = PartKey(step.key, client.hello.rank, handoff.sequence)
        client.reading[key] = handoff.arena
        step.parts[client.hello.rank] = Part(key, client.number, "storing", handoff, recipe, values)
        yield ev.Store(
            key,
            client.number,
            handoff.arena,
            handoff.slot,
            handoff.generation,
            recipe,
            client.hello,
        )

    def _again(self, client: Client, step: Step, handoff: say.Handoff) -> Iterator[Effect]:
        """Take a part that is here already: the connection was lost, this daemon was not."""
        part = step.parts[client.hello.rank]
        if part.client == client.number:
            step.fail(f"rank {client.hello.rank} handed step {handoff.step} off twice", ())
            return
        part.client = client.number
        if part.state == "written":
            yield ev.Send(client.number, say.Written(handoff.step, handoff.sequence))

    def _watch(self, client: Client, watch: say.Watch, now: float) -> Iterator[Effect]:
        job = self._job(client)
        step_id = job.step_id(watch.step)
        job.hear_of(watch.previous)
        if step_id in job.closed:
            yield from self._late(client, watch.sequence, job.closed[step_id])
            return
        step = job.step_of(watch.step, watch.sequence, now, client.hello)
        if step.sequence != watch.sequence:
            return
        step.is_watched = True
        key = PartKey(step.key, client.hello.rank, watch.sequence)
        step.parts.setdefault(client.hello.rank, Part(key, client.number, "written"))

    def _forfeit(self, client: Client, forfeit: say.Forfeit, now: float) -> Iterator[Effect]:
        job, rank = self._job(client), client.hello.rank
        step_id = job.step_id(forfeit.step)
        if step_id in job.closed:
            yield from self._late(client, forfeit.sequence, job.closed[step_id])
            return
        step = job.step_of(forfeit.step, forfeit.sequence, now, client.hello)
        step.forfeit(
            new_outcome(
                step_id, rank, job.world_size, forfeit.sequence, forfeit.state, forfeit.reason
            )
        )

    def _chunks_stored(self, event: ev.ChunksStored) -> Iterator[Effect]:
        yield from self._was_read(event.part)
        found = self._part(event.part)
        if found is None:
            return
        job, step, part = found
        part.chunks = event.chunks
        part.state = "held"
        self.tally.raw_bytes += sum(chunk.raw_bytes for chunk in event.chunks)
        self.tally.stored_bytes += sum(chunk.stored_bytes for chunk in event.chunks)
        yield from self._put_if_free(job, step, part)

    def _put_if_free(self, job: Job, step: Step, part: Part) -> Iterator[Effect]:
        """Put a stored part's rank manifest, unless it is rank 0's and an earlier step is open."""
        if part.state == "held" and (part.key.rank != 0 or job.is_first_open(step)):
            part.state = "putting"
            yield ev.PutRank(part.key, job.rank_manifest(part))

    def _rank_put(self, event: ev.RankPut) -> Iterator[Effect]:
        found = self._part(event.part)
        if found is None:
            return
        _, step, part = found
        part.state = "written"
        step.hurry()
        yield ev.Send(part.client, say.Written(step.key.id.step, step.sequence))

    def _part_failed(self, event: ev.PartFailed) -> Iterator[Effect]:
        yield from self._was_read(event.part)
        found = self._part(event.part)
        if found is None:
            return
        job, step, _ = found
        rank = event.part.rank
        del step.parts[rank]
        step.forfeit(
            new_outcome(step.key.id, rank, job.world_size, step.sequence, "failed", event.reason)
        )

    def _was_read(self, part: PartKey) -> Iterator[Effect]:
        """Note that a part's slot is not being read any more."""
        for client in list(self.clients.values()):
            if client.reading.pop(part, None) is not None:
                yield from self._let_go(client)

    # --- verdicts ------------------------------------------------------------------------------

    def _judged(self, event: ev.Judged, now: float) -> Iterator[Effect]:
        found = self._answered(event.step, now)
        if found is None:
            return
        job, step = found
        if event.verdict.state == "waiting":
            step.missing = event.verdict.ranks or step.missing
        else:
            yield from self._close(job, step, event.verdict, now)

    def _undecided(self, event: ev.Undecided, now: float) -> Iterator[Effect]:
        self.tally.store_errors += 1
        found = self._answered(event.step, now)
        if found is not None and found[1].is_hopeless(now):
            reason = f"{event.reason}; the store took neither the checkpoint nor its tombstone"
            verdict = Verdict("unknown", SaveUnknownError.__name__, reason)
            yield from self._close(*found, verdict, now)

    def _close(self, job: Job, step: Step, verdict: Verdict, now: float) -> Iterator[Effect]:
        closed = job.close(step, verdict)
        self.tally.count(verdict, step.key.id, now)
        for client in self.clients.values():
            if client.job == (job.root, job.attempt) and client.is_here:
                sequence = step.saves.get(client.hello.rank, step.sequence)
                yield ev.Send(client.number, finished(sequence, closed))
        for other in list(job.steps.values()):
            if 0 in other.parts:
                yield from self._put_if_free(job, other, other.parts[0])

    def _answered(self, key: ev.StepKey, now: float) -> tuple[Job, Step] | None:
        """Take the busy mark off a step after an operation on it was answered."""
        job = self.jobs.get((key.root, key.id.attempt))
        step = job.steps.get(key.id) if job else None
        if job is None or step is None:
            return None
        step.is_busy = False
        step.wait(now)
        return job, step

    def _late(self, client: Client, sequence: int, closed: Closed) -> Iterator[Effect]:
        """Answer a part of a step that has its verdict already."""
        if sequence == closed.sequence:
            yield ev.Send(client.number, say.Written(closed.step, sequence))
        yield ev.Send(client.number, finished(sequence, closed))

    # --- what is due ---------------------------------------------------------------------------

    def _due(self, now: float) -> Iterator[Effect]:
        for job in list(self.jobs.values()):
            ranks = {
                c.hello.rank for c in self.clients.values() if c.job == (job.root, job.attempt)
            }
            is_all_local = len(ranks) == job.world_size
            for step in list(job.steps.values()):
                operation = step.next_operation(
                    now, world_size=job.world_size, is_all_local=is_all_local
                )
                if operation is not None:
                    yield operation
        yield from self._settled()
        is_idle = not any(True for _ in self._steps()) and not any(
            client.reading for client in self.clients.values()
        )
        has_clients = any(client.is_here for client in self.clients.values())
        yield from self.lifetime.check(now, is_idle=is_idle, has_clients=has_clients)

    def _settled(self) -> Iterator[Effect]:
        for client in self.clients.values():
            if client.is_settling and not any(
                job.is_undecided()
                for job in self.jobs.values()
                if job.root == client.hello.root and job.attempt < client.hello.attempt
            ):
                client.is_settling = False
                yield ev.Send(client.number, say.Settled())

    # --- looking things up ---------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        for job in self.jobs.values():
            yield from job.steps.values()

    def _job(self, client: Client) -> Job:
        if client.job not in self.jobs:
            raise ProtocolError("nothing may be said between hello and welcome")
        return self.jobs[client.job]

    def _part(self, key: PartKey) -> tuple[Job, Step, Part] | None:
        job = self.jobs.get((key.step.root, key.step.id.attempt))
        step = job.steps.get(key.step.id) if job else None
        part = step.parts.get(key.rank) if step else None
        if job is None or step is None or part is None or part.key != key:
            return None
        return job, step, part
