from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.model.box import Box
from ckptd.plan.pack import PAGE_BYTES, pack
from ckptd.plan.split import whole_share
from ckptd.units import MIB
from tests.plan import layouts as make

CHUNK = 32 * MIB


def packed(*tensors, chunk_bytes=CHUNK, header_bytes=4096):
    own = make.layout(*tensors)
    return pack(own, whole_share(own), chunk_bytes=chunk_bytes, header_bytes=header_bytes)


@given(st.data(), st.sampled_from([16, 64, 4096]), st.sampled_from([1, 4096, 5000]))
def test_pieces_fill_chunks_without_gaps_or_overlaps(data, chunk_bytes, header_bytes):
    (own,) = data.draw(make.layouts(data.draw(make.tensors()), 1))
    result = pack(own, whole_share(own), chunk_bytes=chunk_bytes, header_bytes=header_bytes)
    at = [0] * len(result.chunks)
    for piece in result.pieces:
        t = result.tensors[piece.tensor]
        assert piece.offset_bytes == at[piece.chunk]
        assert piece.offset_bytes % t.itemsize == 0
        assert piece.length_bytes == piece.box.volume * t.itemsize > 0
        assert result.chunks[piece.chunk].dtype == t.dtype
        at[piece.chunk] += piece.length_bytes
    assert at == [span.raw_bytes for span in result.chunks]
    assert all(span.raw_bytes <= chunk_bytes for span in result.chunks)


@given(st.data(), st.sampled_from([1, 4096, 5000]))
def test_chunks_lie_on_pages_apart_from_each_other_inside_the_slot(data, header_bytes):
    (own,) = data.draw(make.layouts(data.draw(make.tensors()), 1))
    result = pack(own, whole_share(own), chunk_bytes=64, header_bytes=header_bytes)
    end = header_bytes
    for span in result.chunks:
        assert span.offset_bytes % PAGE_BYTES == 0
        assert span.offset_bytes >= end
        end = span.offset_bytes + span.raw_bytes
    assert result.slot_bytes >= end
    assert result.slot_bytes % PAGE_BYTES == 0


def test_large_boxes_have_chunks_of_their_own_and_small_ones_share():
    result = packed(
        make.tensor("a", (512, 512)), make.tensor("b", (512, 511)), make.tensor("c", (8,))
    )
    assert [piece.chunk for piece in result.pieces] == [0, 1, 1]
    assert [span.raw_bytes for span in result.chunks] == [MIB, 512 * 511 * 4 + 32]


def test_boxes_larger_than_a_chunk_are_cut_evenly():
    result = packed(make.tensor("w", (33 * MIB // 4,)))
    assert [span.raw_bytes for span in result.chunks] == [33 * MIB // 2] * 2
    result = packed(make.tensor("w", (3, 33, MIB // 4)))
    assert len(result.chunks) == 6
    assert max(span.raw_bytes for span in result.chunks) == 17 * MIB


def test_one_element_larger_than_a_chunk_is_a_chunk():
    result = packed(make.tensor("w", (3,), "float64"), chunk_bytes=4)
    assert [span.raw_bytes for span in result.chunks] == [8, 8, 8]


def test_small_pieces_never_exceed_a_chunk_together():
    result = packed(
        *(make.tensor(f"t{i:03d}", (200_000,)) for i in range(100)), chunk_bytes=2 * MIB
    )
    assert len(result.chunks) == 50


def test_dtypes_and_frozen_parameters_are_apart():
    result = packed(
        make.tensor("a", (4,)),
        make.tensor("b", (4,), grad=False),
        make.tensor("c", (4,), "float64"),
        make.tensor("d", (4,), kind="optimizer", grad=False),
        make.tensor("e", (4,), kind="buffer", grad=False),
        make.tensor("f", (4,), grad=False),
    )
    chunk_of = {result.tensors[piece.tensor].fqn: piece.chunk for piece in result.pieces}
    assert chunk_of == {"a": 0, "b": 1, "c": 2, "d": 0, "e": 0, "f": 1}


def test_the_table_is_whole_even_of_what_the_rank_does_not_write():
    own = make.layout(make.tensor("a"), make.tensor("b"), aliases={"z": "a"})
    result = pack(own, ((1, Box.full((4, 8))),), chunk_bytes=CHUNK, header_bytes=4096)
    assert [t.fqn for t in result.tensors] == ["a", "b"]
    assert [piece.tensor for piece in result.pieces] == [1]
    assert result.aliases == {"z": "a"}


def test_empty_tensors_have_no_pieces_and_a_share_of_nothing_is_a_header():
    result = packed(make.tensor("e", (0, 3)))
    assert (result.pieces, result.chunks, result.slot_bytes) == ((), (), 4096)


def test_the_pieces_of_a_scalar_is_one_element():
    (piece,) = packed(make.tensor("s", ())).pieces
    assert (piece.length_bytes, piece.box) == (4, Box((), ()))
