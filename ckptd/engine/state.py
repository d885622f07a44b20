"""The daemon's decisions: events in, effects out, no I/O, no clock of its own.

One thread owns an engine. `on` takes an event and the time of a monotonic clock and returns what
must be done; the answers come back as events.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from ckptd.engine import events as ev
from ckptd.engine.clients import Client, JobKey, let_go, problem_with
from ckptd.engine.events import Effect, Event
from ckptd.engine.jobs import Job, forget_older, replace
from ckptd.engine.lifetime import TRIM_S, Lifetime
from ckptd.engine.memory import KEEP_S, Memory
from ckptd.engine.parts import Parts
from ckptd.engine.replies import finished, refuse
from ckptd.engine.report import report
from ckptd.engine.steps import Step
from ckptd.engine.tally import Tally
from ckptd.errors import DaemonUnavailableError, ProtocolError, SaveUnknownError
from ckptd.pipeline.commit import Verdict
from ckptd.wire import messages as say


class Engine:
    """All jobs that one daemon serves; `linger_s` and `trim_s` as in `Lifetime`."""

    def __init__(self, *, linger_s: float | None, trim_s: float = TRIM_S) -> None:
        self.jobs: dict[JobKey, Job] = {}
        self.clients: dict[int, Client] = {}
        self.tally = Tally()
        self.lifetime = Lifetime(linger_s, trim_s)
        keep_s = KEEP_S if linger_s is None else linger_s
        self.memory = Memory(self.clients, keep_s, secrets.token_hex(8))
        self.parts = Parts(self.jobs, self.clients, self.tally)

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
        times = [step.next_due() for step in self._steps()]
        times += [self.lifetime.next_due(), self.memory.next_due()]
        return min((due for due in times if due is not None), default=None)

    def _dispatch(self, event: Event, now: float) -> Iterator[Effect]:
        match event:
            case ev.Said():
                yield from self._said(event, now)
            case ev.Mapped():
                yield from self._mapped(event)
            case ev.Restored():
                self.memory.restore(event, now)
            case ev.Gone():
                yield from self._gone(event, now)
            case ev.Opened():
                yield from self._opened(event, now)
            case ev.ChunksStored():
                yield from self.parts.chunks_stored(event)
            case ev.RankPut():
                yield from self.parts.rank_put(event)
            case ev.PartFailed():
                yield from self.parts.failed(event)
            case ev.Judged():
                yield from self._judged(event, now)
            case ev.Undecided():
                yield from self._undecided(event, now)
            case ev.StopAsked():
                self.lifetime.stop(event.deadline)

    def _said(self, event: ev.Said, now: float) -> Iterator[Effect]:
        message = event.message
        if isinstance(message, say.Hello):
            yield from self._hello(event, message, now)
            return
        if isinstance(message, say.Ask):
            yield ev.Send(event.client, say.Report(report(self, now)))
            return
        if isinstance(message, say.Preempt):
            yield from self._pass_on(event.client, message)
            return
        client = self.clients.get(event.client)
        if client is None:
            yield from refuse(event.client, "the first message must be a hello")
            return
        if not client.is_here:
            return  # what it had said before it was told to go
        try:
            yield from self._answers(client, message, now)
        except ProtocolError as error:
            yield from self._expel(client, str(error), now)

    def _mapped(self, event: ev.Mapped) -> Iterator[Effect]:
        client = self.clients.get(event.client)
        if client is None:
            yield from refuse(event.client, "the first message must be a hello")
        if client is None or not client.is_here:
            yield ev.Release(event.client, event.message.arena)
            return
        client.give_arena(event.message, event.identity)
        # First, since others that had the same memory may let go of it now.
        yield ev.KeepArena(client.number, event.message, client.pid)
        yield from let_go(self.clients, client)
        yield from self.memory.inherit(client)

    def _pass_on(self, number: int, preempt: say.Preempt) -> Iterator[Effect]:
        told = [
            client.number for client in self.clients.values()
            if client.is_here and preempt.root in ("", client.hello.root)
        ]  # fmt: skip
        for client in told:
            yield ev.Send(client, say.Stop(preempt.reason))
        yield ev.Send(number, say.Told(len(told)))

    def _answers(self, client: Client, message: say.FromTrainer, now: float) -> Iterator[Effect]:
        match message:
            case say.Arena():
                yield from self._mapped(ev.Mapped(client.number, message, 0))
            case say.Recipe():
                client.add_recipe(message)
            case say.Handoff():
                yield from self.parts.handoff(client, self._job(client), message, now)
            case say.Watch():
                yield from self.parts.watch(client, self._job(client), message, now)
            case say.Forfeit():
                yield from self.parts.forfeit(client, self._job(client), message, now)
            case say.Settle():
                client.is_settling = True
            case say.Seek():
                yield from self.memory.show(client)
            case say.Borrow():
                yield from self.memory.lend(client, message)
            case say.Claim():
                client.claim = message
            case say.Goodbye():
                gone = ev.Gone(client.number, is_dead=False)
                yield from self._gone(gone, now, is_final=not message.keeps)

    # --- clients -------------------------------------------------------------------------------

    def _hello(self, event: ev.Said, hello: say.Hello, now: float) -> Iterator[Effect]:
        number = event.client
        problem = problem_with(hello)
        job = self.jobs.get((hello.root, hello.attempt))
        is_taken = job is not None and job.is_of_another(hello) and not self._replace(job)
        if number in self.clients:
            yield from self._expel(self.clients[number], "a second hello on one connection", now)
            return
        if problem:
            yield from refuse(number, problem)
            return
        # While it drains, the ranks of a job that is here may come back with their last snapshot.
        is_too_late = self.is_draining and job is None
        if is_too_late or is_taken:
            why = f"attempt {hello.attempt} of this root belongs to another job that is still here"
            reason = "the daemon is stopping" if is_too_late else why
            yield from refuse(number, reason, DaemonUnavailableError.__name__)
            return
        for old in list(self.clients.values()):
            if old.is_here and (old.job, old.hello.rank) == (
                (hello.root, hello.attempt),
                hello.rank,
            ):
                yield ev.Drop(old.number)
                yield from self._gone(ev.Gone(old.number, is_dead=False), now)
        client = Client(number, hello, pid=event.pid)
        self.clients[number] = client
        self.memory.came(client)
        self.lifetime.came()
        yield ev.Open(number, hello)

    def _opened(self, event: ev.Opened, now: float) -> Iterator[Effect]:
        client = self.clients.get(event.client)
        if client is None:
            return
        hello = client.hello
        if event.kind:
            yield from self._expel(client, event.reason, now, event.kind)
            return
        job = self.jobs.setdefault(
            client.job, Job(hello.root, hello.attempt, hello.world_size, hello.token)
        )
        job.welcome(hello.rank)
        in_use = {c.job for c in self.clients.values() if c.is_here or c.reading}
        forget_older(self.jobs, hello, in_use)
        yield ev.Send(client.number, say.Welcome())

    def _replace(self, job: Job) -> bool:
        """Forget a job whose attempt another one has claimed, if nothing of it is left at work."""
        is_used = any(
            client.is_here or client.reading
            for client in self.clients.values()
            if client.job == (job.root, job.attempt)
        )
        return not is_used and replace(self.jobs, job)

    def _gone(self, event: ev.Gone, now: float, *, is_final: bool = False) -> Iterator[Effect]:
        """Note that a client left, or `is_final` that it said goodbye and will not come again."""
        client = self.clients.get(event.client)
        if client is not None and client.is_here:
            yield from self._left(client, now, is_final=is_final)
        if event.is_dead:
            self.memory.died(event.client)
            for job in self.jobs.values():
                job.note_dead(event.client)

    def _left(self, client: Client, now: float, *, is_final: bool) -> Iterator[Effect]:
        client.is_here = client.is_settling = False
        client.claim = None
        if is_final:
            yield from self.memory.forget(client)
        else:
            self.lifetime.vanished()
            yield from self.memory.keep(client, now)
            if client.job in self.jobs:
                self.jobs[client.job].note_vanished(client.hello.rank, client.number)
        yield from let_go(self.clients, client)

    def _expel(
        self, client: Client, reason: str, now: float, kind: str = ProtocolError.__name__
    ) -> Iterator[Effect]:  # fmt: skip
        """Tell a client why, and end its connection; the socket's side reports no end of its own."""
        yield from refuse(client.number, reason, kind)
        yield from self._gone(ev.Gone(client.number, is_dead=False), now)

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
                yield from self.parts.put_if_free(job, other, other.parts[0])
        if verdict.state == "committed":
            yield from self.memory.forget_before((job.root, job.attempt))

    def _answered(self, key: ev.StepKey, now: float) -> tuple[Job, Step] | None:
        """Take the busy mark off a step after an operation on it was answered."""
        job = self.jobs.get((key.root, key.id.attempt))
        step = job.steps.get(key.id) if job else None
        if job is None or step is None:
            return None
        step.is_busy = False
        step.wait(now)
        return job, step

    # --- what is due ---------------------------------------------------------------------------

    def _due(self, now: float) -> Iterator[Effect]:
        for job in list(self.jobs.values()):
            ranks = {
                c.hello.rank for c in self.clients.values()
                if c.job == (job.root, job.attempt) and (c.is_here or c.reading)
            }  # fmt: skip
            is_all_local = len(ranks) == job.world_size
            for step in list(job.steps.values()):
                operation = step.next_operation(
                    now, world_size=job.world_size, is_all_local=is_all_local
                )
                if operation is not None:
                    yield operation
        yield from self._settled()
        yield from self.memory.due(now)
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
