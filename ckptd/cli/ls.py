"""``ckptd ls ROOT``."""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer
from rich.table import Table

from ckptd.cli.console import add_row, format_time, new_table, plain, print_json, show
from ckptd.cli.source import open_source
from ckptd.errors import CorruptError
from ckptd.pipeline.catalog import Listed, survey
from ckptd.units import format_bytes, format_span

_DAMAGED = CorruptError.exit_code
_MAX_METRICS = 3


def command(
    root: Annotated[
        str,
        typer.Argument(metavar="ROOT", help="Folder or URL of a root.", show_default=False),
    ],
    *,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the checkpoints of a root, newest first.

    Those marked * are on the line: the newest, and back through the one before each.
    """
    with open_source(root) as store:
        rows = survey(store)
        url = store.url
    if json:
        print_json({"root": url, "checkpoints": [_document(row) for row in rows]})
    elif rows:
        show(_table(rows, time.time()))
        for row in rows:
            if row.damage:
                show(f"{row.commit.id.short} is damaged: {plain(str(row.damage))}", style="red")
    else:
        show(f"{url}: no checkpoints yet")
    if any(row.damage for row in rows):
        raise typer.Exit(_DAMAGED)


def _table(rows: list[Listed], now_s: float) -> Table:
    table = new_table(
        "", "checkpoint", "committed", "age", "bytes", "stored", "ratio", "ranks", "metrics",
        right=("checkpoint", "age", "bytes", "stored", "ratio", "ranks"), fold=("metrics",),
    )  # fmt: skip
    for row in rows:
        add_row(table, *_cells(row, now_s), style="red" if row.damage else "")
    return table


def _cells(row: Listed, now_s: float) -> list[str]:
    commit, manifest = row.commit, row.manifest
    cells = [
        "*" if row.is_on_line else "",
        commit.id.short,
        format_time(commit.committed_at, now_s),
        format_span(max(1.0, round(now_s - commit.committed_at))),
    ]
    if manifest is None:
        return [*cells, "", "", "", "", "damaged"]
    return [
        *cells,
        format_bytes(manifest.raw_bytes),
        format_bytes(manifest.stored_bytes),
        f"{manifest.stored_bytes / manifest.raw_bytes:.2f}" if manifest.raw_bytes else "",
        str(manifest.world_size),
        _summary(manifest.metrics),
    ]


def _summary(metrics: dict[str, float | None]) -> str:
    shown = [
        f"{name}={math.nan if value is None else value:.4g}"
        for name, value in list(metrics.items())[:_MAX_METRICS]
    ]
    left = len(metrics) - len(shown)
    return " ".join(shown) + (f" +{left}" if left else "")


def _document(row: Listed) -> dict[str, object]:
    head: dict[str, object] = {
        "step": row.commit.id.step,
        "attempt": row.commit.id.attempt,
        "committed_at": row.commit.committed_at,
        "is_on_line": row.is_on_line,
        "damage": str(row.damage) if row.damage else None,
    }
    manifest = row.manifest
    if manifest is None:
        return head
    return head | {
        "bytes": manifest.raw_bytes,
        "stored_bytes": manifest.stored_bytes,
        "world_size": manifest.world_size,
        "previous": manifest.previous,
        "metrics": manifest.metrics,
    }
