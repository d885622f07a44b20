"""The deciding part, with the steps of the ranks interleaved in any way."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.trainer.rounds import (
    MAX_OPEN_ROUNDS,
    AgreementState,
    AskFloors,
    AskOffers,
    AskSeen,
    Compute,
    PutFloor,
    PutOffer,
    PutSeen,
    Withdraw,
)


class Job:
    """Ranks that share a board, one effect of one rank at a time."""

    def __init__(self, world_size, bad_rounds=()):
        self.bad_rounds = bad_rounds
        self.failed = set()
        self.world_size = world_size
        self.board = {}
        self.states = [AgreementState() for _ in range(world_size)]
        self.queues = [deque() for _ in range(world_size)]
        self.sequences = [0] * world_size
        self.used = {}  # sequence -> rank -> plan or None
        self.gone = set()

    def all_of(self, name, *about):
        values = [self.board.get((name, *about, rank)) for rank in range(self.world_size)]
        return None if None in values else values

    def save(self, rank, layout, *, is_prepare=False, may_offer=True):
        state = self.states[rank]
        self.sequences[rank] += not is_prepare
        sequence = self.sequences[rank]
        self.queues[rank].extend(state.on_save(sequence, f"{layout}@{rank}", may_offer=may_offer))
        at = state.plan_for(sequence)
        if at:  # a plan is of all ranks' layouts: this rank's must be its present one
            assert at.plan.split("|")[1 + rank] == f"{layout}@{rank}"
        assert not is_prepare or at is None
        self.used.setdefault(sequence, {})[rank] = at and at.plan

    def step(self, rank):
        """Carry out one effect of a rank, polling where there is none; False if it has nothing."""
        queue, state = self.queues[rank], self.states[rank]
        if not queue:
            queue.extend(state.on_poll())
            return False
        match queue.popleft():
            case PutFloor(round_):
                self.board["floor", rank] = round_
            case PutOffer(round_, layout):
                self.board["offer", round_, rank] = layout
            case PutSeen(round_, seen):
                self.board["seen", round_, rank] = seen
            case Withdraw(round_):
                self.board.pop(("offer", round_, rank), None)
                self.board.pop(("seen", round_, rank), None)
            case AskFloors():
                queue.extend(state.on_floors(self.all_of("floor")))
            case AskOffers(round_):
                is_complete = self.all_of("offer", round_) is not None
                queue.extend(state.on_offers(round_, is_complete=is_complete))
            case Compute(round_):
                offers = self.all_of("offer", round_)
                assert offers is not None, "an offer was withdrawn while a rank could read it"
                if round_ in self.bad_rounds:
                    self.failed.add((round_, rank))
                    queue.extend(state.on_failed(round_))
                    return True
                # The round stands in the plan, so that equal layouts of two rounds tell apart.
                queue.extend(state.on_planned(round_, "|".join([str(round_), *offers])))
            case AskSeen(round_):
                queue.extend(state.on_seen(round_, self.all_of("seen", round_)))
        return True

    def settle(self, ranks=None):
        """Let every rank poll until nothing changes any more."""
        for _ in range(4 * self.world_size):
            for rank in range(self.world_size) if ranks is None else ranks:
                self.step(rank)
                while self.step(rank):
                    pass
                self.queues[rank].clear()  # the poll that the last step queued

    def save_everywhere(self, layouts):
        for rank, layout in enumerate(layouts):
            self.save(rank, layout)

    def check_one_plan(self):
        for sequence, plans in self.used.items():
            assert len(set(plans.values()) - {None}) <= 1, (sequence, plans)


MOVES = st.one_of(
    st.tuples(st.just("save"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("save"), st.integers(0, 2), st.sampled_from([0, 0, 0, 1])),
    st.tuples(st.just("quiet"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("step"), st.integers(0, 2), st.integers(1, 12)),
    st.tuples(st.just("step"), st.integers(0, 2), st.integers(1, 12)),
    st.tuples(st.just("settle"), st.just(0), st.just(0)),
)


@settings(max_examples=400, deadline=None)
@given(
    world_size=st.integers(2, 3),
    prepared=st.integers(0, 7),
    bad_rounds=st.sets(st.integers(0, 6), max_size=2),
    moves=st.lists(MOVES, max_size=60),
)
def test_plan_users_agree_at_each_save_and_stable_layouts_end_on_one_plan(
    world_size, prepared, bad_rounds, moves
):
    job = Job(world_size, bad_rounds)
    layouts = [0] * world_size
    for rank in range(world_size):
        if prepared >> rank & 1:
            job.save(rank, layouts[rank], is_prepare=True)
    for move, who, amount in moves:
        rank = who % world_size
        if move == "settle":
            job.settle()
        elif move == "step":
            for _ in range(amount):
                job.step(rank)
        else:
            layouts[rank] += amount
            job.save(rank, layouts[rank], may_offer=move == "save")
    job.check_one_plan()
    while len(set(job.sequences)) > 1:  # the ranks save the same steps in the end
        rank = job.sequences.index(min(job.sequences))
        job.save(rank, layouts[rank])
    for _ in range(12):
        job.settle()
        job.save_everywhere(layouts)
    job.check_one_plan()
    assert None not in job.used[job.sequences[0]].values()
    assert len(job.used[job.sequences[0]]) == world_size


def test_a_prepared_job_splits_its_first_save():
    job = Job(3)
    for rank in range(3):
        job.save(rank, "a", is_prepare=True)
    job.settle()
    job.save_everywhere("aaa")
    assert set(job.used[1].values()) == {"0|a@0|a@1|a@2"}


def test_nobody_waits_for_a_late_rank():
    job = Job(2)
    for _ in range(3):
        job.save(0, "a")
        job.settle()
    assert [plans[0] for plans in job.used.values()] == [None] * 3
    for _ in range(3):
        job.save(1, "a")
        job.settle()
    job.save_everywhere("aa")
    assert len(set(job.used[4].values())) == 1
    assert None not in job.used[4].values()


def test_the_others_keep_their_plan_while_one_rank_changes_its_layout():
    job = Job(2)
    for layouts in ("aa", "aa", "ab"):
        job.save_everywhere(layouts)
        job.settle()
    assert job.used[2] == job.used[3] | {1: job.used[2][1]}
    assert job.used[3][1] is None
    for _ in range(2):
        job.save_everywhere("ab")
        job.settle()
    assert set(job.used[5].values()) == {"4|a@0|b@1"}


def test_a_rank_that_dies_leaves_the_others_without_a_plan_and_the_board_bounded():
    job = Job(3)
    job.save_everywhere("aaa")
    for _ in range(5 * MAX_OPEN_ROUNDS):
        for rank in (0, 1):
            job.save(rank, "a")
            job.settle((0, 1))
    assert {plan for plans in job.used.values() for plan in plans.values()} == {None}
    assert len(job.board) < 2 * 3 * 2 * MAX_OPEN_ROUNDS + 10


def test_a_new_plan_waits_for_the_rank_that_still_saved_by_the_old_one():
    job = Job(2)
    for rank in range(2):
        job.save(rank, "a", is_prepare=True)
    job.settle()
    job.save_everywhere("aa")
    job.save_everywhere("ab")  # save 2: rank 1 has changed and writes all
    job.settle()
    job.save_everywhere("ab")  # save 3: both offer again
    for _ in range(2):
        job.save(0, "a")  # saves 4 and 5 by the old plan, before rank 0 looks at the board
    job.settle()
    assert [job.used[n][0] for n in (4, 5)] == ["0|a@0|a@1"] * 2
    for _ in range(2):
        job.save(1, "b")
    assert [job.used[n][1] for n in (4, 5)] == [None, None]
    job.save_everywhere("ab")
    assert set(job.used[6].values()) == {"3|a@0|b@1"}


def test_rounds_that_no_rank_would_adopt_are_withdrawn():
    job = Job(2)
    for sequence in range(1, 4):
        job.save(0, "a")
        job.save(1, "a", may_offer=sequence == 3)
        job.settle()
    assert {key[1] for key in job.board if key[0] != "floor"} == {3}


def test_every_rank_finds_a_failure_by_itself():
    job = Job(3, bad_rounds={1})
    job.save_everywhere("aaa")
    for rank in range(3):  # each rank only publishes
        while job.step(rank):
            pass
    for rank in range(3):  # then each looks for as long as it finds anything
        for _ in range(3):
            job.settle([rank])
    assert job.failed == {(1, 0), (1, 1), (1, 2)}
    for _ in range(2):
        job.save_everywhere("aaa")
        job.settle()
    assert set(job.used[3].values()) == {"2|a@0|a@1|a@2"}


def test_plans_that_differ_are_never_in_force():
    state = AgreementState()
    state.on_save(1, "a")
    state.on_planned(1, "mine")
    state.on_seen(1, [("mine", 1), ("theirs", 1)])
    assert not state.is_planned
    assert state.adopted is None


def test_saves_never_go_down():
    state = AgreementState()
    state.on_save(2, "a")
    with pytest.raises(ValueError, match="save 1 after save 2"):
        state.on_save(1, "a")
