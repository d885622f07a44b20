"""Chunks that lie in memory: copied out once, and looked at again before anybody believes it."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.errors import CorruptError
from ckptd.model.box import Box
from ckptd.model.manifest import Chunk
from ckptd.pipeline import held as module
from ckptd.pipeline.held import MAX_THREADS, HeldRead, deliver, read_held
from ckptd.plan.reading import ChunkRead, Region

SHAPE = (6, 5, 4)
NUMBERS = np.arange(120, dtype=np.float32).reshape(SHAPE)


def quiet(done: int, total: int) -> None:
    pass


def fine() -> None:
    pass


class Piece(NamedTuple):
    """Numbers from `box` of a tensor, as they lie in a chunk between other bytes."""

    box: Box
    offset_bytes: int = 64

    @property
    def raw(self) -> bytes:
        part = NUMBERS[self.box.slices((0,) * 3)]
        return b"\xee" * self.offset_bytes + np.ascontiguousarray(part).tobytes() + b"\xee" * 64

    def read(self, *boxes: Box) -> ChunkRead:
        chunk = Chunk("0" * 32, "000000000001-0001", "float32", len(self.raw), len(self.raw))
        regions = (Region(i, box, self.box, self.offset_bytes, 4) for i, box in enumerate(boxes))
        return ChunkRead(chunk, tuple(regions))


class Target:
    """Memory for boxes of the tensor; takes what is whole in one way, the rest in the other."""

    def __init__(self, *boxes: Box, may_put: bool = True) -> None:
        self.boxes = boxes
        self.arrays = [np.full(box.shape, -1, np.float32) for box in boxes]
        self.may_put = may_put
        self.ways: list[str] = []

    def place(self, region: Region):
        if not self.may_put:
            return None
        flat = self.arrays[region.wanted].reshape(-1).view(np.uint8)

        def put(at: int, raw) -> None:
            self.ways.append("put")
            flat[at : at + len(raw)] = raw

        return put

    def sink(self, region: Region, raw: memoryview) -> None:
        self.ways.append("sink")
        part = np.frombuffer(raw, np.float32).reshape(region.box.shape)
        self.arrays[region.wanted][...] = part

    def check(self) -> None:
        for box, array in zip(self.boxes, self.arrays, strict=True):
            np.testing.assert_array_equal(array, NUMBERS[box.slices((0,) * 3)])


WHOLE = Box((0, 0, 0), SHAPE)
ROWS = Box((2, 0, 0), (4, 5, 4))
COLUMNS = Box((1, 1, 1), (5, 3, 2))


@pytest.mark.parametrize(
    ("box", "may_put", "way"),
    [(WHOLE, True, "put"), (ROWS, True, "put"), (COLUMNS, True, "sink"), (WHOLE, False, "sink"),
     (COLUMNS, False, "sink")],
)  # fmt: skip
def test_regions_without_gaps_go_straight_and_others_are_put_together(
    box: Box, may_put: bool, way: str
) -> None:
    piece, target = Piece(WHOLE), Target(box, may_put=may_put)
    deliver(piece.read(box), np.frombuffer(piece.raw, np.uint8), target.sink, target.place)
    target.check()
    assert target.ways == [way]


def test_several_regions_of_a_chunk_are_each_delivered() -> None:
    boxes = (ROWS, COLUMNS, WHOLE)
    piece, target = Piece(WHOLE), Target(*boxes)
    read_held(
        [HeldRead(piece.read(*boxes), memoryview(piece.raw), fine)], target.sink,
        place=target.place, progress=quiet,
    )  # fmt: skip
    target.check()
    assert sorted(target.ways) == ["put", "put", "sink"]


@st.composite
def boxes_in(draw: st.DrawFn, outer: Box) -> Box:
    start = tuple(draw(st.integers(a, b - 1)) for a, b in zip(outer.start, outer.stop, strict=True))
    stop = tuple(draw(st.integers(a + 1, b)) for a, b in zip(start, outer.stop, strict=True))
    return Box(start, stop)


@settings(max_examples=100)
@given(st.data())
def test_d2_any_box_of_any_piece_comes_out(data: st.DataObject) -> None:
    outer = data.draw(boxes_in(WHOLE))
    piece = Piece(outer, data.draw(st.integers(0, 9)) * 4)
    boxes = data.draw(st.lists(boxes_in(outer), min_size=1, max_size=3))
    target = Target(*boxes, may_put=data.draw(st.booleans()))
    deliver(piece.read(*boxes), np.frombuffer(piece.raw, np.uint8), target.sink, target.place)
    target.check()


def test_memory_that_may_only_be_read_is_enough() -> None:
    piece, target = Piece(WHOLE), Target(WHOLE, COLUMNS)
    raw = memoryview(piece.raw)
    assert raw.readonly
    read_held(
        [HeldRead(piece.read(WHOLE, COLUMNS), raw, fine)], target.sink,
        place=target.place, progress=quiet,
    )  # fmt: skip
    target.check()


def test_r4_each_chunk_is_looked_at_after_it_was_copied_and_not_before() -> None:
    piece, target = Piece(WHOLE), Target(WHOLE)
    ways: list[list[str]] = []
    held = HeldRead(
        piece.read(WHOLE), memoryview(piece.raw), lambda: ways.append(list(target.ways))
    )
    read_held([held], target.sink, place=target.place, progress=quiet)
    assert ways == [["put"]]


def moved() -> None:
    raise CorruptError("overwritten")


def test_r4_what_was_overwritten_meanwhile_is_damage() -> None:
    piece, target = Piece(WHOLE), Target(WHOLE)
    done: list[int] = []
    with pytest.raises(CorruptError, match="overwritten"):
        read_held(
            [HeldRead(piece.read(WHOLE), memoryview(piece.raw), moved)], target.sink,
            place=target.place, progress=lambda count, _total: done.append(count),
        )  # fmt: skip
    assert done == [], "nobody is told that it is done"


def test_the_first_failure_stops_the_rest_and_no_thread_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "usable_cores", lambda: 1)
    before = threading.active_count()
    piece, target = Piece(WHOLE), Target(*[WHOLE] * 20)
    reads = []
    for number in range(20):
        regions = (Region(number, WHOLE, WHOLE, piece.offset_bytes, 4),)
        read = piece.read()._replace(regions=regions)
        reads.append(HeldRead(read, memoryview(piece.raw), moved if number == 3 else fine))
    with pytest.raises(CorruptError):
        read_held(reads, target.sink, place=target.place, progress=quiet)
    assert len(target.ways) == 4
    assert threading.active_count() == before


def test_what_a_target_raises_is_raised() -> None:
    piece = Piece(WHOLE)

    def fail(region: Region, raw: memoryview) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read_held(
            [HeldRead(piece.read(WHOLE), memoryview(piece.raw), fine)] * 3, fail,
            place=lambda _region: None, progress=quiet,
        )  # fmt: skip


def test_progress_tells_of_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int]] = []
    piece, target = Piece(WHOLE), Target(WHOLE)
    count = len(piece.raw)
    read_held(
        [HeldRead(piece.read(WHOLE), memoryview(piece.raw), fine)] * 3, target.sink,
        place=target.place, progress=lambda done, total: said.append((done, total)),
    )  # fmt: skip
    assert said == [(count, 3 * count), (2 * count, 3 * count), (3 * count, 3 * count)]


def test_nothing_to_read_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda *_, **__: pytest.fail("a thread"))
    read_held([], pytest.fail, place=lambda _region: None, progress=quiet)


@pytest.mark.parametrize(
    ("cores", "reads", "threads"), [(64, 9, MAX_THREADS), (2, 9, 2), (9, 1, 1)]
)
def test_a_few_threads_copy_at_once(
    monkeypatch: pytest.MonkeyPatch, cores: int, reads: int, threads: int
) -> None:
    asked: list[int] = []
    pool = module.ThreadPoolExecutor

    def remember(count: int, **options: str):
        asked.append(count)
        return pool(count, **options)

    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    monkeypatch.setattr(module, "ThreadPoolExecutor", remember)
    piece, target = Piece(WHOLE), Target(WHOLE)
    read_held(
        [HeldRead(piece.read(WHOLE), memoryview(piece.raw), fine)] * reads, target.sink,
        place=target.place, progress=quiet,
    )  # fmt: skip
    assert asked == [threads]
