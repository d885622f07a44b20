"""What the arguments of a command name: a root, and a checkpoint in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ckptd.pipeline import catalog
from ckptd.plan.line import Commit, parse_step_text
from ckptd.store.base import Store
from ckptd.store.open import open_store
from ckptd.store.root import check_root

Src = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Folder or URL of a root.", show_default=False),
]
Step = Annotated[
    str | None, typer.Option(help="1000 on the line, or 1000-0003 for any; else the newest.")
]


@contextmanager
def open_source(url: str) -> Iterator[Store]:
    """Open the store that a person named, for reading, and close it after the block.

    Raises:
        ConfigError: the URL cannot be one.
        StoreError: the store did not answer.
        CheckpointError: there is no root of a known format.
    """
    store = open_store(url, {})
    try:
        check_root(store)
        yield store
    finally:
        store.close()


def find_commit(store: Store, step: str | None) -> Commit:
    """Find what ``--step`` names: ``1000`` on the line, ``1000-0003`` any; None is the newest.

    Raises:
        ConfigError: `step` is neither.
        CheckpointNotFoundError: there is no such checkpoint.
        StoreError: the store did not answer.
    """
    if step is None:
        return catalog.find(store)
    number, attempt = parse_step_text(step)
    return catalog.find(store, number, attempt)
