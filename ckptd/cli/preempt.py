"""``ckptd preempt``."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptd.cli.console import plain, print_json, show
from ckptd.cli.daemons import ask_all, sockets
from ckptd.errors import DaemonUnavailableError
from ckptd.store.open import normalise_url
from ckptd.wire import messages as say


def command(
    root: Annotated[str, typer.Argument(help="Only jobs of this root.", show_default=False)] = "",
    *,
    reason: Annotated[
        str, typer.Option(help="What the jobs write to their logs.")
    ] = "ckptd preempt",
    socket: Annotated[
        str, typer.Option(help="Tell only this daemon.", envvar="CKPTD_SOCKET", show_default=False)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Tell jobs of this user on this machine to save and stop, as a warning of the cluster does.

    A job hears it if its loop asks `ckpt.preempted()` or goes by `ckpt.steps()`. One rank that is
    told on any machine is enough: all ranks of its job stop at the same step.
    """
    message = say.Preempt(normalise_url(root) if root else "", reason[:1000])
    answers, silent = ask_all([socket] if socket else sockets(), message, say.Told)
    told = {path: answer.trainers for path, answer in answers.items()}
    count = sum(told.values())
    if json:
        print_json({"trainers": count, "daemons": told, "silent": silent})
    else:
        for path, why in silent.items():
            show(f"{path}: {plain(why)}", style="red")
        if count:
            show(f"told {count} trainer{'s' * (count > 1)}: they save and stop at their next steps")
    if not told:
        raise DaemonUnavailableError(
            "no daemon is running on this machine, so no job was told; a job can also be told by a "
            "signal to one of its ranks"
        )
    if not count:
        raise DaemonUnavailableError(
            f"no job {f'of {root} ' if root else ''}is connected to a daemon here: nobody was told"
        )
