"""How costs grow with the bytes of a state and with the number of its tensors.

usage of the module itself: python -m bench.cost BYTES TENSORS FOLDER
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ckptd
from bench.engine import WAIT_S
from bench.memory import Watch, parse_rollup
from bench.runtime import PROJECT, runtime_dir
from bench.stats import median, seconds

SIZES = (64_000_000, 256_000_000, 1_000_000_000, 4_000_000_000)
COUNTS = (100, 1_000, 10_000, 100_000)
_MIDDLE_BYTES = 256_000_000
_SAVES = 5

Rows = list[dict[str, Any]]


def measure(
    folder: Path, tick: Callable[[str], None], *, sizes: Sequence[int] = SIZES,
    counts: Sequence[int] = COUNTS, middle_bytes: int = _MIDDLE_BYTES,
) -> Rows:  # fmt: skip
    """Return a row for each size (with the least count) and each count (with the middle size)."""
    cases = [(size, counts[0]) for size in sizes] + [(middle_bytes, count) for count in counts]
    rows = []
    for size, count in cases:
        tick(f"cost: {size / 1e6:.0f} MB in {count} tensors")
        rows.append(_case(size, count, folder))
    return rows


def _case(size: int, count: int, folder: Path) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    work = folder / "cost"
    shutil.rmtree(work, ignore_errors=True)
    try:
        with runtime_dir(folder, "cost.daemon") as runtime:
            watch = Watch(str(runtime), 0.05)
            try:
                with subprocess.Popen(
                    [sys.executable, "-m", "bench.cost", str(size), str(count), work],
                    cwd=PROJECT, env={**os.environ, "CKPTD_RUNTIME_DIR": str(runtime)},
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                ) as process:  # fmt: skip
                    output, _ = process.communicate()
            finally:
                watch.stop()
        if process.returncode:
            raise RuntimeError(f"{size} bytes in {count} tensors: ended with {process.returncode}")
        row: dict[str, Any] = json.loads(output.splitlines()[-1])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    began, base = row.pop("began"), row.pop("base_bytes")
    mine = [size for at, size in watch.own.pop(process.pid, []) if at >= began]
    row["trainer_bytes"] = max(mine, default=base) - base
    row["daemon_bytes"] = max((size for own in watch.own.values() for _, size in own), default=0)
    return row


class Case:
    """A state of one kind, and what its saves and restores cost."""

    def __init__(self, size: int, count: int, folder: Path) -> None:
        each = max(1, size // count // 4)
        self._parameters = [torch.nn.Parameter(torch.randn(each) / 50) for _ in range(count)]
        model = torch.nn.Module()
        model.layers = torch.nn.ParameterList(self._parameters)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self._state = {"model": model, "optimizer": optimizer}
        self._folder = folder
        self._step = 0
        self.size, self.count = each * 4 * count, count

    def run(self) -> dict[str, Any]:
        """Return all figures."""
        copies = [parameter.detach().clone() for parameter in self._parameters]
        copy_s = median([self._copy(copies) for _ in range(_SAVES)])
        del copies
        base = parse_rollup(Path("/proc/self/smaps_rollup").read_bytes())[0]
        found = {
            "bytes": self.size, "tensors": self.count, "copy_s": copy_s,
            "base_bytes": base, "began": time.perf_counter(),
        }  # fmt: skip
        found |= self._saves(is_overlapped=False)
        found["overlapped_pause_s"] = self._saves(is_overlapped=True)["pause_s"]
        found["restore_s"] = median([self._restore() for _ in range(3)])
        return found

    def _copy(self, copies: list[torch.Tensor]) -> float:
        began = time.perf_counter()
        torch._foreach_copy_(copies, [parameter.detach() for parameter in self._parameters])
        return time.perf_counter() - began

    def _saves(self, *, is_overlapped: bool) -> dict[str, Any]:
        with ckptd.Checkpointer(self._folder, overlap=is_overlapped) as ckpt:
            began = time.perf_counter()
            ckpt.prepare(self._state)
            ckpt._preparation.join()
            prepare_s = time.perf_counter() - began
            pauses, spans = [], []
            for _ in range(_SAVES):
                self._step += 1
                began = time.perf_counter()
                handle = ckpt.save(self._step, self._state)
                pauses.append(time.perf_counter() - began)
                handle.result(WAIT_S)
                spans.append(time.perf_counter() - began)
        return {"prepare_s": prepare_s, "pause_s": median(pauses), "durable_s": median(spans)}

    def _restore(self) -> float:
        began = time.perf_counter()
        with ckptd.Checkpointer(self._folder) as ckpt:
            resumed = ckpt.resume(self._state)
            span_s = time.perf_counter() - began
            ckpt._preparation.join()
        assert resumed is not None
        assert resumed.step == self._step
        return span_s


def show(console: Console, rows: Rows) -> None:
    """Print the rows, and how steeply each cost grows from the first row of a series to its last."""
    table = Table("state", title="how costs grow", title_justify="left")
    columns = {
        "copy_s": "bare copy", "prepare_s": "prepare", "pause_s": "pause",
        "overlapped_pause_s": "pause, overlapped", "durable_s": "durable", "restore_s": "restore, hot",
    }  # fmt: skip
    for name in (*columns.values(), "trainer beyond slots", "daemon"):
        table.add_column(name, justify="right")
    last = None
    for row in rows:
        if last is not None and row["bytes"] < last:
            table.add_section()
        last = row["bytes"]
        table.add_row(
            f"{row['bytes'] / 1e6:.0f} MB in {row['tensors']:,}",
            *(seconds(row[key]) for key in columns),
            *(f"{row[key] / 1e6:.0f} MB" for key in ("trainer_bytes", "daemon_bytes")),
        )
    table.caption = (
        "medians; random fp32 weights without moments; durable and restore in a folder of this disk"
    )
    console.print(table)


def main() -> None:
    """Measure one case and print it as JSON."""
    case = Case(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps(case.run()))


if __name__ == "__main__":
    main()
