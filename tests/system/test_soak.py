"""Jobs that are killed at random moments; scripts/soak is the long form of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ckptd
from tests.fakes.cycles import crash_daemons
from tests.fakes.jobs import Place, Ranks
from tests.fakes.soak import run_rounds
from tests.fakes.soak_plans import DAEMON_POINTS, KINDS, NOT_DRAWN, TRAINER_POINTS, Plan

pytestmark = pytest.mark.system

SEED = 9790  # of four rounds with one root, each of another kind


def test_d6_whoever_is_killed_the_job_comes_back_with_what_was_safe(ranks: Ranks) -> None:
    plans = [Plan.of(SEED + number) for number in range(4)]
    assert {plan.kind for plan in plans} == set(KINDS)
    assert any(plan.strike.trainer_point for plan in plans)
    assert any(plan.strike.daemon_point for plan in plans)
    assert any(plan.strike.rides for plan in plans)
    assert any(plan.stumble_s is not None for plan in plans)
    assert any(plan.strike.stall for plan in plans)
    rows = list(run_rounds(SEED, 4, ranks))
    assert [row.kind for row in rows] == [plan.kind for plan in plans]


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_d6_two_hundred_rounds(ranks: Ranks) -> None:
    for row in run_rounds(0, 200, ranks):
        print(row, flush=True)


def test_every_failpoint_is_drawn() -> None:
    source = Path(ckptd.__file__).parent
    found = {True: set[str](), False: set[str]()}
    for path in source.rglob("*.py"):
        names = re.findall(r'failpoints\.hit\("([a-z.]+)"\)', path.read_text())
        found[path.is_relative_to(source / "trainer")] |= set(names)
    assert found[True] == set(TRAINER_POINTS)
    assert found[False] == set(DAEMON_POINTS) | NOT_DRAWN


@pytest.mark.parametrize("crashes", [3, pytest.param(50, marks=pytest.mark.nightly)])
@pytest.mark.timeout(600)
def test_p2_a_trainer_whose_daemons_die_holds_no_more_than_before(
    place: Place, ranks: Ranks, crashes: int
) -> None:
    samples = list(crash_daemons(place, ranks, crashes))
    assert samples[-1].crashes == crashes
