"""Carries an engine's effects out: stores, workers, and the thread that owns the engine."""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import msgspec

from ckptd import failpoints
from ckptd.engine import events as ev
from ckptd.engine.arenas import Arenas, SlotSource
from ckptd.engine.events import Effect, Event
from ckptd.engine.keeper import Keeper, NoKeeper
from ckptd.engine.lifetime import EXIT_UNFINISHED
from ckptd.engine.state import Engine
from ckptd.errors import (
    CheckpointNotFoundError,
    CkptdError,
    CorruptError,
    IncompleteError,
    ProtocolError,
    SlotMovedError,
    StoreError,
    StoreUnavailableError,
)
from ckptd.model import dtypes, keys
from ckptd.model.manifest import Chunk, RankManifest
from ckptd.pipeline.commit import (
    Proofs,
    Verdict,
    end_step,
    give_up,
    put_outcome,
    put_rank,
    read_verdict,
    try_commit,
)
from ckptd.pipeline.threads import submit
from ckptd.pipeline.write import ChunkWriter, Source
from ckptd.store.base import Store
from ckptd.store.open import open_store
from ckptd.store.retry import retrying
from ckptd.store.root import check_root, check_writer
from ckptd.wire.messages import Ceded, FromDaemon, Hello, Lent

log = logging.getLogger("ckptd.engine")

# A part is tried again within its slot; after that the step is ended and everyone hears why.
_retrying = partial(retrying, attempts=5, total_s=60.0, sleep=time.sleep, rng=random.Random())  # noqa: S311 - jitter
T = TypeVar("T")
Share = Callable[[], "int | None"]


def _ignore(_client: int) -> None:
    pass


def _lend_nothing(_client: int, _message: Lent | Ceded, _share: Share) -> None:
    pass


class Outlet(NamedTuple):
    """Where messages to clients go. All are called on the engine's thread and must not block.

    `handled` is called after each `Said`, so that who says too much can be made to wait. `lend` sends a
    message with the descriptor that its last argument makes, from any thread and the caller's to close;
    without one, `without_memory`. So none waits anywhere for its turn to be sent.
    """

    send: Callable[[int, FromDaemon], None]
    drop: Callable[[int], None]
    handled: Callable[[int], None] = _ignore
    lend: Callable[[int, Lent | Ceded, Share], None] = _lend_nothing


class Runner:
    """Runs an engine until it exits.

    `post` and `give_arena` may be called from any thread; the rest belongs to the thread in `run`.
    """

    def __init__(
        self, engine: Engine, outlet: Outlet, *, workers: int | None = None,
        keeper: Keeper | None = None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self._outlet = outlet
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._arenas = Arenas(keeper or NoKeeper())
        self._stores: dict[str, Store] = {}
        self._opened: dict[str, Store] = {}
        self._stores_lock = threading.Lock()  # guards _stores and _opened
        self._proofs = Proofs()
        self._writer = ChunkWriter(workers=workers)
        self._snapshots = ThreadPoolExecutor(4, thread_name_prefix="ckptd-snapshot")
        # Four snapshots in work must not keep one waiting whose machine goes.
        self._urgent = ThreadPoolExecutor(4, thread_name_prefix="ckptd-urgent")
        self._records = ThreadPoolExecutor(4, thread_name_prefix="ckptd-record")

    def post(self, event: Event) -> None:
        """Tell the engine what happened."""
        self._events.put(event)

    def give_arena(self, client: int, number: int, arena: SlotSource) -> None:
        """Hand a mapped arena over; the engine's `Release` closes it, or another of this number."""
        self._arenas.give(client, number, arena)

    def run(self) -> int:
        """Run until the engine exits; return the exit code.

        With `EXIT_UNFINISHED` workers may still be running, perhaps for ever: end the process by
        ``os._exit``. With any other code they have ended.
        """
        code = EXIT_UNFINISHED
        if self._events.empty():  # whoever started it may die before it comes: look at the clock
            self.post(ev.Tick())
        try:
            while True:
                event = self._next_event()
                for effect in self.engine.on(event, time.monotonic()):
                    if isinstance(effect, ev.Exit):
                        code = effect.code
                        return code
                    self._carry_out(effect)
                if isinstance(event, (ev.Said, ev.Mapped)):
                    self._outlet.handled(event.client)
        finally:
            self._close(is_hurried=code == EXIT_UNFINISHED)

    def _next_event(self) -> Event:
        due = self.engine.next_due()
        try:
            wait_s = None if due is None else max(0.0, due - time.monotonic())
            return self._events.get(timeout=wait_s)
        except queue.Empty:
            return ev.Tick()

    def _carry_out(self, effect: Effect) -> None:
        if isinstance(effect, ev.Send):
            self._outlet.send(effect.client, effect.message)
        elif isinstance(effect, ev.Drop):
            self._outlet.drop(effect.client)
        elif isinstance(effect, (ev.ShowHeld, ev.Lend, ev.Release)):
            self._on_memory(effect)
        elif isinstance(effect, (ev.KeepArena, ev.Keep)):
            self._arenas.keep(effect)
        elif isinstance(effect, ev.Idle):
            self._idle()
        elif isinstance(effect, ev.Store):
            submit(self._urgent if effect.is_urgent else self._snapshots, self._store, effect)
        elif isinstance(effect, ev.PutRank):
            submit(self._records, self._put_rank, effect)
        elif isinstance(effect, ev.Open):
            submit(self._records, self._open, effect)
        elif isinstance(effect, (ev.Try, ev.Poll, ev.End)):
            submit(self._records, self._judge, effect)

    # --- on worker threads ---------------------------------------------------------------------

    def _open(self, effect: ev.Open) -> None:
        try:
            self._open_store(effect.hello)
        except CkptdError as error:
            self.post(ev.Opened(effect.client, type(error).__name__, str(error)))
        except Exception as error:
            log.exception("opening the root failed")
            self.post(ev.Opened(effect.client, "CkptdError", repr(error)))
        else:
            self.post(ev.Opened(effect.client))

    def _open_store(self, hello: Hello) -> None:
        failpoints.hit("root.open")
        name = json.dumps([hello.root, hello.storage_options], sort_keys=True, default=str)
        with self._stores_lock:
            store = self._opened.get(name)
        if store is not None and not _is_there(store):
            with self._stores_lock:  # the root was deleted and begun anew under the same name
                self._opened.pop(name, None)
            store = None
        if store is None:
            store = open_store(hello.root, hello.storage_options)
            try:
                _tried(store, lambda: check_root(store))
                _tried(store, lambda: check_writer(store))
            except BaseException:
                store.close()
                raise
        with self._stores_lock:
            first = self._opened.setdefault(name, store)
            self._stores[hello.root] = first
        if first is not store:  # another rank's hello was faster
            store.close()

    def _store(self, effect: ev.Store) -> None:
        try:
            chunks = self._store_chunks(effect)
        except Exception as error:  # noqa: BLE001 - whatever it is, the trainer must hear of it
            self._part_failed(effect.part, error)
        else:
            self.post(ev.ChunksStored(effect.part, tuple(chunks)))

    def _store_chunks(self, effect: ev.Store) -> list[Chunk]:
        failpoints.hit("handoff.taken")
        slot = self._arenas.slot(effect.client, effect.arena, effect.slot)

        def check() -> None:
            if not slot.is_current(effect.generation):
                raise SlotMovedError("the slot was used again while its snapshot was being read")

        check()
        sources = []
        for chunk in effect.recipe.chunks:
            end = chunk.offset_bytes + chunk.raw_bytes
            if end > slot.view.nbytes or chunk.dtype not in dtypes.BY_NAME:
                raise ProtocolError("a chunk that leaves its slot, or of an unknown dtype")
            sources.append(Source(chunk.dtype, slot.view[chunk.offset_bytes : end], check))
        store_all = partial(
            self._writer.write, birth=effect.part.step.id, sources=sources,
            compression=effect.hello.compression, is_urgent=effect.is_urgent,
        )  # fmt: skip
        # A batch of its own: a sync that fails takes deferred objects away again, and those of
        # another rank's snapshot must not be among them.
        with self._store_of(effect.part.step).batch() as store:
            chunks = _tried(store, partial(store_all, store))
        check()
        return chunks

    def _put_rank(self, effect: ev.PutRank) -> None:
        try:
            _check(effect.record)
            store = self._store_of(effect.part.step)
            _tried(store, lambda: put_rank(store, _based(store, effect)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the trainer must hear of it
            self._part_failed(effect.part, error)
        else:
            self.post(ev.RankPut(effect.part))

    def _judge(self, effect: ev.Try | ev.Poll | ev.End) -> None:
        try:
            store = self._store_of(effect.step)
            if isinstance(effect, ev.End):
                for outcome in effect.outcomes:
                    put_outcome(store, outcome)
            if isinstance(effect, ev.Poll) or not (effect.is_leader or store.has_conditional_put):
                verdict = self._read(store, effect)
            elif isinstance(effect, ev.Try):
                verdict = try_commit(store, effect.step.id, effect.world_size, self._proofs)
            else:
                verdict = self._end(store, effect)
        except Exception as error:
            level = logging.WARNING if isinstance(error, CkptdError) else logging.ERROR
            log.log(level, "%s: %s", effect.step.id.short, error, exc_info=level == logging.ERROR)
            self.post(ev.Undecided(effect.step, str(error)))
        else:
            if verdict.state not in {"waiting", "committed"}:
                level = logging.WARNING if verdict.state == "skipped" else logging.ERROR
                log.log(level, "not committed: %s", verdict.reason)
            elif verdict.state == "committed":
                log.info("committed step %s of %s", effect.step.id.short, effect.step.root)
            self.post(ev.Judged(effect.step, verdict))

    def _read(self, store: Store, effect: ev.Try | ev.Poll | ev.End) -> Verdict:
        verdict = read_verdict(store, effect.step.id, effect.world_size)
        if verdict.state == "waiting" and isinstance(effect, ev.End):
            raise StoreUnavailableError(
                keys.checkpoint(effect.step.id),
                f"{store.url} knows no conditional writes, so only rank 0's daemon may end the step",
            )
        return verdict

    def _end(self, store: Store, effect: ev.End) -> Verdict:
        step, world_size, why = effect.step.id, effect.world_size, effect.verdict
        if why.kind == IncompleteError.__name__:
            return give_up(store, step, world_size, self._proofs, why)
        return end_step(store, step, world_size, why)

    def _part_failed(self, part: ev.PartKey, error: Exception) -> None:
        is_ours = isinstance(error, (CkptdError, InterruptedError))
        log.error(
            "rank %d of step %s failed: %s",
            part.rank,
            part.step.id.short,
            error,
            exc_info=not is_ours,
        )
        _clear_frames(error)
        self.post(ev.PartFailed(part, f"{type(error).__name__}: {error}"))

    def _store_of(self, step: ev.StepKey) -> Store:
        with self._stores_lock:
            store = self._stores.get(step.root)
        if store is None:
            raise StoreError(step.root, "the root is not open")
        return store

    # --- memory --------------------------------------------------------------------------------

    def _on_memory(self, effect: ev.ShowHeld | ev.Lend | ev.Release) -> None:
        if isinstance(effect, ev.ShowHeld):
            self._outlet.send(effect.client, self._arenas.held(effect))
        elif isinstance(effect, ev.Release):
            self._arenas.release(effect.client, effect.arena)
        else:
            share = partial(self._arenas.share, *effect.owner)
            self._outlet.lend(effect.client, effect.message, share)

    def _idle(self) -> None:
        self._writer.buffers.trim()
        self._arenas.trim()

    def _close(self, *, is_hurried: bool) -> None:
        failpoints.hit("engine.exit")
        self._snapshots.shutdown(wait=not is_hurried, cancel_futures=True)
        self._urgent.shutdown(wait=not is_hurried, cancel_futures=True)
        self._records.shutdown(wait=not is_hurried, cancel_futures=True)
        self._writer.close(wait=not is_hurried)
        if is_hurried:
            return  # workers may still use the rest, which goes with the process
        self._arenas.close()
        with self._stores_lock:
            for store in self._opened.values():
                store.close()


def _tried(store: Store, operation: Callable[[], T]) -> T:
    """Return what `operation` returns, trying again unless the store does so itself."""
    return operation() if store.traits.is_patient else _retrying(operation)


def _based(store: Store, effect: ev.PutRank) -> RankManifest:
    """Name the step that the job took from memory as the one before, if it is committed by now."""
    record, basis = effect.record, effect.basis
    try:
        is_there = basis and read_verdict(store, basis, record.world_size).state == "committed"
    except CorruptError as error:
        log.warning("what the job took from memory cannot be read in the store: %s", error)
        is_there = False
    return msgspec.structs.replace(record, previous=str(basis)) if is_there else record


def _check(record: RankManifest) -> None:
    try:
        record.check()
    except ValueError as error:
        raise ProtocolError(f"a recipe that makes no sense: {error}") from None


def _clear_frames(error: BaseException | None) -> None:
    """Drop what the frames of an error hold.

    They hold views of a slot, and futures that hold the error: a circle that would keep the memory
    mapped until the next garbage collection, which a daemon without work never comes to.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _is_there(store: Store) -> bool:
    try:
        check_root(store)
    except CheckpointNotFoundError:
        return False
    except CkptdError:
        return store.traits.is_patient  # a folder is opened anew; a service is there or is not
    return True
