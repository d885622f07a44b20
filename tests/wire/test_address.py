from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.errors import (
    AlreadyServingError,
    ConfigError,
    DaemonUnavailableError,
    ProtocolError,
)
from ckptd.wire import address, peer


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: a socket's name holds no long ones."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def served(place: Path) -> Iterator[str]:
    path = str(place / "d.sock")
    listener = address.listen(path)
    yield path
    address.unlisten(path, listener)


@contextmanager
def daemon_process(path: str) -> Iterator[subprocess.Popen[str]]:
    script = """
        import sys
        from ckptd.wire import address
        listener = address.listen(sys.argv[1])
        print("ready", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def is_ready(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "ready\n"


# --- the directory -----------------------------------------------------------------------------


def test_the_directory_is_made_for_its_owner_only(place: Path) -> None:
    env = {"CKPTD_RUNTIME_DIR": str(place / "run")}
    assert address.runtime_directory(env) == str(place / "run")
    assert stat.S_IMODE((place / "run").stat().st_mode) == 0o700
    assert address.runtime_directory(env) == str(place / "run")


def test_the_session_directory_is_used_if_it_is_ours(place: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(place)}
    assert address.runtime_directory(env) == str(place / "ckptd")
    env["CKPTD_RUNTIME_DIR"] = str(place / "mine")
    assert address.runtime_directory(env) == str(place / "mine")


@pytest.mark.parametrize("session", ["/nonexistent/1000", "relative", ""])
def test_a_session_directory_that_is_not_there_is_passed_over(session: str) -> None:
    chosen = address._choose_directory({"XDG_RUNTIME_DIR": session})
    assert chosen == f"/tmp/ckptd-{os.geteuid()}"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o701, 0o750])
def test_s5_a_directory_open_to_others_is_refused(place: Path, mode: int) -> None:
    place.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 700"):
        address.runtime_directory({"CKPTD_RUNTIME_DIR": str(place)})


def test_s5_a_directory_of_someone_else_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(ConfigError, match="chown 4242"):
        address.runtime_directory({"CKPTD_RUNTIME_DIR": str(place)})


def test_s5_a_link_in_place_of_the_directory_is_refused(place: Path) -> None:
    (place / "real").mkdir(mode=0o700)
    (place / "link").symlink_to(place / "real")
    for end in ("", "/"):
        with pytest.raises(ConfigError, match="plain directory"):
            address.runtime_directory({"CKPTD_RUNTIME_DIR": str(place / "link") + end})


@pytest.mark.parametrize("name", ["file", "missing/below", "file/x"])
def test_what_cannot_be_a_directory_is_refused(place: Path, name: str) -> None:
    (place / "file").write_text("")
    with pytest.raises(ConfigError, match="CKPTD_RUNTIME_DIR"):
        address.runtime_directory({"CKPTD_RUNTIME_DIR": str(place / name)})


def test_a_relative_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="absolute"):
        address.runtime_directory({"CKPTD_RUNTIME_DIR": "run"})


# --- the path ----------------------------------------------------------------------------------


def test_one_root_and_its_options_have_one_socket(place: Path) -> None:
    env = {"CKPTD_RUNTIME_DIR": str(place)}
    options = {"key": "canary", "client_kwargs": {"a": 1, "b": 2}}
    same = {"client_kwargs": {"b": 2, "a": 1}, "key": "canary"}
    path = address.socket_path("s3://b/run", options, env)
    assert path == address.socket_path("s3://b/run/", same, env)
    assert path.startswith(str(place))
    assert "canary" not in path
    assert path != address.socket_path("s3://b/run", {}, env)
    assert path != address.socket_path("s3://b/run2", options, env)


def test_another_user_has_another_socket(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"CKPTD_RUNTIME_DIR": str(place)}
    mine = address.socket_path("s3://b/run", {}, env)
    monkeypatch.setattr(address, "runtime_directory", lambda env: str(place))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert address.socket_path("s3://b/run", {}, env) != mine


def test_the_environment_may_name_the_socket() -> None:
    env = {"CKPTD_SOCKET": "/run/x.sock", "CKPTD_RUNTIME_DIR": "/nonexistent/x"}
    assert address.socket_path("s3://b/run", {}, env) == "/run/x.sock"
    with pytest.raises(ConfigError, match="absolute"):
        address.socket_path("s3://b/run", {}, {"CKPTD_SOCKET": "x.sock"})


def test_x5_a_path_too_long_for_a_socket_is_refused_before_the_kernel_does() -> None:
    longest = "/" + "x" * 99
    assert address.socket_path("u", {}, {"CKPTD_SOCKET": longest}) == longest
    with pytest.raises(ConfigError, match="longer than"):
        address.socket_path("u", {}, {"CKPTD_SOCKET": "/" + "é" * 50})


def test_options_that_are_not_plain_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="plain values"):
        address.socket_path("u", {"session": object()}, {"CKPTD_RUNTIME_DIR": str(place)})


# --- listening ---------------------------------------------------------------------------------


def test_x5_the_socket_is_for_its_owner_only_whatever_the_umask(place: Path) -> None:
    before = os.umask(0)
    try:
        path = str(place / "d.sock")
        listener = address.listen(path)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
    assert stat.S_IMODE(os.stat(path + ".lock").st_mode) & 0o077 == 0
    address.unlisten(path, listener)
    assert not os.path.exists(path)


def test_a_client_reaches_the_daemon(served: str) -> None:
    assert address.is_serving(served)
    with address.connect(served, deadline_s=5) as sock:
        assert sock.gettimeout() == 0
        assert not os.get_inheritable(sock.fileno())


def test_p5_the_second_daemon_of_a_socket_is_refused_and_the_first_serves_on(served: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AlreadyServingError):
        address.listen(served)
    assert len(os.listdir("/proc/self/fd")) == before
    assert address.is_serving(served)


def test_p5_a_living_daemon_whose_lock_file_was_cleaned_away_is_not_replaced(served: str) -> None:
    os.unlink(served + ".lock")
    with pytest.raises(AlreadyServingError):
        address.listen(served)
    assert address.is_serving(served)


def test_l9_of_two_processes_one_serves(place: Path) -> None:
    path = str(place / "d.sock")
    with daemon_process(path) as first:
        assert is_ready(first)
        with daemon_process(path) as second:
            assert not is_ready(second)
            assert second.stderr is not None
            assert "AlreadyServingError" in second.stderr.read()
        assert address.is_serving(path)


def test_l10_a_killed_daemons_socket_is_recovered(place: Path) -> None:
    path = str(place / "d.sock")
    with daemon_process(path) as first:  # which kill -9 ends
        assert is_ready(first)
    assert os.path.exists(path)
    assert not address.is_serving(path)
    with pytest.raises(DaemonUnavailableError):
        address.connect(path, deadline_s=1)
    listener = address.listen(path)
    assert address.is_serving(path)
    address.unlisten(path, listener)


def test_the_lock_is_free_again_after_unlisten(place: Path) -> None:
    path = str(place / "d.sock")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        address.unlisten(path, address.listen(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_something_that_is_no_socket_is_never_removed(place: Path) -> None:
    path = place / "d.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        address.listen(str(path))
    assert path.read_text() == "precious"


def test_a_link_in_place_of_the_lock_is_not_followed(place: Path) -> None:
    (place / "d.sock.lock").symlink_to(place / "victim")
    with pytest.raises(ConfigError):
        address.listen(str(place / "d.sock"))
    assert not (place / "victim").exists()


def test_a_place_that_is_not_there_cannot_be_listened_at(place: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        address.listen(str(place / "missing" / "d.sock"))


# --- connecting --------------------------------------------------------------------------------


def test_p1_an_absent_daemon_is_unavailable(place: Path) -> None:
    path = str(place / "d.sock")
    assert not address.is_serving(path)
    with pytest.raises(DaemonUnavailableError, match="no daemon answers"):
        address.connect(path, deadline_s=1)


def test_p1_a_daemon_that_accepts_nobody_is_unavailable_at_the_deadline(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address, "_BACKLOG", 0)
    path = str(place / "d.sock")
    listener = address.listen(path)
    with address.connect(path, deadline_s=1):  # fills the queue
        with pytest.raises(DaemonUnavailableError, match="took no connection"):
            address.connect(path, deadline_s=0.02)
        assert address.is_serving(path)
    address.unlisten(path, listener)


def test_s5_a_daemon_of_another_user_is_refused_before_a_byte_is_sent_or_read(
    served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(peer, "_credentials", lambda sock: (1, 4242, 4242))
    monkeypatch.setattr(socket.socket, "recv", None)
    with pytest.raises(ProtocolError, match="4242"):
        address.connect(served, deadline_s=1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_s5_roots_daemon_is_trusted(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_credentials", lambda sock: (1, 0, 0))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    address.connect(served, deadline_s=1).close()
