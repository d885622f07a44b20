# ruff: noqa: NPY002 - the global generator is what is tested
from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
import torch

from ckptd.errors import CorruptError
from ckptd.trainer import rng
from ckptd.trainer.values import PerRank, decode_value


@pytest.fixture(autouse=True)
def _own_streams():
    held = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    yield
    random.setstate(held[0])
    np.random.set_state(held[1])
    torch.set_rng_state(held[2])


def draw() -> tuple:
    return (
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
        torch.rand(3).tolist(), torch.randn(1).item(),
    )  # fmt: skip


def test_all_streams_go_on_where_they_were() -> None:
    draw()
    tree = msgspec.json.decode(msgspec.json.encode(rng.capture()))
    expected = [draw(), draw()]
    rng.restore(tree)
    assert [draw(), draw()] == expected


def test_the_state_is_per_rank_and_reads_without_a_live_object() -> None:
    tree = rng.capture()
    assert list(tree) == ["$per_rank"]
    held = decode_value(tree, tensors={})
    assert isinstance(held, PerRank)
    assert set(held.value) == {"python", "numpy", "torch"}


def test_derived_streams_differ_by_rank_and_by_checkpoint_and_repeat() -> None:
    first = rng.capture()
    draw()
    second = rng.capture()

    def stream(tree) -> tuple:
        rng.restore(tree)
        return draw()

    trees = [
        first,
        second,
        *(rng.derive(base, rank) for base in (first, second) for rank in (1, 2, 3)),
    ]
    streams = [stream(tree) for tree in trees]
    for values in zip(*streams, strict=True):
        assert len({str(value) for value in values}) == len(streams)
    assert rng.derive(first, 2) == rng.derive(msgspec.json.decode(msgspec.json.encode(first)), 2)


def test_derived_cuda_states_have_the_form_of_a_cuda_generator() -> None:
    held = decode_value(rng.capture(), tensors={}).value
    held["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    from ckptd.trainer.values import InlineTensors, encode_value

    base = encode_value(PerRank(held), path="rng", tensors=InlineTensors())
    states = decode_value(rng.derive(base, 1), tensors={}).value["cuda"]
    assert [state.shape for state in states] == [(16,), (16,)]
    assert not torch.equal(states[0], states[1])
    assert states[0][8:].tolist() == [0] * 8


@pytest.mark.parametrize(
    "tree", [None, {}, {"$per_rank": {}}, {"$per_rank": {"python": 1}}, {"$per_rank": []},
             {"$per_rank": {"python": [3], "torch": 1}}],
)  # fmt: skip
def test_a_hostile_state_is_corrupt(tree) -> None:
    with pytest.raises(CorruptError):
        rng.restore(tree)
    with pytest.raises(CorruptError):
        rng.derive(tree, 1)
