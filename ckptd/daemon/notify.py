"""What a daemon tells the service manager that started it, and what it gets from it.

The protocol of sd_notify(3) and sd_listen_fds(3), which systemd and others speak: datagrams to the
socket that ``NOTIFY_SOCKET`` names, descriptors beside them. What was put into the manager's store
comes back when the next process of the service starts, see
https://systemd.io/FILE_DESCRIPTOR_STORE/.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

log = logging.getLogger("ckptd.daemon")

NOTIFY_TIMEOUT_S = 1.0

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


class Notifier:
    """Tells a service manager how its service is, and gives it descriptors to keep.

    Where the manager does not take what it is told, that is logged once and harms nothing. Each call
    waits for `NOTIFY_TIMEOUT_S` at most.

    Args:
        address: what ``NOTIFY_SOCKET`` holds: a path, or ``@`` and a name in the abstract namespace.
            Empty: there is no manager, and nothing is said.
    """

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._has_failed = False

    @property
    def is_there(self) -> bool:
        """Tell whether there is a manager."""
        return bool(self._address)

    def ready(self) -> None:
        """Say that the service serves."""
        self._say("READY=1")

    def stopping(self) -> None:
        """Say that the service is about to end."""
        self._say("STOPPING=1")

    def store(self, name: str, fd: int) -> None:
        """Put a descriptor into the store; it stays the caller's too."""
        self._say(f"FDSTORE=1\nFDNAME={name}", [fd])

    def remove(self, name: str) -> None:
        """Take out of the store what was put there under a name; nothing may be there."""
        self._say(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _say(self, text: str, fds: Sequence[int] = ()) -> None:
        if not self.is_there:
            return
        try:
            # A new socket each time: the manager may have been started anew, on another one.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as talk:
                talk.settimeout(NOTIFY_TIMEOUT_S)
                talk.connect(self._address)
                socket.send_fds(talk, [text.encode()], list(fds))
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                log.warning("the service manager does not hear this daemon: %s", error)


class Given(NamedTuple):
    """A descriptor that the service manager passed on, and its name in the store."""

    name: str
    fd: int


def take_fds(env: MutableMapping[str, str]) -> list[Given]:
    """Return the descriptors that were passed to this very process; the caller owns them.

    What tells of them leaves the environment: it is true only once.
    """
    is_ours = env.get("LISTEN_PID") == str(os.getpid())
    count, names = env.get("LISTEN_FDS", ""), env.get("LISTEN_FDNAMES", "").split(":")
    _forget_fds(env)
    if not is_ours or count in ("", "0"):
        return []
    if count != str(len(names)):
        log.warning("descriptors of the service manager have no names; they are not used")
        return []
    given = []
    for fd, name in enumerate(names, _FIRST_FD):
        with contextlib.suppress(OSError):  # it was closed on the way
            os.set_inheritable(fd, False)
            given.append(Given(name, fd))
    return given


def forget_manager(env: MutableMapping[str, str]) -> None:
    """Take the service manager out of the environment: this process is not its service.

    A trainer that is one may start a daemon, which must not speak for it.
    """
    _forget_fds(env)
    env.pop("NOTIFY_SOCKET", None)


def _forget_fds(env: MutableMapping[str, str]) -> None:
    for name in _VARIABLES:
        env.pop(name, None)
