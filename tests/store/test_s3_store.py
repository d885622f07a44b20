from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from ckptd.errors import (
    BucketNotFoundError,
    ConfigError,
    CredentialsError,
    ObjectExistsError,
    StoreError,
    StoreUnavailableError,
    StoreUnsupportedError,
)
from ckptd.store.anyfs import FsspecClient
from ckptd.store.base import Store
from ckptd.store.client import Limits
from ckptd.store.remote import RemoteStore
from ckptd.store.root import check_root, create_root
from tests.contracts.store_contract import CHUNK, COMMIT, RANK, StoreContract
from tests.fakes.fault_proxy import FaultProxy, Status
from tests.fakes.s3_calls import together
from tests.fakes.s3_server import S3Server

Open = Callable[..., RemoteStore]


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, open_s3: Open) -> Store:
        return open_s3()


class TestObstoreStore(StoreContract):
    @pytest.fixture
    def store(self, open_s3: Open, bucket: str) -> Store:
        return open_s3(url=f"s3://{bucket}/run?client=obstore")


class TestFsspecStore(StoreContract):
    """Any other file system of fsspec, as far as its own memory stands for it."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        path = f"test-{uuid.uuid4().hex}/run"
        client = FsspecClient("memory", path, {}, Limits())
        store = RemoteStore(f"memory://{path}", client, Limits(), has_conditional_put=False)
        yield store
        store.close()


class TestWeakS3Store(StoreContract):
    """S3 that takes no notice of conditions: what one process does still holds."""

    @pytest.fixture
    def store(self, open_s3: Open, proxy: FaultProxy) -> Store:
        proxy.strip_headers.add("if-none-match")
        store = open_s3(through=proxy)
        create_root(store)
        assert not store.has_conditional_put
        store.delete("ckptd.json")
        return store


# --- how it asks -------------------------------------------------------------------------------


def test_a_chunk_is_one_request_with_a_checksum_and_no_expectation(
    open_s3: Open, proxy: FaultProxy
) -> None:
    store = open_s3(through=proxy)
    store.put_new(CHUNK, bytes(9 << 20), is_deferred=True)
    (asked,) = proxy.requests
    assert asked.method == "PUT"
    assert asked.headers["if-none-match"] == "*"
    assert asked.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert "x-amz-checksum-crc32" in asked.headers
    assert "expect" not in asked.headers
    assert "transfer-encoding" not in asked.headers


def test_servers_that_know_no_checksums_are_sent_none(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(through=proxy, config_kwargs={"request_checksum_calculation": "when_required"})
    store.put_new(CHUNK, b"x" * 1000)
    (asked,) = proxy.requests
    assert not [name for name in asked.headers if "checksum" in name]
    assert len(asked.headers["x-amz-content-sha256"]) == 64, "signed, so that something is checked"


def test_options_reach_every_request_that_takes_them(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(
        through=proxy,
        s3_additional_kwargs={"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k"},
        requester_pays=True,
    )
    store.put(RANK, b"x")
    assert store.get(RANK, max_bytes=1) == b"x"
    assert [e.key for e in store.list("ranks/")] == [RANK]
    put, get, listing = proxy.requests
    assert put.headers["x-amz-server-side-encryption"] == "aws:kms"
    assert put.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "k"
    assert {r.headers.get("x-amz-request-payer") for r in (put, get, listing)} == {"requester"}


def test_connections_are_used_again(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(through=proxy)
    for number in range(20):
        store.put_new(f"attempts/{number:04d}", b"x")
        store.get(f"attempts/{number:04d}", max_bytes=1)
    assert len(proxy.requests) == 40
    assert proxy.connections == 1


def test_many_threads_share_one_store(open_s3: Open) -> None:
    store = open_s3()

    def work(number: int) -> None:
        key = f"chunks/00/{number}"
        store.put_new(key, bytes([number]) * 100_000)
        out = bytearray(50_000)
        store.read_into(key, 25_000, memoryview(out))
        assert out == bytes([number]) * 50_000

    assert together(*(partial(work, number) for number in range(24))) == [None] * 24


def test_n15_of_racing_committers_on_many_nodes_one_wins(open_s3: Open) -> None:
    stores = [open_s3() for _ in range(4)]
    for number in range(5):
        key = f"checkpoints/{number:012d}-0001"
        said = together(
            *(partial(stores[racer % 4].put_new, key, b"%d" % racer) for racer in range(16))
        )
        (won,) = [racer for racer in range(16) if said[racer] is None]
        assert [type(word) for word in said if word is not None] == [ObjectExistsError] * 15
        assert stores[0].get(key, max_bytes=2) == b"%d" % won


# --- what it lists -----------------------------------------------------------------------------


def test_n13_a_listing_of_several_pages_has_every_key(open_s3: Open, moto: S3Server) -> None:
    store = open_s3()
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    keys = [f"chunks/{n % 256:02x}/{n}" for n in range(1005)]
    for key in keys:
        moto.client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=b"x")
    moto.client.put_object(Bucket=bucket, Key=f"{prefix}/Not a key", Body=b"x")
    assert [e.key for e in store.list("chunks/")] == sorted(keys)
    assert [e.key for e in store.list("")] == sorted(keys)


def test_listings_are_never_kept(open_s3: Open, moto: S3Server) -> None:
    store = open_s3()
    assert list(store.list("")) == []
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    moto.client.put_object(Bucket=bucket, Key=f"{prefix}/{RANK}", Body=b"x")
    assert [e.key for e in store.list("")] == [RANK]
    assert store.get(RANK, max_bytes=1) == b"x"


def test_a_directory_buckets_listing_is_sorted(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(through=proxy)
    for number in range(5):
        store.put_new(f"attempts/{number:04d}", b"x")
    proxy.unsorted_listings = True
    assert [e.key for e in store.list("")] == [f"attempts/{n:04d}" for n in range(5)]


def test_a_root_may_be_a_whole_bucket(moto: S3Server, bucket: str, open_s3: Open) -> None:
    if "/" in bucket:
        pytest.skip("only a part of the bucket is ours")
    store = open_s3(url=f"s3://{bucket}")
    create_root(store)
    check_root(store)
    assert list(moto.objects(bucket)) == ["ckptd.json"]


# --- what it never does ------------------------------------------------------------------------


def test_n7_no_bucket_is_ever_created(open_s3: Open, moto: S3Server) -> None:
    name = f"no-such-{uuid.uuid4().hex}"
    store = open_s3(url=f"s3://{name}/run")
    for call in (
        lambda: create_root(store),
        lambda: check_root(store),
        lambda: store.put(RANK, b"x"),
        lambda: store.put_new(COMMIT, b"x"),
        lambda: store.get(COMMIT, max_bytes=1),
        lambda: store.read_into(COMMIT, 0, memoryview(bytearray(1))),
        lambda: store.read_into(COMMIT, 0, memoryview(bytearray(0))),
        lambda: list(store.list("")),
        store.now_s,
    ):
        with pytest.raises(BucketNotFoundError, match="check its name"):
            call()
    with pytest.raises(Exception, match=r"Not Found|NoSuchBucket"):
        moto.client.head_bucket(Bucket=name)


def test_n12_no_multipart_upload_is_ever_begun(open_s3: Open, moto: S3Server) -> None:
    store = open_s3()
    store.put_new(CHUNK, bytes(120 << 20))  # s3fs would cut it into parts
    assert moto.uploads(store.url.removeprefix("s3://")) == []
    assert [e.bytes for e in store.list("chunks/")] == [120 << 20]


# --- a writer's first look ----------------------------------------------------------------------


def test_n16_conditions_are_tried_out_on_the_record_of_the_root(
    open_s3: Open, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_s3(through=proxy)
    create_root(store)
    assert store.has_conditional_put
    assert caplog.text == ""
    proxy.strip_headers.add("if-none-match")
    create_root(store)
    assert not store.has_conditional_put
    assert "no conditional writes" in caplog.text
    with pytest.raises(ObjectExistsError):
        store.put_new("ckptd.json", b"other")
    check_root(store)


def test_n16_a_reader_does_not_try_to_write(open_s3: Open, proxy: FaultProxy) -> None:
    create_root(open_s3())
    check_root(open_s3(through=proxy))
    assert {r.method for r in proxy.requests} == {"GET"}


def test_a_versioned_bucket_is_recognised(
    moto: S3Server, open_s3: Open, caplog: pytest.LogCaptureFixture
) -> None:
    name = moto.make_bucket(f"ckptd-{uuid.uuid4().hex}", versioned=True)
    store = open_s3(url=f"s3://{name}/run")
    assert not store.keeps_deleted
    create_root(store)
    assert store.keeps_deleted
    assert "keeps what is deleted" in caplog.text
    store.put_new(RANK, b"x")
    assert caplog.text.count("keeps what is deleted") == 1


def test_something_else_in_the_bucket_is_no_root(open_s3: Open) -> None:
    store = open_s3()
    store.put_new(RANK, b"x")
    with pytest.raises(ConfigError, match="not a ckptd root"):
        create_root(store)


# --- who asks ----------------------------------------------------------------------------------


def test_missing_credentials_are_said_to_be_missing(
    open_s3: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    store = open_s3(key=None, secret=None)
    with pytest.raises(CredentialsError, match="AWS_PROFILE"):
        store.get(RANK, max_bytes=1)


def test_a_profile_that_is_not_there_is_a_setting(open_s3: Open) -> None:
    with pytest.raises((ConfigError, StoreError), match="nosuchprofile"):
        open_s3(profile="nosuchprofile").get(RANK, max_bytes=1)


# --- its end -----------------------------------------------------------------------------------


def test_closing_ends_its_thread_and_its_connections(open_s3: Open, proxy: FaultProxy) -> None:
    store = open_s3(through=proxy)
    store.put_new(RANK, b"x")
    before = len(os.listdir("/proc/self/fd"))
    store.close()
    assert [t.name for t in threading.enumerate() if t.name.startswith("ckptd-s3")] == []
    assert len(os.listdir("/proc/self/fd")) < before


def test_a_fork_while_a_store_is_open_harms_nobody(open_s3: Open) -> None:
    store = open_s3()
    store.put_new(RANK, b"x")
    child = os.fork()
    if not child:
        os._exit(0)  # as the worker of a data loader does
    assert os.waitpid(child, 0)[1] == 0
    assert store.get(RANK, max_bytes=1) == b"x"


@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_n16_a_service_that_knows_no_put_at_all_is_not_taken_for_a_weak_one(
    open_s3: Open, bucket: str, proxy: FaultProxy, client: str
) -> None:
    store = open_s3(url=f"s3://{bucket}/run?client={client}", through=proxy)
    proxy.fail(Status(501, "NotImplemented"), method="PUT", times=None)
    with pytest.raises(StoreUnsupportedError):
        store.put(RANK, b"x")
    with pytest.raises(StoreUnsupportedError):
        store.put_new(RANK, b"x")
    assert list(store.list("")) == []


# --- what reviews found ------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["s3fs", "obstore"])
def test_r1_a_404_of_somebody_in_between_is_not_absence(
    open_s3: Open, bucket: str, proxy: FaultProxy, client: str
) -> None:
    store = open_s3(url=f"s3://{bucket}/run?client={client}", through=proxy, attempts=1)
    create_root(store)
    proxy.fail(Status(404), times=None)
    for call in (
        lambda: check_root(store),
        lambda: store.get(RANK, max_bytes=1),
        lambda: store.read_into(RANK, 0, memoryview(bytearray(1))),
        lambda: list(store.list("")),
    ):
        with pytest.raises(StoreUnavailableError):
            call()


def test_the_marker_of_a_folder_stops_no_root(open_s3: Open, moto: S3Server) -> None:
    store = open_s3()
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    moto.client.put_object(Bucket=bucket, Key=f"{prefix}/", Body=b"")
    create_root(store)
    assert [e.key for e in store.list("")] == ["ckptd.json"]


def test_n16_a_store_that_knew_conditions_does_not_become_a_weak_one(
    open_s3: Open, proxy: FaultProxy
) -> None:
    store = open_s3(through=proxy, attempts=1)
    create_root(store)
    proxy.fail(Status(501, "NotImplemented"), method="PUT", times=None)
    with pytest.raises(StoreUnavailableError):
        store.put_new(COMMIT, b"x")
    assert store.has_conditional_put


def test_n6_credentials_that_stay_wrong_are_not_looked_for_at_each_call(
    open_s3: Open, proxy: FaultProxy
) -> None:
    store = open_s3(through=proxy)
    proxy.fail(Status(400, "ExpiredToken"), times=None)
    for _ in range(5):
        with pytest.raises(CredentialsError):
            store.get(RANK, max_bytes=1)
    assert len(proxy.requests) == 6, "two of the first call, one of each later one"


def test_checksums_that_the_environment_switches_off_leave_a_signature(
    open_s3: Open, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    open_s3(through=proxy).put_new(CHUNK, b"x" * 1000)
    (asked,) = proxy.requests
    assert not [name for name in asked.headers if "checksum" in name]
    assert len(asked.headers["x-amz-content-sha256"]) == 64


def test_a_range_may_be_the_first_call(open_s3: Open) -> None:
    open_s3().put_new(CHUNK, b"abc")
    out = bytearray(2)
    assert open_s3().read_into(CHUNK, 1, memoryview(out)) == 3
    assert out == b"bc"
