"""Where the roots of the demo live: a folder, or a bucket of a server that the demo starts itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from ckptd.store.base import Store  # noqa: E402
from ckptd.store.open import open_store  # noqa: E402

BUCKET = "ckptd-demo"
SETTLE_TIMEOUT_S = 20.0


class Place:
    """Roots side by side below `base`, a folder or a URL; the story's own is `root`."""

    def __init__(self, base: str, root: str) -> None:
        self.base, self.root = base, root

    def beside(self, name: str) -> str:
        """Return the place of another root."""
        return f"{self.base}/{name}"

    def copy(self, name: str) -> str:
        """Copy the story's root, once nothing writes to it, so that proofs leave the story alone."""
        settle(self.root)
        target = self.beside(f"{name}-root")
        if "://" not in target:
            shutil.copytree(self.root, target, copy_function=_link_or_copy)
            return target
        with opened(self.root) as source, opened(target) as copy:
            for entry in source.list(""):
                copy.put(entry.key, source.get(entry.key, max_bytes=entry.bytes))
        return target


@contextlib.contextmanager
def opened(root: str) -> Iterator[Store]:
    """Open a root as it is, to look at it from outside."""
    store = open_store(root)
    try:
        yield store
    finally:
        store.close()


def settle(root: str) -> None:
    """Wait until a daemon that outlived its trainers has written what it was given."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    before: list[str] = []
    quiet_since = time.monotonic()
    with opened(root) as store:
        while time.monotonic() < min(deadline, quiet_since + 1.0):
            now = [entry.key for entry in store.list("")]
            if now != before:
                before, quiet_since = now, time.monotonic()
            time.sleep(0.1)


@contextlib.contextmanager
def make_place(wanted: str | None, out: Path) -> Iterator[Place]:
    """Make the place that `--root` names: None, a folder, a URL, or ``s3`` for a server of our own.

    Raises:
        SystemExit: there is something already.
    """
    if wanted == "s3":
        with _own_server() as base:
            yield Place(base, f"{base}/root")
        return
    work = str(out / "work")
    if wanted is None:
        yield Place(work, str(out / "root"))
        return
    root = wanted if "://" in wanted else str(Path(wanted).resolve())
    if ("://" in root and _has_something(root)) or Path(root).exists():
        raise SystemExit(f"demo: {root} exists; name one that does not, or leave --root out")
    yield Place(work if "://" not in root else f"{root}-proofs", root)


@contextlib.contextmanager
def _own_server() -> Iterator[str]:
    """Run an S3 server beside the demo; jobs and commands find it by their environment."""
    from tests.fakes.s3_server import MotoServer

    with MotoServer() as server:
        server.make_bucket(BUCKET)
        os.environ.update(server.env, AWS_ENDPOINT_URL=server.url)
        yield f"s3://{BUCKET}"


def _has_something(root: str) -> bool:
    with opened(root) as store:
        return next(iter(store.list("")), None) is not None


def _link_or_copy(source: str, target: str) -> None:
    """Link a chunk, which never changes once it is there; copy anything else."""
    if "/chunks/" in source:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
