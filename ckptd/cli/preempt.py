"""``ckptd preempt``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ckptd.cli.console import plain, print_json, show
from ckptd.cli.status import sockets
from ckptd.errors import DaemonUnavailableError, HandoffError
from ckptd.store.open import normalise_url
from ckptd.wire import messages as say
from ckptd.wire.address import connect
from ckptd.wire.channel import Channel

_TIMEOUT_S = 5.0


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
    told: dict[str, int] = {}
    silent: dict[str, str] = {}
    for path in [socket] if socket else sockets():
        answer = _tell(path, message)
        if isinstance(answer, str):
            silent[path] = answer
        else:
            told[path] = answer
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


def _tell(path: str, message: say.Preempt) -> int | str:
    """Return how many trainers the daemon at `path` has told, or why it told none."""
    try:
        channel = Channel(connect(path, deadline_s=_TIMEOUT_S), say.FromDaemon)
    except HandoffError as error:
        return str(error)
    try:
        channel.send(message, deadline_s=_TIMEOUT_S)
        deadline = time.monotonic() + _TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            for answer in channel.receive(left_s):
                if isinstance(answer, say.Told):
                    return answer.trainers
    except HandoffError as error:
        return str(error)
    finally:
        channel.close()
    return f"no answer in {_TIMEOUT_S:.0f} s; is it stopped?"
