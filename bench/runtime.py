"""A folder for the sockets of a run's daemons, and the end of all that runs there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@contextmanager
def runtime_dir(logs: Path, name: str = "daemon") -> Iterator[Path]:
    """Make it; afterwards end the processes that were given it, and keep their logs in `logs`."""
    runtime = Path(tempfile.mkdtemp(prefix="ckptd-b.", dir="/tmp"))
    try:
        yield runtime
    finally:
        leftovers = PROJECT / "scripts" / "leftovers.py"
        subprocess.run([sys.executable, leftovers, runtime], check=False, capture_output=True)
        for path in runtime.glob("*.log"):
            shutil.copy2(path, logs / f"{name}.log")
        shutil.rmtree(runtime, ignore_errors=True)
