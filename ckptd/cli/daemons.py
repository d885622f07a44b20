"""The daemons of this user on this machine, and how a command asks them something."""

from __future__ import annotations

import glob
import os
import time
from typing import TypeVar

from ckptd.errors import HandoffError
from ckptd.wire import messages as say
from ckptd.wire.address import connect, runtime_directory
from ckptd.wire.channel import Channel

ANSWER_TIMEOUT_S = 5.0

_T = TypeVar("_T", bound=say.Message)


def sockets() -> list[str]:
    """Return where daemons of this user may listen on this machine."""
    return sorted(glob.glob(os.path.join(runtime_directory(os.environ), "*.sock")))


def ask_all(
    paths: list[str], question: say.FromTrainer, kind: type[_T]
) -> tuple[dict[str, _T], dict[str, str]]:
    """Ask daemons; return by path the answers of that kind, and why there is none from the others."""
    found, silent = {}, {}
    for path in paths:
        answer = _ask(path, question, kind)
        if isinstance(answer, str):
            silent[path] = answer
        else:
            found[path] = answer
    return found, silent


def _ask(path: str, question: say.FromTrainer, kind: type[_T]) -> _T | str:
    try:
        channel = Channel(connect(path, deadline_s=ANSWER_TIMEOUT_S), say.FromDaemon)
    except HandoffError as error:
        return str(error)
    try:
        channel.accept_large_frames()
        channel.send(question, deadline_s=ANSWER_TIMEOUT_S)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            for answer in channel.receive(left_s):
                if isinstance(answer, kind):
                    return answer
    except HandoffError as error:
        return str(error)
    finally:
        channel.close()
    return f"no answer in {ANSWER_TIMEOUT_S:.0f} s; is it stopped?"
