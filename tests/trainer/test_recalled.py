"""Ranks that resume from the memory of daemons: real engines lend real arenas, threads stand for ranks."""

from __future__ import annotations

import gc
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from ckptd.engine import runner as runner_module
from ckptd.errors import (
    MissingTensorError,
    StoreFullError,
    StoreUnavailableError,
    TornRestoreError,
)
from ckptd.model import keys
from ckptd.model.columns import Columns
from ckptd.model.keys import StepId
from ckptd.pipeline.commit import TOMBSTONE
from ckptd.store.open import open_store
from ckptd.trainer import proposals as proposals_module
from ckptd.trainer import recalled as recalled_module
from ckptd.trainer import resuming as resuming_module
from ckptd.trainer.attempts import Attempt
from ckptd.trainer.flatten import flatten
from ckptd.trainer.values import PerRank
from ckptd.wire import messages as say
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.jobs import wait_until
from tests.fakes.nodes import Ended, Group, Job, Left, Node
from tests.fakes.stores import FailingStore
from tests.fakes.training import Gate, GateStore

_numbers = itertools.count(1)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Stands before the daemons' store: nothing is committed, and in the end it turns out to be full."""
    gate = Gate()
    gate.error = StoreFullError("chunks/", "no space is left")
    gate.shut()
    monkeypatch.setattr(
        runner_module, "open_store", lambda url, options: GateStore(open_store(url, options), gate)
    )
    yield gate
    gate.open()


@pytest.fixture
def job(gate: Gate) -> Iterator[Job]:
    nodes = [Node(), Node()]
    for node in nodes:
        node.on_settle = gate.open
    job = Job(nodes)
    yield job
    gate.open()
    for node in nodes:
        node.close()
    job.close()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Group]:
    def of(world_size: int) -> Group:
        group = Group(world_size)
        monkeypatch.setattr(recalled_module, "dist", group)
        # Only what lies in memory travels here: `passing` itself sees no group.
        monkeypatch.setattr(proposals_module, "has_group", lambda size: size == world_size)
        monkeypatch.setattr(recalled_module, "carried_devices", lambda: {"cpu", "cuda"})
        return group

    return of


def one(value: float = 0.0, **more: object) -> dict[str, Any]:
    model = nn.Linear(64, 96)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return {"model": model, "b": torch.full((3,), value), "epoch": int(value), **more}


def values_of(states: list[dict[str, Any]]) -> list[float]:
    for state in states:
        tensors = [*state["model"].parameters(), state["b"]]
        assert {n for t in tensors for n in t.flatten().tolist()} == {float(state["epoch"])}
    return [float(state["epoch"]) for state in states]


def commit(job: Job, id_: StepId, states: list[dict[str, Any]]) -> None:
    """Put a checkpoint into the store as daemons that are gone would have."""
    flats = [flatten(state) for state in states]
    tensors = {leaf.fqn: leaf.tensor.detach().numpy().copy() for leaf in flats[0].leaves}
    write_checkpoint(
        job.store, id_, tensors, world_size=len(states), values=[flat.values for flat in flats]
    )


def sources(ended: list[Ended]) -> set[tuple[int, str]]:
    assert [e.error for e in ended] == [None] * len(ended)
    return {(e.resumed.step, e.resumed.source) for e in ended}


def asked(ended: list[Ended]) -> list[list[str]]:
    return [[type(message).__name__ for message in e.asked] for e in ended]


def open_fds() -> int:
    gc.collect()  # of other tests too
    return len(os.listdir("/proc/self/fd"))


# --- what comes back -----------------------------------------------------------------------------


def test_d6_a_step_that_nobody_committed_comes_back_from_memory(job: Job) -> None:
    first = job.begin()
    commit(job, StepId(1, 5), [one(5.0)])
    job.leave([one(8.0)], 8, attempt=first, metrics={"loss": 0.25, "odd": float("nan")})
    states = [one()]
    (ended,) = job.resume(states)
    assert sources([ended]) == {(8, "memory")}
    assert values_of(states) == [8.0]
    assert ended.resumed.attempt == 1
    assert ended.resumed.metrics["loss"] == 0.25
    assert np.isnan(ended.resumed.metrics["odd"])
    assert ended.resuming.basis == StepId(1, 8)
    assert ended.resuming.line == StepId(1, 5), "what is before the next step, if 8 stays out"
    assert asked([ended]) == [["Hello", "Seek", "Borrow"]], "nobody waits for the store"


def test_a_committed_step_comes_from_memory_too_and_is_on_the_line(job: Job) -> None:
    first = job.begin()
    commit(job, StepId(1, 8), [one(8.0)] * 2)
    job.leave([one(8.0)] * 2, 8, attempt=first)
    states = [one(), one()]
    ended = job.resume(states)
    assert sources(ended) == {(8, "memory")}
    assert values_of(states) == [8.0] * 2
    for each in ended:
        assert (each.resuming.line, each.resuming.basis) == (StepId(1, 8), None)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("is_planned", [True, False])
def test_r3_whatever_ranks_left_comes_back_on_other_ranks(
    job: Job, before: int, after: int, is_planned: bool
) -> None:
    job.leave([one(8.0)] * before, 8, is_planned=is_planned)
    states = [one() for _ in range(after)]
    assert sources(job.resume(states)) == {(8, "memory")}
    assert values_of(states) == [8.0] * after


def test_r3_values_of_each_rank_come_back_to_it(job: Job) -> None:
    job.leave([one(8.0, loader=PerRank({"at": rank})) for rank in range(2)], 8)
    states = [one(loader=PerRank({"at": -1})) for _ in range(2)]
    assert sources(job.resume(states)) == {(8, "memory")}
    assert [state["loader"].value for state in states] == [{"at": 0}, {"at": 1}]


def test_r1_of_several_steps_in_memory_the_newest_is_taken(job: Job) -> None:
    attempt = job.begin()
    job.leave([one(8.0)], 8, attempt=attempt)
    job.leave([one(9.0)], 9, attempt=attempt, sequence=2, on=[1])
    states = [one()]
    assert sources(job.resume(states, on=[1])) == {(9, "memory")}
    assert values_of(states) == [9.0]


def test_p2_resuming_from_memory_leaves_no_descriptor(job: Job) -> None:
    job.leave([one(8.0)] * 2, 8)
    job.resume([one()])
    before = open_fds()
    for _ in range(3):
        job.resume([one(), one()])
    assert open_fds() <= before


# --- where memory is not taken -------------------------------------------------------------------


def test_r1_a_newer_checkpoint_wins(job: Job) -> None:
    first = job.begin()
    job.leave([one(8.0)], 8, attempt=first)
    commit(job, StepId(1, 9), [one(9.0)])
    states = [one()]
    (ended,) = job.resume(states)
    assert sources([ended]) == {(9, "store")}
    assert values_of(states) == [9.0]
    assert asked([ended]) == [["Hello", "Seek", "Settle"]]
    assert (ended.resuming.line, ended.resuming.basis) == (StepId(1, 9), None)


def test_r1_a_hole_means_the_newest_checkpoint_on_all_ranks(job: Job) -> None:
    first = job.begin()
    commit(job, StepId(1, 5), [one(5.0)])
    job.leave([one(8.0)] * 2, 8, attempt=first, on=[0, 1])
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 0])) == {(5, "store")}
    assert values_of(states) == [5.0] * 2


def test_a_step_that_is_named_comes_from_the_store(job: Job) -> None:
    first = job.begin()
    commit(job, StepId(1, 5), [one(5.0)])
    job.leave([one(8.0)], 8, attempt=first)
    states = [one()]
    (ended,) = job.resume(states, step=5)
    assert sources([ended]) == {(5, "store")}
    assert values_of(states) == [5.0]
    assert asked([ended]) == [["Hello", "Seek", "Settle"]]


def test_d9_what_a_root_of_the_same_name_had_before_is_not_resumed_from(job: Job) -> None:
    """The root was deleted and begun anew: attempt 1 is another job's, and has another token."""
    job.leave([one(8.0)], 8)
    for entry in list(job.store.list("")):
        job.store.delete(entry.key)
    job.begin()
    (ended,) = job.resume([one()])
    assert (ended.resumed, ended.error) == (None, None)
    commit(job, StepId(1, 5), [one(5.0)])
    states = [one()]
    assert sources(job.resume(states)) == {(5, "store")}


@pytest.mark.parametrize("data", [b"", b"{}", b"x" * (1 << 17)])
def test_d9_an_attempt_whose_record_is_damaged_is_not_resumed_from(job: Job, data: bytes) -> None:
    job.leave([one(8.0)], 8)
    attempt = job.begin()
    job.store.put(keys.attempt(1), data)
    assert attempt.ordinal == 2
    (ended,) = job.resume([one()])
    assert (ended.resumed, ended.error) == (None, None)


def test_what_a_living_trainer_has_is_not_resumed_from(job: Job) -> None:
    """It said no goodbye and is not dead: it may still write there; nothing is lost by reading it."""
    job.leave([one(8.0)], 8, is_dead=False)
    states = [one()]
    assert sources(job.resume(states)) == {(8, "memory")}
    assert values_of(states) == [8.0]


def test_r1_a_store_that_cannot_be_listed_raises_on_all_though_memory_is_there(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be a newer checkpoint: unavailable is not absent."""
    job.leave([one(8.0)] * 2, 8)
    error = StoreUnavailableError("checkpoints/", "no answer")
    monkeypatch.setattr(
        resuming_module, "open_store",
        lambda url, options: FailingStore(open_store(url, options), frozenset({"list"}), error),
    )  # fmt: skip
    states = [one(), one()]
    for ended in job.resume(states):
        assert isinstance(ended.error, StoreUnavailableError)
        assert "no answer" in str(ended.error)
    assert values_of(states) == [0.0, 0.0]


def test_r1_a_store_that_does_not_say_whose_attempt_it_was_raises(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.leave([one(8.0)], 8)
    error = StoreUnavailableError("attempts/", "no answer")
    monkeypatch.setattr(
        resuming_module, "open_store",
        lambda url, options: FailingStore(open_store(url, options), frozenset({"get"}), error),
    )  # fmt: skip
    (ended,) = job.resume([one()])
    assert isinstance(ended.error, StoreUnavailableError)


def test_r4_a_state_that_does_not_fit_raises_on_all_and_changes_nothing(job: Job) -> None:
    commit(job, StepId(1, 5), [one(5.0)])
    job.leave([one(8.0)] * 2, 8, attempt=Attempt(1, "x"))
    job.store.put(keys.attempt(1), msgspec.json.encode(
        {"token": "x", "world_size": 2, "host": "", "user": "", "pid": 1}
    ))  # fmt: skip
    states = [one(), one(extra=torch.zeros(2))]
    for ended in job.resume(states):
        assert isinstance(ended.error, MissingTensorError)
    del states[1]["extra"]
    assert values_of(states) == [0.0, 0.0]


def test_without_anything_else_what_is_gone_is_the_same_as_nothing(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no checkpoint that could be damaged: the job begins anew."""
    job.leave([one(8.0)] * 2, 8)
    job.nodes[0].change = lambda lent: say.Lent(lent.arena)
    states = [one(), one()]
    with caplog.at_level(logging.ERROR, "ckptd"):
        ended = job.resume(states)
    assert [(e.resumed, e.error) for e in ended] == [(None, None)] * 2
    assert "in memory, step 8-0001 is NOT WHOLE" in caplog.text
    assert values_of(states) == [0.0, 0.0]


# --- overwritten in between ----------------------------------------------------------------------


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Let something happen just before the bytes are copied."""

    def do(deed: Callable[[], None]) -> None:
        read = recalled_module.read_held

        def late(*args: Any, **options: Any) -> None:
            deed()
            read(*args, **options)

        monkeypatch.setattr(recalled_module, "read_held", late)

    return do


def both(job: Job, *, on: list[int] | None = None, **more: Any) -> list[Left]:
    """A checkpoint at step 5, and step 8 in memory, of two ranks."""
    first = job.begin()
    commit(job, StepId(1, 5), [one(5.0)] * 2)
    return job.leave([one(8.0)] * 2, 8, attempt=first, on=on, **more)


def test_r2_what_was_overwritten_sends_all_to_the_checkpoint(
    job: Job, meanwhile, caplog: pytest.LogCaptureFixture
) -> None:
    left = both(job)
    meanwhile(left[1].overwrite)
    states = [one(), one(), one()]
    with caplog.at_level(logging.ERROR, "ckptd"):
        ended = job.resume(states)
    assert sources(ended) == {(5, "store")}
    assert values_of(states) == [5.0] * 3
    assert "in memory, step 8-0001 is NOT WHOLE" in caplog.text
    assert "overwritten" in caplog.text
    for each, kinds in zip(ended, asked(ended), strict=True):
        assert each.resuming.basis is None
        assert kinds[-1] == "Settle", "now the daemon is let finish what it writes"


def test_r4_with_nothing_else_left_the_objects_are_unusable(job: Job, meanwhile) -> None:
    (left,) = job.leave([one(8.0)], 8)
    meanwhile(left.overwrite)
    (ended,) = job.resume([one()])
    assert isinstance(ended.error, TornRestoreError)


def test_what_was_overwritten_before_anybody_looked_is_not_seen(job: Job) -> None:
    left = both(job)
    left[0].overwrite()
    states = [one()]
    assert sources(job.resume(states)) == {(5, "store")}
    assert values_of(states) == [5.0]


# --- several nodes -------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [[0, 1], [1, 0], [0, 1, 0], [0, 1, None]])
@pytest.mark.parametrize("piece_bytes", [None, 700])
def test_r3_what_another_node_holds_travels(
    job: Job, group, monkeypatch: pytest.MonkeyPatch, on: list[int | None], piece_bytes: int | None
) -> None:
    if piece_bytes is not None:  # records in many pieces
        monkeypatch.setattr(recalled_module, "PIECE_BYTES", piece_bytes)
    both(job, on=[0, 1])
    travelling = group(len(on))
    states = [one() for _ in on]
    assert sources(job.resume(states, on=on)) == {(8, "memory")}
    assert values_of(states) == [8.0] * len(on)
    assert travelling.sent > 0


def test_what_all_ranks_have_at_hand_does_not_travel(job: Job, group) -> None:
    """Each old rank wrote all it holds: nobody needs the other's."""
    both(job, on=[0, 1], is_planned=False)
    travelling = group(2)
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 1])) == {(8, "memory")}
    assert values_of(states) == [8.0] * 2
    assert travelling.sent <= 2, "buffers are the lowest rank's"


def test_without_a_group_to_travel_over_the_checkpoint_is_taken(job: Job) -> None:
    both(job, on=[0, 1])
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 1])) == {(5, "store")}
    assert values_of(states) == [5.0] * 2


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_of_a_committed_step_the_store_has_what_memory_lacks(
    job: Job, gate: Gate, lost: int
) -> None:
    gate.error = None
    gate.open()
    on = [int(rank == lost) for rank in range(3)]
    job.leave([one(8.0, seed=rank) for rank in range(3)], 8, on=on)
    wait_until(lambda: list(job.store.list(keys.CHECKPOINTS)), "it is committed")
    states = [one(seed=-1) for _ in range(3)]
    ended = job.resume(states, on=[0, 0, 0])
    assert sources(ended) == {(8, "memory")}
    assert values_of(states) == [8.0] * 3
    assert [state["seed"] for state in states] == [0, 1, 2]
    for each in ended:
        assert (each.resuming.line, each.resuming.basis) == (StepId(1, 8), None)


def test_d9_of_another_save_than_the_checkpoint_nothing_is_taken(job: Job) -> None:
    first = job.begin()
    commit(job, StepId(1, 8), [one(8.0)] * 2)
    job.leave([one(9.0)] * 2, 8, attempt=first, on=[0, 1], sequence=2)
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 0])) == {(8, "store")}
    assert values_of(states) == [8.0] * 2


def test_r2_what_was_overwritten_on_its_way_hangs_nobody(job: Job, group, meanwhile) -> None:
    """A collective that one rank leaves hangs the others: it fails when all have been through."""
    left = both(job, on=[0, 1], chunk_bytes=8192)
    travelling = group(2)
    broadcast = travelling.broadcast

    def late(tensor: torch.Tensor, sender: int) -> None:
        left[1].overwrite()
        broadcast(tensor, sender)

    travelling.broadcast = late  # type: ignore[method-assign]
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 1])) == {(5, "store")}
    assert values_of(states) == [5.0] * 2


def test_r2_a_target_that_fails_on_the_way_hangs_nobody(
    job: Job, group, monkeypatch: pytest.MonkeyPatch
) -> None:
    both(job, on=[0, 1])
    group(2)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a bug of the job")

    monkeypatch.setattr(recalled_module, "deliver", fail)
    for ended in job.resume([one(), one()], on=[0, 1]):
        assert isinstance(ended.error, TornRestoreError)
        assert "a bug of the job" in str(ended.error)


def test_r2_a_snapshot_that_one_node_has_let_go_is_gone_for_all_at_once(job: Job, group) -> None:
    both(job, on=[0, 1])
    group(2)
    job.nodes[1].change = lambda lent: say.Lent(lent.arena)
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 1])) == {(5, "store")}
    assert values_of(states) == [5.0] * 2


# --- daemons that say what makes no sense --------------------------------------------------------


def with_handoff(**changes: object) -> Callable[[say.Lent], say.Lent]:
    return lambda lent: msgspec.structs.replace(
        lent, handoff=msgspec.structs.replace(lent.handoff, **changes)
    )


def with_recipe(change: Callable[[say.Recipe], say.Recipe]) -> Callable[[say.Lent], say.Lent]:
    return lambda lent: msgspec.structs.replace(lent, recipe=change(lent.recipe))


def with_chunk(**changes: object) -> Callable[[say.Lent], say.Lent]:
    def change(recipe: say.Recipe) -> say.Recipe:
        first, *rest = recipe.chunks
        chunks = (msgspec.structs.replace(first, **changes), *rest)
        return msgspec.structs.replace(recipe, chunks=chunks)

    return with_recipe(change)


HOSTILE: dict[str, Callable[[say.Lent], say.Lent]] = {
    "chunk outside of its slot": with_chunk(offset_bytes=1 << 40),
    "chunk that ends outside": with_chunk(raw_bytes=1 << 30),
    "empty chunk": with_chunk(raw_bytes=0),
    "unknown dtype": with_chunk(dtype="float33"),
    "half an element": with_chunk(raw_bytes=3),
    "another dtype": with_chunk(dtype="int64"),
    "no chunks": with_recipe(lambda r: msgspec.structs.replace(r, chunks=())),
    "no tensors": with_recipe(lambda r: msgspec.structs.replace(r, tensors=())),
    "tensors twice": with_recipe(lambda r: msgspec.structs.replace(r, tensors=r.tensors * 2)),
    "no pieces": with_recipe(lambda r: msgspec.structs.replace(r, pieces=Columns())),
    "odd columns": with_recipe(
        lambda r: msgspec.structs.replace(
            r, pieces=msgspec.structs.replace(r.pieces, box=b"\xff" * 13)
        )
    ),
    "no digest": with_recipe(lambda r: msgspec.structs.replace(r, layout="x")),
    "alias of nothing": with_recipe(lambda r: msgspec.structs.replace(r, aliases={"a": "?"})),
    "values that are no JSON": with_handoff(values=b"\xff"),
    "values that are no object": with_handoff(values=b"[1]"),
    "values that nest": with_handoff(values=b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "fingerprints": with_handoff(fingerprints=b"123"),
    "another step": with_handoff(step=9),
    "no step": with_handoff(step=1 << 47),
    "another save": with_handoff(sequence=7),
    "another slot": with_handoff(slot=1),
    "no slot": with_handoff(slot=77),
    "another generation": with_handoff(generation=77),
    "another shape": lambda lent: msgspec.structs.replace(lent, slots=1),
    "another size": lambda lent: msgspec.structs.replace(lent, slot_bytes=lent.slot_bytes * 2),
    "nothing": lambda lent: say.Lent(lent.arena),
    "no recipe": lambda lent: msgspec.structs.replace(lent, recipe=None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_s6_whatever_a_daemon_lends_the_checkpoint_is_there(job: Job, name: str) -> None:
    both(job)
    job.nodes[0].change = HOSTILE[name]
    states = [one(), one()]
    assert sources(job.resume(states)) == {(5, "store")}
    assert values_of(states) == [5.0] * 2


def after_the_first(change: Callable[[say.Lent], say.Lent]) -> Callable[[say.Lent], say.Lent]:
    turns = itertools.count()
    return lambda lent: change(lent) if next(turns) else lent


def test_p2_of_what_makes_no_sense_no_descriptor_is_left(job: Job) -> None:
    both(job)
    job.resume([one()])
    before = open_fds()
    for name in ("empty chunk", "values that nest", "another step", "another size", "no recipe"):
        job.nodes[0].change = HOSTILE[name]
        assert sources(job.resume([one()])) == {(5, "store")}
        job.nodes[0].change = after_the_first(HOSTILE[name])
        assert sources(job.resume([one()])) == {(5, "store")}
    assert open_fds() <= before


@pytest.mark.parametrize("name", HOSTILE)
def test_s6_whatever_one_node_lends_the_others_do_not_wait(job: Job, group, name: str) -> None:
    both(job, on=[0, 1])
    group(2)
    job.nodes[1].change = HOSTILE[name]
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 1])) == {(5, "store")}
    assert values_of(states) == [5.0] * 2


def test_s6_values_that_could_not_be_stored_are_not_passed_on(job: Job, group) -> None:
    """They nest deeper than a record may: the ranks on the other node must hear that it is none."""
    both(job, on=[0, 1])
    group(2)
    deep = b'{"a":' + b"[" * 150 + b"]" * 150 + b"}"
    job.nodes[1].change = with_handoff(values=deep)
    states = [one(), one()]
    assert sources(job.resume(states, on=[0, 1])) == {(5, "store")}


def test_d9_replicas_that_differ_are_no_step(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    first = job.begin()
    commit(job, StepId(1, 5), [one(5.0)] * 2)
    job.leave([one(8.0), one(8.5)], 8, attempt=first, is_planned=False)
    states = [one(), one()]
    with caplog.at_level(logging.ERROR, "ckptd"):
        assert sources(job.resume(states)) == {(5, "store")}
    assert "do not add up" in caplog.text


def test_d9_snapshots_that_leave_a_hole_are_no_step(job: Job) -> None:
    """Each is good by itself: what one rank was to write, by another plan, nobody wrote."""
    first = job.begin()
    commit(job, StepId(1, 5), [one(5.0)] * 2)
    job.leave([one(8.0)] * 2, 8, attempt=first)

    def same_twice(lent: say.Lent) -> say.Lent:
        kept.setdefault("recipe", lent.recipe)
        return msgspec.structs.replace(lent, recipe=kept["recipe"])

    kept: dict[str, Any] = {}
    job.nodes[0].change = same_twice
    states = [one()]
    assert sources(job.resume(states)) == {(5, "store")}
    assert values_of(states) == [5.0]


def test_a_step_that_failed_in_the_store_comes_back_from_memory(job: Job, gate: Gate) -> None:
    """One node's disk was full: what was handed off is whole all the same."""
    job.leave([one(8.0)], 8)
    job.store.put(keys.checkpoint(StepId(1, 8)), TOMBSTONE)
    states = [one()]
    (ended,) = job.resume(states)
    assert sources([ended]) == {(8, "memory")}
    assert (ended.resuming.line, ended.resuming.basis) == (None, StepId(1, 8))


def test_r4_damage_of_what_the_store_adds_is_damage(job: Job, gate: Gate) -> None:
    gate.error = None
    gate.open()
    first = job.begin()
    commit(job, StepId(1, 5), [one(5.0)] * 2)
    job.leave([one(8.0)] * 2, 8, attempt=first, on=[0, 1])
    wait_until(lambda: len(list(job.store.list(keys.CHECKPOINTS))) == 2, "it is committed")
    job.store.delete(keys.rank(StepId(1, 8), 1))
    states = [one(), one()]
    ended = job.resume(states, on=[0, 0])
    assert sources(ended) == {(5, "store")}
    assert values_of(states) == [5.0] * 2
