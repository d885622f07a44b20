"""Committers that race, and processes that die at every write."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd import failpoints
from ckptd.errors import (
    SaveFailedError,
    StoreUnavailableError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import line
from ckptd.pipeline.commit import (
    COMMITTED,
    TOMBSTONE,
    Verdict,
    end_step,
    new_outcome,
    put_outcome,
    put_rank,
    read_verdict,
)
from ckptd.pipeline.verify import verify
from ckptd.store.base import Store
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.store.root import create_root
from tests.fakes.checkpoints import PLAIN, write_checkpoint
from tests.fakes.saves import MAX, Save
from tests.fakes.stores import Crashed, CrashingStore, FlakyStore
from tests.fakes.turns import Turns

OLD, STEP = StepId(1, 10), StepId(1, 20)
WHY = Verdict("failed", "SaveFailedError", "rank 1 failed: the disk is full", ranks=(1,))
OUTCOME = new_outcome(STEP, 1, 2, 1, "failed", "the disk is full")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def terminal(store: Store, step: StepId = STEP) -> bytes:
    return store.get(keys.checkpoint(step), max_bytes=MAX)


# --- races -------------------------------------------------------------------------------------


@pytest.fixture
def _often_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_often_switching")
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_d4_of_racing_committers_and_enders_all_report_the_one_terminal_record(
    kind: str, tmp_path
) -> None:
    store: Store = MemoryStore() if kind == "memory" else LocalStore(str(tmp_path / "root"))
    create_root(store)
    rounds, racers = 60 if kind == "memory" else 15, 6
    saves = [Save(StepId(1, 10 * (i + 1))) for i in range(rounds)]
    for save in saves:
        save.deliver_all(store)
    barrier = threading.Barrier(racers)
    found: list[list[Verdict | Exception]] = [[] for _ in saves]

    def race(number: int) -> None:
        for save, verdicts in zip(saves, found, strict=True):
            barrier.wait(60)
            verdicts.append(end_step(store, save.id, 2, WHY) if number % 2 else save.commit(store))

    threads = [threading.Thread(target=race, args=(i,)) for i in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for save, verdicts in zip(saves, found, strict=True):
        assert len(verdicts) == racers
        expected = "failed" if terminal(store, save.id) == TOMBSTONE else "committed"
        assert {verdict.state for verdict in verdicts} == {expected}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_d4_in_any_order_of_store_calls_and_with_answers_lost_all_report_the_same(data) -> None:
    store = MemoryStore()
    save = Save(STEP)
    late = data.draw(st.booleans(), label="rank 1 comes late")
    save.deliver(store, 0)
    if not late:
        save.deliver(store, 1)
    rates = {"put_new": 0.3, "get": 0.1, "list": 0.1, "sync": 0.1}

    def flaky(inner: Store, seed: int) -> Store:
        return FlakyStore(inner, rates, seed=seed, acted=0.7)

    def commit(inner: Store) -> Verdict:
        return save.commit(flaky(inner, 1))

    def end(inner: Store) -> Verdict:
        put_outcome(flaky(inner, 2), OUTCOME)
        return end_step(flaky(inner, 3), STEP, 2, WHY)

    def arrive(inner: Store) -> None:
        save.deliver(inner, 1)

    def look(inner: Store) -> Verdict:
        return read_verdict(inner, STEP, 2)

    actors = [commit, commit, look, *([end] if data.draw(st.booleans()) else [])]
    actors += [arrive] if late else []
    turns = st.integers(0, 11)
    results = Turns(store).play(actors, iter(lambda: data.draw(turns), None))
    for result in results:
        # A rank manifest that comes after its rank's outcome is refused.
        assert not isinstance(result, Exception) or isinstance(
            result, (StoreUnavailableError, SaveFailedError)
        )
    decided = {r.state for r in results if isinstance(r, Verdict)} - {"waiting"}
    final = save.commit(store)
    assert decided <= {final.state}
    assert final.state in {"committed", "failed"}, "with all parts there is a word in the end"
    assert (terminal(store) == TOMBSTONE) == (final.state == "failed")


# --- crashes -----------------------------------------------------------------------------------


def root_with_old(kind: str, tmp_path) -> Store:
    store: Store = MemoryStore() if kind == "memory" else LocalStore(str(tmp_path / "root"))
    write_checkpoint(store, OLD, PLAIN)
    return store


def save_all(store: Store) -> None:
    save = Save(STEP, previous=OLD)
    save.deliver_all(store)
    assert save.commit(store) == COMMITTED


@pytest.mark.parametrize("crash", ["before", "after"])
@pytest.mark.parametrize("kind", ["memory", "local"])
def test_d6_a_crash_at_any_write_leaves_the_previous_checkpoint_and_a_second_run_converges(
    kind: str, crash, tmp_path
) -> None:
    for writes in range(100):
        folder = tmp_path / str(writes)
        folder.mkdir()
        inner = root_with_old(kind, folder)
        store = CrashingStore(inner, writes, crash=crash)
        with suppress(Crashed):
            save_all(store)
        found = [manifest.id for manifest in line(inner)]
        assert found in ([OLD], [STEP, OLD])
        for step in found:
            assert verify(inner, step, is_data=True).is_whole
        save_all(inner)
        assert [manifest.id for manifest in line(inner)] == [STEP, OLD]
        assert verify(inner, STEP, is_data=True).is_whole
        if not store.is_dead:
            break
    assert writes > 6, "chunks, rank manifests and the manifest are all writes"


@pytest.mark.parametrize("crash", ["before", "after"])
def test_d6_a_crash_while_a_step_is_ended_leaves_it_ended_or_open(crash) -> None:
    for writes in range(10):
        inner = MemoryStore()
        write_checkpoint(inner, OLD, PLAIN)
        save = Save(STEP)
        save.deliver(inner, 0)
        store = CrashingStore(inner, writes, crash=crash)
        with suppress(Crashed):
            put_outcome(store, OUTCOME)
            end_step(store, STEP, 2, WHY)
        assert [manifest.id for manifest in line(inner)] == [OLD]
        put_outcome(inner, OUTCOME)
        assert end_step(inner, STEP, 2, WHY) == WHY
        assert read_verdict(inner, STEP, 2).ranks == (1,)
        if not store.is_dead:
            break
    assert writes == 2


@pytest.mark.parametrize("point", ["rank.put", "commit.put", "tombstone.put"])
def test_a_failpoint_stops_before_its_write(store: MemoryStore, point: str) -> None:
    save = Save(STEP)
    save.deliver(store, 0)
    save.put_chunks(store, 1)
    work = {
        "rank.put": lambda: put_rank(store, save.record(1)),
        "commit.put": lambda: save.commit(store),
        "tombstone.put": lambda: end_step(store, STEP, 2, WHY),
    }
    if point == "commit.put":
        put_rank(store, save.record(1))
    before = list(store.list(""))
    failpoints.arm(f"{point}=raise")
    with pytest.raises(OSError, match=point):
        work[point]()
    assert list(store.list("")) == before
