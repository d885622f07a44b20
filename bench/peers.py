"""Installs the peers that are missing, one by one: one that cannot be installed stops nothing.

usage: python -m bench.peers
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def wanted() -> list[str]:
    """Return the requirements of the group `bench`."""
    required = importlib.metadata.requires("ckptd") or []
    return [
        line.partition(";")[0].strip() for line in required if re.search(r"extra == .bench", line)
    ]


def is_installed(requirement: str) -> bool:
    """Tell whether the distribution is there, in any version."""
    name = _NAME.match(requirement)
    try:
        importlib.metadata.version(name.group() if name else requirement)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def version_of(name: str) -> str | None:
    """Return the installed version, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Install what is missing."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--timeout", "20"]
    for requirement in wanted():
        if is_installed(requirement):
            continue
        print(f"bench: installing {requirement} ...", file=sys.stderr)
        done = subprocess.run(
            [*pip, "-c", PROJECT / "constraints.txt", requirement],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"bench: goes on without {requirement}: {last}", file=sys.stderr)


if __name__ == "__main__":
    main()
