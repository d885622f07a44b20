"""Saves that come faster than the store takes them, with real ranks and a real daemon."""

from __future__ import annotations

import signal

import pytest

from ckptd.wire.address import socket_path
from tests.fakes.jobs import Place, Ranks, all_do, all_fail, wait_until
from tests.fakes.trainers import assert_all_whole

pytestmark = pytest.mark.system


def test_d11_saves_that_a_stopped_daemon_has_no_room_for_are_left_out_by_all_and_counted(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon(socket_path(place.root, {}, place.env()))
    job = place.job(ranks, 2, CKPTD_LINGER_S="0.1")
    all_do(job, "build", is_ddp=True)
    # So long that a rank which waited, for a slot or for another rank, would end the test.
    all_do(job, "open", root=place.root, on_busy="skip", slots=1, busy_timeout_s=1000.0)
    daemon.send(signal.SIGSTOP)
    for step in (1, 2, 3):
        all_do(job, "train")
        all_do(job, "save", step=step)
    assert {said["error"] for said in all_fail(job, "result", step=3)} == {"SaveSkippedError"}
    daemon.send(signal.SIGCONT)
    assert all_do(job, "result", step=1) == [1, 1]

    def status() -> str:
        return place.run("status").stdout

    wait_until(lambda: "1 committed, 0 failed, 2 skipped" in status(), "all is counted, once")
    assert ": rank 0 skipped: no slot was free" in status()
    all_do(job, "save", step=4)
    assert all_do(job, "result", step=4) == [4, 4]
    all_do(job, "close")
    store = place.store()
    assert assert_all_whole(store) == [1, 4]
    store.close()
