from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptd.model.box import Box
from ckptd.trainer.passing import BUCKET_BYTES, JOIN_BYTES, _buckets, _shares, digest_of, may_pass
from ckptd.trainer.targets import Target


def target(fqn: str = "w", count: int = 4, dtype: torch.dtype = torch.float32) -> Target:
    return Target(fqn, Box((0,), (count,)), torch.zeros(count, dtype=dtype), torch.float32)


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 9))
def test_shares_are_runs_that_cover_all_and_hardly_differ(sizes: list[int], ranks: int) -> None:
    shares = list(_shares(sizes, ranks))
    assert len(shares) == ranks
    assert [i for share in shares for i in share] == list(range(len(sizes)))
    fair = sum(sizes) / ranks
    for share in shares:
        assert sum(sizes[i] for i in share) <= fair + max(sizes, default=0)


def test_small_tensors_go_together_by_dtype_and_large_ones_alone() -> None:
    large = torch.zeros(JOIN_BYTES // 4 + 1)
    small = [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(())]
    found = [[t.numel() for t in bucket] for bucket in _buckets([small[0], large, *small[1:]])]
    assert found == [[large.numel()], [3, 1], [2]]


def test_a_bucket_has_an_end() -> None:
    many = [torch.zeros(JOIN_BYTES // 4) for _ in range(2 * BUCKET_BYTES // JOIN_BYTES)]
    found = list(_buckets(many))
    assert sum(map(len, found)) == len(many)
    assert max(sum(t.nbytes for t in bucket) for bucket in found) <= BUCKET_BYTES + JOIN_BYTES


def test_who_wants_anything_else_has_another_digest() -> None:
    wants = [target(), target("v"), target(count=5), target(dtype=torch.float64)]
    assert len({digest_of([want]) for want in wants}) == len(wants)
    assert digest_of([target()]) == digest_of([target()])


def test_without_a_process_group_nothing_is_passed_on() -> None:
    assert not may_pass([target()], 1)
