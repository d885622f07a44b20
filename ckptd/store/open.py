"""From what a person types to a store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import unquote

from ckptd.errors import ConfigError
from ckptd.store.base import Store
from ckptd.store.client import ObjectClient, split_options
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.store.remote import RemoteStore

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?=/)", re.ASCII)
_MEMORY = re.compile(r"memory://[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", re.ASCII)
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html, and what clones take
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]", re.ASCII)
_SEGMENT = re.compile(r"[^/\x00-\x1f\x7f?#*\\]+")
_CLIENT = "?client="
_S3 = frozenset({"s3", "s3a", "s3n"})
_NOT_ROOTS = frozenset({"http", "https", "ftp", "zip", "tar", "data", "git", "github", "local",
                        "filecache", "simplecache", "blockcache", "cached", "reference", "dir"})  # fmt: skip


def open_store(url: str, storage_options: Mapping[str, object] | None = None) -> Store:
    """Return the store behind a path or URL; nothing is touched or sent yet.

    Args:
        url: in any form that `normalise_url` takes.
        storage_options: for S3 the options of `s3fs.S3FileSystem`, for other services those of the
            file system that fsspec has for them; and the names of `ckptd.store.client.Limits`.

    Raises:
        ConfigError: the URL or an option cannot be used, or a package for it is missing.
    """
    url = normalise_url(url)
    options = storage_options or {}
    scheme = _SCHEME.match(url)
    if scheme is not None and scheme[1] != "memory":
        return _open_remote(url, scheme[1], options)
    if options:
        raise ConfigError(
            f"storage_options {sorted(options)} mean nothing for {url}; leave them out"
        )
    return LocalStore(url) if scheme is None else MemoryStore.shared(url)


def _open_remote(url: str, scheme: str, options: Mapping[str, object]) -> Store:
    limits, rest = split_options(options)
    path, _, client_name = url.partition("://")[2].partition(_CLIENT)
    if scheme == "s3":
        bucket, _, prefix = path.partition("/")
        make = _s3_client(client_name)
        client = make(bucket, prefix + "/" if prefix else "", rest, limits)
        return RemoteStore(url, client, limits)
    from ckptd.store.anyfs import CONDITIONAL, FsspecClient  # noqa: PLC0415 - as above

    files = FsspecClient(scheme, path, rest, limits)
    return RemoteStore(url, files, limits, has_conditional_put=scheme in CONDITIONAL)


def _s3_client(name: str) -> Callable[..., ObjectClient]:
    """Return the class of a client; each takes a third of a second or more to import."""
    if name == "obstore":
        try:
            from ckptd.store.s3_obstore import ObstoreClient  # noqa: PLC0415 - as above
        except ImportError as error:
            raise ConfigError(
                f"?client=obstore needs obstore ({error}): pip install 'ckptd[obstore]'"
            ) from error
        return ObstoreClient
    from ckptd.store.s3 import S3Client  # noqa: PLC0415 - as above

    return S3Client


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
    return _normalise_remote(url, name)


def _normalise_remote(url: str, scheme: str) -> str:
    if scheme in _NOT_ROOTS:
        raise ConfigError(f"{scheme}:// cannot hold checkpoints; give a path or a bucket")
    scheme = "s3" if scheme in _S3 else scheme
    rest = re.sub(r"^[^:]*:/", "", url)
    rest, _, client = rest.partition(_CLIENT) if scheme == "s3" else (rest, "", "")
    if client not in {"", "s3fs", "obstore"}:
        raise ConfigError(f"cannot read {url!r}; write ?client=s3fs or ?client=obstore")
    parts = rest.strip("/").split("/")
    is_fine = rest.startswith("/") and all(
        _SEGMENT.fullmatch(part) and part not in {".", ".."} for part in parts
    )
    if scheme == "s3" and not _BUCKET.fullmatch(parts[0]):
        is_fine = False
    if not is_fine or rest.startswith("//"):
        raise ConfigError(f"cannot read {url!r}; write {scheme}://bucket/path, without '?' and '#'")
    query = _CLIENT + client if client == "obstore" else ""
    return f"{scheme}://{'/'.join(parts)}{query}"


def _normalise_path(path: str) -> str:
    if not path or "\0" in path:
        raise ConfigError(f"cannot read {path!r} as the path of a root")
    if path.startswith("~"):
        raise ConfigError(f"{path!r}: the shell did not expand '~'; write the whole path")
    path = os.path.abspath(path)
    # POSIX lets "//" at the start mean something else; Linux and macOS do not use that.
    folder, name = os.path.split("/" + path.lstrip("/"))
    return os.path.join(os.path.realpath(folder), name)
