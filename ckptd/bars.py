"""A bar for work that takes long, for a person who sits there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_S = 2.0


@contextmanager
def progress_bar(label: str, *, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Give a callback (bytes done, bytes in all), for any thread, that shows a bar on stderr.

    Nothing is shown for work of under two seconds, nor where stderr is not a terminal, nor without
    `is_shown`. The bar is gone at the end.
    """
    screen = Console(stderr=True)
    if not (is_shown and screen.is_terminal):
        yield lambda _done_bytes, _total_bytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    bar = Progress(*columns, TimeRemainingColumn(), console=screen, transient=True)
    task = bar.add_task(label, total=None)
    begin_s = time.monotonic()

    def report(done_bytes: int, total_bytes: int) -> None:
        if time.monotonic() - begin_s > QUIET_S:
            bar.update(task, completed=done_bytes, total=total_bytes)
            bar.start()  # again and again is fine

    try:
        yield report
    finally:
        if bar.live.is_started:  # an unstarted bar's stop writes an empty line
            bar.stop()
