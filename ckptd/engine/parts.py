"""What each rank delivers to a step, from its handoff to its durable rank manifest."""

from __future__ import annotations

from collections.abc import Iterator

from ckptd.engine import events as ev
from ckptd.engine.clients import Client, JobKey, let_go
from ckptd.engine.events import Effect, PartKey
from ckptd.engine.jobs import Job
from ckptd.engine.keeper import Snapshot
from ckptd.engine.replies import decode_values, finished, parse_id
from ckptd.engine.steps import Closed, Part, Step
from ckptd.engine.tally import Tally
from ckptd.pipeline.commit import new_outcome
from ckptd.wire import messages as say


class Parts:
    """The parts of all open steps. Jobs, clients and tally are the engine's."""

    def __init__(
        self, jobs: dict[JobKey, Job], clients: dict[int, Client], tally: Tally
    ) -> None:  # fmt: skip
        self._jobs = jobs
        self._clients = clients
        self._tally = tally

    def handoff(
        self, client: Client, job: Job, handoff: say.Handoff, now: float
    ) -> Iterator[Effect]:
        """Take a snapshot.

        Raises:
            ProtocolError: it makes no sense.
        """
        recipe = client.recipe_of(handoff)
        step_id = job.step_id(handoff.step)
        values = decode_values(handoff.values)
        job.hear_of(handoff.previous)
        parse_id(handoff.basis)
        snapshot = client.snapshots[handoff.slot] = Snapshot(client.hello, handoff, recipe)
        # Before the word that lets the trainer die.
        yield ev.Keep(client.number, handoff.arena, handoff.slot, snapshot)
        yield ev.Send(client.number, say.Taken(handoff.step, handoff.sequence))
        if step_id in job.closed:
            yield from self._late(client, handoff.sequence, job.closed[step_id])
            return
        step = job.step_of(handoff.step, handoff.sequence, now, client.hello)
        if step.sequence != handoff.sequence:
            return  # its word comes with the step's verdict
        if client.hello.rank in step.parts:
            yield from self._again(client, step, handoff)
            return
        key = PartKey(step.key, client.hello.rank, handoff.sequence)
        client.reading[key] = handoff.arena
        part = Part(key, client.number, "storing", handoff, recipe, values)
        step.parts[client.hello.rank] = part
        yield ev.Store(
            key,
            client.number,
            handoff.arena,
            handoff.slot,
            handoff.generation,
            recipe,
            client.hello,
            part.is_urgent,
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

    def watch(self, client: Client, job: Job, watch: say.Watch, now: float) -> Iterator[Effect]:
        """Report the outcome of a step whose part a former daemon wrote."""
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

    def forfeit(
        self, client: Client, job: Job, forfeit: say.Forfeit, now: float
    ) -> Iterator[Effect]:
        """Record that a rank delivers nothing."""
        rank = client.hello.rank
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

    def chunks_stored(self, event: ev.ChunksStored) -> Iterator[Effect]:
        """Go on with a part whose chunks are durable."""
        yield from self._was_read(event.part)
        found = self._part(event.part)
        if found is None:
            return
        job, step, part = found
        part.chunks = event.chunks
        part.state = "held"
        self._tally.raw_bytes += sum(chunk.raw_bytes for chunk in event.chunks)
        self._tally.stored_bytes += sum(chunk.stored_bytes for chunk in event.chunks)
        yield from self.put_if_free(job, step, part)

    def put_if_free(self, job: Job, step: Step, part: Part) -> Iterator[Effect]:
        """Put a stored part's rank manifest, unless it is rank 0's and an earlier step is open.

        An urgent one does not wait for that: it names the newest checkpoint known by now.
        """
        is_free = part.key.rank != 0 or part.is_urgent or job.is_first_open(step)
        if part.state == "held" and is_free:
            part.state = "putting"
            yield ev.PutRank(part.key, job.rank_manifest(part), job.basis_of(part))

    def rank_put(self, event: ev.RankPut) -> Iterator[Effect]:
        """Go on with a part whose rank manifest is durable."""
        found = self._part(event.part)
        if found is None:
            return
        _, step, part = found
        part.state = "written"
        step.hurry()
        yield ev.Send(part.client, say.Written(step.key.id.step, step.sequence))

    def failed(self, event: ev.PartFailed) -> Iterator[Effect]:
        """Forfeit for a part that cannot be stored."""
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
        for client in list(self._clients.values()):
            if client.reading.pop(part, None) is not None:
                yield from let_go(self._clients, client)

    def _late(self, client: Client, sequence: int, closed: Closed) -> Iterator[Effect]:
        """Answer a part of a step that has its verdict already."""
        if sequence == closed.sequence:
            yield ev.Send(client.number, say.Written(closed.step, sequence))
        yield ev.Send(client.number, finished(sequence, closed))

    def _part(self, key: PartKey) -> tuple[Job, Step, Part] | None:
        job = self._jobs.get((key.step.root, key.step.id.attempt))
        step = job.steps.get(key.step.id) if job else None
        part = step.parts.get(key.rank) if step else None
        if job is None or step is None or part is None or part.key != key:
            return None
        return job, step, part
