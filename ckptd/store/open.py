"""From what a person types to a store."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from ckptd.errors import ConfigError
from ckptd.store.base import Store
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=/)", re.ASCII)
_MEMORY = re.compile(r"memory://[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", re.ASCII)


def open_store(url: str, storage_options: dict[str, object] | None = None) -> Store:
    """Return the store behind a path, ``file://`` or ``memory://`` URL; nothing is touched yet.

    Args:
        url: in any form that `normalise_url` takes.
        storage_options: settings of an object store; none fit the stores of this version.

    Raises:
        ConfigError: the URL is of another kind, or there are options.
    """
    url = normalise_url(url)
    if storage_options:
        raise ConfigError(
            f"storage_options {sorted(storage_options)} mean nothing for {url}; leave them out"
        )
    return MemoryStore.shared(url) if url.startswith("memory://") else LocalStore(url)


def normalise_url(url: str) -> str:
    """Return the one form of `url` by which every process of this machine names the root.

    For a folder that is its absolute path, links in the folders above it resolved; the root itself
    stays as it is, because a root that is a link is refused where it is opened.

    Raises:
        ConfigError: the URL cannot name a root.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        return _normalise_path(url)
    name = scheme[1].lower()
    if name == "memory":
        if not _MEMORY.fullmatch(url):
            raise ConfigError(f"cannot read {url!r}; write memory://name")
        return url
    if name == "file":
        path = re.sub(r"^file:(//(localhost)?(?=/))?", "", url, flags=re.IGNORECASE)
        if path.startswith("//"):
            raise ConfigError(f"{url!r} names a folder of another machine; write file:///path")
        return _normalise_path(unquote(path))
    raise ConfigError(
        f"{name}:// is not supported by this version yet, as no object store is; "
        "give a path, file:///path or memory://name"
    )


def _normalise_path(path: str) -> str:
    if not path or "\0" in path:
        raise ConfigError(f"cannot read {path!r} as the path of a root")
    if path.startswith("~"):
        raise ConfigError(f"{path!r}: the shell did not expand '~'; write the whole path")
    path = os.path.abspath(path)
    # POSIX lets "//" at the start mean something else; Linux and macOS do not use that.
    folder, name = os.path.split("/" + path.lstrip("/"))
    return os.path.join(os.path.realpath(folder), name)
