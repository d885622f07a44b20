"""End and name what a run left behind: processes, and sockets in its runtime folder.

usage: leftovers.py RUNTIME_DIR

A process belongs to the run if RUNTIME_DIR stands in its environment, so nobody else's daemon is
ever touched. Exits with 1 if there was anything, with 0 and no output if there was nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from pathlib import Path

GRACE_S = 10.0  # a daemon that was told to go may still be draining


def processes(runtime: str) -> list[int]:
    """Return the pids of the processes, this one left out, that were started for the run."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # gone meanwhile, or somebody else's
            continue
        if f"={runtime}".encode() in environment:
            found.append(int(entry.name))
    return found


def sockets(runtime: str) -> list[Path]:
    """Return the sockets below the runtime folder."""
    return [p for p in Path(runtime).rglob("*") if stat.S_ISSOCK(p.lstat().st_mode)]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
    except OSError:
        return "gone meanwhile"


def main() -> int:
    runtime = sys.argv[1]
    deadline = time.monotonic() + GRACE_S
    while processes(runtime) and time.monotonic() < deadline:
        time.sleep(0.05)
    found = [f"process {pid}: {name_of(pid)}" for pid in processes(runtime)]
    for pid in processes(runtime):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    found += [f"socket {path}" for path in sockets(runtime)]
    for line in found:
        print(f"left behind: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
