"""Who is at the other end of a Unix socket, as the kernel says.

Credentials are those of the moment of `connect` (or, seen from the client, of `listen`): see
unix(7). A process id alone is only good for logs, since ids are used again; death is watched
through a pidfd.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Collection

from ckptd.errors import ProtocolError

_SO_PEERPIDFD = 77  # Linux 6.5; not in Python's socket module, and another number on sparc, parisc
_IS_MACOS = sys.platform == "darwin"
_UCRED = struct.Struct("iII")  # pid, uid, gid

# macOS, <sys/un.h>: level SOL_LOCAL, and a struct xucred that begins with version and uid.
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID, _XUCRED_BYTES = 0, 1, 2, 76


def peer_uid(sock: socket.socket) -> int:
    """Return the effective user id of the other end.

    Raises:
        ProtocolError: if the kernel does not say.
    """
    try:
        if not _IS_MACOS:
            return _credentials(sock)[1]
        record = sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED_BYTES)
        return int(struct.unpack_from("II", record)[1])
    except (OSError, struct.error) as error:
        raise ProtocolError(f"cannot tell whose the other end is: {error}") from error


def peer_pid(sock: socket.socket) -> int:
    """Return the process id of the other end, for logs; 0 where the kernel does not say."""
    try:
        if not _IS_MACOS:
            return _credentials(sock)[0]
        return int(struct.unpack("i", sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))[0])
    except (OSError, struct.error):
        return 0


def peer_pidfd(sock: socket.socket) -> int | None:
    """Return a descriptor that becomes readable when the process at the other end dies.

    The caller owns it. None where there is no such thing or the process is dead already: then only
    the end of the stream tells, which a forked child of that process may keep open.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            return None
    # Before Linux 6.5. The id may belong to another process by now: at worst the death of a peer
    # is seen late, since nothing is ever sent to it.
    try:
        return os.pidfd_open(peer_pid(sock))
    except (OSError, ValueError):
        return None


def check_peer(sock: socket.socket, allowed_uids: Collection[int]) -> int:
    """Return the user id of the other end if it is allowed; call this before reading a byte.

    Raises:
        ProtocolError: if it is someone else's process.
    """
    uid = peer_uid(sock)
    if uid not in allowed_uids:
        raise ProtocolError(
            f"the other end belongs to user id {uid}, which is not allowed here "
            "(inside a user namespace, users it does not map all show as one id, often 65534)"
        )
    return uid


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    return pid, uid, gid
