"""The simulated job is one that ckptd accepts, and each step of it does what is claimed."""

import json

import pytest
from rich.console import Console

pytest.importorskip("torch")

from bench import ranks, ranks_job
from bench.ranks_job import EARLIER, LATER, Job
from ckptd.codec.records import decode_record
from ckptd.model import keys
from ckptd.model.manifest import Manifest, RankManifest
from ckptd.plan.coverage import prove_coverage

RANKS, TENSORS = 8, 20
MAX = 1 << 30


@pytest.fixture(scope="module", params=ranks_job.CASES)
def made(request, tmp_path_factory):
    job, folder = Job(request.param, RANKS, TENSORS), tmp_path_factory.mktemp("ranks")
    ranks_job.build(job, folder)
    return job, folder


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    monkeypatch.setattr(ranks, "_RUNS", 1)


def records_of(folder, id_):
    store = ranks_job.store(folder, id_)
    return [
        decode_record(store.get(key, max_bytes=MAX), RankManifest, key=key)
        for key in (keys.rank(id_, rank) for rank in range(RANKS))
    ]


def test_what_all_ranks_wrote_is_every_tensor_once(made):
    _, folder = made
    for id_ in (EARLIER, LATER):
        records = records_of(folder, id_)
        prove_coverage(records)
        assert [len(record.tensors) for record in records] == [TENSORS] * RANKS
        assert all(record.plan == records[0].plan is not None for record in records)
        tensors = {t.fqn: t.bytes for record in records for t in record.tensors}
        pieces = [piece for record in records for piece in record.unpack()]
        assert sum(piece.length_bytes for piece in pieces) == sum(tensors.values())


def test_two_saves_differ_in_contents_and_generators_alone(made):
    _, folder = made
    for one, two in zip(records_of(folder, EARLIER), records_of(folder, LATER), strict=True):
        assert (one.layout, one.plan, one.pieces) == (two.layout, two.plan, two.pieces)
        assert not {chunk.hash for chunk in one.chunks} & {chunk.hash for chunk in two.chunks}
        assert one.values["optimizer"] == two.values["optimizer"]
        assert one.values["rng"] != two.values["rng"]


def test_a_rank_plans_the_share_that_it_wrote(made):
    job, folder = made
    row = ranks.plan(job, folder)
    records = records_of(folder, EARLIER)
    assert sorted(row["shares"]) == [0, 3, 7]
    for rank, share in row["shares"].items():
        pieces = records[rank].unpack()
        if job.case == "sharded":
            assert [(place, box) for place, box in share] == [(p.tensor, p.box) for p in pieces]
        assert sum(box.volume for _, box in share) == sum(p.box.volume for p in pieces)
        assert {place for place, _ in share} == {piece.tensor for piece in pieces}


def test_the_commit_that_is_measured_happens_and_the_layout_is_known(made):
    job, folder = made
    row = ranks.commit(job, folder)
    assert f"{RANKS} records" in row["note"]
    store = ranks_job.store(folder, EARLIER)
    key = keys.checkpoint(EARLIER)
    manifest = decode_record(store.get(key, max_bytes=MAX), Manifest, key=key)
    assert (manifest.world_size, manifest.differing) == (RANKS, ("rng",))


@pytest.mark.parametrize(("step", "world"), [("read", RANKS), ("read-half", RANKS // 2)])
def test_what_is_chosen_is_what_a_rank_wants(made, step, world):
    job, folder = made
    row = ranks.STEPS[step](job, folder)
    for rank, reads in row["reads"].items():
        wanted = [box.volume for _, box in job.boxes(rank, world)]
        found = [0] * len(wanted)
        for region in (region for read in reads for region in read.regions):
            found[region.wanted] += region.box.volume
        assert found == wanted
    few = {"read": 1, "read-half": 3}[step]
    records = RANKS if job.case == "replicated" else few
    assert row["note"].endswith(f"records read: {records} of {RANKS}")


def test_every_step_has_figures_or_says_why_not(made, monkeypatch, capsys):
    job, folder = made

    def child(arguments):
        if "read-half" in arguments:
            return {"failed": "no memory"}
        monkeypatch.setattr("sys.argv", ["ranks", *arguments[:-1], str(folder)])
        if "build" in arguments or arguments[0] != job.case:
            return {"seconds": 0.5, "cpu_s": 0.5, "peak_bytes": 1, "note": ""}
        ranks.main()
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(ranks, "_child", child)
    ticks = []
    rows = ranks.measure(ticks.append, RANKS, TENSORS)
    assert [(row["case"], row["step"]) for row in rows] == [
        (case, title) for case in ranks_job.CASES for title in ranks.TITLES.values()
    ]
    assert len(ticks) == 10
    for row in rows:
        if row["step"] == ranks.TITLES["read-half"]:
            assert (row["seconds"], row["failed"]) == (None, "no memory")
            assert not ranks.is_within(row)
        else:
            assert row["seconds"] > 0
            assert row["peak_bytes"] >= 0
    console = Console(record=True, width=150)
    ranks.show(console, rows)
    text = console.export_text()
    assert "no memory" in text
    assert all(title in text for title in ranks.TITLES.values())
