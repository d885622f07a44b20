"""``ckptd show SRC``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from ckptd.cli.console import add_row, new_table, plain, print_json, show
from ckptd.cli.source import Src, Step, find_commit, open_source
from ckptd.model.checkpoint import Checkpoint
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import read_manifest, read_rank
from ckptd.units import format_bytes, format_span

_MAX_PREVIEW = 60


def command(
    src: Src,
    *,
    step: Step = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what a checkpoint holds: tensors and values."""
    with open_source(src) as store:
        commit = find_commit(store, step)
        manifest = read_manifest(store, commit.id)
        values: dict[str, Any] = read_rank(store, manifest, 0).values
        url = store.url
    checkpoint = Checkpoint.of(manifest, commit.committed_at)
    if json:
        print_json({"source": url, **msgspec.to_builtins(checkpoint), "values": values})
        return
    show(_head(url, checkpoint), "", _tensors(checkpoint))
    if values:
        show("", _values(values, checkpoint.differing))


def _head(url: str, checkpoint: Checkpoint) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    age_s = max(1.0, round(time.time() - checkpoint.committed_at))
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(checkpoint.committed_at))
    facts = {
        "source": url,
        "step": f"{checkpoint.step} of attempt {checkpoint.attempt:04d}",
        "committed": f"{when} ({format_span(age_s)} ago)",
        "previous": StepId.parse(checkpoint.previous).short if checkpoint.previous else "none",
        "ranks": str(checkpoint.world_size),
        "bytes": f"{format_bytes(checkpoint.bytes)}, stored {format_bytes(checkpoint.stored_bytes)}"
        + (f" ({checkpoint.stored_bytes / checkpoint.bytes:.2f})" if checkpoint.bytes else ""),
    }
    for name, value in checkpoint.metrics.items():
        facts[f"metric {name}"] = f"{value:.6g}"
    for name, text in facts.items():
        add_row(table, name, text)
    return table


def _tensors(checkpoint: Checkpoint) -> Table:
    table = new_table(
        "tensor", "shape", "dtype", "bytes", "device", "grad", right=("bytes",),
        fold=("tensor", "shape"),
    )  # fmt: skip
    for tensor in checkpoint.tensors:
        shape = ", ".join(map(str, tensor.shape))
        grad = "yes" if tensor.requires_grad else "no"
        add_row(
            table, tensor.fqn, f"[{shape}]", tensor.dtype, format_bytes(tensor.bytes),
            tensor.device, grad,
        )  # fmt: skip
    for alias, target in checkpoint.aliases.items():
        add_row(table, alias, f"= {target}", "", "", "", "")
    count = len(checkpoint.tensors)
    total = f"{count} tensor{'' if count == 1 else 's'}"
    table.add_section()
    add_row(table, total, "", "", format_bytes(checkpoint.bytes), "", "", style="bold")
    return table


def _values(values: dict[str, Any], differing: tuple[str, ...]) -> Table:
    table = new_table("value", "", "as stored", fold=("value", "as stored"))
    for name, tree in values.items():
        mark = "differs between ranks; rank 0's:" if name in differing else ""
        add_row(table, name, mark, _preview(tree))
    return table


def _preview(tree: Any) -> str:
    text = plain(msgspec.json.encode(tree).decode())
    return text if len(text) <= _MAX_PREVIEW else text[: _MAX_PREVIEW - 3] + "..."
