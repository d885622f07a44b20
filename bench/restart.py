"""Restarts: workers are killed, and come back from the memory of their daemon.

usage of the module itself: python -m bench.restart PLAN.json RANK

The bare copy beside it moves the same bytes, in the same process and right before, from shared memory
that the process has just mapped into tensors like those that are restored: weights that exist, and
moments that do not. First touch of memory costs both alike. Times are the slowest rank's.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import ckptd
from bench.content import Job
from bench.runtime import PROJECT, runtime_dir
from bench.stats import ratio, spread, with_range

WORLD_SIZES = (1, 2, 4)
_LIMIT_S = 600.0


def measure(
    size_bytes: int, rounds: int, folder: Path, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row per number of ranks: bytes each restores, and seconds."""
    work = folder / "restart"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        return [
            _row(ranks, [_round(size_bytes // ranks, ranks, work, tick) for _ in range(rounds)])
            for ranks in WORLD_SIZES
        ]
    finally:
        shutil.rmtree(work, ignore_errors=True)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table("ranks", title="restart from memory", title_justify="left")
    names = ("MB a rank", "resume (min..max)", "bare copy (min..max)", "resume / copy",
             "of it filling / copy", "from")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        resume, copy, fill = row["resume_s"], row["copy_s"], row["fill_s"]
        table.add_row(
            str(row["ranks"]), f"{row['bytes'] / 1e6:.0f}", with_range(resume), with_range(copy),
            ratio(resume and resume.median, copy and copy.median),
            ratio(fill and fill.median, copy and copy.median), row["source"],
        )  # fmt: skip
    table.caption = "kill -9 of all workers; a replicated state; the slowest rank's time"
    console.print(table)


def _row(ranks: int, events: list[list[dict[str, Any]]]) -> dict[str, Any]:
    slowest = {
        key: spread([max(e[key] for e in one) for one in events], 1.0)
        for key in ("resume_s", "copy_s", "fill_s")
    }
    sources = {e["source"] for one in events for e in one}
    return {
        "ranks": ranks, "bytes": events[0][0]["bytes"], "source": " and ".join(sorted(sources)),
        **slowest,
    }  # fmt: skip


def _round(
    size_bytes: int, ranks: int, work: Path, tick: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Save, kill all, start again; return what each rank measured."""
    tick(f"restart of {ranks}")
    root = work / "root"
    shutil.rmtree(root, ignore_errors=True)
    plan = {"size_bytes": size_bytes, "ranks": ranks, "root": str(root)}
    with runtime_dir(work.parent, "restart-daemon") as runtime:
        first = _start({**plan, "phase": "save"}, work, runtime)
        for process in first:
            _line(process)
        for process in first:
            process.kill()
            process.wait()
        again = _start({**plan, "phase": "resume"}, work, runtime)
        try:
            return [_line(process) for process in again]
        finally:
            for process in again:
                process.wait(_LIMIT_S)
                assert process.stdout is not None
                process.stdout.close()


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a rank ended early; its log is beside the results")
    found: dict[str, Any] = json.loads(line)
    return found


def _start(plan: dict[str, Any], work: Path, runtime: Path) -> list[subprocess.Popen[str]]:
    path = work / f"plan-{plan['phase']}.json"
    path.write_text(json.dumps(plan))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(plan["ranks"]):
        env = {
            **os.environ, "CKPTD_RUNTIME_DIR": str(runtime), "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
            "WORLD_SIZE": str(plan["ranks"]), "LOCAL_WORLD_SIZE": str(plan["ranks"]),
        }  # fmt: skip
        with (work.parent / f"restart-{plan['phase']}-{rank}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "bench.restart", path, str(rank)], cwd=PROJECT,
                    env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
                )
            )  # fmt: skip
    return processes


# --- a rank ------------------------------------------------------------------------------------


def run(plan: dict[str, Any], rank: int) -> None:
    """Be one rank of a phase."""
    dist.init_process_group("gloo", rank=rank, world_size=plan["ranks"])
    job = Job(plan["size_bytes"])
    state = {"model": job.model, "optimizer": job.optimizer}
    if plan["phase"] == "save":
        _save(plan, job, state)
    else:
        _resume(plan, job, state)


def _save(plan: dict[str, Any], job: Job, state: dict[str, Any]) -> None:
    ckpt = ckptd.Checkpointer(plan["root"])
    ckpt.prepare(state)
    job.step()
    for step in (1, 2):
        ckpt.save(step, state, wait=True)
    print(json.dumps({"saved": 2}), flush=True)
    sys.stdin.read()
    time.sleep(_LIMIT_S)


def _resume(plan: dict[str, Any], job: Job, state: dict[str, Any]) -> None:
    weights = list(job.model.parameters())
    copy_s = _bare_copy(weights)
    with ckptd.Checkpointer(plan["root"]) as ckpt:
        fill_s: list[float] = []
        _time_filling(fill_s)
        dist.barrier()
        began = time.perf_counter()
        resumed = ckpt.resume(state)
        resume_s = time.perf_counter() - began
    assert resumed is not None
    count = 3 * sum(weight.nbytes for weight in weights)
    said = {"resume_s": resume_s, "copy_s": copy_s, "fill_s": fill_s[0], "bytes": count}
    print(json.dumps({**said, "source": resumed.source}), flush=True)
    dist.barrier()


def _bare_copy(weights: list[torch.Tensor]) -> float:
    """Copy as many bytes as a restore does, from shared memory into such tensors, on one thread."""
    total = 3 * sum(weight.nbytes for weight in weights)
    fd = os.memfd_create("bench")
    os.posix_fallocate(fd, 0, total)
    with mmap.mmap(fd, total) as writer:
        for at in range(0, total, 1 << 20):
            writer[at : at + 64] = b"x" * 64
    dist.barrier()
    began = time.perf_counter()
    held = mmap.mmap(fd, total, mmap.MAP_SHARED)
    source = torch.frombuffer(held, dtype=torch.uint8)
    at, made = 0, []
    with torch.no_grad():
        for weight in weights:
            for to in (weight.detach(), torch.empty_like(weight), torch.empty_like(weight)):
                made.append(to)
                to.view(-1).view(torch.uint8).copy_(source[at : at + weight.nbytes])
                at += weight.nbytes
    span = time.perf_counter() - began
    del source, made
    held.close()
    os.close(fd)
    return span


def _time_filling(spans: list[float]) -> None:
    """Note how long the part of `resume` takes that copies."""
    from ckptd.trainer.filling import Filling

    fill = Filling.fill

    def timed(filling: Filling) -> None:
        began = time.perf_counter()
        fill(filling)
        spans.append(time.perf_counter() - began)

    Filling.fill = timed  # type: ignore[method-assign]


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
