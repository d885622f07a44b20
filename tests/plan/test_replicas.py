from __future__ import annotations

import pytest

from ckptd.errors import ReplicaMismatchError
from ckptd.model.box import Box
from ckptd.plan.replicas import check_replicas

UPPER, LOWER = Box((0,), (4,)), Box((4,), (8,))


def test_equal_fingerprints_and_different_parts_agree():
    check_replicas([])
    check_replicas([(0, {("w", UPPER): 5}), (1, {("w", UPPER): 5}), (2, {("w", LOWER): 6})])


def test_zero_is_not_sampled_and_agrees_with_everything():
    check_replicas([(0, {("w", UPPER): 0}), (1, {("w", UPPER): 5}), (2, {("w", UPPER): 0})])
    with pytest.raises(ReplicaMismatchError):
        check_replicas([(0, {("w", UPPER): 0}), (1, {("w", UPPER): 5}), (2, {("w", UPPER): 6})])


def test_the_minority_is_named():
    rows = [(rank, {("model.w", UPPER): 8 if rank in (3, 6) else 7}) for rank in range(8)]
    with pytest.raises(ReplicaMismatchError, match=r"model\.w.*ranks 3, 6") as caught:
        check_replicas(rows)
    assert (caught.value.fqn, caught.value.ranks) == ("model.w", (3, 6))


def test_without_a_majority_all_are_named():
    with pytest.raises(ReplicaMismatchError) as caught:
        check_replicas([(0, {("w", UPPER): 1}), (1, {("w", UPPER): 2})])
    assert caught.value.ranks == (0, 1)


def test_the_first_name_is_reported_and_the_others_counted():
    differ = [{("a", UPPER): n, ("b", UPPER): n, ("c", UPPER): n, ("d", UPPER): 9} for n in (1, 2)]
    with pytest.raises(ReplicaMismatchError, match="2 more tensors") as caught:
        check_replicas(list(enumerate(differ)))
    assert caught.value.fqn == "a"


def test_a_part_may_be_several_boxes():
    rows = [(rank, {("w", (UPPER, LOWER)): fingerprint}) for rank, fingerprint in enumerate((1, 2))]
    with pytest.raises(ReplicaMismatchError):
        check_replicas(rows)
