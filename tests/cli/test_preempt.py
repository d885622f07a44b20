"""`ckptd preempt` tells the trainers of a daemon to stop, and says how many there were."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from ckptd.store.local import LocalStore
from ckptd.store.root import create_root
from ckptd.wire import messages as say
from tests.fakes.jobs import Daemon, Place, new_place
from tests.fakes.trainers import FakeTrainer


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with new_place() as fresh:
        monkeypatch.setenv("CKPTD_RUNTIME_DIR", str(fresh.runtime))
        monkeypatch.delenv("CKPTD_SOCKET", raising=False)
        yield fresh


@pytest.fixture
def daemon(place: Place) -> Daemon:
    return place.daemon()


@pytest.fixture
def trainers(place: Place, daemon: Daemon) -> Iterator[dict[str, FakeTrainer]]:
    """Give two ranks of one root, and one of another."""
    for root in ("a", "b"):
        store = LocalStore(str(place.base / root))
        create_root(store)
        store.close()
    made = {
        name: FakeTrainer(daemon.socket, str(place.base / root), rank=rank, world_size=ranks)
        for name, root, rank, ranks in (("a0", "a", 0, 2), ("a1", "a", 1, 2), ("b", "b", 0, 1))
    }
    for trainer in made.values():
        trainer.connect()
    yield made
    for trainer in made.values():
        trainer.goodbye()
        trainer.close()


def reasons(trainer: FakeTrainer) -> list[str]:
    """Return what the trainer was told so far; a report comes after all that was said before."""
    trainer.report()
    return [message.reason for message in trainer.heard if isinstance(message, say.Stop)]


def test_all_trainers_are_told_and_counted(ckptd, trainers: dict[str, FakeTrainer]) -> None:
    result = ckptd("preempt")
    assert result.exit_code == 0
    assert "told 3 trainers" in result.stdout
    assert [reasons(trainer) for trainer in trainers.values()] == [["ckptd preempt"]] * 3


def test_only_those_of_a_root_are_told_why(ckptd, place, trainers: dict[str, FakeTrainer]) -> None:
    result = ckptd("preempt", f"{place.base}/b/", "--reason", "maintenance at noon")
    assert result.exit_code == 0
    assert "told 1 trainer:" in result.stdout
    assert [reasons(trainer) for trainer in trainers.values()] == [[], [], ["maintenance at noon"]]


def test_json_is_one_document(ckptd, daemon: Daemon, trainers: dict[str, FakeTrainer]) -> None:
    result = ckptd("preempt", "--socket", daemon.socket, "--json")
    assert json.loads(result.stdout) == {
        "trainers": 3, "daemons": {daemon.socket: 3}, "silent": {},
    }  # fmt: skip


def test_nobody_to_tell_is_an_error(ckptd, place: Place, trainers: dict[str, FakeTrainer]) -> None:
    result = ckptd("preempt", place.base / "c")
    assert result.exit_code == 6
    assert f"no job of {place.base}/c is connected" in result.stderr
    assert [reasons(trainer) for trainer in trainers.values()] == [[]] * 3


def test_no_daemon_is_an_error(ckptd, place: Place) -> None:
    result = ckptd("preempt", "--json")
    assert result.exit_code == 6
    assert json.loads(result.stdout) == {"trainers": 0, "daemons": {}, "silent": {}}
    assert "no daemon is running" in result.stderr


def test_a_daemon_that_does_not_answer_is_named(
    ckptd, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptd.cli import daemons

    monkeypatch.setattr(daemons, "ANSWER_TIMEOUT_S", 0.2)
    daemon.send(signal.SIGSTOP)
    try:
        result = ckptd("preempt")
    finally:
        daemon.send(signal.SIGCONT)
    assert result.exit_code == 6
    assert daemon.socket in result.stdout.replace("\n", "")
    assert "is it stopped?" in result.stdout.replace("\n", " ")
