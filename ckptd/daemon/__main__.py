"""``python -m ckptd.daemon SOCKET``: how a trainer starts a daemon on demand.

Returns once the daemon listens (or another one does already); the daemon itself is a process of
its own then, in its own session.
"""

from __future__ import annotations

import os
import sys

from ckptd.config import daemon_config
from ckptd.daemon.process import main, set_up_log
from ckptd.errors import CkptdError


def _start(socket: str) -> int:
    try:
        config = daemon_config(os.environ, socket=socket, is_on_demand=True)
    except CkptdError as error:
        sys.stderr.write(f"ckptd: {error}\n")
        return error.exit_code
    set_up_log(config.log_level)
    return main(config, os.environ, is_detached=True)


if __name__ == "__main__":
    sys.exit(_start(sys.argv[1]))
