"""What `?client=obstore` makes of faults: a client of its own has ways of its own to get them wrong.

Bytes of objects go through obstore (`OWN`), all else through s3fs's client (test_s3_faults.py).
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator

import pytest

from ckptd.errors import (
    BucketNotFoundError,
    ConfigError,
    CredentialsError,
    ObjectExistsError,
    StoreAccessDeniedError,
    StoreUnavailableError,
    StoreUnsupportedError,
)
from ckptd.store.open import open_store
from ckptd.store.remote import RemoteStore
from ckptd.store.root import create_root
from ckptd.store.s3 import S3Client
from tests.fakes.fault_proxy import (
    Fault,
    FaultProxy,
    FlipRequest,
    Link,
    OkWithError,
    ResetAfter,
    ResetBefore,
    Short,
    Silent,
    Slow,
    Status,
    Truncated,
)
from tests.fakes.s3_calls import (
    ATTEMPTS,
    CALLS,
    CREDENTIALS,
    HASTY,
    NEW,
    OLD,
    PASSING,
    PROVOKED,
    WITH_ANSWERS,
    OtherRange,
    Page,
    Shared,
    Site,
    check_disconnected,
    check_nothing_is_not_found,
    check_silent,
    error_of,
    fails_of,
    sharing,
    together,
    told,
    works_despite,
)
from tests.fakes.s3_server import S3Server

Open = Callable[..., RemoteStore]

KEY = "attempts/0001"
OWN = ("put", "put_new", "read_into")
every_call = pytest.mark.parametrize("name", CALLS)
own_call = pytest.mark.parametrize("name", OWN)


def list_by_twos(store: RemoteStore) -> None:
    client = store._client
    client._s3fs.close()
    options = {**client._options, "s3_additional_kwargs": {"MaxKeys": 2}}
    client._s3fs = S3Client(client._bucket, client._prefix, options, client._limits)


@pytest.fixture(scope="module")
def shared(moto: S3Server) -> Iterator[Shared]:
    with sharing(moto, "?client=obstore") as shared:
        list_by_twos(shared.store)
        yield shared


@pytest.fixture
def site(shared: Shared, waits: list[float]) -> Iterator[Site]:
    with shared.site() as site:
        yield site


# --- N1, N2, N3, N5: what passes is tried again ------------------------------------------------


@every_call
def test_n1_what_passes_is_tried_again_by_one_layer(site: Site, name: str) -> None:
    for fault in PASSING if name in OWN else PASSING[:1]:
        assert works_despite(site, name, fault, 3) == 3
        site.direct.delete(site.key(7))
        assert fails_of(site, name, fault) == ATTEMPTS, "p7: no layer below tries again"
        assert site.stored(7) is None


@own_call
@pytest.mark.parametrize("fault", [ResetBefore(), ResetBefore(reads=True), ResetAfter()], ids=str)
def test_n2_n3_a_lost_connection_is_one_attempt(site: Site, name: str, fault: Fault) -> None:
    site.store.get(site.key(0), max_bytes=1 << 20)  # a connection that was used before
    if (name, fault) != ("put_new", ResetAfter()):  # whose second attempt finds the first one's
        assert works_despite(site, name, fault, 2) == 2
        site.direct.delete(site.key(7))
        assert fails_of(site, name, fault) == ATTEMPTS
    if isinstance(fault, ResetBefore):
        site.direct.put(site.key(0), OLD)
        fails_of(site, "put", fault)
        assert (site.stored(0), site.stored(7)) == (OLD, None)


@pytest.mark.parametrize("data", [NEW, b""], ids=["some", "empty"])
def test_n3_a_record_whose_answer_was_lost_is_ours(site: Site, data: bytes) -> None:
    site.proxy.fail(ResetAfter(), method="PUT")
    site.store.put_new(site.key(7), data)
    asked = [(r.method, r.status) for r in site.asked]
    assert asked == [("PUT", None), ("PUT", 412), ("GET", 200)]
    assert site.stored(7) == data


def test_n3_a_lost_answer_of_racing_records_has_one_winner(site: Site) -> None:
    site.proxy.fail(ResetAfter(), method="PUT", times=3)
    values = [bytes([n]) * 100 for n in range(6)]
    results = together(*(lambda v=v: site.store.put_new(site.key(7), v) for v in values))
    assert [site.stored(7)] == [v for v, r in zip(values, results, strict=True) if r is None]
    assert sum(isinstance(result, ObjectExistsError) for result in results) == 5


def test_n5_a_conflict_of_conditional_puts_is_tried_again(site: Site) -> None:
    conflict = Status(409, "ConditionalRequestConflict")
    assert works_despite(site, "put_new", conflict, 3) == 3
    assert {r.headers["if-none-match"] for r in site.asked} == {"*"}
    site.direct.put(site.key(7), OLD)
    site.proxy.fail(conflict, method="PUT")
    with pytest.raises(ObjectExistsError):
        site.store.put_new(site.key(7), NEW)


# --- N4: silence -------------------------------------------------------------------------------


def hurry(store: RemoteStore) -> None:
    for client in (store._client, store._client._s3fs):
        client._limits = client._limits._replace(request_timeout_s=0.6, slowest_bytes_s=1 << 40)
    store._client._stores.clear()


@pytest.fixture(scope="module")
def hasty(shared: Shared) -> Iterator[RemoteStore]:
    """A store of which no request takes long, once its clients are built: that may."""
    options = {"key": "testing", "secret": "testing", "attempts": 2}
    store = open_store(shared.store.url, {**options, "endpoint_url": shared.proxy.url})
    store.now_s()
    hurry(store)
    yield store  # type: ignore[misc]
    store.close()


@pytest.mark.parametrize(
    ("fault", "hung"),
    [
        (Silent(reads=True), set(HASTY)),
        (Silent(reads=False), set(HASTY)),
        (Slow(100), WITH_ANSWERS),
        (Slow(100, reads=True), {"put", "put big"}),
    ],
    ids=["silent reader", "silent", "slow", "slow reader"],
)
def test_n4_each_request_has_an_end(
    site: Site, hasty: RemoteStore, fault: Fault, hung: set[str]
) -> None:
    site.store = hasty
    site.proxy.fail(fault, times=None)
    acts = (lambda act=act: act(site) for act in HASTY.values())
    results = dict(zip(HASTY, together(*acts), strict=True))
    failed = {name: type(got) for name, got in results.items() if isinstance(got, Exception)}
    assert failed == dict.fromkeys(hung, StoreUnavailableError)
    site.proxy.clear()
    for name in reversed(OWN):
        assert CALLS[name].is_right(site, CALLS[name].act(site)), f"{name} works again"


def test_n4_silence_leaves_no_thread_and_no_connection(
    open_obstore: Open, proxy: FaultProxy
) -> None:
    store = open_obstore(through=proxy)
    store.put(KEY, b"xyz")
    hurry(store)
    threads = len(os.listdir("/proc/self/task"))
    for fault in (Silent(), Slow(1)):
        proxy.fail(fault, times=None)
        assert error_of(lambda: store.read_into(KEY, 0, memoryview(bytearray(3)))) is not None
        proxy.clear()
    store.close()
    check_disconnected(proxy)
    assert len(os.listdir("/proc/self/task")) <= threads


# --- N6: who asks ------------------------------------------------------------------------------


@own_call
def test_n6_refusals_are_told_apart(
    site: Site, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert fails_of(site, name, Status(403, "AccessDenied"), StoreAccessDeniedError) == 1
    assert caplog.text == ""
    assert works_despite(site, name, CREDENTIALS[0], 1) == 1
    faults = CREDENTIALS if name == "put_new" else CREDENTIALS[:1]
    site.direct.delete(site.key(7))
    for number, fault in enumerate(faults, 2):
        assert fails_of(site, name, fault, CredentialsError) == 2
        assert caplog.text.count("looking for credentials anew") == number


# --- N7: no bucket, no server ------------------------------------------------------------------


def test_n7_a_missing_bucket_is_no_missing_object(site: Site, open_obstore: Open) -> None:
    for name in CALLS:
        assert fails_of(site, name, Status(404, "NoSuchBucket"), BucketNotFoundError) == 1
    url = f"s3://no-such-{uuid.uuid4().hex}/run?client=obstore"
    check_nothing_is_not_found(open_obstore(url=url), BucketNotFoundError)


def test_n7_a_bucket_in_another_region_is_said_to_be(site: Site) -> None:
    for name in OWN:
        for code in ("PermanentRedirect", ""):
            assert fails_of(site, name, Status(301, code), BucketNotFoundError) == 1
        malformed = Status(400, "AuthorizationHeaderMalformed")
        assert fails_of(site, name, malformed, BucketNotFoundError) == 1


def test_n7_a_server_that_is_not_there_is_unavailable(
    open_obstore: Open, waits: list[float]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    for endpoint in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        store = open_obstore(endpoint_url=endpoint, request_timeout_s=5)
        check_nothing_is_not_found(store, StoreUnavailableError)


# --- N8, N9, N10, N11: damage on the way, success that is none ---------------------------------


class Whole(Fault):
    """Answer a request for a range with the whole object and 200."""

    def __str__(self) -> str:
        return "Whole"

    def act(self, link: Link) -> None:
        link.read()
        link.request = link.request.without("range")
        link.answer(link.ask())


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, Truncated(keep)) for name in ("get", "read_into") for keep in (0.0, 0.5, 0.99)),
        *(("read_into", Short(0.5, adapts_range=adapts)) for adapts in (False, True)),
        ("read_into", OtherRange()),
        ("read_into", Whole()),
    ],
    ids=str,
)
def test_n8_n9_less_or_other_bytes_than_asked_for_are_read_again(
    site: Site, name: str, fault: Fault
) -> None:
    assert works_despite(site, name, fault, 3) == 3
    assert fails_of(site, name, fault) == ATTEMPTS


@pytest.mark.parametrize("name", ["put", "put_new"])
def test_n10_a_bit_that_flips_on_its_way_to_the_server_is_refused(site: Site, name: str) -> None:
    assert works_despite(site, name, FlipRequest(), 1) == 1
    assert [r.status for r in site.asked] == [400, 200]


@every_call
def test_n11_an_answer_of_something_else_is_a_failure(site: Site, name: str) -> None:
    faults = [OkWithError("InternalError"), OkWithError("SlowDown")]
    if name != "delete":
        faults += [Page(), Page(b"", ())]
    for fault in faults:
        assert works_despite(site, name, fault, 1) == 1
        site.direct.delete(site.key(7))
        assert fails_of(site, name, fault) == ATTEMPTS
    assert site.stored(7) is None
    assert site.stored(2) == OLD


# --- N13, N16, T1: listings, conditions, clocks ------------------------------------------------


def test_n13_a_listing_has_every_key_in_order_or_fails(
    open_obstore: Open, moto: S3Server, proxy: FaultProxy
) -> None:
    store = open_obstore(through=proxy)
    list_by_twos(store)
    bucket = store.url.removeprefix("s3://").partition("/")[0]
    keys = [f"chunks/0{n}/{n}" for n in range(5)]
    for key in [*keys, "No key", "chunks/", "chunks//x"]:
        moto.client.put_object(Bucket=bucket, Key=f"run/{key}", Body=b"x")
    assert [e.key for e in store.list("chunks/")] == keys
    proxy.unsorted_listings = True  # as of a directory bucket
    assert [e.key for e in store.list("")] == keys
    proxy.unsorted_listings = False
    proxy.fail(Status(500, "InternalError"), skip=2, times=None)
    with pytest.raises(StoreUnavailableError):
        list(store.list("chunks/"))


def test_n16_conditions_that_the_service_does_not_know(
    open_obstore: Open, proxy: FaultProxy, waits: list[float]
) -> None:
    store = open_obstore(through=proxy)
    proxy.fail(Status(501, "NotImplemented"), method="PUT")
    store.put_new(KEY, b"x")
    assert [(r.method, r.status) for r in proxy.requests] == [
        ("PUT", 501),
        ("GET", 404),
        ("PUT", 200),
    ]
    assert not store.has_conditional_put
    with pytest.raises(ObjectExistsError):
        store.put_new(KEY, b"y")
    proxy.fail(Status(501, "NotImplemented"), method="PUT", times=None)
    with pytest.raises(StoreUnsupportedError):
        store.put(KEY, b"y")  # of what it was asked it stored nothing


def test_n16_conditions_that_the_service_ignores(open_obstore: Open, proxy: FaultProxy) -> None:
    proxy.strip_headers.add("if-none-match")
    store = open_obstore(through=proxy)
    create_root(store)
    assert not store.has_conditional_put


def test_t1_ages_come_from_the_clock_of_the_store(site: Site) -> None:
    now_s = site.store.now_s()
    site.proxy.clock_shift_s = 864000.0
    try:
        assert 864000 <= site.store.now_s() - now_s < 864060
    finally:
        site.proxy.clock_shift_s = 0.0
    assert {r.method for r in site.asked} == {"GET"}, "a reader can tell the time"


# --- S7: secrets; its end ----------------------------------------------------------------------


def test_s7_no_error_and_no_log_tells_a_secret(
    open_obstore: Open, proxy: FaultProxy, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="ckptd")
    secrets = {"secret": "CANARYSECRET", "token": "CANARYTOKEN"}
    store = open_obstore(through=proxy, attempts=2, **secrets)
    raised = set()
    for fault in PROVOKED:
        proxy.fail(fault, times=None)
        for act in (
            lambda: store.put_new(KEY, b"x" * 10),
            lambda: store.get(KEY, max_bytes=100),
            lambda: store.read_into(KEY, 0, memoryview(bytearray(10))),
        ):
            if (error := error_of(act)) is not None:
                raised.add(type(error))
                check_silent(told(error))
                assert "Debug source" not in str(error)
        proxy.clear()
    assert len(raised) >= 7
    assert proxy.requests[0].headers["x-amz-security-token"] == "CANARYTOKEN", "it was used"
    url = "http://user:CANARYSECRET@127.0.0.1:9"
    with pytest.raises(ConfigError, match="endpoint_url") as refused:
        open_obstore(endpoint_url=url)
    check_silent(told(refused.value))
    assert "looking for credentials anew" in caplog.text
    check_silent(caplog.text)


def test_closing_and_forking_harm_nobody(open_obstore: Open, proxy: FaultProxy) -> None:
    store, other = open_obstore(through=proxy), open_obstore()
    store.put_new(KEY, b"x")
    assert other.get(KEY, max_bytes=1) == b"x"
    child = os.fork()
    if not child:
        os._exit(0)  # as the worker of a data loader does
    assert os.waitpid(child, 0)[1] == 0
    assert store.get(KEY, max_bytes=1) == b"x"
    store.close()
    check_disconnected(proxy)
    assert other.get(KEY, max_bytes=1) == b"x"
