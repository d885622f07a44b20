"""What trainers that are gone left in memory, for those that come after them."""

from __future__ import annotations

from collections.abc import Iterator

from ckptd.engine.clients import Client, JobKey, let_go
from ckptd.engine.events import Effect, KeepArena, Lend, Restored, Send, ShowHeld
from ckptd.wire import messages as say

KEEP_S = 600.0


class Memory:
    """Arenas of clients that left without a final goodbye, each with its newest snapshots.

    An arena is kept until a newer attempt has a checkpoint, until somebody else has it, or for `keep_s`.
    It is ceded only once the process that wrote in it is dead: two writers would mix their bytes.

    Args:
        clients: of the engine, those that are gone too.
        keep_s: 0 keeps nothing.
        daemon: a name that tells this daemon from every other.
    """

    def __init__(self, clients: dict[int, Client], keep_s: float, daemon: str) -> None:
        self._clients = clients
        self._keep_s = keep_s
        self._daemon = daemon

    @property
    def kept(self) -> list[Client]:
        """The clients whose arenas are kept."""
        return [client for client in self._clients.values() if client.kept_until is not None]

    def came(self, client: Client) -> None:
        """Note a new connection: the process of that rank may have had others before."""
        for owner in self.kept:
            if owner.is_same_rank(client):
                owner.last = client.number
            if owner.claimant is not None and owner.claimant.is_same_rank(client):
                owner.claimant = client

    def died(self, number: int) -> None:
        """Note that the process behind a connection has ended; what it had claimed is free again.

        Not before: it may have begun to write there, whatever became of its connection.
        """
        for owner in self.kept:
            owner.is_dead = owner.is_dead or owner.last == number
            if owner.claimant is not None and owner.claimant.number == number:
                owner.claimant = None

    def keep(self, client: Client, now: float) -> Iterator[Effect]:
        """Keep what a client leaves, if there is anything.

        Of each rank of a root one arena is kept at most, however often a job dies.
        """
        if self._keep_s <= 0 or client.arena is None or not client.snapshots:
            return
        client.kept_until = now + self._keep_s
        same = [
            owner for owner in self.kept
            if owner.claimant is None
            and (owner.hello.root, owner.hello.rank) == (client.hello.root, client.hello.rank)
        ]  # fmt: skip
        newest = max(same, key=lambda owner: (owner.hello.attempt, owner is client))
        for owner in same:  # who was paused may leave long after others that came later
            if owner is not newest:
                yield from self._drop(owner)

    def restore(self, event: Restored, now: float) -> None:
        """Keep what a former daemon had; a trainer that lives comes back for it."""
        newest = max(event.snapshots.values(), key=lambda s: (s.hello.attempt, s.handoff.sequence))
        client = Client(event.client, newest.hello, is_here=False, is_dead=event.is_dead)
        client.give_arena(event.message, event.identity)
        client.snapshots = dict(event.snapshots)
        self._clients[client.number] = client
        client.kept_until = now + self._keep_s

    def forget(self, client: Client) -> Iterator[Effect]:
        """Keep nothing of a client that said goodbye for good, and nothing for it."""
        for owner in self.kept:
            if owner.claimant is client:
                owner.claimant = None
            if owner.last == client.number:
                yield from self._drop(owner)

    def inherit(self, heir: Client) -> Iterator[Effect]:
        """Give a client the snapshots that lie in the arena that it has just announced.

        What it had claimed and does not use is let go.
        """
        for former in self.kept:
            is_same = former.lies_in(heir.arena, heir.identity)
            if is_same:
                heir.snapshots = dict(former.snapshots)
            if is_same or former.claimant is heir:
                yield from self._drop(former)

    def show(self, client: Client) -> Iterator[Effect]:
        """Answer `Seek`."""
        found = []
        for owner in self.kept:
            if owner.arena is None or owner.hello.root != client.hello.root:
                continue
            for slot, snapshot in sorted(owner.snapshots.items()):
                hello, handoff = snapshot.hello, snapshot.handoff
                row = say.HeldSnapshot(
                    hello.attempt, hello.token, handoff.step, handoff.sequence, hello.rank,
                    hello.world_size, owner.number, slot, handoff.generation,
                )  # fmt: skip
                found.append((owner.arena.arena, row))
        yield ShowHeld(client.number, self._daemon, tuple(found))

    def lend(self, client: Client, wish: say.Borrow) -> Iterator[Effect]:
        """Answer `Borrow`."""
        owner = self._clients.get(wish.arena)
        snapshot = owner.snapshots.get(wish.slot) if owner else None
        if (
            owner is None or owner.kept_until is None or owner.arena is None or snapshot is None
            or owner.hello.root != client.hello.root
            or snapshot.handoff.generation != wish.generation
        ):  # fmt: skip
            yield Send(client.number, say.Lent(wish.arena))
            return
        arena = owner.arena
        message = say.Lent(
            wish.arena, arena.slots, arena.slot_bytes, snapshot.handoff, snapshot.recipe
        )  # fmt: skip
        yield Lend(client.number, message, (owner.number, arena.arena))

    def forget_before(self, job: JobKey) -> Iterator[Effect]:
        """Drop what earlier attempts left: this one has a checkpoint."""
        root, attempt = job
        for owner in self.kept:
            newest = max((s.hello.attempt for s in owner.snapshots.values()), default=0)
            if owner.hello.root == root and newest < attempt:
                yield from self._drop(owner)

    def next_due(self) -> float | None:
        """Return when `due` may have something without any event."""
        return min((c.kept_until for c in self.kept if c.kept_until is not None), default=None)

    def due(self, now: float) -> Iterator[Effect]:
        """Drop what was kept for long enough, and answer claims that can be answered now."""
        for owner in self.kept:
            if owner.kept_until is not None and now >= owner.kept_until:
                yield from self._drop(owner)
        for client in list(self._clients.values()):
            if client.is_here and client.claim is not None:
                yield from self._cede(client, client.claim)

    def _cede(self, client: Client, claim: say.Claim) -> Iterator[Effect]:
        left = [
            owner for owner in self.kept
            if owner.hello.root == client.hello.root and owner.is_dead
            # Its own claim, once more: the answer went down with a connection.
            and (owner.claimant is None or owner.claimant is client)
        ]  # fmt: skip
        is_late = client.arena is not None  # it has made one meanwhile
        fitting = [owner for owner in left if owner.has_room(claim) and not is_late]
        free = [owner for owner in fitting if not owner.reading]
        if fitting and not free:
            return  # its snapshot is still being stored: soon
        client.claim = None
        if free:
            chosen = min(free, key=lambda owner: _preference(owner, client))
            assert chosen.arena is not None
            chosen.claimant = client
            arena = chosen.arena
            yield KeepArena(chosen.number, arena, client.pid)
            yield Lend(
                client.number, say.Ceded(arena.slots, arena.slot_bytes),
                (chosen.number, arena.arena),
            )  # fmt: skip
            return
        # The client makes an arena of its own: one for one, so that memory does not grow.
        older = [o for o in left if o.hello.attempt < client.hello.attempt and not o.reading]
        if older:
            yield from self._drop(min(older, key=lambda owner: _preference(owner, client)))
        yield Send(client.number, say.Ceded())

    def _drop(self, owner: Client) -> Iterator[Effect]:
        owner.kept_until = None
        owner.snapshots = {}
        yield from let_go(self._clients, owner)


def _preference(owner: Client, client: Client) -> tuple[bool, int, int]:
    """The arena of the same rank first: it is as large as is needed. Then the largest."""
    assert owner.arena is not None
    return (owner.hello.rank != client.hello.rank, -owner.arena.slot_bytes, owner.number)
