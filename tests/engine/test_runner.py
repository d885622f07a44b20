"""Effects carried out: chunks, records and verdicts of a runner over real stores, without sockets."""

from __future__ import annotations

import itertools
import logging
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest

from ckptd.engine import events as ev
from ckptd.engine import runner as runner_module
from ckptd.errors import StoreFullError, StoreUnavailableError
from ckptd.model import keys
from ckptd.model.box import Box
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import find, line, read_manifest, read_ranks
from ckptd.pipeline.read import read_chunks
from ckptd.pipeline.verify import verify
from ckptd.plan.reading import Region, Wanted, plan_reads
from ckptd.shm.slots import Slot
from ckptd.store.base import Store
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.store.open import open_store
from ckptd.store.retry import retrying
from ckptd.store.root import create_root
from ckptd.wire import messages as say
from tests.fakes.engines import hello
from tests.fakes.runners import MIB, WAIT_S, Bench, Trainer, noise
from tests.fakes.stores import FailingStore, FlakyStore, Op, RecordingStore
from tests.fakes.training import Gate, GateStore

_numbers = itertools.count(1)

Wrap = Callable[[Store], Store]


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(
        retrying, attempts=5, total_s=60.0, sleep=lambda _: None, rng=random.Random(0)
    )  # fmt: skip
    monkeypatch.setattr(runner_module, "_retrying", quick)


@pytest.fixture
def root() -> str:
    url = f"memory://runner-{next(_numbers)}"
    create_root(MemoryStore.shared(url))
    return url


@pytest.fixture
def wrap(monkeypatch: pytest.MonkeyPatch) -> Callable[[Wrap], None]:
    """Let the runner see each store through something."""

    def through(around: Wrap) -> None:
        monkeypatch.setattr(runner_module, "open_store", lambda u, o: around(open_store(u, o)))

    return through


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.stop()


def stored(store: Store, id_: StepId, count: int) -> bytes:
    """Read the tensor of a checkpoint back."""
    found = bytearray(count)

    def sink(region: Region, raw: memoryview) -> None:
        start = 4 * region.box.start[0]
        found[start : start + raw.nbytes] = raw

    manifest = read_manifest(store, id_)
    reads = plan_reads([Wanted("w", Box.full((count // 4,)))], read_ranks(store, manifest))
    read_chunks(store, reads, sink)
    return bytes(found)


def test_d2_a_snapshot_is_committed_with_the_bytes_that_were_handed_over(
    bench: Bench, root: str
) -> None:
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    assert bench.wait_for(say.Written)
    assert trainer.word().state == "committed"
    assert bench.runner.engine.tally.stored_bytes > 0
    store = MemoryStore.shared(root)
    assert stored(store, StepId(1, 10), trainer.bytes) == noise(10, trainer.bytes)
    assert verify(store, StepId(1, 10), is_data=True).is_whole


def test_several_snapshots_at_once_on_a_local_root(bench: Bench, tmp_path) -> None:
    store = LocalStore(str(tmp_path / "root"))
    create_root(store)
    trainers = [Trainer(bench, store.url, rank=rank, world_size=2, mib=1) for rank in range(2)]
    for trainer in trainers:
        trainer.join()
    for step, sequence in ((10, 1), (20, 2)):
        for trainer in trainers:
            trainer.save(step, sequence)
    for trainer in trainers:
        assert [trainer.word(n).state for n in (1, 2)] == ["committed", "committed"]
    assert [m.id.step for m in line(store)] == [20, 10]
    assert all(verify(store, m.id, is_data=True).is_whole for m in line(store))


def test_d3_the_order_of_writes(bench: Bench, root: str, wrap) -> None:
    shared: list[Op] = []

    def record(inner: Store) -> Store:
        store = RecordingStore(inner)
        store.ops = shared
        return store

    wrap(record)
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    trainer.word()
    writes = [op for op in shared if op.name in {"put", "put_new", "put_deferred", "sync"}]
    kinds = [op.name if op.name == "sync" else op.key.split("/")[0] for op in writes]
    assert kinds == ["chunks", "chunks", "sync", "ranks", "sync", "checkpoints"]
    batches = [op for op in shared if op.name == "batch"]
    assert len(batches) == 1, "the chunks have one of their own: its sync undoes nothing of others"


# --- a slot that moves -------------------------------------------------------------------------


class Restless(Slot):
    """Is used again for another snapshot, before or after its n-th check."""

    moves_at: int | None = None
    is_after = False
    checks = 0

    def is_current(self, generation: int) -> bool:
        type(self).checks += 1
        is_turn = self.checks == self.moves_at
        if is_turn and not self.is_after:
            self.move()
        found = super().is_current(generation)
        if is_turn and self.is_after:
            self.move()
        return found

    def move(self) -> None:
        self.begin(99, 99)
        self.payload[: 3 * MIB] = noise(99, 3 * MIB)
        self.finish()


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("moves_at", range(1, 8))
def test_p4_a_slot_that_is_used_again_gives_no_mixture(
    bench: Bench, root: str, moves_at: int, is_after: bool
) -> None:
    """Three blocks in two chunks: seven checks would be one more than there are."""
    kind = type("Moving", (Restless,), {"moves_at": moves_at, "is_after": is_after})
    trainer = Trainer(bench, root, slot_type=kind)
    trainer.join()
    trainer.save(10, 1)
    word = trainer.word()
    store = MemoryStore.shared(root)
    if word.state == "committed":
        assert stored(store, StepId(1, 10), trainer.bytes) == noise(10, trainer.bytes)
        assert moves_at >= 5, "before the last copy it would have been a mixture"
    else:
        assert "used again" in word.reason
        assert list(line(store)) == []
    assert (word.state == "committed") == (moves_at > 5 or (moves_at == 5 and is_after))


def test_p4_a_slot_that_moves_between_two_tries_is_not_taken_for_the_first(
    bench: Bench, root: str, wrap
) -> None:
    kind = type("Moving", (Restless,), {})
    trainer = Trainer(bench, root, slot_type=kind)

    class Once(RecordingStore):
        def _before(self, op: Op) -> None:
            if op.name == "sync" and kind.checks < 10:
                trainer.memory.slots[1].move()
                raise StoreUnavailableError("", "no answer")

    wrap(Once)
    trainer.join()
    trainer.save(10, 1)
    assert "used again" in trainer.word().reason


@pytest.mark.parametrize("state", ["writing", "abandoned", "another generation"])
def test_a_slot_without_the_whole_snapshot_is_refused(bench: Bench, root: str, state: str) -> None:
    trainer = Trainer(bench, root)
    trainer.join()
    generation = trainer.fill(1, 10, 1, seed=1)
    slot = trainer.memory.slots[1]
    if state == "another generation":
        generation += 1
    else:
        generation = slot.begin(10, 1)
        if state == "abandoned":
            slot.abandon()
    plain = msgspec.structs.replace(_handoff_of(1), generation=generation)
    bench.say(1, plain)
    assert "SlotMovedError" in trainer.word().reason


def _handoff_of(slot: int) -> say.Handoff:
    from tests.fakes.engines import handoff

    return handoff(10, 1, slot=slot)


# --- stores that fail --------------------------------------------------------------------------


@pytest.mark.parametrize("acted", [0.0, 0.5, 1.0])
def test_d8_a_store_that_fails_now_and_then_is_tried_again(
    bench: Bench, root: str, wrap, acted: float
) -> None:
    seeds = itertools.count(1)
    rates = {"put_deferred": 0.2, "put_new": 0.3, "sync": 0.2, "get": 0.05, "list": 0.05}
    wrap(lambda inner: FlakyStore(inner, rates, seed=next(seeds), acted=acted))
    trainer = Trainer(bench, root)
    trainer.join()
    for number, step in enumerate((10, 20, 30), 1):
        trainer.save(step, number)
        word = trainer.word(number)
        # Five tries may all fail; then everyone hears of it.
        assert word.state == "committed" or "flaky" in word.reason
        if word.state == "committed":
            found = stored(MemoryStore.shared(root), StepId(1, step), trainer.bytes)
            assert found == noise(step, trainer.bytes)


def test_d8_a_rank_manifest_is_tried_again(bench: Bench, root: str, wrap) -> None:
    left = iter([True] * 4)

    class Slow(RecordingStore):
        def _before(self, op: Op) -> None:
            if op.name == "put_new" and op.key.startswith("ranks/") and next(left, False):
                raise StoreUnavailableError(op.key, "no answer")

    wrap(Slow)
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    assert trainer.word().state == "committed"
    assert next(left, False) is False


def test_d11_a_full_store_fails_the_part_at_once_with_its_reason(
    bench: Bench, root: str, wrap, caplog: pytest.LogCaptureFixture
) -> None:
    full = StoreFullError("chunks/ab", "no space left")
    stores: list[FailingStore] = []

    def fill_up(inner: Store) -> Store:
        stores.append(FailingStore(inner, frozenset({"put_deferred"}), full))
        return stores[-1]

    wrap(fill_up)
    trainer = Trainer(bench, root)
    trainer.join()
    with caplog.at_level(logging.ERROR, "ckptd"):
        trainer.save(10, 1)
        word = trainer.word()
    assert word.state == "failed"
    assert "no space left" in word.reason
    assert word.ranks == (0,)
    assert "no space left" in caplog.text
    store = MemoryStore.shared(root)
    assert store.get(keys.checkpoint(StepId(1, 10)), max_bytes=0) == b""
    assert b"no space left" in store.get(keys.rank(StepId(1, 10), 0), max_bytes=10_000)


def test_a_step_of_which_the_store_decides_nothing_is_asked_for_again(
    bench: Bench, root: str, wrap
) -> None:
    class Deaf(RecordingStore):
        left = 3

        def _before(self, op: Op) -> None:
            if op.key.startswith("ranks/") and op.name == "list" and Deaf.left:
                Deaf.left -= 1
                raise StoreUnavailableError(op.key, "no answer")

    wrap(Deaf)
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    assert trainer.word().state == "committed"
    assert Deaf.left == 0
    assert bench.runner.engine.tally.store_errors == 3


# --- bugs and breaches -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["chunks", "ranks"])
def test_d11_a_bug_in_a_worker_reaches_the_client(
    bench: Bench, root: str, wrap, prefix: str
) -> None:
    class Buggy(RecordingStore):
        has_raised = False

        def _before(self, op: Op) -> None:
            if op.name.startswith("put") and op.key.startswith(prefix) and not Buggy.has_raised:
                Buggy.has_raised = True
                raise ZeroDivisionError("a bug")

    wrap(Buggy)
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    word = trainer.word()
    assert word.state == "failed"
    assert "ZeroDivisionError" in word.reason
    assert bench.code is None, "the engine goes on"


def test_a_bug_while_judging_is_tried_again_and_does_not_end_the_engine(
    bench: Bench, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([True, True])
    work = runner_module.try_commit

    def buggy(*args: Any) -> Any:
        if next(left, False):
            raise ZeroDivisionError("a bug")
        return work(*args)

    monkeypatch.setattr(runner_module, "try_commit", buggy)
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    assert trainer.word().state == "committed"


def test_a_root_that_does_not_answer_at_first_is_opened_all_the_same(
    bench: Bench, root: str, wrap
) -> None:
    left = iter([True, True])

    class Slow(RecordingStore):
        def _before(self, op: Op) -> None:
            if op.name == "get" and next(left, False):
                raise StoreUnavailableError(op.key, "no answer")

    wrap(Slow)
    bench.say(1, hello(root=root))
    bench.wait_for(say.Welcome)


def test_a_root_that_never_answers_is_refused_for_now(bench: Bench, root: str, wrap) -> None:
    error = StoreUnavailableError("ckptd.json", "no answer")
    wrap(lambda inner: FailingStore(inner, frozenset({"get"}), error))
    bench.say(1, hello(root=root))
    assert bench.wait_for(say.Refused).kind == "StoreUnavailableError"


def test_a_root_that_is_none_is_refused(bench: Bench) -> None:
    bench.say(1, hello(root="memory://nothing-here"))
    refused = bench.wait_for(say.Refused)
    assert refused.kind == "CheckpointNotFoundError"
    bench.until(lambda: bench.dropped == [1])


def test_a_bug_while_opening_a_root_is_told(
    bench: Bench, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(store: Store) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runner_module, "check_root", bug)
    bench.say(1, hello(root=root))
    assert "a bug" in bench.wait_for(say.Refused).reason


def test_s2_a_chunk_that_leaves_its_slot_is_refused(bench: Bench, root: str) -> None:
    trainer = Trainer(bench, root)
    far = msgspec.structs.replace(trainer.recipe.chunks[0], offset_bytes=3 * MIB)
    trainer.recipe = msgspec.structs.replace(
        trainer.recipe, chunks=(far, *trainer.recipe.chunks[1:])
    )
    trainer.join()
    trainer.save(10, 1)
    word = trainer.word()
    assert word.state == "failed"
    assert "leaves its slot" in word.reason


def test_s2_a_recipe_that_makes_no_sense_is_refused(bench: Bench, root: str) -> None:
    trainer = Trainer(bench, root)
    tensor = trainer.recipe.tensors[0]
    trainer.recipe = msgspec.structs.replace(trainer.recipe, tensors=(tensor, tensor))
    trainer.join()
    trainer.save(10, 1)
    word = trainer.word()
    assert word.state == "failed"
    assert "makes no sense" in word.reason


@pytest.mark.parametrize("dtype", ["float33", "", "float32\0"])
def test_s2_a_chunk_of_no_dtype_fails_the_part_only(bench: Bench, root: str, dtype: str) -> None:
    trainer = Trainer(bench, root)
    odd = tuple(msgspec.structs.replace(c, dtype=dtype) for c in trainer.recipe.chunks)
    trainer.recipe = msgspec.structs.replace(trainer.recipe, chunks=odd)
    trainer.join()
    trainer.save(10, 1)
    assert trainer.word().state == "failed"


def test_s2_a_chunk_beyond_the_budget_fails_the_part_only(bench: Bench, root: str) -> None:
    trainer = Trainer(bench, root, mib=66, chunk_bytes=66 * MIB)
    trainer.join()
    generation = trainer.memory.slots[1].begin(10, 1)
    trainer.memory.slots[1].finish()
    bench.say(1, msgspec.structs.replace(_handoff_of(1), generation=generation))
    assert trainer.word().state == "failed"


def test_a_handoff_whose_memory_never_came_fails_the_part(bench: Bench, root: str) -> None:
    trainer = Trainer(bench, root)
    bench.say(1, trainer.hello)
    bench.wait_for(say.Welcome)
    bench.say(1, say.Arena(1, 2, 4 * MIB))
    bench.say(1, trainer.recipe)
    trainer.save(10, 1)
    assert "before its arena" in trainer.word().reason


# --- memory and the end ------------------------------------------------------------------------


def test_memory_is_released_when_the_trainer_is_gone_and_trimmed_when_there_is_nothing_to_do(
    bench: Bench, root: str
) -> None:
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    trainer.word()
    bench.say(1, say.Ask())
    bench.wait_for(say.Report)
    assert trainer.memory.trims >= 1
    assert trainer.memory.closes == 0
    bench.say(1, say.Goodbye())
    bench.say(9, say.Ask())
    bench.wait_for(say.Report, 9)
    assert trainer.memory.closes == 1


def test_d6_a_snapshot_of_a_trainer_that_died_is_committed(bench: Bench, root: str, wrap) -> None:
    gate = Gate()
    wrap(lambda inner: GateStore(inner, gate))
    trainer = Trainer(bench, root)
    trainer.join()
    gate.shut()
    trainer.save(10, 1)
    assert gate.arrived.wait(WAIT_S)
    bench.runner.post(ev.Gone(1, is_dead=True))
    gate.open()
    watcher = Trainer(bench, root)
    watcher.client = 2
    bench.say(2, watcher.hello)
    bench.wait_for(say.Welcome, 2)
    bench.say(2, say.Watch(10, 1, None))
    assert bench.wait_for(say.Finished, 2).state == "committed"
    assert find(MemoryStore.shared(root)).id == StepId(1, 10)


def test_the_runner_ends_with_the_last_goodbye_and_closes_what_it_has(root: str) -> None:
    bench = Bench(linger_s=0.0)
    trainer = Trainer(bench, root)
    trainer.join()
    trainer.save(10, 1)
    trainer.word()
    bench.say(1, say.Goodbye())
    assert bench.wait_exit() == 0
    assert trainer.memory.closes == 1
    left = [t.name for t in threading.enumerate() if t.name.startswith("ckptd-")]
    assert left == []


def test_p6_a_drain_past_its_deadline_does_not_wait_for_a_store_that_hangs(
    bench: Bench, root: str, wrap
) -> None:
    gate = Gate()
    wrap(lambda inner: GateStore(inner, gate))
    trainer = Trainer(bench, root)
    trainer.join()
    gate.shut()
    trainer.save(10, 1)
    assert gate.arrived.wait(WAIT_S)
    bench.runner.post(ev.StopAsked(0.0))
    try:
        assert bench.wait_exit() == 6
        assert list(line(MemoryStore.shared(root))) == []
    finally:
        gate.open()
