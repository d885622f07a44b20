"""``python -m ckptd.daemon SOCKET``: how a trainer starts a daemon on demand.

Returns once the daemon listens (or another one does already); the daemon itself is a process of
its own then, in its own session.
"""

from __future__ import annotations

import contextlib
import os
import sys

from ckptd.config import daemon_config
from ckptd.daemon.notify import forget_manager
from ckptd.daemon.process import main, set_up_log
from ckptd.errors import CkptdError


def start(socket: str) -> int:
    """Serve on `socket` in a process of its own, detached from this one; return the exit code.

    This process lets go of all that it inherited but its standard streams.
    """
    _let_go()
    forget_manager(os.environ)  # it is the trainer's, if there is one
    try:
        config = daemon_config(os.environ, socket=socket, is_on_demand=True)
    except CkptdError as error:
        sys.stderr.write(f"ckptd: {error}\n")
        return error.exit_code
    set_up_log(config.log_level)
    return main(config, os.environ, is_detached=True)


def _let_go() -> None:
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    os.chdir("/")
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    for fd in map(int, os.listdir(folder)):
        if fd > 2:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(fd)


if __name__ == "__main__":
    sys.exit(start(sys.argv[1]))
