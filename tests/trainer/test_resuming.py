"""Resuming in one process: the newest whole checkpoint of the line, loudly, or an error."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ckptd.codec.records import decode_record, encode_record
from ckptd.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptError,
    LayoutError,
    MissingTensorError,
    ShapeMismatchError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
    TornRestoreError,
    UnsupportedFormatError,
)
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.model.manifest import Manifest, RankManifest
from ckptd.store.memory import MemoryStore
from ckptd.store.open import open_store
from ckptd.trainer import proposals as proposals_module
from ckptd.trainer import resuming as resuming_module
from ckptd.trainer import rng
from ckptd.trainer.checkpointer import Checkpointer
from ckptd.trainer.rng import RNGState
from tests.fakes.checkpoints import PLAIN, flip_byte, write_checkpoint
from tests.fakes.stores import FailingStore
from tests.fakes.training import WAIT_S, bits, make_state, same, train

_numbers = itertools.count(1)
MAX = 1 << 30


class Root:
    """A root in memory with checkpoints at steps 1, 2 and 3 of attempt 1, and Checkpointers on it."""

    def __init__(self) -> None:
        self.url = f"memory://resuming-{next(_numbers)}"
        self.store = MemoryStore.shared(self.url)
        self.saved: dict[int, dict[str, Any]] = {}
        self.made: list[Checkpointer] = []

    def fill(self, steps: int = 3, **more: object) -> Root:
        state = make_state(1, **more)
        with self.open() as ckpt:
            for step in range(1, steps + 1):
                train(state)
                ckpt.save(step, state)
                self.saved[step] = bits(state)
        return self

    def open(self) -> Checkpointer:
        self.made.append(Checkpointer(self.url, daemon=False, slots=2))
        return self.made[-1]

    def record(self, step: int) -> RankManifest:
        key = keys.rank(StepId(1, step), 0)
        return decode_record(self.store.get(key, max_bytes=MAX), RankManifest, key=key)

    def damage_chunk(self, step: int) -> None:
        chunk = self.record(step).chunks[0]
        flip_byte(self.store, chunk.id.key, chunk.stored_bytes - 1)

    def damage(self, kind: str, step: int) -> None:
        if kind == "chunk":
            self.damage_chunk(step)
        elif kind == "lost chunk":
            self.store.delete(self.record(step).chunks[0].id.key)
        elif kind == "rank":
            flip_byte(self.store, keys.rank(StepId(1, step), 0), 3)
        elif kind == "lost rank":
            self.store.delete(keys.rank(StepId(1, step), 0))
        else:
            flip_byte(self.store, keys.checkpoint(StepId(1, step)), 3)


@pytest.fixture
def root() -> Iterator[Root]:
    root = Root()
    yield root
    for ckpt in root.made:
        ckpt._leave()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[StoreError, str], None]:
    """Make every store that `resume` opens fail."""

    def fail(error: StoreError, name: str) -> None:
        monkeypatch.setattr(
            resuming_module,
            "open_store",
            lambda url, options: FailingStore(open_store(url, options), frozenset({name}), error),
        )

    return fail


def test_an_empty_root_resumes_to_none_and_changes_nothing(root: Root) -> None:
    state = make_state()
    before = bits(state)
    assert root.open().resume(state) is None
    assert same(bits(state), before)


def test_the_newest_of_the_line_is_taken(root: Root) -> None:
    root.fill()
    state = make_state(2)
    assert root.open().resume(state).step == 3
    assert same(bits(state), root.saved[3])


def test_resuming_over_a_trained_state_is_as_over_a_new_one(root: Root) -> None:
    root.fill()
    state = make_state(2)
    train(state, 5)
    root.open().resume(state)
    assert same(bits(state), root.saved[3])


def test_r1_the_highest_attempt_counts_not_the_highest_step(root: Root) -> None:
    root.fill()
    state = make_state(2)
    with root.open() as ckpt:
        ckpt.resume(state, step=1)
        ckpt.save(2, state)
    other = make_state(3)
    resumed = root.open().resume(other)
    assert (resumed.attempt, resumed.step) == (2, 2)
    assert same(bits(other), root.saved[1])


def test_a_step_is_meant_on_the_line(root: Root) -> None:
    root.fill()
    state = make_state(2)
    with root.open() as ckpt:
        assert ckpt.resume(state, step=2).step == 2
        assert same(bits(state), root.saved[2])
        ckpt.save(5, state)
    for step in (5, 2, 1):
        assert root.open().resume(make_state(), step=step).step == step
    with pytest.raises(CheckpointNotFoundError, match="not on the line") as caught:
        root.open().resume(make_state(), step=3)
    assert "3-0001" in str(caught.value), "it is there, and has a full name"
    with pytest.raises(CheckpointNotFoundError):
        root.open().resume(make_state(), step=77)


@pytest.mark.parametrize("kind", ["chunk", "lost chunk", "rank", "lost rank", "manifest"])
def test_r1_damage_leads_to_the_next_older_checkpoint_loudly(
    root: Root, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root.fill()
    root.damage(kind, 3)
    state = make_state(2)
    with caplog.at_level(logging.WARNING, "ckptd"):
        assert root.open().resume(state).step == 2
    assert same(bits(state), root.saved[2])
    assert "3-0001" in caplog.text
    assert "NOT WHOLE" in caplog.text or "DAMAGED" in caplog.text


@pytest.mark.parametrize("kind", ["chunk", "rank", "manifest"])
def test_r1_damage_of_a_step_that_was_asked_for_raises_and_no_other_step_is_taken(
    root: Root, kind: str
) -> None:
    root.fill()
    root.damage(kind, 2)
    state = make_state(2)
    before = bits(state)
    with pytest.raises((CorruptError, TornRestoreError)) as caught:
        root.open().resume(state, step=2)
    if kind == "chunk":  # found only while the objects were being filled
        assert isinstance(caught.value, TornRestoreError)
    else:
        assert "step 2 is damaged" in str(caught.value)
        assert same(bits(state), before)


def test_r1_the_newest_whole_one_is_found_past_two_damaged_manifests(root: Root) -> None:
    root.fill()
    root.damage("manifest", 3)
    root.damage("manifest", 2)
    state = make_state(2)
    assert root.open().resume(state).step == 1


@pytest.mark.parametrize("kind", ["rank", "lost rank", "manifest"])
def test_r1_where_no_record_is_whole_resume_raises_and_changes_nothing(
    root: Root, kind: str
) -> None:
    root.fill(2)
    for step in (1, 2):
        root.damage(kind, step)
    state = make_state(2)
    before = bits(state)
    with pytest.raises(CorruptError, match="there are checkpoints"):
        root.open().resume(state)
    assert same(bits(state), before)


def test_r4_where_no_chunk_is_whole_the_objects_are_said_to_be_unusable(root: Root) -> None:
    root.fill(2)
    for step in (1, 2):
        root.damage_chunk(step)
    with pytest.raises(TornRestoreError, match="do not use them"):
        root.open().resume(make_state(2))


def test_r4_an_older_checkpoint_that_does_not_fit_does_not_hide_torn_objects(root: Root) -> None:
    """The newest is found damaged while it is read, and the one before lacks a layer."""
    state = make_state(1)
    with root.open() as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, {**state, "extra": nn.Linear(3, 3)})
    root.damage_chunk(2)
    with pytest.raises(TornRestoreError, match="extra"):
        root.open().resume({**make_state(2), "extra": nn.Linear(3, 3)})


@pytest.mark.parametrize("name", ["list", "get"])
@pytest.mark.parametrize("kind", [StoreUnavailableError, StoreAccessDeniedError])
def test_r1_a_store_that_does_not_answer_is_neither_empty_nor_damaged(
    root: Root, failing, name: str, kind: type[StoreError]
) -> None:
    root.fill(2)
    state = make_state(2)
    before = bits(state)
    failing(kind("chunks/", "no answer"), name)
    with pytest.raises(kind):
        root.open().resume(state)
    assert same(bits(state), before)


def test_r1_a_store_that_dies_while_reading_raises(root: Root, failing) -> None:
    root.fill(2)
    failing(StoreUnavailableError("chunks/", "no answer"), "get")
    with pytest.raises(StoreUnavailableError):
        root.open().resume(make_state(2))


def test_r5_a_newer_format_is_refused_and_not_passed_over(root: Root) -> None:
    root.fill(2)
    key = keys.checkpoint(StepId(1, 2))
    data = root.store.get(key, max_bytes=MAX)
    manifest = decode_record(data, Manifest, key=key)
    root.store.put(key, encode_record(manifest).replace(b'"format":1', b'"format":2'))
    with pytest.raises(UnsupportedFormatError):
        root.open().resume(make_state(2))


def test_a_state_that_wants_more_raises_before_anything_is_changed(root: Root) -> None:
    root.fill(2)
    state = make_state(2, extra=nn.Linear(3, 3))
    before = bits(state)
    with pytest.raises(MissingTensorError) as caught:
        root.open().resume(state)
    assert caught.value.fqn.startswith("extra")
    assert same(bits(state), before)
    state["model"][0] = nn.Linear(5, 8)
    with pytest.raises(ShapeMismatchError):
        root.open().resume({"model": state["model"]})


def test_after_an_error_resume_may_be_called_again(root: Root) -> None:
    root.fill(2)
    ckpt = root.open()
    with pytest.raises(LayoutError):
        ckpt.resume(make_state(2, extra=nn.Linear(3, 3)))
    state = make_state(3)
    assert ckpt.resume(state).step == 2
    assert same(bits(state), root.saved[2])


def test_without_strict_what_is_missing_keeps_its_value_and_is_listed(root: Root) -> None:
    root.fill(2, gone=torch.ones(3), count=5)
    extra = nn.Linear(3, 3)
    weight = extra.weight.detach().clone()
    state = make_state(2, extra=extra, name="new")
    resumed = root.open().resume(state, strict=False)
    assert set(resumed.missing) == {"extra.weight", "extra.bias", "name"}
    assert "gone" in resumed.unused
    assert "count" in resumed.unused
    assert torch.equal(extra.weight, weight)
    assert state["name"] == "new"
    assert same(bits(state), root.saved[2])


def test_what_the_checkpoint_holds_beyond_the_state_is_unused(root: Root) -> None:
    root.fill(1)
    model = make_state(5)["model"]
    resumed = root.open().resume({"model": model})
    assert resumed.values["epoch"] == 1
    assert any(name.startswith("optimizer") for name in resumed.unused)
    expected = {k[2:]: v for k, v in root.saved[1].items() if k.startswith("m.")}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.items())


def test_names_may_be_mapped(root: Root) -> None:
    root.fill(1)
    net = make_state(5)["model"]
    root.open().resume({"net": net}, rename=lambda name: name.replace("model.", "net.", 1))
    assert torch.equal(net[0].weight, root.saved[1]["m.0.weight"])


def test_resume_comes_before_the_first_save(root: Root) -> None:
    ckpt = root.open()
    state = make_state()
    ckpt.save(1, state)
    with pytest.raises(ConfigError, match="before the first save"):
        ckpt.resume(state)


def test_a_step_that_lacks_only_its_commit_is_committed_and_taken(root: Root) -> None:
    root.fill()
    root.store.delete(keys.checkpoint(StepId(1, 3)))
    state = make_state(2)
    assert root.open().resume(state).step == 3
    assert root.store.get(keys.checkpoint(StepId(1, 3)), max_bytes=MAX)


def test_a_step_that_was_ended_is_passed_over(root: Root) -> None:
    root.fill()
    root.store.put(keys.checkpoint(StepId(1, 3)), b"")
    assert root.open().resume(make_state(2)).step == 2


def test_generators_go_on_where_they_were(root: Root) -> None:
    state = make_state(1, rng=RNGState())
    with root.open() as ckpt:
        torch.manual_seed(11)
        ckpt.save(1, state)
    expected = torch.rand(3)
    torch.manual_seed(12)
    root.open().resume(make_state(2, rng=RNGState()))
    assert torch.equal(torch.rand(3), expected)


def test_values_that_turn_out_unusable_at_the_end_are_damage_too(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    """The generators' state parses as a value, but no generator takes it: found in the last phase."""
    good = {"w": {"$tensor": "w"}}
    bad_rng = {"$per_rank": {"python": [3, [1, 2], None], "torch": 5}}
    tensors = {"w": PLAIN["model.weight"]}
    fine = {**good, "rng": rng.capture()}
    write_checkpoint(root.store, StepId(1, 1), tensors, values=fine)
    write_checkpoint(
        root.store, StepId(1, 2), tensors, values={**good, "rng": bad_rng}, previous=StepId(1, 1)
    )
    state = {"w": torch.zeros(3, 4), "rng": RNGState()}
    assert root.open().resume(state).step == 1
    assert "2-0001 is NOT WHOLE" in caplog.text


def test_a_bug_while_looking_is_raised_and_not_taken_for_an_empty_root(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(store: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(proposals_module, "commit_whole_steps", bug)
    with pytest.raises(Exception, match="a bug"):
        root.open().resume(make_state())


def test_settling_waits_for_a_snapshot_of_an_earlier_attempt(root: Root) -> None:
    """What a Checkpointer of this process still writes is there before another one looks."""
    state = make_state(1)
    first = root.open()
    handle = first.save(1, state)
    first.close()
    assert handle.result(WAIT_S).step == 1
    assert root.open().resume(make_state(2)).step == 1
