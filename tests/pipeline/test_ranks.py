"""What is remembered of rank manifests changes nothing of what passes and what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.codec.records import decode_record, encode_record
from ckptd.errors import CkptdError
from ckptd.model.manifest import Outcome, RankManifest
from ckptd.pipeline.ranks import RankReader
from tests.codec.test_records import (
    HOSTILE,
    JSON,
    KEY,
    OUTCOME,
    SEEDS,
    TOKENS,
    VALID,
    edited,
    rank_manifest,
)


def both(reader: RankReader, data: bytes) -> None:
    """Decode with and without a memory: the same record, or the same error."""
    plain = outcome_of(lambda: decode_record(data, RankManifest | Outcome, key=KEY))
    assert outcome_of(lambda: reader.decode(data, key=KEY)) == plain


def outcome_of(decode: Callable[[], object]) -> object:
    try:
        return msgspec.json.encode(decode())
    except CkptdError as error:
        return type(error), str(error)


def warm() -> RankReader:
    """Return a reader that knows the parts of a valid record."""
    reader = RankReader()
    reader.decode(VALID, key=KEY)
    return reader


def test_equal_parts_of_different_records_are_one_object() -> None:
    reader = RankReader()
    one, two = (
        reader.decode(encode_record(rank_manifest(400, rank=rank, step=step)), key=KEY)
        for rank, step in ((0, 1000), (1, 2000))
    )
    assert isinstance(one, RankManifest)
    assert isinstance(two, RankManifest)
    assert (one.rank, one.step, two.rank, two.step) == (0, 1000, 1, 2000)
    assert one.tensors is two.tensors
    assert one.pieces is two.pieces
    assert all(one.values[name] is two.values[name] for name in one.values)
    assert one == rank_manifest(400, rank=0)
    other = reader.decode(encode_record(rank_manifest(400, values={"epoch": 4})), key=KEY)
    assert isinstance(other, RankManifest)
    assert other.values == {"epoch": 4}
    assert other.tensors is one.tensors


def test_j4_pieces_are_checked_against_the_tensors_of_their_own_record() -> None:
    """The same pieces of smaller tensors are not the same pieces."""
    whole = rank_manifest()
    smaller = tuple(
        msgspec.structs.replace(t, shape=tuple(max(0, n - 1) for n in t.shape))
        for t in whole.tensors
    )
    both(warm(), msgspec.json.encode(msgspec.structs.replace(whole, tensors=smaller)))


def test_an_outcome_and_another_writers_form_are_read_too() -> None:
    reader = RankReader()
    assert reader.decode(encode_record(OUTCOME), key=KEY) == OUTCOME
    assert reader.decode(json.dumps(json.loads(VALID)).encode(), key=KEY) == rank_manifest()


@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.parametrize("is_warm", [False, True])
def test_s1_s2_j2_j3_j4_hostile_bytes_are_the_same_error(name: str, is_warm: bool) -> None:
    both(warm() if is_warm else RankReader(), HOSTILE[name])


@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(
        st.tuples(
            st.floats(0, 1), st.integers(0, 12), st.sampled_from(TOKENS) | st.binary(max_size=4)
        ),
        max_size=3,
    ),
)
@settings(max_examples=300, deadline=None)
def test_mutated_records_are_judged_alike(seed: bytes, edits: list[tuple[float, int, bytes]]):
    data = bytearray(seed)
    for where, length, new in edits:
        at = int(where * len(data))
        data[at : at + length] = new
    both(warm(), bytes(data))


@given(field=st.sampled_from(sorted(json.loads(VALID))), value=JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_in_any_field_is_judged_alike(field: str, value: object) -> None:
    both(warm(), edited(**{field: value}))
    both(warm(), msgspec.json.encode({**json.loads(VALID), field: value}))


@given(numbers=st.lists(st.integers(0, 200), min_size=4, max_size=8), which=st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_j4_pieces_are_checked_against_the_chunks_of_their_own_record(
    numbers: list[int], which: int
) -> None:
    """The same pieces with shorter chunks are not the same pieces."""
    reader = warm()
    chunk = rank_manifest().chunks[0]
    smaller = msgspec.structs.replace(chunk, raw_bytes=4 * max(1, numbers[0]))
    both(reader, msgspec.json.encode(rank_manifest(chunks=(smaller,))))
    names = ("tensor", "chunk", "offset", "length", "box")
    column = b"".join(number.to_bytes(8, "little") for number in numbers)
    pieces = msgspec.structs.replace(rank_manifest().pieces, **{names[which]: column})
    both(reader, msgspec.json.encode(rank_manifest(pieces=pieces)))


def test_memory_is_bounded_and_what_was_forgotten_is_decoded_again() -> None:
    reader = RankReader(memory_bytes=20_000)
    for number in range(50):
        record = rank_manifest(20, values={"text": "x" * 500, "number": number})
        assert reader.decode(encode_record(record), key=KEY) == record
        assert sum(size for _, size in reader._known.values()) <= 20_000
    assert len(reader._known) > 3
    tiny = RankReader(memory_bytes=0)
    assert tiny.decode(VALID, key=KEY) == tiny.decode(VALID, key=KEY) == rank_manifest()
