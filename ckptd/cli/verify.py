"""``ckptd verify SRC``."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from ckptd.bars import progress_bar
from ckptd.cli.console import add_row, new_table, plain, print_json, show
from ckptd.cli.source import Src, Step, find_commit, open_source
from ckptd.errors import ConfigError, CorruptError
from ckptd.pipeline.verify import Damage, VerifyReport, verify, verify_all
from ckptd.units import format_bytes


def command(
    src: Src,
    *,
    step: Step = None,
    is_all: Annotated[bool, typer.Option("--all", help="Check every checkpoint.")] = False,
    is_data: Annotated[
        bool, typer.Option("--data", help="Re-read and re-hash every byte, not only lengths.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check that checkpoints are whole; without --data: that all is there, and of its length."""
    if is_all and step is not None:
        raise ConfigError("--all and --step exclude each other")
    with open_source(src) as store, progress_bar("verifying") as progress:
        if is_all:
            reports = list(verify_all(store, is_data=is_data, progress=progress))
        else:
            id_ = find_commit(store, step).id
            reports = [verify(store, id_, is_data=is_data, progress=progress)]
        url = store.url
    if json:
        print_json({"source": url, "checkpoints": [_document(report) for report in reports]})
    else:
        _print(url, reports)
    if not all(report.is_whole for report in reports):
        raise typer.Exit(CorruptError.exit_code)


def _print(url: str, reports: list[VerifyReport]) -> None:
    if not reports:
        show(f"{url}: no checkpoints yet")
        return
    table = new_table(
        "checkpoint", "", "ranks", "chunks", "bytes", "checked", right=("ranks", "chunks", "bytes")
    )
    for report in reports:
        add_row(
            table, report.id.short, "whole" if report.is_whole else "DAMAGED", str(report.ranks),
            str(report.chunks), format_bytes(report.raw_bytes),
            "every byte" if report.is_data else "names and lengths",
            style="" if report.is_whole else "red",
        )  # fmt: skip
    show(table)
    for report in reports:
        if report.damage:
            show("", f"damage in {report.id.short}:")
        for damage in report.damage:
            show(f"  {damage.key}", f"    {plain(_describe(damage))}")


def _describe(damage: Damage) -> str:
    if not damage.tensors:
        return damage.what
    more = damage.tensor_count - len(damage.tensors)
    names = ", ".join(damage.tensors) + (f" and {more} more" if more else "")
    return f"{damage.what}; needed by {names}"


def _document(report: VerifyReport) -> dict[str, object]:
    return {
        "step": report.id.step,
        "attempt": report.id.attempt,
        "is_whole": report.is_whole,
        "is_data": report.is_data,
        "ranks": report.ranks,
        "chunks": report.chunks,
        "bytes": report.raw_bytes,
        "damage": msgspec.to_builtins(report.damage),
    }
