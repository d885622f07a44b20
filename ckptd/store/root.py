"""Making a root, and telling whether something is one."""

from __future__ import annotations

import logging
from itertools import islice

import msgspec

from ckptd.errors import (
    CheckpointNotFoundError,
    ConfigError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    UnsupportedFormatError,
)
from ckptd.model import keys
from ckptd.model.manifest import FORMAT, RootRecord
from ckptd.store.base import Store
from ckptd.store.local import LocalStore
from ckptd.store.remote import RemoteStore

log = logging.getLogger(__name__)

_MAX_BYTES = 64 << 10
_MAX_FORMAT = 9999


def create_root(store: Store) -> None:
    """Make sure, for a writer, that `store` is a root of this format that takes writes.

    An empty store becomes a root; several processes may do that at once.

    Raises:
        ConfigError: something else lives there, or its record is damaged. Nothing was touched.
        UnsupportedFormatError: a newer version made it.
        StoreError: the store cannot be read or written.
    """
    if not _is_root(store):
        strangers = _strangers(store)
        # Asked again: whatever was found may belong to a root that another rank just made.
        if strangers and not _is_root(store):
            raise ConfigError(
                f"{store.url} is not a ckptd root: it has no {keys.ROOT_RECORD} and holds "
                f"{', '.join(strangers[:3])}; choose an empty folder"
            )
        try:
            store.put_new(keys.ROOT_RECORD, msgspec.json.encode(RootRecord(FORMAT)))
        except ObjectExistsError:
            _is_root(store)
    if isinstance(store, LocalStore):
        store.check_writable()
    check_writer(store)


def check_writer(store: Store) -> None:
    """Learn, for a writer, whether the service of a root knows conditional writes.

    The record of the root is put once more: it has the same bytes for everybody, so a service that
    does not look at the condition changes nothing. A folder needs no asking.

    Raises:
        StoreError: the root cannot be written.
    """
    if not isinstance(store, RemoteStore):
        return
    record = store.get(keys.ROOT_RECORD, max_bytes=_MAX_BYTES)
    if not store.check_condition(keys.ROOT_RECORD, record):
        log.warning(
            "%s knows no conditional writes: only the daemon of rank 0 commits, resume finishes "
            "nothing, and two jobs must not start in it at once; see docs/operations.md",
            store.url,
        )


def check_root(store: Store) -> None:
    """Make sure, for a reader, that `store` is a root that this version can read.

    Raises:
        CheckpointNotFoundError: it is no root; the store answered that.
        ConfigError: its record is damaged.
        UnsupportedFormatError: a newer version made it.
        StoreError: the store cannot be read.
    """
    if not _is_root(store):
        raise CheckpointNotFoundError(f"no ckptd root at {store.url}; check the path")


def _is_root(store: Store) -> bool:
    """Tell whether there is a record, and check that it is of a format that is known."""
    try:
        data = store.get(keys.ROOT_RECORD, max_bytes=_MAX_BYTES)
        record = msgspec.json.decode(data, type=RootRecord)
    except ObjectNotFoundError:
        return False
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _damaged(store) from error
    except StoreError as error:
        if type(error) is StoreError:  # too large, or not a file: the store did answer
            raise _damaged(store) from error
        raise
    if not 1 <= record.format <= _MAX_FORMAT:
        raise _damaged(store)
    if record.format > FORMAT:
        raise UnsupportedFormatError(
            f"{store.url} has format {record.format}, this ckptd knows {FORMAT}; "
            "install a newer ckptd here or use another root"
        )
    return True


def _strangers(store: Store) -> tuple[str, ...]:
    if isinstance(store, LocalStore):
        return store.strangers()
    return tuple(entry.key for entry in islice(store.list(""), 3))


def _damaged(store: Store) -> ConfigError:
    return ConfigError(
        f"{keys.ROOT_RECORD} of {store.url} is damaged; if this is a ckptd root, "
        f'write {{"format": {FORMAT}}} into it'
    )
