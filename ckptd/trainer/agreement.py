"""The agreement on who writes what, carried out: a thread, the board, and the plans it leads to.

What is decided, and when, stands in `ckptd.trainer.rounds`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
import xxhash
import zstandard

from ckptd.errors import LayoutError, MeetingError
from ckptd.model.ready import make_ready
from ckptd.model.tensor import Layout
from ckptd.plan.holdings import Holdings, TensorNames, TensorTable, name_holdings
from ckptd.plan.replicas import check_replicas, common_parts
from ckptd.plan.split import Share, Splitter, split
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.rounds import (
    AgreementState,
    AskFloors,
    AskOffers,
    AskSeen,
    Compute,
    Effect,
    PutFloor,
    PutOffer,
    PutSeen,
    Seen,
    Withdraw,
)

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

MAX_LAYOUT_BYTES = 1 << 30
_YIELD_S = 0.005
_FIRST_DELAY_S, _LAST_DELAY_S = 0.02, 1.0


class Offer(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a rank holds: the digests of its layout and of its samples."""

    layout: str
    samples: str


make_ready(Offer, Seen)


class Agreed(NamedTuple):
    """The digest of the plan in force, and what this rank writes by it."""

    plan: str
    share: Share


class Agreement:
    """Finds out which boxes this rank writes, on a thread of its own; the trainer never waits.

    One thread may call `prepare` and `begin_save`; the others may be called from any. A board that
    fails ends the agreement quietly: a plan in force stays, otherwise the rank writes all it holds.
    """

    def __init__(self, meeting: Meeting, chunk_bytes: int) -> None:
        self._meeting = meeting
        self._chunk_bytes = chunk_bytes
        self._own: Layout | None = None  # the last one, which need not be fetched
        self._whole: tuple[str, Agreed] | None = None  # the plan of a job of one rank
        self._state = AgreementState()
        # Guards everything below and _state. Never held while the board is asked.
        self._changed = threading.Condition()
        self._queue: deque[Effect] = deque()
        self._offered: dict[int, tuple[Layout, bytes]] = {}  # until the board has them
        self._agreed: dict[int, Agreed] = {}
        self._error: LayoutError | None = None
        self._is_kicked = self._is_over = False
        # Touched by the thread alone: what it put on the board, the samples' digests by round.
        self._samples: dict[int, str] = {}
        self._shared_layout = ""
        self._thread = threading.Thread(target=self._run, name="ckptd-agreement", daemon=True)
        if meeting.world_size > 1:
            self._thread.start()

    def prepare(self, layout: Layout, fingerprints: bytes = b"") -> None:
        """Offer a layout before the first save. Without fingerprints replicas are not compared.

        Later calls, and calls after the first save, do nothing.
        """
        self._own, digest = layout, layout.digest()
        if self._meeting.world_size == 1:
            return
        with self._changed:
            if self._state.has_begun:
                return
            self._offer(0, layout, digest, fingerprints)

    def begin_save(
        self, sequence: int, layout: Layout, fingerprints: bytes | None
    ) -> Agreed | None:
        """Return what to write by the plan in force, None to write everything that is held.

        Never blocks on the network. `fingerprints` are 8 bytes for each held tensor, in order (as
        in a rank manifest), zeros or nothing at all meaning "not sampled". None, for
        a caller that took none because `is_planned`, leaves this save without an offer.

        Raises:
            LayoutError: the layouts of the ranks do not fit, or replicas differ: once on each rank,
                in the save after this was found. The next save starts another round.
        """
        self._own, digest = layout, layout.digest()
        if self._meeting.world_size == 1:
            return self._alone(layout, digest)
        with self._changed:
            error, self._error = self._error, None
            if error is not None:
                raise error
            self._offer(sequence, layout, digest, fingerprints)
            at = self._state.plan_for(sequence)
            return None if at is None else self._agreed[at.round]

    @property
    def is_planned(self) -> bool:
        """Whether a plan for the last layout is in force, so that fingerprints need not be taken."""
        if self._meeting.world_size == 1:
            return True
        with self._changed:
            return self._state.is_planned

    def planned(self, layout: Layout) -> Agreed | None:
        """Return the plan that a next save of this layout will find in force, if one is."""
        self._own, digest = layout, layout.digest()
        if self._meeting.world_size == 1:
            return self._alone(layout, digest)
        with self._changed:
            at = self._state.adopted
            return self._agreed[at.round] if at is not None and self._state.is_planned else None

    def wait_planned(self, timeout_s: float) -> bool:
        """Wait until a plan for the last layout is in force; False if it is not in time or never.

        An error that `begin_save` would raise ends the wait too.
        """
        if self._meeting.world_size == 1:
            return True
        with self._changed:
            self._changed.wait_for(
                lambda: self._state.is_planned or self._error or self._is_over, timeout_s
            )
            return self._state.is_planned

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread; one that waits for a dead board is left to its deadline. May be repeated."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _alone(self, layout: Layout, digest: str) -> Agreed:
        if self._whole is None or self._whole[0] != digest:
            plan = split([layout], self._chunk_bytes)
            self._whole = (digest, Agreed(plan.digest, plan.shares[0]))
        return self._whole[1]

    def _offer(
        self, sequence: int, layout: Layout, digest: str, fingerprints: bytes | None
    ) -> None:
        """Queue what a save brings. Called with the lock held."""
        effects = self._state.on_save(sequence, digest, may_offer=fingerprints is not None)
        if self._is_over:
            return
        if fingerprints is not None and any(isinstance(e, PutOffer) for e in effects):
            self._offered[sequence] = (layout, fingerprints)
        self._queue.extend(effects)
        self._is_kicked = True
        self._changed.notify_all()

    def _run(self) -> None:
        delay_s = _FIRST_DELAY_S
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._is_kicked or self._is_over,
                        delay_s if self._state.is_pending else None,
                    )
                    delay_s = _FIRST_DELAY_S if self._is_kicked else min(2 * delay_s, _LAST_DELAY_S)
                    self._is_kicked = False
                    is_over = self._is_over
                if not is_over:
                    # The save that woke this thread is about to copy, and needs the interpreter.
                    time.sleep(_YIELD_S)
                with self._changed:
                    self._queue.extend(self._state.on_poll())
                if not self._drain():
                    return
        except Exception as error:  # noqa: BLE001 (training goes on whatever happens here)
            self._give_up(error)

    def _drain(self) -> bool:
        """Carry out what is queued and what follows from it; False once the agreement is over."""
        while True:
            with self._changed:
                if self._is_over or not self._queue:
                    return not self._is_over
                effect = self._queue.popleft()
            self._do(effect)

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            was_over, self._is_over = self._is_over, True
            self._queue.clear()
            self._offered.clear()
            self._changed.notify_all()
        if not was_over:
            _log.warning(
                "rank %d can no longer agree with the others who writes what, and goes on as it is: %s",
                self._meeting.rank,
                error,
                exc_info=None if isinstance(error, MeetingError) else error,
            )

    def _do(self, effect: Effect) -> None:
        """Carry out one effect, and feed the answer to the state."""
        meeting = self._meeting
        match effect:
            case PutFloor(round_):
                meeting.publish("floor", str(round_).encode())
            case PutOffer(round_, layout):
                self._put_offer(round_, layout)
            case PutSeen(round_, seen):
                meeting.publish(f"seen/{round_}", msgspec.msgpack.encode(seen))
            case Withdraw(round_):
                self._withdraw(round_)
            case AskFloors():
                values = meeting.read_all("floor")
                floors = None if values is None else [int(value) for value in values]
                self._tell(lambda: self._state.on_floors(floors))
            case AskOffers(round_):
                is_complete = meeting.has_all(f"offer/{round_}")
                self._tell(lambda: self._state.on_offers(round_, is_complete=is_complete))
            case Compute(round_):
                self._compute(round_)
            case AskSeen(round_):
                values = meeting.read_all(f"seen/{round_}")
                all_seen = None if values is None else [_decode(value, Seen) for value in values]
                self._tell(lambda: self._state.on_seen(round_, all_seen))

    def _tell(self, event: Callable[[], list[Effect]]) -> None:
        """Feed an answer to the state, and queue what follows."""
        with self._changed:
            self._queue.extend(event())
            at = self._state.adopted
            self._agreed = {r: a for r, a in self._agreed.items() if at and r == at.round}
            self._changed.notify_all()

    def _put_offer(self, round_: int, digest: str) -> None:
        with self._changed:
            layout, fingerprints = self._offered.pop(round_)
        samples = _comparable(layout, fingerprints)
        offer = Offer(digest, xxhash.xxh3_128_hexdigest(samples))
        self._samples[round_] = offer.samples
        if digest != self._shared_layout:
            held = Holdings.of(layout, self._meeting.rank)
            table = held.table()
            name = xxhash.xxh3_128_hexdigest(table)
            # The table first, which most ranks have in common: what refers to it is there later.
            self._meeting.share(f"tensors/{name}", zstandard.compress(table))
            value = msgspec.msgpack.encode((name, held.pack()))
            self._meeting.share(f"layout/{digest}", zstandard.compress(value))
            self._shared_layout = digest
        self._meeting.share(f"samples/{round_}/{offer.samples}", zstandard.compress(samples))
        self._meeting.publish(f"offer/{round_}", msgspec.msgpack.encode(offer))

    def _withdraw(self, round_: int) -> None:
        self._meeting.withdraw(f"offer/{round_}")
        self._meeting.withdraw(f"seen/{round_}")
        self._meeting.forget(f"samples/{round_}/{self._samples.pop(round_)}")

    def _compute(self, round_: int) -> None:
        values = self._meeting.read_all(f"offer/{round_}")
        if values is None:
            return
        offers = [_decode(value, Offer) for value in values]
        layouts = self._fetch_layouts({offer.layout for offer in offers})
        try:
            self._compare(round_, offers, layouts)
            plan = Splitter([layouts[offer.layout] for offer in offers], self._chunk_bytes)
            share = plan.share(self._meeting.rank)
        except LayoutError as error:
            with self._changed:
                self._error = error
            self._tell(lambda: self._state.on_failed(round_))
            return
        with self._changed:
            before = self._agreed
            self._agreed = {**before, round_: Agreed(plan.digest, share)}
        self._tell(lambda: self._state.on_planned(round_, plan.digest))

    def _fetch_layouts(self, digests: set[str]) -> dict[str, Holdings]:
        """Return what ranks hold by the digest of their layout: one object for equal ones."""
        names = sorted(digests)
        values = self._fetch([f"layout/{digest}" for digest in names])
        pairs = [_decode(value, tuple[str, bytes]) for value in values]
        wanted = sorted({table for table, _ in pairs})
        tables = dict(
            zip(wanted, self._fetch([f"tensors/{name}" for name in wanted]), strict=True)
        )  # fmt: skip
        try:
            known = {name: TensorTable.unpack(data) for name, data in tables.items()}
            return {
                digest: Holdings.unpack(data, known[table])
                for digest, (table, data) in zip(names, pairs, strict=True)
            }
        except (ValueError, msgspec.DecodeError) as error:
            raise MeetingError(f"a rank published something that is no layout: {error}") from error

    def _fetch(self, names: list[str]) -> list[bytes]:
        """Return shared values that offers refer to, unpacked."""
        values = self._meeting.fetch(names)
        for name, value in zip(names, values, strict=True):
            if value is None:
                raise MeetingError(f"{name} is not there, though an offer refers to it")
        return [_unpack(value) for value in values if value is not None]

    def _compare(self, round_: int, offers: list[Offer], layouts: dict[str, Holdings]) -> None:
        """Refuse replicas that differ, reading samples only where ranks hold the same parts.

        Raises:
            ReplicaMismatchError: on every rank alike.
        """
        if len(set(offers)) == 1:
            return
        counts = Counter(offer.layout for offer in offers)
        common = common_parts([(layouts[digest], count) for digest, count in counts.items()])
        parts = dict(zip(counts, common, strict=True))
        involved = {offer for offer in offers if parts[offer.layout]}
        digests = sorted({offer.samples for offer in involved})
        contents = self._fetch([f"samples/{round_}/{digest}" for digest in digests])
        samples = dict(zip(digests, contents, strict=True))
        rows = {
            offer: {
                part: int.from_bytes(samples[offer.samples][8 * i : 8 * i + 8], "little")
                for i, part in parts[offer.layout].items()
            }
            for offer in involved
        }
        check_replicas([(rank, rows.get(offer, {})) for rank, offer in enumerate(offers)])


def _comparable(layout: Layout, fingerprints: bytes) -> bytes:
    """Return 8 bytes for each held tensor: its fingerprint, or zeros where none is compared."""
    samples = np.zeros(len(layout.held), "<u8")
    if fingerprints:
        held = Holdings.of(layout)
        is_compared = name_holdings(held, TensorNames.of(held.tensors)) != 0
        samples[is_compared] = np.frombuffer(fingerprints, "<u8")[is_compared]
    return samples.tobytes()


def _unpack(value: bytes) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(value, max_output_size=MAX_LAYOUT_BYTES)
    except zstandard.ZstdError as error:
        raise MeetingError(f"a rank published something that does not unpack: {error}") from error


def _decode(value: bytes, type_: type[_T]) -> _T:
    try:
        return msgspec.msgpack.decode(value, type=type_)
    except msgspec.DecodeError as error:
        raise MeetingError(f"a rank published something that is not {type_}: {error}") from error
