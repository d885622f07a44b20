"""Where a daemon is found: the runtime directory, the socket in it, and who holds its lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from ckptd.errors import AlreadyServingError, ConfigError, DaemonUnavailableError
from ckptd.units import format_span
from ckptd.wire.peer import check_peer

MAX_PATH_BYTES = 100  # sun_path holds 108 on Linux and 104 on macOS, with the final zero
_BACKLOG = 256


class Listener(NamedTuple):
    """A listening socket (not blocking) and the descriptor that holds its lock, for life."""

    socket: socket.socket
    lock_fd: int


def runtime_directory(env: Mapping[str, str]) -> str:
    """Return the directory of sockets, made with mode 0700 if it is not there.

    It is ``$CKPTD_RUNTIME_DIR``, else ``$XDG_RUNTIME_DIR/ckptd`` where that is ours (it survives
    ``su``), else ``/tmp/ckptd-<uid>``.

    Raises:
        ConfigError: if it cannot be made, is a link, is someone else's, or is open to others.
    """
    path = _choose_directory(env)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot serve as the directory of sockets ({error.strerror}): make it a plain "
            "directory of yours with mode 0700, or set CKPTD_RUNTIME_DIR to another one"
        ) from error
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path} belongs to user id {found.st_uid} and has mode {found.st_mode & 0o7777:04o}: "
            f"others could put a socket there. Run `chown {os.geteuid()} {path} && chmod 700 "
            f"{path}`, or set CKPTD_RUNTIME_DIR to another directory"
        )
    return path


def socket_path(url: str, storage_options: Mapping[str, object], env: Mapping[str, str]) -> str:
    """Return the path of the socket of the daemon that serves this root for this user.

    ``$CKPTD_SOCKET`` if set. Otherwise the name is a hash, from which no credential can be read.

    Raises:
        ConfigError: as `runtime_directory`; if the path is too long for a socket or not absolute;
            if the storage options are not plain values.
    """
    path = env.get("CKPTD_SOCKET") or os.path.join(
        runtime_directory(env), _short_hash(url, storage_options) + ".sock"
    )
    if not os.path.isabs(path):
        raise ConfigError(f"CKPTD_SOCKET={path}: give an absolute path")
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(
            f"{path} is longer than the {MAX_PATH_BYTES} bytes that a socket's path may have: "
            "set CKPTD_RUNTIME_DIR or CKPTD_SOCKET to something shorter"
        )
    return path


def listen(path: str) -> Listener:
    """Take the lock of `path`, clear away a dead daemon's socket, and listen there.

    Changes the umask for a moment: call it before threads that create files are started.

    Raises:
        AlreadyServingError: another daemon holds the lock or answers there.
        ConfigError: the place cannot be used; something that is no socket is never touched.
    """
    lock_fd = _take_lock(path + ".lock")
    try:
        with _as_config_error(path):
            _clear_stale(path)
            return Listener(_bind(path), lock_fd)
    except BaseException:
        os.close(lock_fd)
        raise


def unlisten(path: str, listener: Listener) -> None:
    """Remove the socket, then let the lock go; the lock's file stays, since removing it races."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    listener.socket.close()
    os.close(listener.lock_fd)


def connect(path: str, *, deadline_s: float) -> socket.socket:
    """Return a connection to the daemon at `path`, whose owner was checked before a byte was read.

    Raises:
        DaemonUnavailableError: nothing is there, it refuses, or its queue stayed full.
        ConfigError: the socket may not be opened.
        ProtocolError: the daemon is neither ours nor root's.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A connect on a Unix socket is never "in progress": it waits while the queue is full, for
        # as long as SO_SNDTIMEO says (0 would be for ever), see unix_stream_connect in the kernel.
        wait_us = max(1000, int(deadline_s * 1e6))
        wait = struct.pack("ll", wait_us // 1_000_000, wait_us % 1_000_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        _connect(sock, path, deadline_s)
        check_peer(sock, {os.geteuid(), 0})
        sock.settimeout(0)
    except BaseException:
        sock.close()
        raise
    return sock


def is_serving(path: str) -> bool:
    """Tell whether some process listens at `path`, even one that is stopped or busy."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(0)
        try:
            sock.connect(path)
        except BlockingIOError:  # its queue is full
            return True
        except OSError:
            return False
        return True


def _choose_directory(env: Mapping[str, str]) -> str:
    if chosen := env.get("CKPTD_RUNTIME_DIR"):
        if not os.path.isabs(chosen):
            raise ConfigError(f"CKPTD_RUNTIME_DIR={chosen}: give an absolute path")
        return os.path.normpath(chosen)
    session = env.get("XDG_RUNTIME_DIR")
    if session and os.path.isabs(session):
        with contextlib.suppress(OSError):
            if os.stat(session).st_uid == os.geteuid():
                return os.path.join(session, "ckptd")
    return f"/tmp/ckptd-{os.geteuid()}"  # noqa: S108 - owner, mode and links are checked


def _short_hash(url: str, storage_options: Mapping[str, object]) -> str:
    try:
        text = msgspec.json.encode(
            [os.geteuid(), url.rstrip("/"), dict(storage_options)], order="sorted"
        )
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"storage_options must be plain values that can be sent to a daemon: {error}"
        ) from error
    return hashlib.sha256(text).hexdigest()[:20]


def _take_lock(path: str) -> int:
    with _as_config_error(path):
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyServingError(f"a daemon already serves here, and holds {path}") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _clear_stale(path: str) -> None:
    """Remove the socket of a dead daemon; the lock is held, so nobody else does at this time."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is not a socket; it was left alone: remove or rename it")
    # The lock's file may have been cleaned out of /tmp under a living daemon.
    if is_serving(path):
        raise AlreadyServingError(f"a daemon already serves on {path}")
    os.unlink(path)


def _bind(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o077)  # a socket's mode is what umask leaves at bind
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(_BACKLOG)
        sock.settimeout(0)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect(sock: socket.socket, path: str, deadline_s: float) -> None:
    began_s = time.monotonic()
    try:
        sock.connect(path)
    except (BlockingIOError, TimeoutError) as error:
        raise DaemonUnavailableError(
            f"the daemon on {path} took no connection for "
            f"{format_span(max(deadline_s, time.monotonic() - began_s))}; is it stopped?"
        ) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(f"{path} may not be opened: {error.strerror}") from error
        raise DaemonUnavailableError(f"no daemon answers on {path}: {error}") from error


@contextlib.contextmanager
def _as_config_error(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"a daemon cannot listen at {path}: {error.strerror or error}") from error
