"""Lets clients in: the right users only, and never stuck when descriptors run out."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Collection

from ckptd.errors import ProtocolError
from ckptd.wire.peer import check_peer

_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)


class Door:
    """Accepts connections of `allowed_uids` on a listening socket, which stays the caller's.

    One descriptor is kept in reserve. Where the table is full, it is given up for a moment to
    accept the client and close it at once: otherwise the listener would stay readable and the loop
    would spin. For one thread.
    """

    def __init__(self, listener: socket.socket, allowed_uids: Collection[int]) -> None:
        self._listener = listener
        self._allowed_uids = frozenset(allowed_uids)
        self._reserve: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def accept(self) -> socket.socket | None:
        """Return the next client, not blocking; None if there is none that may come in.

        A client of another user, or one for which no descriptor is left, was closed before a byte
        of it was read.
        """
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTOR:
                self._turn_away()
            return None
        try:
            client.settimeout(0)
            check_peer(client, self._allowed_uids)
        except (OSError, ProtocolError):
            client.close()
            return None
        self._restock()
        return client

    def close(self) -> None:
        """Give the reserve back. May be repeated."""
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None

    def _turn_away(self) -> None:
        self.close()
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self._restock()

    def _restock(self) -> None:
        if self._reserve is None:
            with contextlib.suppress(OSError):
                self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
