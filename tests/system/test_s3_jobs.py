"""Real trainers and daemons with a root on a real S3 server, and what happens when it fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptd.model import keys
from ckptd.store.remote import RemoteStore
from ckptd.wire.address import socket_path
from tests.fakes.fault_proxy import FaultProxy, Silent, Slow, Status
from tests.fakes.jobs import Place, Rank, Ranks, all_do, all_fail, wait_until
from tests.fakes.s3_server import S3Server
from tests.fakes.trainers import assert_all_whole

pytestmark = pytest.mark.system

Options = dict[str, Any]


@pytest.fixture
def root(bucket: str) -> str:
    return f"s3://{bucket}/run"


def options_of(server: S3Server | FaultProxy, **more: object) -> Options:
    """Return storage options whose secret must never be seen anywhere."""
    aws = os.environ
    return {
        "endpoint_url": server.url, "key": aws.get("AWS_ACCESS_KEY_ID", "CANARYKEY"),
        "secret": aws.get("AWS_SECRET_ACCESS_KEY", "CANARYSECRET"), **more,
    }  # fmt: skip


def start(job: list[Rank], root: str, options: Options, **settings: object) -> list[Rank]:
    all_do(job, "build", is_ddp=len(job) > 1)
    all_do(job, "open", root=root, storage_options=options, **settings)
    all_do(job, "train")
    return job


def assert_whole(store: RemoteStore, steps: list[int], moto: S3Server) -> None:
    """Check that what is listed is whole, and that all else is what a prune would know."""
    assert assert_all_whole(store) == steps
    place = store.url.removeprefix("s3://")
    assert moto.uploads(place) == []
    known = (keys.parse_chunk, keys.parse_rank, keys.parse_attempt, keys.parse_checkpoint)
    for key in moto.objects(place):
        assert key == keys.ROOT_RECORD or any(parse(key) for parse in known), key


def test_a_job_saves_to_s3_and_another_number_of_ranks_resumes(
    place: Place, ranks: Ranks, moto: S3Server, root: str, open_s3: Callable[..., RemoteStore]
) -> None:
    options = options_of(moto)
    job = start(place.job(ranks, 2, CKPTD_LINGER_S="0.1"), root, options)
    for step in (1, 2):
        all_do(job, "save", step=step)
        assert all_do(job, "result", step=step) == [step, step]
    digest = job[0].do("digest")
    all_do(job, "close")
    assert_whole(open_s3(), [1, 2], moto)
    (alone,) = place.job(ranks, 1, CKPTD_LINGER_S="0.1")
    alone.do("build", seed=2)
    alone.do("open", root=root, storage_options=options)
    assert alone.do("resume") == {"step": 2, "attempt": 1}
    assert alone.do("digest") == digest
    alone.do("close")


@pytest.mark.parametrize("point", ["chunk.put", "rank.put", "commit.put", "commit.done"])
def test_d6_k2_a_daemon_killed_on_the_way_to_s3_loses_nothing(
    place: Place, ranks: Ranks, moto: S3Server, root: str, open_s3: Callable[..., RemoteStore],
    point: str,
) -> None:  # fmt: skip
    options = options_of(moto)
    path = socket_path(root, options, place.env())
    daemon = place.daemon(path, failpoints=f"{point}=kill@2")
    (rank,) = start(place.job(ranks, 1, CKPTD_LINGER_S="0.1"), root, options)
    rank.do("save", step=1)
    rank.do("save", step=2)
    assert daemon.wait() == -signal.SIGKILL
    assert rank.do("result", step=1) == 1
    assert rank.do("result", step=2) == 2, "another daemon was started, and told of it again"
    rank.do("close")
    assert_whole(open_s3(), [1, 2], moto)


def test_d1_a_daemon_killed_in_the_middle_of_an_upload_leaves_no_part_of_it(
    place: Place, ranks: Ranks, moto: S3Server, root: str, proxy: FaultProxy,
    open_s3: Callable[..., RemoteStore],
) -> None:  # fmt: skip
    options = options_of(proxy)
    path = socket_path(root, options, place.env())
    daemon = place.daemon(path)
    (rank,) = start(place.job(ranks, 1), root, options)
    upload = proxy.fail(Slow(1.0, reads=True), method="PUT", key="/chunks/", times=None)
    rank.do("save", step=1)
    proxy.wait_hits(upload)
    rank.kill()
    daemon.kill()
    wait_until(lambda: not place.pids(), "all are dead")
    proxy.clear()
    store = open_s3()
    assert_whole(store, [], moto)
    assert list(store.list("ranks/")) == []
    assert list(store.list("chunks/")) == []
    assert place.daemon(path).end() == 0  # which takes the socket away


def test_s8_a_writer_needs_no_permission_to_delete(
    place: Place, ranks: Ranks, moto: S3Server, root: str, proxy: FaultProxy,
    open_s3: Callable[..., RemoteStore],
) -> None:  # fmt: skip
    proxy.fail(Status(403, "AccessDenied"), method="DELETE", times=None)
    proxy.fail(Status(403, "AccessDenied"), method="POST", query="delete", times=None)
    (rank,) = start(place.job(ranks, 1, CKPTD_LINGER_S="0.1"), root, options_of(proxy))
    rank.do("save", step=1)
    rank.do("result", step=1)
    rank.do("close")
    (again,) = start(place.job(ranks, 1, CKPTD_LINGER_S="0.1"), root, options_of(proxy))
    assert again.do("resume") == {"step": 1, "attempt": 1}
    again.do("close")
    assert {asked.method for asked in proxy.requests} == {"GET", "PUT"}
    assert_whole(open_s3(), [1], moto)


def test_n16_without_conditions_only_the_daemon_of_rank_0_ends_steps(
    place: Place, ranks: Ranks, moto: S3Server, root: str, open_s3: Callable[..., RemoteStore]
) -> None:
    with FaultProxy(moto.url) as first, FaultProxy(moto.url) as second:
        job = place.job(ranks, 2)
        daemons = [place.daemon(name) for name in "ab"]
        for proxy, rank, name in zip((first, second), job, "ab", strict=True):
            proxy.strip_headers.add("if-none-match")
            rank.do("setenv", CKPTD_SOCKET=place.socket(name))
        all_do(job, "build", is_ddp=True)
        for proxy, rank in zip((first, second), job, strict=True):
            rank.order("open", root=root, storage_options=options_of(proxy), commit_timeout_s=4.0)
        for rank in job:
            rank.answer()
        all_do(job, "save", step=1)
        assert all_do(job, "result", step=1) == [1, 1]
        job[1].do("put", odd="socket")
        job[0].do("save", step=2)
        job[1].fail("save", step=2)
        assert job[0].fail("result", step=2)["error"] == "SaveFailedError"
        all_do(job, "close")
        assert [daemon.end() for daemon in daemons] == [0, 0]
        ended = [
            [r.path for r in proxy.requests if r.method == "PUT" and "/checkpoints/" in r.path]
            for proxy in (first, second)
        ]
    assert len(ended[0]) == 2
    assert ended[1] == []
    assert "no conditional writes" in "".join(p.read_text() for p in logs(place))
    assert_whole(open_s3(), [1], moto)


def test_d11_r1_a_store_that_refuses_fails_the_save_and_the_resume_and_nothing_else(
    place: Place, ranks: Ranks, moto: S3Server, root: str, proxy: FaultProxy,
    open_s3: Callable[..., RemoteStore],
) -> None:  # fmt: skip
    job = start(place.job(ranks, 2, CKPTD_LINGER_S="0.1"), root, options_of(proxy, attempts=2))
    all_do(job, "save", step=1)
    all_do(job, "result", step=1)
    proxy.fail(Status(403, "AccessDenied"), method="PUT", key="/chunks/", times=None)
    all_do(job, "save", step=2)
    for said in all_fail(job, "result", step=2):
        assert said["error"] == "SaveFailedError"
        assert "not allowed" in said["text"]
        assert "CANARY" not in said["text"]
    proxy.clear()
    all_do(job, "close")
    again = start(place.job(ranks, 2, CKPTD_LINGER_S="0.1"), root, options_of(proxy, attempts=2))
    proxy.fail(Status(503, "SlowDown"), method="GET", key="/ranks/", times=None)
    for said in all_fail(again, "resume"):
        assert said["error"] == "StoreUnavailableError"
    proxy.clear()
    assert all_do(again, "resume") == [{"step": 1, "attempt": 1}] * 2
    job = again
    all_do(job, "save", step=3)
    assert all_do(job, "result", step=3) == [3, 3]
    all_do(job, "close")
    assert_whole(open_s3(), [1, 3], moto)


def test_p1_l4_a_silent_store_does_not_hold_training_up(
    place: Place, ranks: Ranks, moto: S3Server, root: str, proxy: FaultProxy,
    open_s3: Callable[..., RemoteStore],
) -> None:  # fmt: skip
    options = options_of(proxy, request_timeout_s=1, attempts=2)
    (rank,) = start(place.job(ranks, 1, CKPTD_LINGER_S="0.1"), root, options)
    rank.do("save", step=1)
    rank.do("result", step=1)
    silence = proxy.fail(Silent(), method="PUT", key="/chunks/", times=None)
    rank.do("save", step=2)
    proxy.wait_hits(silence)
    rank.do("train")  # answers while the upload hangs
    assert rank.fail("result", step=2)["error"] == "SaveFailedError"
    proxy.clear()
    rank.do("save", step=3)
    assert rank.do("result", step=3) == 3
    rank.do("close")
    assert_whole(open_s3(), [1, 3], moto)


def test_s7_no_secret_is_seen_in_any_log_record_argument_or_error(
    place: Place, ranks: Ranks, moto: S3Server, root: str, proxy: FaultProxy
) -> None:
    options = options_of(proxy, token="CANARYTOKEN", attempts=1)
    job = place.job(ranks, 1, CKPTD_LINGER_S="0.1", CKPTD_LOG_LEVEL="debug")
    (rank,) = start(job, root, options)
    rank.do("save", step=1)
    rank.do("result", step=1)
    arguments = [Path(f"/proc/{pid}/{of}").read_text(errors="replace")
                 for pid in place.pids() for of in ("cmdline", "environ")]  # fmt: skip
    proxy.fail(Status(400, "ExpiredToken"), method="PUT", key="/chunks/", times=None)
    rank.do("save", step=2)
    told = rank.fail("result", step=2)["text"]
    rank.do("close")
    seen = [told, *arguments, *(p.read_text(errors="replace") for p in logs(place))]
    seen += [raw.decode(errors="replace") for raw in moto.objects(root[5:]).values()]
    assert "credentials" in told
    assert not [text for text in seen if "CANARYSECRET" in text or "CANARYTOKEN" in text]


def logs(place: Place) -> list[Path]:
    """Return the logs of all processes of a place."""
    return [path for path in place.base.rglob("*.log") if path.is_file()]
