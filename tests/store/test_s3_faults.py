"""What a store in S3 does when requests are refused, cut, held, damaged, or answered wrongly.

Most tests share one store behind one proxy, since a client takes long to build; each works below
names of its own and takes its faults away.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckptd.errors import (
    BucketNotFoundError,
    CkptdError,
    CorruptError,
    CredentialsError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessDeniedError,
    StoreError,
    StoreUnavailableError,
)
from ckptd.model.box import Box
from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import read_manifest, read_ranks
from ckptd.pipeline.read import read_chunks
from ckptd.plan.reading import Wanted, plan_reads
from ckptd.store.base import Entry
from ckptd.store.open import open_store
from ckptd.store.remote import RemoteStore
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.fault_proxy import (
    WAIT_S,
    Fault,
    FaultProxy,
    Flip,
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
    BIG,
    CALLS,
    CREDENTIALS,
    HASTY,
    NEW,
    OLD,
    PASSING,
    PROVOKED,
    WITH_ANSWERS,
    Expired,
    OtherRange,
    Page,
    Shared,
    Site,
    check_nothing_is_not_found,
    check_silent,
    error_of,
    fails_of,
    listed,
    sharing,
    together,
    told,
    works_despite,
)
from tests.fakes.s3_server import S3Server

Open = Callable[..., RemoteStore]

DAY_S = 86400.0


# --- one store for all -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(moto: S3Server) -> Iterator[Shared]:
    with sharing(moto, s3_additional_kwargs={"MaxKeys": 2}) as shared:
        yield shared


@pytest.fixture
def site(shared: Shared, waits: list[float]) -> Iterator[Site]:
    with shared.site() as site:
        yield site


WRITES = ("put", "put_new")
every_call = pytest.mark.parametrize("name", CALLS)


# --- N1, N2, N3, N5: what passes is tried again ------------------------------------------------


@every_call
@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.code}")
def test_n1_what_passes_is_tried_again_by_one_layer(site: Site, name: str, fault: Status) -> None:
    assert works_despite(site, name, fault, 1) == 1
    if name == "put_new":
        site.direct.delete(site.key(7))
    assert works_despite(site, name, fault, 3) == 3
    if name == "put_new":
        site.direct.delete(site.key(7))
    assert fails_of(site, name, fault) == ATTEMPTS, "p7: no layer below tries again"
    assert name != "put_new" or site.stored(7) is None


def test_n1_waits_grow_and_are_jittered(site: Site, waits: list[float]) -> None:
    fails_of(site, "get", Status(503, "SlowDown"))
    fails_of(site, "get", Status(503, "SlowDown"))
    assert len(waits) == 2 * (ATTEMPTS - 1)
    bounds = [0.2, 0.4, 0.8] * 2
    assert all(0 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert waits[:3] != waits[3:]


def test_n1_no_attempt_begins_after_the_time_for_retries(
    open_s3: Open, proxy: FaultProxy, waits: list[float]
) -> None:
    store = open_s3(through=proxy, retry_s=1e-9, attempts=100)
    proxy.fail(Status(503, "SlowDown"), times=None)
    with pytest.raises(StoreUnavailableError):
        store.now_s()
    assert len(proxy.requests) == 1
    assert waits == []


@every_call
@pytest.mark.parametrize(
    "fault",
    [ResetBefore(), ResetBefore(reads=True), ResetAfter()],
    ids=["at once", "unasked", "after"],
)
def test_n2_n3_lost_connections_are_replaced(site: Site, name: str, fault: Fault) -> None:
    # Where a connection that was used before breaks, aiohttp sends a request without a body once
    # more (test_s3_traps.py). That harms nothing; a PUT sent twice unseen would.
    most = 1 if name in WRITES else 2
    site.store.now_s()  # a connection that was used before
    assert works_despite(site, name, fault, 1) in (1, 2)
    if name == "put_new":
        site.direct.delete(site.key(7))
        if isinstance(fault, ResetAfter):
            return  # a second attempt finds what the first one made
    assert ATTEMPTS <= fails_of(site, name, fault) <= ATTEMPTS * most


def test_n2_a_put_that_was_lost_changes_nothing(site: Site) -> None:
    fails_of(site, "put", ResetBefore(reads=True))
    fails_of(site, "put_new", ResetBefore(reads=True))
    assert (site.stored(0), site.stored(7)) == (OLD, None)


@pytest.mark.parametrize("data", [NEW, b""], ids=["some", "empty"])
def test_n3_a_record_whose_answer_was_lost_is_ours(site: Site, data: bytes) -> None:
    site.store.now_s()
    begin = len(site.proxy.requests)
    site.proxy.fail(ResetAfter(), method="PUT")
    site.store.put_new(site.key(7), data)
    asked = [(r.method, r.status) for r in site.proxy.requests[begin:]]
    assert asked == [("PUT", None), ("PUT", 412), ("GET", 200)]
    assert site.stored(7) == data


def test_n3_a_record_that_was_there_before_exists_even_if_it_is_the_same(site: Site) -> None:
    site.direct.put(site.key(7), NEW)
    with pytest.raises(ObjectExistsError):
        site.store.put_new(site.key(7), NEW)


@pytest.mark.parametrize("other", [OLD, NEW[:-1], NEW + b"x", b""])
def test_n3_a_record_of_somebody_else_exists(site: Site, other: bytes) -> None:
    site.direct.put(site.key(7), other)
    site.proxy.fail(ResetAfter(), method="PUT")
    with pytest.raises(ObjectExistsError):
        site.store.put_new(site.key(7), NEW)
    assert site.stored(7) == other


def test_n3_a_record_that_is_gone_when_it_is_read_back_is_not_ours(site: Site) -> None:
    site.proxy.fail(ResetAfter(), method="PUT")
    site.proxy.fail(Status(404, "NoSuchKey"), method="GET")
    with pytest.raises(ObjectExistsError):
        site.store.put_new(site.key(7), NEW)


def test_n3_a_record_that_cannot_be_read_back_is_unknown(site: Site) -> None:
    site.proxy.fail(ResetAfter(), method="PUT")
    site.proxy.fail(Status(503, "SlowDown"), method="GET", times=None)
    with pytest.raises(StoreUnavailableError):
        site.store.put_new(site.key(7), NEW)
    assert site.stored(7) == NEW


def test_n3_a_deferred_object_whose_answer_was_lost_exists(site: Site) -> None:
    site.proxy.fail(ResetAfter(), method="PUT")
    with pytest.raises(ObjectExistsError):
        site.store.put_new(site.key(7), NEW, is_deferred=True)
    assert site.stored(7) == NEW
    assert [r.method for r in site.asked] == ["PUT", "PUT"], "chunks are not read back"


def test_n3_a_lost_answer_of_racing_records_has_one_winner(site: Site) -> None:
    site.proxy.fail(ResetAfter(), method="PUT", times=3)
    values = [bytes([n]) * 100 for n in range(6)]
    results = together(*(lambda v=v: site.store.put_new(site.key(7), v) for v in values))
    won = [value for value, result in zip(values, results, strict=True) if result is None]
    assert [site.stored(7)] == won
    assert sum(isinstance(result, ObjectExistsError) for result in results) == 5


def test_n3_a_delete_whose_answer_was_lost_is_done(site: Site) -> None:
    site.proxy.fail(ResetAfter(), method="DELETE")
    site.store.delete(site.key(1))
    assert site.stored(1) is None
    site.proxy.fail(Status(404, "NoSuchKey"), method="DELETE")  # as some services say then
    site.store.delete(site.key(1))


@pytest.mark.parametrize("times", [1, 3])
def test_n5_a_conflict_of_conditional_puts_is_tried_again(site: Site, times: int) -> None:
    conflict = Status(409, "ConditionalRequestConflict")
    assert works_despite(site, "put_new", conflict, times) == times
    assert {r.headers["if-none-match"] for r in site.asked} == {"*"}


def test_n5_a_conflict_that_somebody_else_won_exists(site: Site) -> None:
    site.direct.put(site.key(7), OLD)
    site.proxy.fail(Status(409, "ConditionalRequestConflict"), method="PUT")
    with pytest.raises(ObjectExistsError):
        site.store.put_new(site.key(7), NEW)
    site.direct.delete(site.key(7))
    assert fails_of(site, "put_new", Status(409, "ConditionalRequestConflict")) == ATTEMPTS


# --- N4: silence -------------------------------------------------------------------------------


def hurried(store: RemoteStore) -> RemoteStore:
    """Let no request take long, now that a client is built: that may take longer."""
    store.now_s()
    client = store._client
    client._limits = client._limits._replace(request_timeout_s=0.6, slowest_bytes_s=1 << 40)
    return store


@pytest.fixture(scope="module")
def hasty(shared: Shared) -> Iterator[RemoteStore]:
    options = {"key": "testing", "secret": "testing", "attempts": 2}
    store = open_store(shared.store.url, {**options, "endpoint_url": shared.proxy.url})
    yield hurried(store)  # type: ignore[arg-type]
    store.close()


@pytest.mark.parametrize(
    ("fault", "hung"),
    [
        (Silent(reads=True), set(HASTY)),
        (Silent(reads=False), set(HASTY)),
        (Slow(100), WITH_ANSWERS),
        (Slow(100, reads=True), {"put", "put big"}),
    ],
    ids=["silent", "deaf", "slow answer", "slow to read"],
)
def test_n4_each_request_has_an_end(
    site: Site, hasty: RemoteStore, fault: Fault, hung: set[str]
) -> None:
    site.store = hasty
    site.proxy.fail(fault, times=None)
    results = dict(
        zip(HASTY, together(*(lambda act=act: act(site) for act in HASTY.values())), strict=True)
    )
    failed = {name for name, got in results.items() if isinstance(got, BaseException)}
    assert failed == hung
    assert {type(results[name]) for name in hung} == {StoreUnavailableError}
    site.proxy.clear()
    for name in ("get", "read_into", "delete", "put", "put_new", "now_s"):
        assert CALLS[name].is_right(site, CALLS[name].act(site)), f"{name} works again"


def test_n4_no_connection_to_who_does_not_read_outlives_the_store(
    site: Site, open_s3: Open
) -> None:
    store = hurried(open_s3(through=site.proxy, url=site.store.url, attempts=1))
    rule = site.proxy.fail(Silent(reads=False), method="PUT")
    with pytest.raises(StoreUnavailableError):
        store.put(site.key(8), BIG)
    assert rule.hits == 1
    store.close()
    del store
    gc.collect()  # a warning about a socket that was not closed would be an error


class Held(Fault):
    """Keep a request until the test lets it go, then reset its connection."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def act(self, link: Link) -> None:
        link.read()
        self.gate.wait(WAIT_S)
        link.reset()


@pytest.mark.parametrize("act", HASTY.values(), ids=HASTY)
def test_n4_a_request_that_hangs_holds_up_no_other(
    site: Site, act: Callable[[Site], object]
) -> None:
    held = Held()
    rule = site.proxy.fail(held)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(act(site)))
    thread.start()
    try:
        site.proxy.wait_hits(rule)
        for name in ("put_new", "read_into", "now_s"):
            assert CALLS[name].is_right(site, CALLS[name].act(site))
        assert thread.is_alive()
    finally:
        held.gate.set()
        thread.join()
    assert len(results) == 1, "it was tried again, and done"


# --- N6: who asks ------------------------------------------------------------------------------


@every_call
def test_n6_what_is_not_allowed_is_not_tried_again(
    site: Site, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert fails_of(site, name, Status(403, "AccessDenied"), StoreAccessDeniedError) == 1
    assert caplog.text == ""


@every_call
def test_n6_credentials_are_looked_for_once(
    site: Site, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault = CREDENTIALS[0]
    assert fails_of(site, name, fault, CredentialsError) == 2
    assert caplog.text.count("looking for credentials anew") == 1
    assert works_despite(site, name, fault, 1) == 1


@pytest.mark.parametrize("name", ["put_new", "size"])
@pytest.mark.parametrize("fault", CREDENTIALS[1:], ids=lambda fault: fault.xml_code)
def test_n6_credentials_that_are_wrong_are_said_to_be(site: Site, name: str, fault: Status) -> None:
    assert fails_of(site, name, fault, CredentialsError) == 2


def test_n6_renewed_credentials_have_all_attempts(site: Site) -> None:
    site.proxy.fail(Status(503, "SlowDown"), times=2)
    site.proxy.fail(Status(400, "ExpiredToken"))
    site.proxy.fail(Status(503, "SlowDown"), times=3)
    assert site.store.get(site.key(0), max_bytes=1 << 20) == OLD
    assert [r.status for r in site.asked] == [503, 503, 400, 503, 503, 503, 200]


def test_n6_threads_whose_token_expired_find_the_new_one_together(
    open_s3: Open, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(token: str) -> None:
        (tmp_path / "credentials").write_text(
            "[default]\naws_access_key_id = k\naws_secret_access_key = s\n"
            f"aws_session_token = {token}\n"
        )

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write("OLDTOKEN")
    store = open_s3(through=proxy, key=None, secret=None, attempts=1)
    store.put("attempts/0001", b"x")
    assert proxy.requests[0].headers["x-amz-security-token"] == "OLDTOKEN"
    write("NEWTOKEN")
    renewals = []
    renew = store._client.renew
    monkeypatch.setattr(store._client, "renew", lambda: renewals.append(1) or renew())
    proxy.fail(Expired("OLDTOKEN"), times=None)
    results = together(
        *(lambda n=n: store.put_new(f"attempts/{n:04d}", b"x") for n in range(100, 108))
    )
    assert results == [None] * 8
    assert len(renewals) == 1
    begin = len(proxy.requests)
    assert len(list(store.list("attempts/"))) == 9
    assert proxy.requests[begin].headers["x-amz-security-token"] == "NEWTOKEN"


# --- N7: no bucket, no server ------------------------------------------------------------------


def test_n7_a_missing_bucket_is_no_missing_object(site: Site) -> None:
    for name in CALLS:
        fails_of(site, name, Status(404, "NoSuchBucket"), BucketNotFoundError)


@pytest.mark.parametrize(
    "fault",
    [Status(301, "PermanentRedirect"), Status(301), Status(307, "TemporaryRedirect"),
     Status(400, "AuthorizationHeaderMalformed")],
    ids=["PermanentRedirect", "bare 301", "307", "AuthorizationHeaderMalformed"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["put_new", "get", "size", "list"])
def test_n7_a_redirect_that_names_no_region_ends(site: Site, name: str, fault: Status) -> None:
    kind = StoreUnavailableError if fault.code == 307 else BucketNotFoundError
    attempts = ATTEMPTS if fault.code == 307 else 1
    assert fails_of(site, name, fault, kind) <= 3 * attempts, "looking for the region has an end"


class WrongRegion(Fault):
    """Answer as S3 does to what is signed for another region than the bucket's."""

    def act(self, link: Link) -> None:
        is_right = "/eu-west-1/" in link.request.header("authorization")
        there = {"x-amz-bucket-region": "eu-west-1"}
        (Fault() if is_right else Status(301, "PermanentRedirect", there)).act(link)


@pytest.mark.parametrize("first", ["get", "put_new", "list"])
def test_n7_a_bucket_in_another_region_is_found(site: Site, moto: S3Server, first: str) -> None:
    options = {"key": "testing", "secret": "testing", "attempts": 2}
    site.proxy.fail(WrongRegion(), times=None)
    store = open_store(site.store.url, {**options, "endpoint_url": site.proxy.url})
    site.store = store  # type: ignore[assignment]
    try:
        for name in (first, "read_into", "put"):
            assert CALLS[name].is_right(site, CALLS[name].act(site)), name
    finally:
        store.close()


def test_n7_a_name_that_no_server_has_is_unavailable(open_s3: Open, waits: list[float]) -> None:
    store = open_s3(endpoint_url="http://no-such-host.invalid", attempts=2, request_timeout_s=5)
    check_nothing_is_not_found(store, StoreUnavailableError)


def test_n7_a_port_where_nobody_listens_is_unavailable(open_s3: Open, waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    store = open_s3(endpoint_url=f"http://127.0.0.1:{port}", attempts=2)
    check_nothing_is_not_found(store, StoreUnavailableError)
    assert len(waits) == 10


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(Status(404, "NoSuchBucket"), BucketNotFoundError),
     (Status(403, "AccessDenied"), StoreAccessDeniedError),
     (Status(503, "SlowDown"), StoreUnavailableError),
     (ResetBefore(), StoreUnavailableError)],
    ids=["NoSuchBucket", "AccessDenied", "SlowDown", "reset"],
)  # fmt: skip
def test_n7_a_root_that_does_not_answer_is_not_taken_for_none(
    site: Site, fault: Fault, kind: type[StoreError]
) -> None:
    site.proxy.fail(fault, times=None)
    check_nothing_is_not_found(site.store, kind)


# --- N8, N9, N10: damage on the way ------------------------------------------------------------


READS = ("get", "read_into", "list", "later page")
CUT = [Truncated(0.5), Truncated(0.0), Truncated(0.99)]
SHORT = [Short(0.5), Short(0.5, adapts_range=True), Short(0.99, adapts_range=True)]


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("fault", CUT, ids=lambda fault: f"{fault.keep}")
def test_n8_truncated_bodies_are_read_again(site: Site, name: str, fault: Fault) -> None:
    assert works_despite(site, name, fault, 1) == 1
    assert works_despite(site, name, fault, 3) == 3
    assert fails_of(site, name, fault) == ATTEMPTS


@pytest.mark.parametrize("name", READS[1:])
@pytest.mark.parametrize("fault", SHORT, ids=lambda fault: f"{fault.keep} {fault.adapts_range}")
def test_n9_short_bodies_are_read_again(site: Site, name: str, fault: Fault) -> None:
    assert works_despite(site, name, fault, 1) == 1
    assert works_despite(site, name, fault, 3) == 3
    assert fails_of(site, name, fault) == ATTEMPTS


def test_n9_another_range_than_was_asked_for_is_read_again(site: Site) -> None:
    assert works_despite(site, "read_into", OtherRange(), 1) == 1


STEP = StepId(attempt=2, step=10**9)
TENSORS = {
    "big": np.random.default_rng(5).standard_normal((700, 1024)).astype(np.float32),
    "small": np.arange(12, dtype=np.float32),
}


@pytest.fixture(scope="module")
def checkpoint(shared: Shared) -> None:
    """A checkpoint in the shared root."""
    write_checkpoint(shared.direct, STEP, TENSORS)


def read_tensors(store: RemoteStore) -> dict[str, np.ndarray]:
    wanted = [Wanted(fqn, Box.full(array.shape)) for fqn, array in TENSORS.items()]
    arrays = {fqn: np.zeros_like(array) for fqn, array in TENSORS.items()}

    def sink(region, raw) -> None:
        want = wanted[region.wanted]
        part = np.frombuffer(raw, arrays[want.fqn].dtype).reshape(region.box.shape)
        arrays[want.fqn][region.box.slices(want.box.start)] = part

    read_chunks(store, plan_reads(wanted, read_ranks(store, read_manifest(store, STEP))), sink)
    return arrays


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("where", ["chunks/", "ranks/", "checkpoints/"])
@pytest.mark.parametrize("at", [0.0, 0.0005, 0.5, 1.0])
def test_n10_a_bit_that_flips_once_is_read_again(site: Site, where: str, at: float) -> None:
    rule = site.proxy.fail(Flip(at), method="GET", key=where)
    for fqn, array in read_tensors(site.store).items():
        assert np.array_equal(array, TENSORS[fqn]), fqn
    assert rule.hits == 1


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("where", ["chunks/", "ranks/", "checkpoints/"])
def test_n10_a_bit_that_flips_each_time_is_damage(site: Site, where: str) -> None:
    site.proxy.fail(Flip(0.5), method="GET", key=where, times=None)
    with pytest.raises(CorruptError):
        read_tensors(site.store)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_n10_a_bit_that_flips_on_its_way_to_the_server_is_refused(
    site: Site, name: str, at: float
) -> None:
    assert works_despite(site, name, FlipRequest(at), 1) == 1
    assert [r.status for r in site.asked] == [400, 200]
    site.direct.delete(site.key(7))
    assert fails_of(site, name, FlipRequest(at)) == ATTEMPTS
    assert site.stored(7) is None


# --- N11: success that is none -----------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if name != "size"])
@pytest.mark.parametrize("code", ["InternalError", "SlowDown"])
def test_n11_an_error_with_status_200_is_a_failure(site: Site, name: str, code: str) -> None:
    assert works_despite(site, name, OkWithError(code), 1) == 1
    site.direct.delete(site.key(7))
    assert fails_of(site, name, OkWithError(code)) == ATTEMPTS
    assert site.stored(7) is None
    assert site.stored(2) == OLD


@pytest.mark.parametrize(
    "name", ["put", "put_new", "get", "read_into", "list", "later page", "now_s"]
)
@pytest.mark.parametrize("fault", [Page(), Page(b"", ())], ids=["html", "nothing"])
def test_n11_an_answer_of_something_else_is_a_failure(site: Site, name: str, fault: Fault) -> None:
    assert works_despite(site, name, fault, 1) == 1
    site.direct.delete(site.key(7))
    assert fails_of(site, name, fault) == ATTEMPTS
    assert (site.stored(0) == NEW) == (name == "put")


# --- N13, N14, T1: listings and clocks ---------------------------------------------------------


class NoToken(Fault):
    """Say that a listing goes on, and not where."""

    def act(self, link: Link) -> None:
        answer = link.ask()
        body = re.sub(rb"<NextContinuationToken>.*</NextContinuationToken>", b"", answer.body)
        link.answer(replace(answer, body=body))


@pytest.mark.parametrize(
    "fault",
    [Status(500, "InternalError"), ResetAfter(), Truncated(), Status(403, "AccessDenied"),
     OkWithError("InternalError")],
    ids=["500", "reset", "truncated", "denied", "200"],
)  # fmt: skip
def test_n13_a_listing_whose_later_page_fails_never_ends_early(site: Site, fault: Fault) -> None:
    rule = site.proxy.fail(fault, skip=1, times=None)
    listing = site.store.list(f"ranks/{site.step}/")
    assert [next(listing).key, next(listing).key] == [site.key(0), site.key(1)]
    assert rule.hits == 0, "a page is asked for when the one before it has been used"
    with pytest.raises((StoreUnavailableError, StoreAccessDeniedError)):
        next(listing)


def test_n13_a_listing_that_does_not_say_how_it_goes_on_is_not_complete(site: Site) -> None:
    assert works_despite(site, "list", NoToken(), 1) == 1
    assert fails_of(site, "list", NoToken()) == ATTEMPTS


def test_n14_what_vanished_since_it_was_listed_is_not_found(site: Site) -> None:
    for entry in site.store.list(f"ranks/{site.step}/"):
        site.direct.delete(entry.key)
        out = memoryview(bytearray(entry.bytes))
        for act in (
            lambda e=entry: site.store.get(e.key, max_bytes=e.bytes),
            lambda e=entry, out=out: site.store.read_into(e.key, 0, out),
            lambda e=entry, out=out: site.store.read_into(e.key, 0, out[:0]),
        ):
            with pytest.raises(ObjectNotFoundError):
                act()
    assert listed(site) == []


@pytest.mark.parametrize("shift_s", [10 * DAY_S, -3600.0])
def test_t1_ages_come_from_the_clock_of_the_store(
    site: Site, shift_s: float, request: pytest.FixtureRequest
) -> None:
    def look() -> tuple[float, Sequence[Entry]]:
        return site.store.now_s(), list(site.store.list(f"ranks/{site.step}/"))

    now_s, entries = look()
    site.proxy.clock_shift_s = shift_s
    request.addfinalizer(lambda: setattr(site.proxy, "clock_shift_s", 0.0))
    later_s, shifted = look()
    assert [e.modified_s + shift_s for e in entries] == [e.modified_s for e in shifted]
    assert shift_s <= later_s - now_s < shift_s + 60


# --- S7: secrets -------------------------------------------------------------------------------


def test_s7_no_error_and_no_log_tells_a_secret(
    open_s3: Open, proxy: FaultProxy, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    caplog.set_level(logging.DEBUG, logger="ckptd")
    store = open_s3(
        through=proxy, attempts=2, key="CANARYKEY", secret="CANARYSECRET", token="CANARYTOKEN"
    )
    out = memoryview(bytearray(10))
    acts: list[Callable[[], object]] = [
        lambda: store.put_new("attempts/0001", b"x" * 10),
        lambda: store.get("attempts/0001", max_bytes=100),
        lambda: store.read_into("attempts/0001", 0, out),
        lambda: list(store.list("")),
    ]
    raised = set()
    for fault in PROVOKED:
        proxy.fail(fault, times=None)
        for act in acts:
            if (error := error_of(act)) is not None:
                raised.add(type(error))
                check_silent(told(error))
        proxy.clear()
    assert len(raised) >= 7
    assert proxy.requests[0].headers["x-amz-security-token"] == "CANARYTOKEN", "it was used"
    assert "looking for credentials anew" in caplog.text
    check_silent(caplog.text)


@pytest.mark.parametrize(
    "options",
    [
        {"region_name": "CANARY"},
        {"client_kwargs": {"aws_secret_access_key": "CANARYSECRET", "no_such": 1}},
        {"config_kwargs": {"no_such": "CANARYSECRET"}},
        {"token": "CANARYTOKEN\n"},
        {"no_such": "CANARYSECRET"},
        {"profile": "no-such-profile"},
    ],
    ids=",".join,
)
def test_s7_no_error_about_options_tells_a_secret(
    open_s3: Open, waits: list[float], caplog: pytest.LogCaptureFixture, options: dict
) -> None:
    caplog.set_level(logging.DEBUG, logger="ckptd")
    wanted = {"key": "CANARYKEY", "secret": "CANARYSECRET", "token": "CANARYTOKEN", **options}
    with pytest.raises(CkptdError) as caught:
        open_s3(attempts=1, **wanted).get("attempts/0001", max_bytes=10)
    assert not isinstance(caught.value, ObjectNotFoundError)
    check_silent(told(caught.value))
    check_silent(caplog.text)
