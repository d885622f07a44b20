from __future__ import annotations

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ckptd.model.box import Box
from ckptd.model.columns import Columns, Piece
from ckptd.model.manifest import (
    MAX_CHUNK_BYTES,
    Chunk,
    Manifest,
    Outcome,
    RankEntry,
    RankManifest,
)
from ckptd.model.tensor import MAX_DIMS, MAX_ELEMENTS, Held, Layout, Tensor

replace = msgspec.structs.replace
HASH = "0" * 32
W = Tensor("w", "float32", (4, 8), "parameter", True, "cuda:0")
S = Tensor("s", "int64", (), "buffer", False, "cpu")
CHUNKS = (
    Chunk(HASH, "000000000001-0001", "float32", 128, 60),
    Chunk(HASH, "000000000001-0001", "int64", 8, 60),
)
PIECES = (
    Piece(0, 0, 0, 64, Box((0, 0), (2, 8))),
    Piece(0, 0, 64, 64, Box((2, 0), (4, 8))),
    Piece(1, 1, 0, 8, Box((), ())),
)
RANK = RankManifest(
    format=1,
    step=1,
    attempt=1,
    rank=0,
    world_size=2,
    sequence=1,
    plan=None,
    layout=HASH,
    previous=None,
    parent=None,
    captured_at=0.0,
    metrics={},
    tensors=(W, S),
    aliases={"tied": "w"},
    chunks=CHUNKS,
    pieces=Columns.pack(PIECES),
    fingerprints=b"",
    values={"epoch": 3},
)
MANIFEST = Manifest(
    format=1,
    step=1,
    attempt=1,
    world_size=2,
    sequence=1,
    previous="000000000000-0001",
    captured_at=0.0,
    metrics={},
    raw_bytes=136,
    stored_bytes=120,
    tensors=(W, S),
    aliases={"tied": "w"},
    differing=(),
    ranks=(RankEntry(0, 10, HASH), RankEntry(1, 10, HASH)),
)
OUTCOME = Outcome(1, 1, 1, 0, 2, 1, "failed", "disk full")


def test_valid_records_pass_and_come_back_from_json():
    for record in (RANK, MANIFEST, OUTCOME):
        record.check()
        copy = msgspec.json.decode(
            msgspec.json.encode(record), type=Manifest | RankManifest | Outcome
        )
        assert copy == record
    assert RANK.unpack() == list(PIECES)


def with_pieces(*changed):
    return {"pieces": Columns.pack(changed)}


P = PIECES[0]
RANK_CHANGES = {
    "step": [{"step": -1}, {"step": 10**12}],
    "attempt": [{"attempt": 0}, {"attempt": 10_000}],
    "sequence": [{"sequence": 0}],
    "world size": [{"world_size": 0}, {"world_size": 100_001}],
    "rank": [{"rank": 2}, {"rank": -1}],
    "digest": [{"plan": ""}, {"plan": "A" * 32}, {"layout": "0" * 31}],
    "step id": [{"previous": "1-1"}, {"parent": ""}],
    "twice": [{"tensors": (W, W), "pieces": Columns()}],
    "alias": [{"aliases": {"x": "y"}}, {"aliases": {"w": "w"}}, {"aliases": {"w": "s"}}],
    "fingerprints": [{"fingerprints": b"12345678"}, {"fingerprints": b"1"}],
    "not in the table": [
        with_pieces(P._replace(tensor=1), P._replace(chunk=2)) | {"tensors": (W,), "aliases": {}},
        {"chunks": CHUNKS[:1]},
    ],
    "outside": [
        with_pieces(P._replace(box=Box((3, 0), (5, 8)))),
        with_pieces(P._replace(box=Box((2**63, 0), (2**63 + 2, 8)))),
        with_pieces(P._replace(box=Box((2, 0), (0, 8)))),
    ],
    "dtype or length": [
        with_pieces(P._replace(length_bytes=60)),
        with_pieces(P._replace(chunk=1)),
        with_pieces(P._replace(length_bytes=2**64 - 64)),
    ],
    "leaves its chunk": [
        with_pieces(P._replace(offset_bytes=68)),
        with_pieces(P._replace(offset_bytes=2)),
        with_pieces(P._replace(offset_bytes=2**64 - 64)),
    ],
    "64-bit": [{"pieces": Columns(tensor=b"1")}],
    "bad": [
        {"chunks": (replace(CHUNKS[0], **change), CHUNKS[1])}
        for change in (
            {"hash": "x"},
            {"dtype": "float31"},
            {"raw_bytes": 0},
            {"raw_bytes": -128},
            {"raw_bytes": MAX_CHUNK_BYTES + 4},
            {"stored_bytes": 0},
        )
    ],
    "whole elements": [{"chunks": (replace(CHUNKS[0], raw_bytes=130), CHUNKS[1])}],
}


@pytest.mark.parametrize(
    ("message", "changes"), [(text, c) for text, changes in RANK_CHANGES.items() for c in changes]
)
def test_j4_a_rank_manifest_that_types_let_through_is_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        replace(RANK, **changes).check()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("exactly 0", {"ranks": MANIFEST.ranks[:1]}),
        ("exactly 0", {"ranks": MANIFEST.ranks[::-1]}),
        ("exactly 0", {"ranks": (MANIFEST.ranks[0],) * 2}),
        ("exactly 0", {"ranks": (*MANIFEST.ranks, RankEntry(2, 1, HASH))}),
        ("rank 1", {"ranks": (MANIFEST.ranks[0], RankEntry(1, 0, HASH))}),
        ("rank 1", {"ranks": (MANIFEST.ranks[0], RankEntry(1, 1, "z" * 32))}),
        ("negative", {"raw_bytes": -1}),
        ("negative", {"stored_bytes": -1}),
        ("step", {"step": -1}),
        ("step id", {"previous": "latest"}),
        ("twice", {"tensors": (W, W)}),
        ("alias", {"aliases": {"a": "b"}}),
    ],
)
def test_j4_a_manifest_that_types_let_through_is_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        replace(MANIFEST, **changes).check()


@pytest.mark.parametrize("changes", [{"rank": 2}, {"rank": -1}, {"sequence": 0}, {"attempt": 0}])
def test_an_outcome_is_checked_too(changes):
    with pytest.raises(ValueError, match=r"rank|sequence|attempt"):
        replace(OUTCOME, **changes).check()


@pytest.mark.parametrize(
    "changes",
    [
        {"fqn": ""},
        {"fqn": "a\nb"},
        {"fqn": "\x1b[31m"},
        {"fqn": "a" * 1025},
        {"dtype": "object"},
        {"dtype": ""},
        {"shape": (-1,)},
        {"shape": (MAX_ELEMENTS,)},
        {"shape": (1 << 30, 1 << 30)},
        {"shape": (1,) * (MAX_DIMS + 1)},
    ],
)
def test_j4_tensors_that_cannot_be_are_refused(changes):
    with pytest.raises(ValueError, match=r"."):
        replace(W, **changes).check()


@given(st.data())
def test_unknown_fields_and_wrong_types_are_refused(data):
    raw = msgspec.to_builtins(RANK)
    field = data.draw(st.sampled_from(sorted(raw)))
    if data.draw(st.booleans()):
        raw[field + "_"] = 1
    elif field not in ("values", "metrics", "aliases"):
        raw[field] = {"not": "that"}
    else:
        raw[field] = 7
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, RankManifest)


@given(
    st.lists(st.tuples(*[st.integers(0, 2**64 - 1) | st.integers(0, 9)] * 4), max_size=3), st.data()
)
def test_j4_any_pieces_pass_only_if_they_lie_in_their_tensor_and_chunk(numbers, data):
    small = st.integers(0, 9) | st.integers(0, 2**64 - 1)
    pieces = []
    for tensor, chunk, offset, length in numbers:
        dims = 2 if tensor % 2 == 0 else 0
        box = Box(*(tuple(data.draw(small) for _ in range(dims)) for _ in range(2)))
        pieces.append(Piece(tensor % 2, chunk, offset, length, box))
    record = replace(RANK, pieces=Columns.pack(pieces))
    try:
        record.check()
    except ValueError:
        return
    for piece in pieces:
        size = piece.box.volume * record.tensors[piece.tensor].itemsize
        assert 0 <= piece.offset_bytes <= CHUNKS[piece.chunk].raw_bytes - size
        assert size == piece.length_bytes


def test_the_digest_of_a_layout_leaves_out_devices_and_nothing_else():
    own = Layout((Held(W, (Box.full((4, 8)),)),), {"tied": "w"})
    digest = own.digest()
    assert (
        Layout((Held(replace(W, device="cpu"), own.held[0].boxes),), own.aliases).digest() == digest
    )
    others = [
        Layout((Held(replace(W, **change), own.held[0].boxes),), own.aliases)
        for change in (
            {"fqn": "v"}, {"dtype": "int32"}, {"shape": (8, 4)}, {"kind": "other"},
            {"requires_grad": False},
        )
    ]  # fmt: skip
    others += [
        Layout((Held(W, (Box((0, 0), (2, 8)),)),), own.aliases),
        Layout((Held(W, own.held[0].boxes, True),), own.aliases),
        Layout(own.held),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 1 + len(others)


def test_a_layout_computes_its_digest_once_and_stays_the_same_value(monkeypatch):
    own, other = (Layout((Held(W, (Box.full((4, 8)),)),), {"tied": "w"}) for _ in range(2))
    digest = own.digest()
    monkeypatch.setattr(xxhash, "xxh3_128_hexdigest", lambda _: "another")
    assert own.digest() == digest
    assert (own, msgspec.msgpack.encode(own)) == (other, msgspec.msgpack.encode(other))
    assert replace(own, aliases={}).digest() == "another"


def test_bytes_of_a_tensor_are_those_of_the_whole():
    assert (W.elements, W.itemsize, W.bytes) == (32, 4, 128)
    assert (S.elements, S.bytes) == (1, 8)
    assert np.prod(W.shape) == W.elements
