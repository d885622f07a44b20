"""A job of many ranks, simulated: what one process of it spends on what grows with their number.

These are planning on a rank, a commit in a daemon, and a resuming rank's choice of what to read. One
process makes what all ranks said and stored; each step is measured in another, which holds that,
as bytes, and nothing else: so its memory is the memory of the step.

usage: python -m bench.ranks CASE STEP --inputs FOLDER   (the step ``build`` comes first)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

from bench import ranks_job as inputs
from bench.ranks_job import CASES, CHUNK_BYTES, EARLIER, LATER, ROUND, Job
from bench.runtime import PROJECT
from bench.stats import median, seconds
from ckptd.model import keys
from ckptd.pipeline.commit import COMMITTED, Proofs, try_commit

Row = dict[str, Any]
Tick = Callable[[str], None]
_T = TypeVar("_T")

RANKS, TENSORS = 1024, 2000
GOAL_S, GOAL_BYTES = 1.0, 500e6
"""What a step may take, in one process."""

_RUNS = 3


class Span(NamedTuple):
    """How long something took: by the clock, and by the processors (of all threads)."""

    seconds: float
    cpu_s: float


class Meter:
    """Times runs, and finds the most memory beyond what was resident when this was made.

    The memory is that of the first run, since a process plans, or resumes, once; it is the kernel's
    ``VmHWM``, which is set back before, where the kernel allows it.

    Attributes:
        peak_bytes: the most memory; what was kept from before the run, but after the start, counts.
    """

    def __init__(self) -> None:
        gc.collect()
        self.peak_bytes: int | None = None
        self._base = _status_bytes("VmRSS")
        self._spans: list[Span] = []

    def run(self, work: Callable[[], _T]) -> _T:
        """Run something, and time it."""
        is_first = self.peak_bytes is None
        if is_first:
            with contextlib.suppress(OSError):  # then it is an upper bound
                Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter(), time.process_time()
        found = work()
        self._spans.append(
            Span(time.perf_counter() - began[0], time.process_time() - began[1]),
        )
        if is_first:
            self.peak_bytes = max(0, _status_bytes("VmHWM") - self._base)
        return found

    def middle(self) -> Span:
        """Return the medians of what ran since this was last asked."""
        spans, self._spans = self._spans, []
        return Span(*(median(column) or 0.0 for column in zip(*spans, strict=True)))


def plan(job: Job, folder: Path) -> Row:
    """Measure how long a rank takes from everybody's offer to its own share."""
    from ckptd.trainer.agreement import Agreement
    from ckptd.trainer.meeting import Meeting

    board = inputs.board(folder)
    digests = {rank: job.layout(rank).digest() for rank in _some(job.ranks)}
    meter, spans, shares = Meter(), {}, {}
    for rank, digest in digests.items():
        for _ in range(_RUNS):
            agreement = Agreement(Meeting(board, rank, job.ranks), CHUNK_BYTES)
            agreement._state.on_save(ROUND, digest)  # as `prepare` does, whose thread would go on
            meter.run(partial(agreement._compute, ROUND))
            shares[rank] = agreement._agreed[ROUND].share
            agreement.close()
        spans[rank] = meter.middle()
    said = sum(map(len, board._values.values()))
    note = f"of ranks {_join(spans)}; {said / 1e6:.1f} MB from the board, which is in memory"
    return {**_slowest(spans), "peak_bytes": meter.peak_bytes, "note": note, "shares": shares}


def commit(job: Job, folder: Path) -> Row:
    """Measure the commit of a save by a daemon that committed an earlier one of the same layout."""
    store = inputs.store(folder, EARLIER, LATER)
    first, known = Meter(), Meter()
    for _ in range(_RUNS):
        proofs = Proofs()  # what a daemon keeps from commit to commit
        for meter, id_ in ((first, EARLIER), (known, LATER)):
            store.delete(keys.checkpoint(id_))
            verdict = meter.run(partial(try_commit, store, id_, job.ranks, proofs))
            if verdict != COMMITTED:
                raise RuntimeError(verdict.reason)
    each_bytes = store.bytes_of(f"{keys.RANKS}{LATER}/") / job.ranks
    note = (
        f"{job.ranks} records of {each_bytes / 1e3:.0f} kB; memory with what is kept from the commit "
        f"before, the first, which took {seconds(first.middle().seconds)} and {_mb(first.peak_bytes)}"
    )
    return {**known.middle()._asdict(), "peak_bytes": known.peak_bytes, "note": note}


def read(job: Job, folder: Path) -> Row:
    """Measure the choice of what to read, for a job of as many ranks."""
    return _read(job, folder, job.ranks)


def read_half(job: Job, folder: Path) -> Row:
    """Measure the choice of what to read, for a job of half as many ranks."""
    return _read(job, folder, job.ranks // 2)


STEPS: dict[str, Callable[[Job, Path], Row]] = {
    "plan": plan, "commit": commit, "read": read, "read-half": read_half,
}  # fmt: skip
TITLES = {
    "plan": "planning",
    "commit": "commit, layout known",
    "read": "what to read, as many ranks",
    "read-half": "what to read, half as many",
}


def measure(tick: Tick, ranks: int = RANKS, tensors: int = TENSORS) -> list[Row]:
    """Measure all steps of all cases; what fails has a note that says why, and no figures."""
    rows: list[Row] = []
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="ckptd-ranks.") as folder:
            counts = ["--ranks", str(ranks), "--tensors", str(tensors), "--inputs", folder]
            tick(f"ranks: {case}, making what {ranks} ranks said")
            made = _child([case, "build", *counts])
            for step in STEPS:
                tick(f"ranks: {case}, {TITLES[step]}")
                rows.append({
                    "case": case, "step": TITLES[step], "ranks": ranks, "tensors": tensors,
                    "seconds": None, "cpu_s": None, "peak_bytes": None, "note": "",
                    **(made if "failed" in made else _child([case, step, *counts])),
                })  # fmt: skip
    return rows


def show(console: Console, rows: list[Row]) -> None:
    """Print the steps; those beyond the goal stand out."""
    if not rows:
        return
    title = f"one process of {rows[0]['ranks']} ranks, {rows[0]['tensors']} tensors"
    table = Table("case", "step", title=title, title_justify="left")
    for name in ("time", "of it CPU", "most memory"):
        table.add_column(name, justify="right")
    table.add_column("note")
    last = None
    for row in rows:
        is_new, last = row["case"] != last, row["case"]
        if is_new and len(table.rows):
            table.add_section()
        table.add_row(
            row["case"] if is_new else "", row["step"], seconds(row["seconds"]),
            seconds(row["cpu_s"]), _mb(row["peak_bytes"]), row.get("failed") or row["note"],
            style="" if is_within(row) else "red",
        )  # fmt: skip
    table.caption = f"red: more than {GOAL_S:g} s or {_mb(GOAL_BYTES)}, which is the goal"
    console.print(table)


def is_within(row: Row) -> bool:
    """Tell whether a step was measured and met the goal."""
    if row["seconds"] is None:
        return False
    return bool(row["seconds"] < GOAL_S and row["peak_bytes"] < GOAL_BYTES)


def main() -> None:
    """Make the inputs of a case, or measure one step with them; print one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.ranks")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("step", choices=["build", *STEPS])
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--tensors", type=int, default=TENSORS)
    parser.add_argument("--inputs", type=Path, required=True, help="a folder that `build` fills")
    options = parser.parse_args()
    job = Job(options.case, options.ranks, options.tensors)
    if options.step == "build":
        gc.disable()  # millions of values and no circles among them
        began = time.perf_counter()
        inputs.build(job, options.inputs)
        print(json.dumps({"built_s": time.perf_counter() - began}))
    else:
        row = STEPS[options.step](job, options.inputs)
        print(json.dumps({key: row[key] for key in ("seconds", "cpu_s", "peak_bytes", "note")}))


def _read(job: Job, folder: Path, ranks: int) -> Row:
    from ckptd.pipeline.catalog import read_manifest
    from ckptd.plan.reading import ChunkRead, Wanted
    from ckptd.trainer.fetching import StoreRecords, choose_reads

    store = inputs.store(folder, EARLIER)
    wanted = {
        rank: [Wanted(fqn, box) for fqn, box in job.boxes(rank, ranks)] for rank in _some(ranks)
    }

    def choose(rank: int) -> list[ChunkRead]:
        records = StoreRecords(store, read_manifest(store, EARLIER))
        return choose_reads(records, wanted[rank], rank, ranks)

    meter, spans, counts, found = Meter(), {}, [], {}
    for rank in wanted:
        for _ in range(_RUNS):
            before = store.gets
            found[rank] = meter.run(partial(choose, rank))
            counts.append(store.gets - before - 1)  # one is the manifest
        spans[rank] = meter.middle()
    note = f"of ranks {_join(spans)}; records read: {max(counts)} of {job.ranks}"
    return {**_slowest(spans), "peak_bytes": meter.peak_bytes, "note": note, "reads": found}


def _slowest(spans: dict[int, Span]) -> Row:
    return max(spans.values())._asdict()


def _child(arguments: list[str]) -> Row:
    done = subprocess.run(
        [sys.executable, "-m", "bench.ranks", *arguments],
        cwd=PROJECT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return {"failed": f"failed ({done.returncode}): {last}"}
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _some(ranks: int) -> list[int]:
    return sorted({0, (ranks - 1) // 2, ranks - 1})


def _join(ranks: Any) -> str:
    return ", ".join(map(str, ranks))


def _mb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f} MB"


def _status_bytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{field}:")
    )


if __name__ == "__main__":
    main()
