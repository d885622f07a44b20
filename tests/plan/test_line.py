from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import ConfigError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.plan.line import Commit, line, newest, parse_commits, parse_step_text


class Object(NamedTuple):
    key: str
    bytes: int
    modified_s: float


def listing(*names, size=100):
    """Listed commits of ``step-attempt`` names, the later the older by the store's clock."""
    ids = [StepId(attempt=a or 1, step=s) for s, a in map(parse_step_text, names)]
    return [Object(keys.checkpoint(id_), size, -float(n)) for n, id_ in enumerate(ids)]


def commits(*names):
    return parse_commits(listing(*names))


def names(found):
    return [commit.id.short for commit in found]


def test_tombstones_are_no_commits_and_strange_keys_are_nothing():
    strange = [Object("checkpoints/latest", 5, 0.0), Object("ranks/000000000001-0001/00000", 5, 0)]
    entries = [*listing("10-0001"), *listing("20-0001", size=0), *strange]
    assert parse_commits(entries) == [Commit(StepId(1, 10), 100, -0.0)]


def test_r1_the_newest_is_of_the_highest_attempt_not_the_highest_step_nor_time():
    found = newest(commits("900-0001", "3000-0001", "1500-0002", "1400-0002"))
    assert found is not None
    assert found.id == StepId(attempt=2, step=1500)
    assert newest([]) is None


def test_r1_an_attempt_that_has_only_tombstones_does_not_count():
    entries = [*listing("10-0001"), *listing("20-0002", size=0)]
    assert names([newest(parse_commits(entries))]) == ["10-0001"]


def test_r1_the_line_leaves_out_steps_that_a_restart_left_behind():
    every = commits("1000-0001", "2000-0001", "3000-0001", "1500-0002", "1600-0002", "1700-0004")
    previous = {"1700-0004": StepId(2, 1500), "1500-0002": StepId(1, 1000), "1000-0001": None}
    asked = []

    def previous_of(id_):
        asked.append(id_.short)
        return previous[id_.short]

    assert names(line(every, previous_of)) == ["1700-0004", "1500-0002", "1000-0001"]
    assert asked == ["1700-0004", "1500-0002", "1000-0001"]


def test_the_line_reads_no_manifest_before_the_caller_goes_past_an_attempt():
    def previous_of(id_):
        raise AssertionError(id_)

    steps = line(commits("1-0001", "7-0002", "8-0002", "9-0002"), previous_of)
    assert names([next(steps), next(steps), next(steps)]) == ["9-0002", "8-0002", "7-0002"]


def test_the_line_goes_on_below_a_pruned_step_and_ends_where_nothing_is_known():
    every = commits("1000-0001", "3000-0001", "1500-0002")
    assert names(line(every, lambda _: StepId(1, 2000))) == ["1500-0002", "1000-0001"]
    assert names(line(every, lambda _: StepId(2, 1400))) == ["1500-0002"]
    assert names(line(every, lambda _: StepId(1, 900))) == ["1500-0002"]
    assert names(line([], lambda _: None)) == []


@given(st.sets(st.tuples(st.integers(1, 4), st.integers(0, 9))), st.data())
def test_the_line_ends_whatever_previous_says(ids, data):
    every = [Commit(StepId(*id_), 1, 0.0) for id_ in sorted(ids)]
    any_id = st.builds(StepId, st.integers(1, 4), st.integers(0, 9))
    found = list(line(every, lambda _: data.draw(st.none() | any_id)))
    assert len(set(found)) == len(found)
    assert [c.id for c in found] == sorted((c.id for c in found), reverse=True)
    assert found[:1] == [c for c in [newest(every)] if c]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000", (1000, None)), ("1000-0007", (1000, 7)), ("0", (0, None)), ("5-12", (5, 12)),
     ("000000001000-0007", (1000, 7))],
)  # fmt: skip
def test_people_name_a_step_with_or_without_its_attempt(text, expected):
    assert parse_step_text(text) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1-", "1-0000", "1-00007", "1 ", "1\n", "٣", "1e3", "1" * 13, "1-2-3"]
)
def test_anything_else_is_a_config_error(text):
    with pytest.raises(ConfigError, match="not a step"):
        parse_step_text(text)
