"""Trainers that die, one after the other, each at another point of its life.

usage: python -m tests.fakes.crashers SOCKET ROOT FIRST COUNT

The processes are real ones, forked and killed; they speak the protocol without torch. Each is an
attempt of its own, numbered from FIRST on.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NamedTuple

from ckptd.shm.arena import Arena
from ckptd.wire import messages as say
from ckptd.wire.address import connect
from ckptd.wire.channel import Channel
from tests.fakes.trainers import FakeTrainer

SHAPES = {"w": (16, 1024)}
MOST_RANKS = 2  # of one attempt
COMMIT_TIMEOUT_S = 2.0  # who waits for somebody that never comes


class Life(NamedTuple):
    """One life. `steps` are its own, by attempt."""

    socket: str
    root: str
    attempt: int

    def trainer(self, rank: int = 0, world_size: int = 1) -> FakeTrainer:
        return FakeTrainer(
            self.socket, self.root, rank=rank, world_size=world_size, attempt=self.attempt,
            shapes=SHAPES, commit_timeout_s=COMMIT_TIMEOUT_S,
        )  # fmt: skip

    @property
    def step(self) -> int:
        return self.attempt * 10

    # --- lives, up to where they end -------------------------------------------------------------

    def knocks(self) -> None:
        connect(self.socket, deadline_s=10.0)

    def greets(self) -> None:
        self.trainer().connect()

    def hands_off(self) -> None:
        self.trainer().connect().save(self.step, 1)

    def knows_that_it_is_taken(self) -> None:
        trainer = self.trainer().connect()
        trainer.save(self.step, 1)
        trainer.wait_for(say.Taken)

    def knows_that_it_is_committed(self) -> None:
        trainer = self.trainer().connect()
        trainer.save(self.step, 1)
        assert trainer.outcome(self.step).state == "committed"
        trainer.fill(self.step + 1, 2, slot=1)  # and in the middle of the next one

    def hands_off_as_two(self) -> None:
        both = [self.trainer(rank, 2).connect() for rank in range(2)]
        for trainer in both:
            trainer.save(self.step, 1)
            trainer.wait_for(say.Taken)

    def hands_off_alone(self) -> None:
        """Of two, the other of which never comes: no checkpoint makes what it left useless."""
        self.trainer(0, 2).connect().save(self.step, 1)

    def is_half_way_as_two(self) -> None:
        both = [self.trainer(rank, 2).connect() for rank in range(2)]
        both[0].save(self.step, 1)
        both[0].wait_for(say.Taken)

    def borrows(self) -> None:
        trainer = self.trainer()
        greet(trainer)
        trainer.say(say.Seek())
        for row in trainer.wait_for(say.Held).snapshots:
            trainer.say(say.Borrow(row.arena, row.slot, row.generation))
            lent = trainer.wait_for(say.Lent)
            if lent.handoff is not None:
                Arena.adopt(trainer._channel.take_fd(), lent.slots, lent.slot_bytes)

    def claims(self) -> None:
        trainer = self.trainer()
        greet(trainer)
        take_over(trainer)

    def inherits(self) -> None:
        trainer = self.trainer()
        greet(trainer)
        take_over(trainer)
        announce(trainer)
        trainer.save(self.step, 1)

    def inherits_and_commits(self) -> None:
        trainer = self.trainer()
        greet(trainer)
        take_over(trainer)
        announce(trainer)
        trainer.save(self.step, 1)
        assert trainer.outcome(self.step).state == "committed"

    def comes_twice(self) -> None:
        trainer = self.trainer().connect()
        trainer.save(self.step, 1)
        trainer.connect().offer(self.step)
        trainer.wait_for(say.Taken)

    def says_goodbye_for_now(self) -> None:
        trainer = self.trainer().connect()
        trainer.save(self.step, 1)
        trainer.say(say.Goodbye(keeps=True))


LIVES = [
    Life.knocks, Life.greets, Life.hands_off, Life.knows_that_it_is_taken, Life.inherits,
    Life.knows_that_it_is_committed, Life.claims, Life.hands_off_as_two, Life.borrows,
    Life.is_half_way_as_two, Life.inherits_and_commits, Life.comes_twice,
    Life.says_goodbye_for_now,
]  # fmt: skip
LAST = 4  # of a run, which leave what would pile up


def greet(trainer: FakeTrainer) -> None:
    """Open a conversation, without memory of its own."""
    trainer._channel = Channel(connect(trainer.socket, deadline_s=10.0), say.FromDaemon)
    trainer._channel.accept_large_frames()
    trainer.say(trainer.hello)
    trainer.wait_for(say.Welcome)


def take_over(trainer: FakeTrainer) -> None:
    """Claim what a dead one left, if there is anything."""
    assert trainer._channel is not None
    trainer.say(say.Claim(trainer.arena.slots, trainer.arena.slot_bytes))
    ceded = trainer.wait_for(say.Ceded)
    if ceded.slots:
        trainer.arena.close()
        fd = trainer._channel.take_fd()
        trainer.arena = Arena.adopt(fd, ceded.slots, ceded.slot_bytes, is_writable=True)


def announce(trainer: FakeTrainer) -> None:
    """Show the daemon the memory, its own or that of another."""
    arena = trainer.arena
    trainer.say(say.Arena(1, arena.slots, arena.slot_bytes), [arena.fileno()])
    trainer.say(trainer.recipe)


def live_and_die(life: Life, *, is_last: bool) -> None:
    """Be one of them; this returns only where the life itself failed."""
    live = Life.hands_off_alone if is_last else LIVES[life.attempt % len(LIVES)]
    live(life)
    os.kill(os.getpid(), signal.SIGKILL)


def main(socket: str, root: str, first: int, count: int) -> int:
    """Let them live one after the other; tell of the first that did not die as it should."""
    Life(socket, root, first).trainer().close()  # imports what each of them would import
    end = first + count
    for attempt in range(first, end):
        pid = os.fork()
        if pid == 0:
            try:
                live_and_die(Life(socket, root, attempt), is_last=attempt >= end - LAST)
            finally:
                sys.stderr.flush()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != -signal.SIGKILL:
            print(f"attempt {attempt} ended with {code}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
