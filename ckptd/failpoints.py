"""Named places where a test can kill, stop or fail this process.

``CKPTD_FAILPOINTS="commit.put=kill@2;chunk.put=raise"`` kills the process the second time it comes
to ``commit.put``. Unarmed, a failpoint is one truth test of an empty dict. ``hang`` blocks the
thread that comes there, for ever: a disk that does not answer.
"""

from __future__ import annotations

import os
import signal
import threading

from ckptd.errors import ConfigError

_ACTIONS = ("kill", "stop", "raise", "abort", "hang")
_armed: dict[str, tuple[str, int]] = {}
_lock = threading.Lock()  # guards _armed: points are hit from several worker threads


def arm(spec: str) -> None:
    """Arm the points of `spec` (``name=action[@nth];...``), replacing what was armed before.

    Raises:
        ConfigError: if `spec` does not parse.
    """
    armed = {}
    for part in filter(None, spec.split(";")):
        name, _, action = part.partition("=")
        action, _, nth = action.partition("@")
        is_count = (nth or "1").isdecimal() and int(nth or "1") > 0
        if not name or action not in _ACTIONS or not is_count:
            raise ConfigError(f"CKPTD_FAILPOINTS: cannot read {part!r}; write name=kill@1")
        armed[name] = (action, int(nth or "1"))
    with _lock:
        _armed.clear()
        _armed.update(armed)


def hit(name: str) -> None:
    """Do what is armed for `name`, if its turn has come.

    Raises:
        OSError: if the armed action is ``raise``.
    """
    if not _armed:
        return
    with _lock:
        action, nth = _armed.get(name, ("", 0))
        if not action:
            return
        if nth > 1:
            _armed[name] = (action, nth - 1)
            return
        del _armed[name]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "abort":
        os.abort()
    elif action == "hang":
        threading.Event().wait()
    else:
        raise OSError(5, f"failpoint {name}")
