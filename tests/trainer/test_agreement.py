import logging
import struct
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from ckptd.errors import LayoutError, MeetingError, ReplicaMismatchError
from ckptd.model.box import Box
from ckptd.model.tensor import Held, Layout, Tensor
from ckptd.plan.split import split
from ckptd.trainer.agreement import Agreement
from ckptd.trainer.boards import LocalBoard, TcpBoard
from ckptd.trainer.meeting import Meeting
from ckptd.units import MIB

LONG_S = 60.0


def held(fqn, shape=(64, 64), *, box=None, is_replicated=False, dtype="float32"):
    tensor = Tensor(fqn, dtype, shape, "parameter", True, "cpu")
    return Held(tensor, (box or Box.full(shape),), is_replicated)


def replica(*names):
    return Layout(tuple(held(name) for name in names))


def samples(*numbers):
    return struct.pack(f"<{len(numbers)}Q", *numbers)


class Clients:
    """A board for each rank: one in memory for all, or clients of one TCPStore server."""

    def __init__(self, kind):
        self._local = LocalBoard()
        self.server = None
        if kind == "tcp":
            self.server = dist.TCPStore(
                "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False
            )

    def agreements(self, world_size):
        boards = [
            TcpBoard("127.0.0.1", self.server.port, 5) if self.server else self._local
            for _ in range(world_size)
        ]
        return [
            Agreement(Meeting(board, rank, world_size), MIB) for rank, board in enumerate(boards)
        ]


@pytest.fixture(params=["local", "tcp"])
def job(request):
    clients, made = Clients(request.param), []

    def make(world_size):
        made.extend(clients.agreements(world_size))
        return made

    make.clients = clients
    yield make
    for agreement in made:
        agreement.close()
    assert not [t for t in threading.enumerate() if t.name == "ckptd-agreement"]


def save(ranks, sequence, layouts, prints):
    return [
        rank.begin_save(sequence, layout, sampled)
        for rank, layout, sampled in zip(ranks, layouts, prints, strict=True)
    ]


def test_replicas_are_split_from_the_save_after_the_first_on(job):
    ranks, layout = job(3), replica("a", "b")
    assert save(ranks, 1, [layout] * 3, [samples(7, 8)] * 3) == [None] * 3
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    agreed = save(ranks, 2, [layout] * 3, [None] * 3)
    plan = split([layout] * 3, MIB)
    assert [a.plan for a in agreed] == [plan.digest] * 3
    assert tuple(a.share for a in agreed) == plan.shares
    assert save(ranks, 3, [layout] * 3, [None] * 3) == agreed


def test_a_prepared_job_splits_its_first_save(job):
    ranks, layout = job(2), replica("a")
    for rank in ranks:
        rank.prepare(layout, samples(5))
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    assert None not in save(ranks, 1, [layout] * 2, [None] * 2)


def test_shards_of_all_ranks_need_no_fingerprints_that_agree(job):
    ranks = job(2)
    halves = [Box((0, 0), (32, 64)), Box((32, 0), (64, 64))]
    layouts = [Layout((held("a", box=box),)) for box in halves]
    save(ranks, 1, layouts, [samples(1), samples(2)])
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    agreed = save(ranks, 2, layouts, [None] * 2)
    assert [a.share for a in agreed] == [((0, box),) for box in halves]


def test_a_placement_vouches_for_replicas_without_fingerprints(job):
    ranks = job(2)
    layout = Layout((held("a", is_replicated=True),))
    save(ranks, 1, [layout] * 2, [samples(1), samples(2)])
    assert all(rank.wait_planned(LONG_S) for rank in ranks)


def test_replicas_that_differ_are_refused_once_on_every_rank_with_fqn_and_ranks(job):
    ranks, layout = job(3), replica("a", "w")
    prints = [samples(1, 5), samples(1, 5), samples(1, 6)]
    assert save(ranks, 1, [layout] * 3, prints) == [None] * 3
    for rank in ranks:
        assert not rank.wait_planned(LONG_S)
        with pytest.raises(ReplicaMismatchError) as caught:
            rank.begin_save(2, layout, samples(1, 5))
        assert caught.value.fqn == "w"
        assert caught.value.ranks == (2,)
    assert save(ranks, 3, [layout] * 3, [samples(1, 5)] * 3) == [None] * 3
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    assert None not in save(ranks, 4, [layout] * 3, [None] * 3)


def test_replicas_are_compared_between_ranks_of_different_layouts(job):
    ranks = job(2)
    layouts = [replica("a", "w"), replica("w")]
    save(ranks, 1, layouts, [samples(1, 5), samples(6)])
    for rank, layout in zip(ranks, layouts, strict=True):
        assert not rank.wait_planned(LONG_S)
        with pytest.raises(ReplicaMismatchError, match="w differs"):
            rank.begin_save(2, layout, None)


def test_layouts_that_do_not_fit_are_refused_on_every_rank(job):
    ranks = job(2)
    layouts = [replica("a"), Layout((held("a", (8, 8)),))]
    save(ranks, 1, layouts, [samples(1), samples(1)])
    for rank, layout in zip(ranks, layouts, strict=True):
        assert not rank.wait_planned(LONG_S)
        with pytest.raises(LayoutError, match="a"):
            rank.begin_save(2, layout, None)


def test_nobody_waits_for_a_late_rank(job):
    ranks, layout = job(2), replica("a")
    for sequence in (1, 2, 3):
        assert ranks[0].begin_save(sequence, layout, samples(sequence)) is None
    assert not ranks[0].wait_planned(0)
    for sequence in (1, 2, 3):
        assert ranks[1].begin_save(sequence, layout, samples(sequence)) is None
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    assert None not in save(ranks, 4, [layout] * 2, [None] * 2)


def test_a_layout_that_changes_is_agreed_anew_while_saves_go_on(job):
    ranks, small, large = job(2), replica("a"), replica("a", "b")
    save(ranks, 1, [small] * 2, [samples(1)] * 2)
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    for rank in ranks:  # one after the other: the first has called before the second changes
        assert rank.begin_save(2, large, samples(1, 2)) is None
        assert not rank.is_planned
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    agreed = save(ranks, 3, [large] * 2, [None] * 2)
    assert {a.plan for a in agreed} == {split([large] * 2, MIB).digest}


def test_a_rank_with_a_plan_goes_back_to_offering_when_another_has_changed(job):
    ranks, small, large = job(2), replica("a"), replica("a", "b")
    save(ranks, 1, [small] * 2, [samples(1)] * 2)
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    before, after = (split(layouts, MIB).digest for layouts in ([small] * 2, [small, large]))
    for sequence in range(2, 60):
        zero, one = save(ranks, sequence, [small, large], [samples(1), samples(1, 2)])
        if zero and one:
            assert zero.plan == one.plan == after
            break
        assert zero is None or zero.plan in {before, after}
        assert one is None or one.plan == after
        for rank in ranks:
            rank.wait_planned(0.2)
    else:
        pytest.fail("the ranks never agreed again")


def test_a_rank_that_never_offers_leaves_the_others_writing_all(job):
    ranks, layout = job(3), replica("a")
    for sequence in (1, 2, 3):
        assert save(ranks[:2], sequence, [layout] * 2, [samples(1)] * 2) == [None] * 2
    assert not ranks[0].wait_planned(0)


def test_a_job_of_one_has_a_plan_at_once_and_no_thread():
    agreement, layout = Agreement(Meeting(LocalBoard(), 0, 1), MIB), replica("a")
    agreement.prepare(layout)
    assert agreement.wait_planned(0)
    agreed = agreement.begin_save(1, layout, b"")
    assert agreed.share == ((0, Box.full((64, 64))),)
    assert agreement.begin_save(2, replica("b"), b"").plan != agreed.plan
    assert not [t for t in threading.enumerate() if t.name == "ckptd-agreement"]
    agreement.close()


class DeadBoard(LocalBoard):
    """Stops to answer once told so."""

    is_dead = False

    def has_all(self, keys):
        if self.is_dead:
            raise MeetingError("no answer")
        return super().has_all(keys)


def test_a_board_that_never_answers_is_logged_once_and_training_goes_on(caplog):
    board = DeadBoard()
    board.is_dead = True
    rank = Agreement(Meeting(board, 0, 2), MIB)
    with caplog.at_level(logging.WARNING, "ckptd"):
        for sequence in (1, 2, 3):
            assert rank.begin_save(sequence, replica("a"), samples(1)) is None
            assert not rank.wait_planned(LONG_S)
        rank.close()
    (record,) = caplog.records
    assert "no answer" in record.getMessage()


def test_a_plan_in_force_outlives_the_board(caplog):
    board, layout = DeadBoard(), replica("a")
    ranks = [Agreement(Meeting(board, rank, 2), MIB) for rank in range(2)]
    save(ranks, 1, [layout] * 2, [samples(1)] * 2)
    assert all(rank.wait_planned(LONG_S) for rank in ranks)
    board.is_dead = True
    agreed = save(ranks, 2, [layout] * 2, [None] * 2)
    assert None not in agreed
    for rank in ranks:
        rank._thread.join(LONG_S)
    assert save(ranks, 3, [layout] * 2, [None] * 2) == agreed
    assert save(ranks, 4, [replica("b")] * 2, [samples(1)] * 2) == [None] * 2


def test_a_master_that_died_costs_the_plan_and_nothing_else(caplog):
    clients = Clients("tcp")
    rank = Agreement(Meeting(TcpBoard("127.0.0.1", clients.server.port, 0.3), 0, 2), MIB)
    assert rank.begin_save(1, replica("a"), samples(1)) is None
    clients.server = None
    for sequence in (2, 3):
        assert rank.begin_save(sequence, replica("a"), samples(1)) is None
        rank.wait_planned(LONG_S)
    rank.close()
    (record,) = caplog.records
    assert "is the process of rank 0 alive" in record.getMessage()


@pytest.mark.parametrize("value", [b"\xc1", b"", b"\x92\x01\x02"])
def test_nonsense_on_the_board_ends_the_agreement_and_not_the_training(value, caplog):
    board, layout = LocalBoard(), replica("a")
    stranger, rank = Meeting(board, 1, 2), Agreement(Meeting(board, 0, 2), MIB)
    stranger.publish("floor", b"0")
    stranger.publish("offer/1", value)
    assert rank.begin_save(1, layout, samples(1)) is None
    assert not rank.wait_planned(LONG_S)
    assert rank.begin_save(2, layout, samples(1)) is None
    rank.close()
    assert len(caplog.records) == 1
