from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import IncompleteError, LayoutError, ReplicaMismatchError, SaveFailedError
from ckptd.model.manifest import RankEntry
from ckptd.plan.commit import layout_key, manifest_of
from ckptd.plan.split import split, whole_share
from tests.plan import layouts as make

WORLD = 4
TENSOR = make.tensor("w", (8, 8))
LAYOUTS = [make.layout((TENSOR, [make.rows(2 * r, 2 * r + 2)])) for r in range(WORLD)]
PLAN = split(LAYOUTS, 1 << 20)


def record(rank, *, own=None, **changes):
    own = own or LAYOUTS[rank]
    fields = {"plan": PLAN.digest, "world_size": WORLD, **changes}
    return make.manifest(rank, own, whole_share(own), **fields)


def parts(*records):
    return [(r, 100 + r.rank, f"{r.rank:032x}") for r in records]


def whole(**of_rank):
    """All ranks' parts; ``r2={...}`` changes what rank 2 says."""
    return parts(*(record(rank, **of_rank.get(f"r{rank}", {})) for rank in range(WORLD)))


def test_a_commit_of_all_ranks_is_valid_and_takes_facts_from_rank_0():
    facts = {"metrics": {"loss": 1.5}, "previous": "000000000001-0001", "captured_at": 42.0}
    manifest = manifest_of(whole(r0=facts))
    manifest.check()
    assert (manifest.metrics, manifest.previous, manifest.captured_at) == tuple(facts.values())
    assert (manifest.step, manifest.attempt, manifest.sequence, manifest.world_size) == (1, 1, 1, 4)
    assert manifest.raw_bytes == 8 * 8 * 4
    assert manifest.tensors == (TENSOR,)
    assert manifest.ranks[3] == RankEntry(3, 103, f"{3:032x}")


@given(st.permutations(range(WORLD)))
def test_d4_whoever_commits_makes_the_same_bytes(order):
    ordered = whole(r1={"values": {"b": 1, "a": 2}})
    encoded = msgspec.json.encode(manifest_of([ordered[i] for i in order]))
    assert encoded == msgspec.json.encode(manifest_of(ordered))


@pytest.mark.parametrize(
    ("field", "value"), [("step", 2), ("attempt", 2), ("sequence", 2), ("world_size", 5)]
)
def test_d9_a_mixture_is_refused_and_named(field, value):
    with pytest.raises(SaveFailedError, match=rf"{field}.*rank 2\b"):
        manifest_of(whole(r2={field: value}))


def test_d9_two_plans_are_refused_and_no_plan_goes_with_any():
    with pytest.raises(SaveFailedError, match=r"rank 2\b"):
        manifest_of(whole(r2={"plan": "b" * 32}))
    manifest_of(whole(r2={"plan": None}))


def test_d9_missing_ranks_are_named():
    with pytest.raises(IncompleteError) as caught:
        manifest_of(parts(record(0), record(3)))
    assert (caught.value.step, caught.value.missing_ranks) == (1, (1, 2))


def test_d9_a_rank_twice_or_out_of_range_is_refused():
    with pytest.raises(SaveFailedError, match="rank 3 of 4"):
        manifest_of(parts(*(record(r) for r in (0, 1, 2, 3)), record(3)))
    stray = msgspec.structs.replace(record(3), rank=4)
    with pytest.raises(SaveFailedError, match="rank 4 of 4"):
        manifest_of(parts(record(0), record(1), record(2), stray))


def test_a_commit_of_nothing_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="no rank manifests"):
        manifest_of([])


def test_a_hole_refuses_the_commit_unless_the_layout_is_proven():
    holed = whole()
    empty = make.manifest(2, LAYOUTS[2], (), world_size=WORLD, plan=PLAN.digest)
    holed[2] = (empty, 1, "0" * 32)
    with pytest.raises(LayoutError, match=r"\[4:6, 0:8\]"):
        manifest_of(holed)
    manifest_of(holed, is_layout_proven=True)


def test_the_layout_key_follows_layouts_plans_and_pieces_and_nothing_else():
    key = layout_key(whole())
    assert key == layout_key(whole()[::-1])
    later = {"step": 9, "sequence": 3, "metrics": {"a": 1.0}}
    assert key == layout_key(whole(**{f"r{rank}": later for rank in range(WORLD)}))
    holed = whole()
    holed[2] = (make.manifest(2, LAYOUTS[2], (), world_size=WORLD, plan=PLAN.digest), 1, "0" * 32)
    others = [whole(r2={"layout": "c" * 32}), whole(r2={"plan": None}), holed, whole()[:3]]
    others.append([*whole()[:3], *parts(record(3, own=LAYOUTS[2], layout=LAYOUTS[3].digest()))])
    assert len({key, *map(layout_key, others)}) == 6


def test_values_that_differ_or_that_some_ranks_lack_are_listed():
    manifest = manifest_of(
        whole(
            r0={"values": {"epoch": 1, "rng": [1], "same": {"a": 1, "b": 2}}},
            r1={"values": {"epoch": 1, "rng": [2], "same": {"b": 2, "a": 1}}},
            r2={"values": {"epoch": 1, "rng": [1], "same": {"a": 1, "b": 2}, "only": 0}},
            r3={"values": {"epoch": 1, "rng": [1], "same": {"a": 1, "b": 2}}},
        )
    )
    assert manifest.differing == ("only", "rng")


def test_a_value_that_only_rank_0_has_differs():
    assert manifest_of(whole(r0={"values": {"epoch": 1}})).differing == ("epoch",)


def test_stored_bytes_count_each_chunk_once():
    own = make.layout(TENSOR)
    records = [record(rank, own=own, plan=None) for rank in range(WORLD)]
    assert len({r.chunks for r in records}) == 1
    manifest = manifest_of(parts(*records))
    assert manifest.stored_bytes == sum(c.stored_bytes for c in records[0].chunks)


def test_tensors_and_aliases_are_merged_and_the_lowest_holder_says_the_device():
    held = [("a", "cuda:0"), ("b", "cuda:1"), ("a", "cuda:2"), ("c", "cuda:3")]
    records = []
    for rank, (fqn, device) in enumerate(held):
        t = msgspec.structs.replace(make.tensor(fqn), device=device)
        own = make.layout(t, aliases={f"{fqn}.tied": fqn})
        records.append(record(rank, own=own, plan=None))
    manifest = manifest_of(parts(*records)[::-1])
    assert [(t.fqn, t.device) for t in manifest.tensors] == [
        ("a", "cuda:0"),
        ("b", "cuda:1"),
        ("c", "cuda:3"),
    ]
    assert manifest.aliases == {"a.tied": "a", "b.tied": "b", "c.tied": "c"}


def fingerprinted(*samples, own):
    rows = []
    for rank, sample in enumerate(samples):
        changes = {"fingerprints": np.array([sample], "<u8").tobytes(), "plan": None}
        rows.append(record(rank, own=own, **changes))
    return parts(*rows)


def test_replicas_that_differ_refuse_the_commit():
    own = make.layout(TENSOR)
    manifest_of(fingerprinted(7, 7, 0, 7, own=own))
    with pytest.raises(ReplicaMismatchError) as caught:
        manifest_of(fingerprinted(7, 7, 7, 2**64 - 1, own=own), is_layout_proven=True)
    assert (caught.value.fqn, caught.value.ranks) == ("w", (3,))


def test_shards_of_one_tensor_have_fingerprints_of_their_own():
    samples = (np.array([rank + 1], "<u8").tobytes() for rank in range(WORLD))
    rows = {f"r{rank}": {"fingerprints": s, "plan": None} for rank, s in enumerate(samples)}
    manifest_of(whole(**rows))
