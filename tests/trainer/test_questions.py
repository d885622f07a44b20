"""What a trainer asks a daemon: each question gets its own answer, and nobody waits for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from ckptd.trainer.questions import Answer, Questions
from ckptd.wire import messages as say
from tests.fakes.ports import WAIT_S

WISH = say.Borrow(1, 0, 1)
LENT = say.Lent(1, 1, 8192)
CLAIM = say.Claim(1, 8192)
CEDED = say.Ceded(1, 8192)


class Asking:
    """Somebody who asks on a thread."""

    def __init__(
        self, questions: Questions, message: say.FromTrainer, timeout_s: float = WAIT_S
    ) -> None:
        self.answer: Answer | None = None
        self._thread = threading.Thread(target=self._ask, args=(questions, message, timeout_s))
        self._thread.start()

    def _ask(self, questions: Questions, message: say.FromTrainer, timeout_s: float) -> None:
        self.answer = questions.ask(message, timeout_s)

    def result(self) -> Answer | None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.answer


class Talk:
    """Questions, and the thread that would talk to a daemon: this one."""

    def __init__(self) -> None:
        self.questions = Questions(self._wake)
        self._woken = threading.Semaphore(0)
        self.asking: list[Asking] = []
        self.fds: list[int] = []

    def _wake(self) -> None:
        self._woken.release()

    def ask(self, *messages: say.FromTrainer, timeout_s: float = WAIT_S) -> list[Asking]:
        """Ask, one after the other."""
        begun = []
        for message in messages:
            begun.append(Asking(self.questions, message, timeout_s))
            assert self._woken.acquire(timeout=WAIT_S)
        self.asking += begun
        return begun

    def sent(self) -> list[say.FromTrainer]:
        """Send what has to be sent."""
        return list(iter(self.questions.next, None))

    def expire(self) -> None:
        """Let the deadline of the oldest question come."""
        with self.questions._changed:
            self.questions._open[0].is_over = True
            self.questions._changed.notify_all()

    def hear(self, message: say.FromDaemon, fd: int | None = None) -> None:
        """Hear a message, with a descriptor beside it."""
        self.fds = [] if fd is None else [fd]
        self.questions.answered(message, self.fds.pop)
        assert self.fds == [], "it was taken"


@pytest.fixture
def talk() -> Iterator[Talk]:
    talk = Talk()
    yield talk
    talk.questions.end()
    for asking in talk.asking:
        asking.result()


def new_fd() -> int:
    return os.memfd_create("lent")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (say.Settle(), say.Settled()),
        (say.Seek(), say.Held("daemon", ())),
        (say.Borrow(1, 2, 3), say.Lent(1)),
        (say.Claim(1, 8192), say.Ceded()),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_question_gets_the_answer_of_its_kind(
    talk: Talk, question: say.FromTrainer, answer: say.FromDaemon
) -> None:
    (asking,) = talk.ask(question)
    assert talk.questions.is_open
    assert talk.sent() == [question]
    assert talk.sent() == [], "once"
    for other in (say.Settled(), say.Held("x", ()), say.Lent(9), say.Ceded(), say.Stop("x")):
        if type(other) is not type(answer):
            talk.hear(other)
    assert talk.questions.is_open
    talk.hear(answer)
    assert asking.result() == Answer(answer)
    assert not talk.questions.is_open


def test_those_of_a_kind_are_answered_in_the_order_in_which_they_were_asked(talk: Talk) -> None:
    first, claim, second = talk.ask(say.Borrow(1, 0, 1), say.Claim(1, 8192), say.Borrow(2, 0, 1))
    assert [getattr(message, "arena", None) for message in talk.sent()] == [1, None, 2]
    talk.hear(say.Lent(1))
    talk.hear(say.Lent(2))
    assert first.result() == Answer(say.Lent(1))
    assert second.result() == Answer(say.Lent(2))
    talk.hear(say.Ceded())
    assert claim.result() == Answer(say.Ceded())


@pytest.mark.parametrize(("question", "answer"), [(WISH, LENT), (CLAIM, CEDED)])
def test_a_descriptor_goes_to_whoever_asked(
    talk: Talk, question: say.FromTrainer, answer: say.FromDaemon
) -> None:
    (asking,) = talk.ask(question)
    talk.sent()
    fd = new_fd()
    talk.hear(answer, fd)
    assert asking.result() == Answer(answer, fd)
    assert is_open(fd)
    os.close(fd)


def test_p2_a_descriptor_that_nobody_waits_for_is_closed(talk: Talk) -> None:
    fd = new_fd()
    talk.hear(LENT, fd)  # nobody ever asked
    assert not is_open(fd)
    (late,) = talk.ask(CLAIM)
    talk.sent()
    talk.expire()
    assert late.result() is None
    fd = new_fd()
    talk.hear(CEDED, fd)
    assert not is_open(fd)


def test_an_answer_that_is_too_late_is_not_taken_for_the_next_one(talk: Talk) -> None:
    late, next_one = talk.ask(say.Borrow(1, 0, 1), say.Borrow(2, 0, 1))
    talk.sent()
    talk.expire()
    assert late.result() is None
    talk.hear(say.Lent(1))
    talk.hear(say.Lent(2))
    assert next_one.result() == Answer(say.Lent(2))


def test_what_was_not_sent_in_time_is_not_sent_any_more(talk: Talk) -> None:
    (late,) = talk.ask(say.Borrow(1, 0, 1), timeout_s=0.01)
    assert late.result() is None
    assert not talk.questions.is_open
    assert talk.sent() == []


def test_an_answer_to_what_was_not_sent_yet_is_none(talk: Talk) -> None:
    (asking,) = talk.ask(say.Seek())
    talk.hear(say.Held("an earlier question's", ()))
    assert talk.sent() == [say.Seek()]
    talk.hear(say.Held("mine", ()))
    assert asking.result() == Answer(say.Held("mine", ()))


def test_d6_what_a_lost_conversation_leaves_unanswered_is_asked_again(talk: Talk) -> None:
    first, second = talk.ask(say.Settle(), say.Borrow(1, 0, 1))
    (late,) = talk.ask(say.Seek(), timeout_s=0.01)
    late.result()
    talk.sent()
    talk.hear(say.Settled())
    assert first.result() is not None
    talk.questions.lost()
    assert talk.questions.is_open
    assert talk.sent() == [say.Borrow(1, 0, 1)], "in time, and not what has its answer"
    talk.questions.lost()
    assert talk.sent() == [say.Borrow(1, 0, 1)]
    talk.hear(say.Lent(1))
    assert second.result() == Answer(say.Lent(1))


def test_what_nobody_waits_for_any_more_is_not_asked_again(talk: Talk) -> None:
    (late,) = talk.ask(say.Seek())
    talk.sent()
    talk.expire()
    assert late.result() is None
    assert not talk.questions.is_open
    talk.questions.lost()
    assert talk.sent() == []
    assert not talk.questions._open


def test_p1_at_the_end_everybody_is_let_go_and_later_questions_get_no_answer(talk: Talk) -> None:
    sent, waiting = talk.ask(say.Settle(), say.Seek())
    talk.questions.next()
    talk.questions.end()
    assert sent.result() is None
    assert waiting.result() is None
    assert talk.questions.ask(say.Settle(), WAIT_S) is None
    assert not talk.questions.is_open
    talk.questions.end()
    fd = new_fd()
    talk.hear(LENT, fd)
    assert not is_open(fd)


def test_p1_a_question_without_an_answer_ends_at_its_deadline(talk: Talk) -> None:
    assert talk.questions.ask(say.Settle(), 0.01) is None
    assert talk.questions.ask(say.Settle(), 0.0) is None
