"""What was measured of S3 clients, as figures and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.report import is_ours
from bench.s3_clients import Client
from bench.stats import Spread, median, ratio, spread, with_range

FLOOR = "floor"

Rows = list[dict[str, Any]]


class Sample(NamedTuple):
    """One turn of one client.

    Processor seconds are of the client's process and of what works for it, and of the server.
    `rest_bytes` and `peak_bytes` are what a daemon holds for itself, before the turn and at most.
    """

    stored_bytes: int
    put_s: float
    put_cpu_s: float
    put_server_s: float
    get_s: float
    get_cpu_s: float
    get_server_s: float
    is_same: bool
    rest_bytes: int = 0
    peak_bytes: int = 0


def row_of(kind: type[Client], samples: Sequence[Sample], failed: str | None) -> dict[str, Any]:
    """Return the figures of one client; speeds are of stored bytes, in MB/s, with their spread."""
    row: dict[str, Any] = {
        "client": kind.name, "note": kind.note, "failed": failed,
        "is_same": all(sample.is_same for sample in samples),
        "samples": [sample._asdict() for sample in samples],
        "stored_bytes": median([s.stored_bytes for s in samples]),
        "rest_bytes": max((s.rest_bytes for s in samples), default=0),
        "peak_bytes": max((s.peak_bytes for s in samples), default=0),
        "budget_bytes": kind.budget_bytes,
    }  # fmt: skip
    for way in ("put", "get"):
        spans = [(s.stored_bytes, s._asdict()) for s in samples]
        row[f"{way}_mb_s"] = spread([size / 1e6 / s[f"{way}_s"] for size, s in spans], 1.0)
        for whose in ("cpu", "server"):
            row[f"{way}_{whose}_s_per_gb"] = median(
                [s[f"{way}_{whose}_s"] * 1e9 / size for size, s in spans]
            )
    return row


def best_peer(rows: Rows, key: str) -> float | None:
    """Return the highest median of the others' clients; the floor is no client."""
    found = [
        row[key].median
        for row in rows
        if row[key] is not None and not is_ours(row["client"]) and row["client"] != FLOOR
    ]
    return max(found, default=None)


def is_sound(rows: Rows) -> bool:
    """Tell whether every byte came back as it was, and ckptd did not fail."""
    return all(row["is_same"] and not (row["failed"] and is_ours(row["client"])) for row in rows)


def show(console: Console, found: dict[str, Any]) -> None:
    """Print everything."""
    rows, each = found["clients"], found["object_bytes"]
    state_bytes = found["objects"] * each
    console.print(
        f"{found['server']}; {found['cores']} cores; "
        + ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    )
    console.print(_table(rows, f"S3: {found['objects']} objects of {_size(each)}; "
                               f"{found['rounds']} rounds each", state_bytes))  # fmt: skip
    for row in rows:
        if row["failed"]:
            console.print(f"{row['client']} failed: {row['failed']}", style="red", markup=False)
        else:
            console.print(f"{row['client']}: {row['note']}", highlight=False, markup=False)
        if row["stored_bytes"] and abs(row["stored_bytes"] / state_bytes - 1) > 0.02:
            share = row["stored_bytes"] / state_bytes
            speeds = [_number(row[f"{way}_mb_s"].median / share) for way in ("put", "get")]
            console.print(
                f"{row['client']}: OTHER BYTES, {share:.2f} stored; of the state, put "
                f"{speeds[0]} MB/s and get {speeds[1]} MB/s", highlight=False, markup=False,
            )  # fmt: skip


def _table(rows: Rows, title: str, state_bytes: int) -> Table:
    table = Table("client", title=title, title_justify="left")
    for name in ("PUT MB/s (min..max)", "/ best", "CPU s/GB", "GET MB/s (min..max)", "/ best",
                 "CPU s/GB", "stored", "same bytes", "daemon, peak", "/ budget"):  # fmt: skip
        table.add_column(name, justify="right")
    table.caption = (
        "MB/s of stored bytes; best: the fastest of the others' clients; CPU: the client with its "
        "daemon, + the server's where it was started here; daemon: all memory but the slots, in a save"
    )
    best = {way: best_peer(rows, f"{way}_mb_s") for way in ("put", "get")}
    for row in rows:
        if row["stored_bytes"] is None:
            table.add_row(row["client"], "failed", style="red")
            continue
        table.add_row(
            row["client"],
            *(cell for way in ("put", "get") for cell in _speed(row, way, best[way])),
            f"{row['stored_bytes'] / state_bytes:.3f}", "yes" if row["is_same"] else "NO",
            f"{row['peak_bytes'] / 1e6:.0f} MB" if row["peak_bytes"] else "-",
            ratio(row["peak_bytes"], row["budget_bytes"]) if row["peak_bytes"] else "-",
            style="bold" if is_ours(row["client"]) else "",
        )  # fmt: skip
    return table


def _speed(row: dict[str, Any], way: str, best: float | None) -> tuple[str, str, str]:
    found: Spread = row[f"{way}_mb_s"]
    own, server = row[f"{way}_cpu_s_per_gb"], row[f"{way}_server_s_per_gb"]
    cpu = f"{own:.2f} + {server:.2f}" if server else f"{own:.2f}"
    return with_range(found, _number), ratio(found.median, best), cpu


def _number(value: float) -> str:
    return f"{value:.0f}"


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
