"""Restores by another number of ranks: four save a replicated state, two load it.

usage of the module itself: python -m bench.reshard PLAN.json RANK EVENTS.jsonl

Engines take turns in the same processes. A time is the slowest rank's, from a barrier to a barrier.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from rich.console import Console
from rich.table import Table

from bench.content import Job
from bench.engine import Engine
from bench.engines_ckptd import Ckptd
from bench.engines_torch import DcpSave
from bench.files import forget
from bench.runtime import PROJECT, runtime_dir
from bench.stats import ratio, spread, with_range

ENGINES: list[type[Engine]] = [DcpSave, Ckptd]
RANKS_BEFORE, RANKS_AFTER = 4, 2
_LIMIT_S = 600.0


def measure(
    size_bytes: int, rounds: int, folder: Path, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row per engine: seconds cold and hot, and whether the bytes were the same."""
    work = folder / "reshard"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    plan = {"size_bytes": size_bytes, "rounds": rounds, "folder": str(work)}
    try:
        with runtime_dir(folder) as runtime:
            for phase, ranks in (("save", RANKS_BEFORE), ("load", RANKS_AFTER)):
                tick(f"{RANKS_BEFORE} to {RANKS_AFTER} ranks, {phase}")
                _start({**plan, "phase": phase, "ranks": ranks}, work, runtime)
        lines = (work / "events.jsonl").read_text().splitlines()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [_row(engine, [json.loads(line) for line in lines]) for engine in ENGINES]


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table("engine", title=f"restore, {RANKS_BEFORE} ranks to {RANKS_AFTER}",
                  title_justify="left")  # fmt: skip
    for name in ("cold (min..max)", "hot (min..max)", "cold / dcp", "hot / dcp", "same bytes"):
        table.add_column(name, justify="right")
    base = next(row for row in rows if row["engine"] == DcpSave.name)
    for row in rows:
        table.add_row(
            row["engine"], with_range(row["cold_s"]), with_range(row["hot_s"]),
            *(ratio(row[key] and row[key].median, base[key] and base[key].median)
              for key in ("cold_s", "hot_s")),
            "yes" if row["is_same"] else "NO",
            style="bold" if row["engine"] == Ckptd.name else "",
        )  # fmt: skip
    table.caption = "a replicated state; the slowest rank's time"
    console.print(table)


def _row(engine: type[Engine], events: list[dict[str, Any]]) -> dict[str, Any]:
    own = [event for event in events if event["engine"] == engine.name]
    return {
        "engine": engine.name,
        **{
            f"{kind}_s": spread([e["span_s"] for e in own if e["kind"] == kind], 1.0)
            for kind in ("cold", "hot")
        },
        "is_same": bool(own) and all(event["is_same"] for event in own),
    }


def _start(plan: dict[str, Any], work: Path, runtime: Path) -> None:
    """Run the ranks of a phase to their end."""
    path = work / "plan.json"
    path.write_text(json.dumps(plan))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = []
    for rank in range(plan["ranks"]):
        env = {
            **os.environ, "CKPTD_RUNTIME_DIR": str(runtime), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "RANK": str(rank), "WORLD_SIZE": str(plan["ranks"]), "LOCAL_RANK": str(rank),
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.reshard", path, str(rank), work / "events.jsonl"]
        log = (work.parent / f"reshard-{plan['phase']}-{rank}.log").open("wb")
        with log:
            ranks.append(
                subprocess.Popen(
                    command, cwd=PROJECT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )
    deadline = time.monotonic() + _LIMIT_S
    try:
        codes = [rank.wait(max(1.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(codes):
        raise RuntimeError(
            f"{plan['phase']}: ranks ended with {codes}; see {work.parent}/reshard-*"
        )


class Rank:
    """One rank of a phase."""

    def __init__(self, plan: dict[str, Any], rank: int, events: Path) -> None:
        self._rank = rank
        self._rounds: int = plan["rounds"]
        self._events = events
        self._job = Job(plan["size_bytes"])
        self._job.step()
        self._engines = [
            kind(self._job, Path(plan["folder"]) / kind.name.replace(" ", "-")) for kind in ENGINES
        ]

    def save(self) -> None:
        """Save what all ranks hold alike with every engine."""
        for tensor in self._job.tensors():
            dist.broadcast(tensor, 0)
        for engine in self._engines:
            engine.folder.mkdir(parents=True, exist_ok=True)
            engine.prepare()
            engine.save(1).wait_durable()
            engine.close()
        Path(self._engines[0].folder, "digest").write_text(self._digest())

    def load(self) -> None:
        """Restore with every engine in turns, from the disk and from the page cache."""
        expected = Path(self._engines[0].folder, "digest").read_text()
        for _ in range(self._rounds):
            for engine in self._engines:
                for kind in ("cold", "hot"):
                    self._load(engine, kind, expected)

    def _load(self, engine: Engine, kind: str, expected: str) -> None:
        with torch.no_grad():
            for tensor in self._job.tensors():
                tensor.zero_()
        if kind == "cold" and self._rank == 0:
            forget(engine.folder)
        dist.barrier()
        began = time.perf_counter()
        undo = engine.restores()[""](1)
        dist.barrier()
        span_s = time.perf_counter() - began
        if undo is not None:
            undo()
        is_same = torch.tensor(self._digest() == expected)
        dist.all_reduce(is_same, dist.ReduceOp.MIN)
        if self._rank == 0:
            line = {"engine": engine.name, "kind": kind, "span_s": span_s,
                    "is_same": bool(is_same)}  # fmt: skip
            with self._events.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _digest(self) -> str:
        seen = xxhash.xxh3_128()
        for tensor in self._job.tensors():
            seen.update(tensor.contiguous().numpy())
        return seen.hexdigest()


def main() -> None:
    """Be one rank."""
    warnings.simplefilter("ignore")  # deprecations inside of the peers
    plan = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    rank = Rank(plan, int(sys.argv[2]), Path(sys.argv[3]))
    {"save": rank.save, "load": rank.load}[plan["phase"]]()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
