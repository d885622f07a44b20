"""Tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.stats import Spread, ratio, seconds, with_range

Rows = list[dict[str, Any]]


def is_ours(name: str) -> bool:
    """Tell ckptd's rows from those of its peers."""
    return name.startswith("ckptd")


def best_peer(rows: Rows, key: str) -> float | None:
    """Return the least median among the peers."""
    found = [m for row in rows if not is_ours(row["engine"]) if (m := middle(row.get(key)))]
    return min(found, default=None)


def middle(value: Any) -> float | None:
    """Return the median of a spread, or the value itself."""
    return value.median if isinstance(value, Spread) else value


def show_limits(console: Console, limits: dict[str, float | str]) -> None:
    """Print what the machine can do."""
    table = Table("limit of the machine", title="limits, GB/s", title_justify="left")
    table.add_column("median", justify="right")
    for name, value in limits.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:.2f}")
    console.print(table)


def show_content(console: Console, content: dict[str, Any]) -> None:
    """Say what was saved."""
    if not content:
        return
    bits = ", ".join(f"{kind} {value:.2f}" for kind, value in content["exponent_bits"].items())
    console.print(
        f"state: {content['model']}, {content['tensors']} tensors, "
        f"{content['state_bytes'] / 1e6:.0f} MB; content: {content['made']}; "
        f"entropy of the exponents in bits: {bits}",
        soft_wrap=False,
    )


def show_saves(console: Console, rows: Rows) -> None:
    """Print what saves cost."""
    table = _table("save", rows, "pause (min..max)", "first save", "whole overhead (80 %)",
                   "first, whole", "durable (80 %)", "stored")  # fmt: skip
    for row in rows:
        if row["pause_s"] is None:
            table.add_row(row["engine"], "failed", style="red")
            continue
        table.add_row(
            row["engine"], with_range(row["pause_s"]), with_range(row["first_pause_s"]),
            with_range(row["overhead_s"]), with_range(row["first_overhead_s"]),
            with_range(row["durable_s"]),
            f"{row['stored_bytes'] / row['state_bytes']:.3f}",
            style=_style(row),
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if row["failed"]:
            console.print(f"{row['engine']} failed: {row['failed']}", style="red", markup=False)


def show_ratios(console: Console, rows: Rows) -> None:
    """Print the same as multiples of a bare copy and of the best peer, which is what counts."""
    columns = [f"{what} / {base}" for what in ("pause", "overhead") for base in ("copy", "best")]
    table = _table("as multiples", rows, *columns, "durable / best", "cold load / best",
                   "hot load / best")  # fmt: skip
    table.caption = "copy: a bare copy of the same bytes in the same round; best: the best peer"
    best = {key: best_peer(rows, key) for key in ("pause_s", "overhead_s", "durable_s")}
    loads = {kind: best_peer(_loads(rows), kind) for kind in ("cold_s", "hot_s")}
    for row in rows:
        if row["pause_s"] is None:
            continue
        copy = middle(row["copy_s"])
        load = row["restores"].get("", {})
        table.add_row(
            row["engine"],
            *(ratio(middle(row[key]), base)
              for key in ("pause_s", "overhead_s") for base in (copy, best[key])),
            ratio(middle(row["durable_s"]), best["durable_s"]),
            *(ratio(middle(load.get(kind)), loads[kind]) for kind in ("cold_s", "hot_s")),
            style=_style(row),
        )  # fmt: skip
    console.print(table)


def show_restores(console: Console, rows: Rows) -> None:
    """Print restores and memory."""
    table = _table("restore, memory", rows, "cold (min..max)", "hot (min..max)", "same bytes",
                   "memory: save", "of it shared", "memory: restore")  # fmt: skip
    table.caption = "memory: most at any moment beyond the training itself, all processes together"
    for row in rows:
        for way, load in sorted(row["restores"].items()):
            memory = [
                row.get(key) if not way else None
                for key in ("save_memory_bytes", "save_shared_bytes", "restore_memory_bytes")
            ]
            table.add_row(
                f"{row['engine']} {way}".strip(), with_range(load["cold_s"]),
                with_range(load["hot_s"]), "yes" if load["is_same"] else "NO",
                *("-" if value is None else f"{value / 1e6:.0f} MB" for value in memory),
                style=_style(row),
            )  # fmt: skip
    console.print(table)


def show_notes(console: Console, rows: Rows) -> None:
    """Say how engines were set."""
    for row in rows:
        if row["note"]:
            console.print(f"{row['engine']}: {row['note']}", highlight=False)


def show_codecs(console: Console, rows: Rows) -> None:
    """Print the codecs."""
    table = Table("content", "codec", title="codec, one thread", title_justify="left")
    for name in ("ratio", "in GB/s (best)", "out GB/s (best)", "in / ZipNN", "out / ZipNN"):
        table.add_column(name, justify="right")
    table.add_column("why not")
    last = None
    for row in rows:
        is_new, last = row["content"] != last, row["content"]
        if is_new and len(table.rows):
            table.add_section()
        name = row["content"] if is_new else ""
        if row["ratio"] is None or row["failed"]:
            table.add_row(name, row["codec"], *[""] * 5, row["failed"] or "no result")
            continue
        base = next(
            (r for r in rows if r["content"] == row["content"] and r["codec"] == "ZipNN"), {}
        )
        table.add_row(
            name, row["codec"], f"{row['ratio']:.3f}",
            *(f"{row[f'{way}_median']:.2f} ({row[f'{way}_best']:.2f})" for way in ("in", "out")),
            *(ratio(row[f"{way}_median"], base.get(f"{way}_median")) for way in ("in", "out")),
            style="bold" if is_ours(row["codec"]) else "",
        )  # fmt: skip
    table.caption = "ckptd's speeds include hashing and checking every block"
    console.print(table)


def show_drift(console: Console, rows: Rows) -> None:
    """Say how quiet the machine was."""
    copies = [row["copy_s"] for row in rows if row["copy_s"]]
    steps = [row["plain_step_s"] for row in rows if row["plain_step_s"]]
    if copies and steps:
        console.print(
            f"bare copy {seconds(min(s.low for s in copies))} to "
            f"{seconds(max(s.high for s in copies))}, plain step "
            f"{seconds(min(s.low for s in steps))} to {seconds(max(s.high for s in steps))} over "
            "the run; a wide range means that something else used the machine"
        )


def _table(title: str, rows: Rows, *columns: str) -> Table:
    count = max((row["pause_s"].count for row in rows if row["pause_s"]), default=0)
    table = Table("engine", title=f"{title}; {count} warm saves each", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _loads(rows: Rows) -> Rows:
    return [{"engine": r["engine"], **load} for r in rows for load in r["restores"].values()]


def _style(row: dict[str, Any]) -> str:
    return "bold" if is_ours(row["engine"]) else ""
