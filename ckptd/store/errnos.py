"""What the operating system's errors mean for a store: the one place that translates them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ckptd.errors import (
    CkptdError,
    ConfigError,
    StoreAccessDeniedError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)

_ADVICE: tuple[tuple[frozenset[int], type[StoreError], str], ...] = (
    (
        frozenset({errno.EACCES, errno.EPERM, errno.EROFS}),
        StoreAccessDeniedError,
        "not allowed below {root} ({why}); give this user access to that folder",
    ),
    (
        frozenset({errno.ENOSPC, errno.EDQUOT}),
        StoreFullError,
        "no space below {root} ({why}); prune it or free space",
    ),
    (
        frozenset({errno.EFBIG}),
        StoreFullError,
        "too large a file below {root} ({why}); raise `ulimit -f`",
    ),
    (
        frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR}),
        StoreAccessDeniedError,
        (
            "a link, file or folder is in the way below {root} ({why}); links are never followed: "
            "put a plain folder or file there"
        ),
    ),
    (
        frozenset({errno.ENAMETOOLONG}),
        StoreError,
        "the path of the root {root} is too long",
    ),
)


@contextmanager
def border(key: str, root: str) -> Iterator[None]:
    """Translate each `OSError` of the block into an error that names `key` and advises."""
    try:
        yield
    except OSError as error:
        raise translate(error, key, root) from error


def translate(error: OSError, key: str, root: str) -> CkptdError:
    """Return what `error` means for the object `key` below `root`.

    Whatever is not known to be for good may pass, so it becomes `StoreUnavailableError`: EIO and
    ESTALE, but also running out of descriptors.
    """
    why = error.strerror or str(error)
    if error.errno == errno.EXDEV:
        return ConfigError(
            f"{root} spans several file systems ({why}): {key}; "
            "nothing may be mounted inside of a root"
        )
    for codes, kind, advice in _ADVICE:
        if error.errno in codes:
            return kind(key, advice.format(root=root, why=why))
    return StoreUnavailableError(key, f"{root} failed ({why}); it may work again later")
