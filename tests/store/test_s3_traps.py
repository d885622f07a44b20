"""What the libraries below do that we rely on, or keep away from: a new release may change it.

A test that fails here is no defect of its own. It says that something in `ckptd/store/s3.py` has
lost its reason or its footing.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import botocore.session
import pytest
import s3fs
from aiohttp.payload import PAYLOAD_REGISTRY, BytesPayload
from botocore.awsrequest import AWSRequest
from botocore.exceptions import ClientError, ConnectionClosedError
from botocore.handlers import _should_handle_200_error, add_expect_header
from botocore.utils import determine_content_length
from s3fs.errors import translate_boto_error

from ckptd.store.bodies import Body
from ckptd.store.loop import LoopThread
from tests.fakes.fault_proxy import (
    DeleteErrors,
    FaultProxy,
    Request,
    ResetAfter,
    Short,
    Status,
)
from tests.fakes.s3_server import MotoServer, S3Server

WAIT_S = 20.0
ONE_TRY = {"mode": "standard", "total_max_attempts": 1}


class Below:
    """s3fs as `ckptd.store.s3` builds it, on a loop of its own, through a proxy."""

    def __init__(self, loop: LoopThread, proxy: FaultProxy, bucket: str) -> None:
        self.loop = loop
        self.proxy = proxy
        self.bucket = bucket
        self.clients: list[Any] = []
        self.files = self.made(config_kwargs={"retries": ONE_TRY})
        self.client = self.run(self.files.set_session(refresh=True))
        self.clients.append(self.client)

    def made(self, **options: object) -> Any:
        return s3fs.S3FileSystem(
            key="k", secret="s", endpoint_url=self.proxy.url, asynchronous=True,
            loop=self.loop.loop, skip_instance_cache=True, use_listings_cache=False, **options,
        )  # fmt: skip

    def run(self, coroutine: Any, timeout_s: float = WAIT_S) -> Any:
        return self.loop.run(coroutine, timeout_s)

    def put(self, key: str, body: object, **kwargs: object) -> Any:
        return self.run(self.client.put_object(Bucket=self.bucket, Key=key, Body=body, **kwargs))

    def asked(self, act: Callable[[], object], *errors: type[Exception]) -> list[Request]:
        """Return what was asked during a call that may fail so."""
        begin = len(self.proxy.requests)
        with contextlib.suppress(*errors):
            act()
        self.proxy.clear()
        return self.proxy.requests[begin:]


@pytest.fixture(scope="module")
def shared(moto: S3Server) -> Iterator[Below]:
    if not isinstance(moto, MotoServer):
        pytest.skip("faults are made before moto only")
    loop = LoopThread("traps")
    with FaultProxy(moto.url) as proxy:
        below = Below(loop, proxy, moto.make_bucket("ckptd-traps"))
        yield below
        for client in below.clients:
            below.run(client.close())
        loop.close()


@pytest.fixture
def below(shared: Below) -> Iterator[Below]:
    yield shared
    shared.proxy.clear()


# --- what we rely on ---------------------------------------------------------------------------


def test_x1_options_of_a_call_are_filtered_by_what_it_takes(below: Below) -> None:
    """`_call` hands all options to every operation and lets s3fs leave out what one lacks."""
    below.files.s3_additional_kwargs = {"ServerSideEncryption": "AES256", "MaxKeys": 2}
    try:
        args = below.files._get_s3_method_kwargs(below.client.put_object, Bucket="b", Key="k")
        assert args == {"Bucket": "b", "Key": "k", "ServerSideEncryption": "AES256"}
        args = below.files._get_s3_method_kwargs(below.client.list_objects_v2, Bucket="b")
        assert args == {"Bucket": "b", "MaxKeys": 2}
    finally:
        below.files.s3_additional_kwargs = {}


def test_x1_a_session_that_is_refreshed_leaves_the_one_before_open(below: Below) -> None:
    """`renew` keeps the former client for requests under way, and closes it itself."""
    again = below.run(below.files.set_session(refresh=True))
    below.clients.append(again)
    assert again is not below.client
    assert below.run(below.files.get_s3(below.bucket)) is again
    assert below.run(below.files.set_session()) is again
    assert below.put("still", b"x")["ETag"], "the former client still works"


def test_x1_one_request_is_sent_for_one_call(below: Below) -> None:
    """`total_max_attempts` 1 leaves all tries to us; `max_attempts` 1 would send two."""
    below.proxy.fail(Status(503, "SlowDown"), times=None)
    asked = below.asked(
        lambda: below.run(below.client.get_object(Bucket=below.bucket, Key="x")), ClientError
    )
    assert len(asked) == 1
    kept = below.client.meta.config.retries
    assert (kept["mode"], kept["total_max_attempts"]) == ("standard", 1)


def test_x2_the_header_that_expects_is_added_by_a_handler_that_can_be_taken_away(
    below: Below,
) -> None:
    """With `Expect: 100-continue`, a server that says nothing would hold a PUT for ever."""
    events = below.client.meta.events
    (asked,) = below.asked(lambda: below.put("k", io.BytesIO(b"x")))
    assert asked.headers["expect"] == "100-continue"
    events.unregister("before-call.s3", add_expect_header)
    try:
        (asked,) = below.asked(lambda: below.put("k", io.BytesIO(b"x")))
        assert "expect" not in asked.headers
    finally:
        events.register("before-call.s3", add_expect_header)


def test_x2_a_200_with_an_error_is_an_error_but_of_what_streams(below: Below) -> None:
    """botocore looks into the answers to PUT, LIST and DELETE; to GET we must look ourselves."""
    model = botocore.session.Session().get_service_model("s3")
    names = ("PutObject", "ListObjectsV2", "DeleteObject", "GetObject")
    found = [
        bool(_should_handle_200_error(model.operation_model(name), {"body": b"<Error/>"}))
        for name in names
    ]
    assert found == [True, True, True, False]


# --- the body of a PUT -------------------------------------------------------------------------


class Watched(Body):
    """Notes how much was read at once."""

    def __init__(self, data: bytes) -> None:
        super().__init__(memoryview(data))
        self.reads: list[int] = []
        self.slices = 0

    def read(self, count: int = -1) -> bytes:
        data = super().read(count)
        self.reads.append(len(data))
        return data

    async def __aiter__(self) -> Any:
        async for part in super().__aiter__():
            self.slices += 1
            yield part


@pytest.mark.parametrize("count", [0, 1, 5 << 20])
def test_x2_our_body_is_iterated_over_and_never_read_whole(
    below: Below, moto: S3Server, count: int
) -> None:
    """botocore sees a file, aiohttp an asynchronous iterable; a chunk is not copied whole."""
    data = bytes(range(256)) * (count // 256) + bytes(count % 256)
    body = Watched(data)
    (asked,) = below.asked(
        lambda: below.put("body", body, ChecksumCRC32=crc32(data), IfNoneMatch="*")
    )
    assert asked.headers["content-length"] == str(count)
    assert "transfer-encoding" not in asked.headers
    assert sum(body.reads) in (0, count), "at most a hash of it, in pieces"
    assert all(size <= 1 << 20 for size in body.reads)
    assert body.slices == -(-count // (256 << 10))
    answer = moto.client.get_object(Bucket=below.bucket, Key="body")
    with answer["Body"] as stream:
        assert stream.read() == data
    moto.client.delete_object(Bucket=below.bucket, Key="body")


def crc32(data: bytes) -> str:
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def test_x2_our_body_is_one_that_botocore_and_aiohttp_take() -> None:
    """The duck's legs: length, seek and tell for one; an asynchronous iterator for the other."""
    body = Body(memoryview(b"abcdef"))
    assert determine_content_length(body) == 6
    request = AWSRequest("PUT", "http://h/b/k", data=body)
    assert request.prepare().body is body
    assert hasattr(body, "read")
    assert not isinstance(body, io.IOBase), "aiobotocore would wrap it"
    body.seek(2)
    assert (body.tell(), body.read(2), body.read(), body.read()) == (2, b"cd", b"ef", b"")
    body.seek(-1, 2)
    assert body.read() == b"f"
    body.seek(0)
    body.seek(1, 1)
    assert body.tell() == 1

    async def parts() -> list[bytes]:
        return [part async for part in body]

    assert asyncio.run(parts()) == asyncio.run(parts()) == [b"abcdef"]


def test_n3_aiohttp_sends_bytes_twice_and_never_our_body(below: Below) -> None:
    """A lost conditional PUT that is sent again unseen looks like somebody else's object."""

    def lose(body: object) -> list[Request]:
        below.run(below.client.list_objects_v2(Bucket=below.bucket))  # a used connection
        below.proxy.fail(ResetAfter(), method="PUT")
        return below.asked(lambda: below.put("twice", body, IfNoneMatch="*"), Exception)

    asked = lose(b"bytes")
    assert [(r.method, r.status) for r in asked] == [("PUT", None), ("PUT", 412)]
    below.run(below.client.delete_object(Bucket=below.bucket, Key="twice"))
    for data in (b"bytes", b""):
        asked = lose(Body(memoryview(data)))
        assert [(r.method, r.status) for r in asked] == [("PUT", None)]
        below.run(below.client.delete_object(Bucket=below.bucket, Key="twice"))

    async def payloads() -> tuple[Any, Any]:
        body = Body(memoryview(b"x"))
        return PAYLOAD_REGISTRY.get(b"x"), PAYLOAD_REGISTRY.get(body)

    one, other = asyncio.run(payloads())
    assert isinstance(one, BytesPayload)
    assert isinstance(other, aiohttp.payload.AsyncIterablePayload)


def test_n7_aiohttp_cannot_send_our_body_elsewhere(below: Below) -> None:
    """A 301 never reaches botocore then, which would look for the bucket's region."""
    below.proxy.fail(Status(301, "PermanentRedirect"), times=None)
    body = Body(memoryview(b"bytes"))
    with pytest.raises(ConnectionClosedError) as caught:
        below.put("elsewhere", body)
    assert "redirect" in str(caught.value.kwargs["error"])


def test_p7_aiohttp_sends_what_has_no_body_twice(below: Below) -> None:
    """On a connection that was used before, GET and DELETE have a second try below our own."""
    below.run(below.client.list_objects_v2(Bucket=below.bucket))
    below.proxy.fail(ResetAfter(), times=None)
    asked = below.asked(
        lambda: below.run(below.client.get_object(Bucket=below.bucket, Key="x")), Exception
    )
    assert [r.method for r in asked] == ["GET", "GET"]


# --- what we keep away from --------------------------------------------------------------------


def test_x1_removing_many_does_not_tell_what_was_not_removed(below: Below) -> None:
    """`delete` asks for one key at a time: errors of single keys get lost in `rm`."""
    below.put("kept", b"x")
    below.proxy.fail(DeleteErrors("AccessDenied"), query="delete")
    assert below.run(below.files._rm([f"{below.bucket}/kept"])) == []
    assert below.run(below.client.head_object(Bucket=below.bucket, Key="kept"))


def test_x1_a_lost_answer_of_a_conditional_write_looks_like_another_writer(below: Below) -> None:
    """`put_new` reads back after a second try, which s3fs does not."""
    below.proxy.fail(ResetAfter(), method="PUT")
    with pytest.raises(FileExistsError):
        below.run(below.files._pipe_file(f"{below.bucket}/ours", b"x", mode="create"))
    assert below.run(below.files._cat_file(f"{below.bucket}/ours")) == b"x"


def test_x1_errors_of_s3fs_do_not_tell_an_expired_token_from_a_missing_permission() -> None:
    """`codes` reads the answer itself."""

    def translated(status: int, code: str) -> Exception:
        response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return translate_boto_error(ClientError(response, "GetObject"))

    for status, code in (
        (400, "ExpiredToken"),
        (403, "RequestTimeTooSkewed"),
        (403, "AccessDenied"),
    ):
        assert type(translated(status, code)) is PermissionError
    assert type(translated(409, "ConditionalRequestConflict")) is OSError


def test_x1_making_folders_makes_the_bucket(below: Below, moto: S3Server) -> None:
    """Nothing of ours calls `mkdir` or `makedirs`: a bucket's name with a typo would come to be."""
    moto_buckets = {b["Name"] for b in moto.client.list_buckets()["Buckets"]}
    assert "ckptd-typo" not in moto_buckets
    below.run(below.files._makedirs("ckptd-typo/run", exist_ok=True))
    assert "ckptd-typo" in {b["Name"] for b in moto.client.list_buckets()["Buckets"]}
    moto.client.delete_bucket(Bucket="ckptd-typo")


def test_x1_a_short_answer_is_a_short_read(below: Below) -> None:
    """`read_into` counts what came; s3fs takes a short range for all there is."""
    below.put("short", bytes(1000))
    below.proxy.fail(Short(0.5, adapts_range=True), method="GET")
    found = below.run(below.files._cat_file(f"{below.bucket}/short", start=100, end=900))
    assert len(found) == 400


def test_x1_listings_are_kept_unless_that_is_turned_off(below: Below) -> None:
    """`use_listings_cache=False` keeps s3fs from telling of what was there before."""
    below.put("seen/one", b"x")
    keeping = s3fs.S3FileSystem(
        key="k", secret="s", endpoint_url=below.proxy.url, asynchronous=True,
        loop=below.loop.loop, skip_instance_cache=True,
    )  # fmt: skip
    below.clients.append(below.run(keeping.set_session()))

    def names(files: Any) -> int:
        return len(below.run(files._ls(f"{below.bucket}/seen", detail=False)))

    assert (names(keeping), names(below.files)) == (1, 1)
    below.put("seen/two", b"x")
    assert (names(keeping), names(below.files)) == (1, 2)


def test_x1_instances_are_shared_unless_that_is_turned_off(below: Below) -> None:
    """`skip_instance_cache` gives each store a file system of its own."""
    args = {"key": "k", "secret": "s", "endpoint_url": below.proxy.url, "asynchronous": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = s3fs.S3FileSystem(**args), s3fs.S3FileSystem(**args)
        assert one is other
        own = s3fs.S3FileSystem(**args, skip_instance_cache=True)
        assert own is not one
        s3fs.S3FileSystem.clear_instance_cache()
