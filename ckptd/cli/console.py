"""How commands talk: tables for people, one JSON document for programs."""

from __future__ import annotations

import io
import sys
import time

import msgspec
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

# Output that nobody sees on a screen is never folded or cut: tools downstream want whole lines.
_PIPED_COLUMNS = 100_000
_HALF_A_YEAR_S = 182 * 86400


def show(*parts: RenderableType, style: str = "") -> None:
    """Write to stdout: coloured and fitted on a terminal, plain and in whole lines in a pipe."""
    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(*parts, sep="\n", style=style)
        return
    out = Console(highlight=False, markup=False, width=_PIPED_COLUMNS, file=io.StringIO())
    with out.capture() as captured:
        out.print(*parts, sep="\n")
    lines = captured.get().splitlines()
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in lines))


def new_table(*columns: str, right: tuple[str, ...] = (), fold: tuple[str, ...] = ()) -> Table:
    """Return an empty table; columns in `right` hold numbers, those in `fold` may take more lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name not in fold,
            overflow="fold",
        )
    return table


def add_row(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of texts that may come from a store: no markup, no control characters."""
    table.add_row(*(Text(plain(cell)) for cell in cells), style=style)


def plain(text: str) -> str:
    """Return `text` with everything escaped that could steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_json(document: object) -> None:
    """Write one JSON document to stdout; numbers that JSON does not know become null."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")


def format_time(seconds: float, now_s: float) -> str:
    """Write a time for people, as ``ls -l`` does: the year in place of the hour once it is old."""
    is_recent = abs(now_s - seconds) < _HALF_A_YEAR_S
    return time.strftime("%b %d %H:%M" if is_recent else "%b %d  %Y", time.localtime(seconds))
