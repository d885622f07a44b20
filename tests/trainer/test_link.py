"""The thread that talks to a daemon, against daemons made of scripts."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from ckptd.errors import (
    CheckpointError,
    CkptdError,
    ConfigError,
    DaemonUnavailableError,
    ProtocolError,
    SaveFailedError,
    SaveUnknownError,
)
from ckptd.model.keys import StepId
from ckptd.shm.arena import Arena, round_up
from ckptd.trainer import link as link_module
from ckptd.trainer.handle import Handle
from ckptd.trainer.link import Link
from ckptd.trainer.pending import Pending
from ckptd.trainer.questions import Answer
from ckptd.wire import messages as say
from tests.fakes.engines import handoff, hello, recipe
from tests.fakes.ports import (
    WAIT_S,
    FakeDaemon,
    FakePort,
    Script,
    commit_all,
    finished,
    welcome,
    written,
)


class Clock:
    """In place of the module `time`: it stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Stand still."""


class Trainer:
    """Makes saves by hand over a link."""

    def __init__(self, daemon: FakeDaemon, *, give_up_s: float = 5.0) -> None:
        self.daemon = daemon
        self.arenas = [Arena.create(2, round_up(1), is_shared=False) for _ in range(2)]
        self.releases: list[int] = []
        self.stops: list[str] = []
        self.link = Link(
            daemon.open, hello(attempt=3), give_up_s=give_up_s, on_stop=self.stops.append
        )  # fmt: skip

    def save(self, step: int, sequence: int | None = None, **changes: int) -> Handle:
        handle = Handle(step, sequence or step, lambda _: None)
        message = msgspec.structs.replace(handoff(step, handle.sequence), **changes)
        arena = (message.arena, self.arenas[message.arena - 1])
        release = lambda: self.releases.append(step)  # noqa: E731
        pending = Pending(handle, message, recipe(message.recipe), arena, release)
        self.link.submit(pending)
        return handle

    def forfeit(self, step: int) -> Handle:
        handle = Handle(step, step, lambda _: None)
        self.link.submit(Pending(handle, say.Forfeit(step, step, "failed", "because")))
        return handle

    def poke_until(self, is_so: Callable[[], bool]) -> None:
        """Let the thread look at the clock again and again until something holds."""
        done = threading.Event()
        for _ in range(2000):
            self.link._wake()
            if is_so():
                return
            done.wait(0.005)
        raise AssertionError("it never came")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_RETRY_S", (0.0,))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(link_module, "time", clock)
    return clock


@pytest.fixture
def start() -> Iterator[Callable[..., Trainer]]:
    made: list[Trainer] = []

    def begin(*scripts: Script, **options: float) -> Trainer:
        made.append(Trainer(FakeDaemon(*scripts), **options))
        return made[-1]

    yield begin
    for trainer in made:
        trainer.link.close()
        for arena in trainer.arenas:
            arena.close()


def error_of(handle: Handle) -> CkptdError:
    with pytest.raises(CkptdError) as caught:
        handle.result(WAIT_S)
    assert handle.is_done
    return caught.value


def test_nothing_is_opened_before_there_is_something_to_say(start) -> None:
    trainer = start(commit_all)
    trainer.save(1).result(WAIT_S)
    assert trainer.daemon.opened == 1
    other = start(commit_all)
    other.link.close()
    assert other.daemon.opened == 0


def test_a_handoff_comes_after_hello_arena_and_recipe_and_those_come_once(start) -> None:
    trainer = start(commit_all)
    for step in (1, 2, 3):
        trainer.save(step).result(WAIT_S)
    (port,) = trainer.daemon.ports
    assert port.kinds() == ["Hello", "Arena", "Recipe", "Handoff", "Handoff", "Handoff"]
    assert [m.step for m in port.heard[3:]] == [1, 2, 3]
    assert trainer.releases == [1, 2, 3]


def test_a_new_arena_or_recipe_is_announced_before_the_handoff_that_needs_it(start) -> None:
    trainer = start(commit_all)
    trainer.save(1).result(WAIT_S)
    trainer.save(2, recipe=2).result(WAIT_S)
    trainer.save(3, recipe=2, arena=2).result(WAIT_S)
    assert trainer.daemon.ports[0].kinds() == [
        "Hello", "Arena", "Recipe", "Handoff", "Recipe", "Handoff", "Arena", "Handoff"
    ]  # fmt: skip


def test_a_recipe_that_the_daemon_has_forgotten_is_said_again(start) -> None:
    trainer = start(commit_all)
    for step in range(1, say.MAX_RECIPES + 2):
        trainer.save(step, recipe=step).result(WAIT_S)
    trainer.save(90, recipe=1).result(WAIT_S)
    said = [m.recipe for m in trainer.daemon.ports[0].heard if isinstance(m, say.Recipe)]
    assert said == [*range(1, say.MAX_RECIPES + 2), 1]


def test_the_slot_comes_back_with_written_and_the_word_with_finished(start) -> None:
    trainer = start(welcome)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    trainer.daemon.ports[0].answer(written(1))
    trainer.poke_until(lambda: trainer.releases == [1])
    assert not handle.is_done
    trainer.daemon.ports[0].answer(finished(1))
    handle.result(WAIT_S)
    assert trainer.link.newest == StepId(3, 1)
    assert trainer.releases == [1], "once"


def test_a_final_word_without_written_gives_the_slot_back_too(start) -> None:
    trainer = start(welcome)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    trainer.daemon.ports[0].answer(finished(1, 1, "failed", "SaveFailedError", "the disk is full"))
    error = error_of(handle)
    assert isinstance(error, SaveFailedError)
    assert "the disk is full" in str(error)
    assert trainer.releases == [1]
    assert trainer.link.newest is None


def test_newest_never_goes_back(start) -> None:
    trainer = start(welcome)
    handles = [trainer.save(step) for step in (1, 2)]
    trainer.daemon.until_heard(say.Handoff, 2)
    trainer.daemon.ports[0].answer(finished(2), finished(1))
    for handle in handles:
        handle.result(WAIT_S)
    assert trainer.link.newest == StepId(3, 2)


def test_words_about_steps_that_nobody_saved_change_nothing(start) -> None:
    trainer = start(welcome)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    trainer.daemon.ports[0].answer(written(7), finished(7, 7, "failed", "", "x"), finished(1))
    handle.result(WAIT_S)
    assert trainer.releases == [1]


def test_d6_after_a_lost_connection_all_is_announced_and_handed_off_again(start) -> None:
    trainer = start(welcome, commit_all)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    trainer.daemon.ports[0].break_off()
    handle.result(WAIT_S)
    assert trainer.daemon.ports[1].kinds() == ["Hello", "Arena", "Recipe", "Handoff"]
    assert trainer.daemon.ports[0].is_closed
    assert trainer.releases == [1]


def test_d6_what_was_written_is_only_watched_after_a_lost_connection(start) -> None:
    trainer = start(welcome, commit_all)
    first, second = trainer.save(1), trainer.save(2)
    trainer.daemon.until_heard(say.Handoff, 2)
    trainer.daemon.ports[0].answer(written(1))
    trainer.poke_until(lambda: trainer.releases == [1])
    trainer.daemon.ports[0].break_off()
    first.result(WAIT_S)
    second.result(WAIT_S)
    said = trainer.daemon.ports[1].heard
    assert [type(m).__name__ for m in said] == ["Hello", "Watch", "Arena", "Recipe", "Handoff"]
    assert (said[1].step, said[4].step) == (1, 2), "in the order of the saves"
    assert trainer.releases == [1, 2]


def test_a_forfeit_is_said_again_after_a_lost_connection(start) -> None:
    trainer = start(welcome, welcome)
    handle = trainer.forfeit(1)
    trainer.daemon.until_heard(say.Forfeit)
    trainer.daemon.ports[0].break_off()
    trainer.daemon.until_heard(say.Forfeit, port=1)
    trainer.daemon.ports[1].answer(finished(1, 1, "failed", "SaveFailedError", "because"))
    assert isinstance(error_of(handle), SaveFailedError)


def test_a_daemon_that_refuses_the_job_fails_every_save_with_its_reason(start) -> None:
    def refuse(port: FakePort, message: say.FromTrainer) -> None:
        port.answer(say.Refused("CheckpointNotFoundError", "no ckptd root at /root"))

    trainer = start(refuse)
    error = error_of(trainer.save(1))
    assert isinstance(error, ConfigError)
    assert "no ckptd root" in str(error)
    assert "no ckptd root" in str(error_of(trainer.save(2))), "later saves fail at once"
    assert trainer.releases == [1, 2]
    assert trainer.daemon.opened == 1, "and nobody is asked again"
    assert trainer.link.settle(WAIT_S) is False


def test_a_breach_of_the_protocol_fails_every_save(start) -> None:
    def refuse(port: FakePort, message: say.FromTrainer) -> None:
        welcome(port, message)
        if isinstance(message, say.Handoff):
            port.answer(say.Refused("ProtocolError", "a handoff that refers to nothing"))

    trainer = start(refuse)
    assert isinstance(error_of(trainer.save(1)), ProtocolError)
    assert trainer.releases == [1]


@pytest.mark.parametrize("kind", ["DaemonUnavailableError", "StoreUnavailableError"])
def test_p1_a_daemon_that_cannot_now_is_asked_again(start, kind: str) -> None:
    def stopping(port: FakePort, message: say.FromTrainer) -> None:
        port.answer(say.Refused(kind, "the daemon is stopping, or the store does not answer"))

    trainer = start(stopping, commit_all)
    trainer.save(1).result(WAIT_S)
    assert trainer.daemon.opened == 2


def test_p1_a_daemon_that_never_comes_fails_the_save_after_give_up_s(start, clock) -> None:
    trainer = start(welcome, give_up_s=60.0)
    trainer.daemon.is_absent = True
    handle = trainer.save(1)
    trainer.daemon.until(lambda: trainer.daemon.opened >= 2)
    assert not handle.is_done
    clock.now += 61
    trainer.poke_until(lambda: handle.is_done)
    assert isinstance(error_of(handle), DaemonUnavailableError)
    assert trainer.releases == [1]


def test_d6_an_old_snapshot_gets_the_whole_time_to_find_another_daemon(start, clock) -> None:
    trainer = start(welcome, commit_all, give_up_s=60.0)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    clock.now += 100  # a slow store, longer than give_up_s
    with trainer.daemon.changed:
        trainer.daemon.is_absent = True
    opened = trainer.daemon.opened
    trainer.daemon.ports[0].break_off()
    trainer.daemon.until(lambda: trainer.daemon.opened >= opened + 2)
    assert not handle.is_done
    with trainer.daemon.changed:
        trainer.daemon.is_absent = False
    handle.result(WAIT_S)


def test_a_daemon_that_does_not_welcome_is_given_up_and_another_is_asked(start, clock) -> None:
    trainer = start(lambda port, message: None, commit_all, give_up_s=1000.0)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Hello)
    clock.now += link_module.WELCOME_TIMEOUT_S + 1
    trainer.poke_until(lambda: handle.is_done)
    handle.result(WAIT_S)
    assert trainer.daemon.ports[0].is_closed


def test_d5_a_word_that_never_comes_is_unknown_never_committed(start, clock) -> None:
    trainer = start(welcome)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    clock.now += hello().commit_timeout_s + link_module._OVERTIME_S + 1
    trainer.poke_until(lambda: handle.is_done)
    assert isinstance(error_of(handle), SaveUnknownError)
    assert trainer.releases == [1]
    assert trainer.link.wait(0) is True
    trainer.daemon.ports[0].answer(written(1), finished(1))  # too late: the word stands
    trainer.save(2)
    trainer.daemon.until_heard(say.Handoff, 2)
    assert isinstance(error_of(handle), SaveUnknownError)
    assert trainer.releases == [1]


def test_wait_tells_whether_all_saves_have_their_word(start) -> None:
    trainer = start(welcome)
    assert trainer.link.wait(0) is True
    handle = trainer.save(1)
    assert trainer.link.wait(0) is False
    trainer.daemon.until_heard(say.Handoff)
    trainer.daemon.ports[0].answer(finished(1))
    assert trainer.link.wait(WAIT_S) is True
    assert handle.is_done


def test_settle_waits_for_the_answer_and_survives_a_lost_connection(start) -> None:
    def die_when_asked(port: FakePort, message: say.FromTrainer) -> None:
        welcome(port, message)
        if isinstance(message, say.Settle):
            port.break_off()

    trainer = start(die_when_asked, commit_all)
    assert trainer.link.settle(WAIT_S) is True
    assert trainer.daemon.opened == 2


def test_begin_finds_a_daemon_before_there_is_anything_to_hand_off(start) -> None:
    trainer = start(lambda port, message: port.break_off(), commit_all)
    trainer.link.begin()
    trainer.daemon.until_heard(say.Hello, port=1)
    assert trainer.daemon.opened == 2  # the first one broke off
    trainer.save(1)
    assert trainer.link.wait(WAIT_S)
    assert trainer.daemon.opened == 2


def test_settle_does_not_wait_longer_than_asked(start) -> None:
    trainer = start(welcome)
    assert trainer.link.settle(0.01) is False


# --- questions, and what the daemon says unasked ------------------------------------------------


def lend(port: FakePort, message: say.FromTrainer) -> None:
    """Answer questions of memory; the descriptors are those of the null device."""
    welcome(port, message)
    if isinstance(message, say.Borrow):
        port.fds.append(os.open(os.devnull, os.O_RDONLY))
        port.answer(say.Lent(message.arena, 1, 8192))
    elif isinstance(message, say.Seek):
        port.answer(say.Held("fake", ()))


class Asking:
    """Somebody who asks on a thread, and would wait for long."""

    def __init__(self, link: Link, message: say.FromTrainer) -> None:
        self._answers: list[Answer | None] = []
        self._thread = threading.Thread(
            target=lambda: self._answers.append(link.ask(message, 50 * WAIT_S)), daemon=True
        )
        self._thread.start()

    def result(self) -> Answer | None:
        self._thread.join(WAIT_S)
        (answer,) = self._answers
        return answer


def test_questions_of_several_threads_get_their_own_answers(start) -> None:
    trainer = start(lend)
    arenas: list[tuple[int, int]] = []

    def ask(number: int) -> None:
        answer = trainer.link.ask(say.Borrow(number, 0, 1), WAIT_S)
        assert answer is not None
        assert answer.fd is not None
        os.close(answer.fd)
        arenas.append((number, answer.message.arena))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(arenas) == [(number, number) for number in range(8)]
    assert trainer.daemon.opened == 1


def test_a_question_opens_a_conversation_and_hands_nothing_off(start) -> None:
    trainer = start(lend)
    answer = trainer.link.ask(say.Seek(), WAIT_S)
    assert answer is not None
    assert answer.message == say.Held("fake", ())
    assert trainer.daemon.ports[0].kinds() == ["Hello", "Seek"]


def test_what_was_handed_off_goes_before_a_question(start) -> None:
    trainer = start(welcome)
    trainer.daemon.is_absent = True
    trainer.link.begin()
    trainer.daemon.until(lambda: trainer.daemon.opened >= 1)
    trainer.save(1)
    asking = Asking(trainer.link, say.Seek())
    with trainer.daemon.changed:
        trainer.daemon.is_absent = False
    trainer.daemon.until_heard(say.Seek)
    assert trainer.daemon.ports[0].kinds() == ["Hello", "Arena", "Recipe", "Handoff", "Seek"]
    trainer.link.close()
    assert asking.result() is None


def test_p2_a_descriptor_that_comes_too_late_is_closed(start) -> None:
    trainer = start(commit_all)
    trainer.save(1).result(WAIT_S)
    assert trainer.link.ask(say.Borrow(1, 0, 1), 0.0) is None
    (port,) = trainer.daemon.ports
    fd = os.open(os.devnull, os.O_RDONLY)
    port.fds.append(fd)
    port.answer(say.Lent(1, 1, 8192))
    trainer.poke_until(lambda: port.fds == [])
    trainer.link.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


def test_p1_a_daemon_that_refuses_lets_those_who_ask_go(start) -> None:
    def refuse(port: FakePort, message: say.FromTrainer) -> None:
        welcome(port, message)
        if isinstance(message, say.Seek):
            port.answer(say.Refused("ProtocolError", "of another version"))

    trainer = start(refuse)
    asking = Asking(trainer.link, say.Seek())
    assert asking.result() is None
    assert trainer.link.ask(say.Seek(), WAIT_S) is None
    assert trainer.daemon.opened == 1, "and is not asked again"


def test_p1_close_lets_those_who_ask_go(start) -> None:
    trainer = start(welcome)
    asking = Asking(trainer.link, say.Claim(1, 8192))
    trainer.daemon.until_heard(say.Claim)
    trainer.link.close()
    assert asking.result() is None
    assert trainer.link.ask(say.Seek(), WAIT_S) is None


@pytest.mark.parametrize("keeps", [True, False])
def test_the_goodbye_says_whether_the_trainer_will_come_again(start, keeps: bool) -> None:
    trainer = start(commit_all)
    trainer.save(1).result(WAIT_S)
    trainer.link.close(keeps=keeps)
    assert trainer.daemon.ports[0].heard[-1] == say.Goodbye(keeps)


def test_a_word_to_stop_is_passed_on(start) -> None:
    trainer = start(welcome)
    trainer.link.begin()
    trainer.daemon.until_heard(say.Hello)
    trainer.daemon.ports[0].answer(say.Stop("the node goes"))
    trainer.poke_until(lambda: trainer.stops == ["the node goes"])


@pytest.mark.parametrize("is_first", [True, False])
def test_a_word_to_stop_that_comes_with_the_welcome_is_not_lost(start, is_first: bool) -> None:
    def hurry(port: FakePort, message: say.FromTrainer) -> None:
        if isinstance(message, say.Hello):
            words = [say.Welcome(), say.Stop("the node goes")]
            port.answer(*(reversed(words) if is_first else words))

    trainer = start(hurry)
    trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    assert trainer.stops == ["the node goes"]


def test_a_snapshot_is_handed_off_once_the_daemon_says_so(start) -> None:
    trainer = start(welcome)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    assert handle.status != "handed_off"
    trainer.daemon.ports[0].answer(say.Taken(7, 7), say.Taken(1, 1))
    trainer.poke_until(lambda: handle.status == "handed_off")


def test_close_says_goodbye_after_everything_was_handed_off(start) -> None:
    trainer = start(commit_all)
    trainer.save(1)
    trainer.link.close()
    (port,) = trainer.daemon.ports
    assert port.kinds()[-2:] == ["Handoff", "Goodbye"]
    assert port.is_closed
    trainer.link.close()  # may be repeated


def test_close_takes_the_last_words_of_an_engine_in_this_process(start) -> None:
    def finish_at_the_end(port: FakePort, message: say.FromTrainer) -> None:
        welcome(port, message)
        if isinstance(message, say.Goodbye):
            port.answer(written(1), finished(1))

    trainer = start(finish_at_the_end)
    handle = trainer.save(1)
    trainer.link.close()
    handle.result(0)
    assert trainer.releases == [1]


def test_d5_after_close_a_handle_without_its_word_is_unknown_and_waits_no_more(start) -> None:
    trainer = start(welcome)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    trainer.link.close()
    assert isinstance(error_of(handle), SaveUnknownError)
    assert trainer.releases == [1]


def test_an_error_inside_of_the_thread_fails_the_saves_instead_of_hanging(start, caplog) -> None:
    def bug(port: FakePort, message: say.FromTrainer) -> None:
        if isinstance(message, say.Hello):
            raise ZeroDivisionError("a bug")

    with caplog.at_level(logging.ERROR):
        trainer = start(bug)
        assert "a bug" in str(error_of(trainer.save(1)))
    assert trainer.releases == [1]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("IncompleteError", CheckpointError),
        ("SaveSkippedError", SaveFailedError),
        ("NoSuchError", SaveFailedError),
        ("os", SaveFailedError),
    ],
)
def test_s1_a_kind_of_error_is_looked_up_among_our_own(start, kind, expected) -> None:
    trainer = start(welcome)
    handle = trainer.save(1)
    trainer.daemon.until_heard(say.Handoff)
    trainer.daemon.ports[0].answer(finished(1, 1, "failed", kind, "why"))
    assert isinstance(error_of(handle), expected)


def test_a_new_daemon_is_told_what_was_committed_since_the_snapshot(start) -> None:
    def first(port: FakePort, message: say.FromTrainer) -> None:
        welcome(port, message)
        if isinstance(message, say.Handoff) and message.step == 10:
            port.answer(written(10), finished(10))

    trainer = start(first, welcome)
    early, late = trainer.save(10), trainer.save(20)
    assert early.wait_committed(WAIT_S)
    trainer.daemon.ports[0].break_off()
    (again,) = trainer.daemon.until_heard(say.Handoff, port=1)
    assert (again.step, again.previous) == (20, str(StepId(attempt=3, step=10)))
    assert not late.is_done
