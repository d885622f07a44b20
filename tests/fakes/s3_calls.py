"""Calls of a store in S3 and what befalls them, for each client that there is.

A store is shared by the tests of a file, since a client takes long to build; each test has a step of
its own.
"""

from __future__ import annotations

import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

import pytest

from ckptd.errors import CkptdError, ObjectNotFoundError, StoreError, StoreUnavailableError
from ckptd.model import keys
from ckptd.model.keys import StepId
from ckptd.store.open import open_store
from ckptd.store.remote import RemoteStore
from ckptd.store.root import check_root, create_root
from tests.fakes.fault_proxy import (
    WAIT_S,
    Fault,
    FaultProxy,
    Link,
    OkWithError,
    Request,
    ResetBefore,
    Status,
    Truncated,
)
from tests.fakes.http_wire import Message
from tests.fakes.s3_server import MotoServer, S3Server

ATTEMPTS = 4
OLD = bytes(range(256)) * 16
NEW = OLD[::-1]
_ids = count(1)


class Shared(NamedTuple):
    """A store through a proxy that shows listings by twos, and one of the same root without."""

    proxy: FaultProxy
    store: RemoteStore
    direct: RemoteStore

    @contextmanager
    def site(self) -> Iterator[Site]:
        """Make a step for one test; take its faults away afterwards."""
        site = Site(self.proxy, self.store, self.direct, StepId(attempt=1, step=next(_ids)))
        for number in range(3):
            self.direct.put(site.key(number), OLD)
        site.begin = len(self.proxy.requests)
        try:
            yield site
        finally:
            self.proxy.clear()


@contextmanager
def sharing(moto: S3Server, query: str = "", **options: object) -> Iterator[Shared]:
    """Make a root in a bucket of its own; `query` ends the URL of the store under test."""
    if not isinstance(moto, MotoServer):
        pytest.skip("faults are made before moto only")
    url = f"s3://{moto.make_bucket(f'ckptd-{uuid.uuid4().hex}')}/run"
    common = {"key": "testing", "secret": "testing", "request_timeout_s": WAIT_S}
    with FaultProxy(moto.url) as proxy:
        through = {"endpoint_url": proxy.url, "attempts": ATTEMPTS}
        store = open_store(url + query, {**common, **through, **options})
        direct = open_store(url, {**common, "endpoint_url": moto.url})
        create_root(direct)
        yield Shared(proxy, store, direct)  # type: ignore[arg-type]
        store.close()
        direct.close()


@dataclass
class Site:
    """What one test finds: `step`, whose objects 0, 1 and 2 hold `OLD`, and 7 is not there."""

    proxy: FaultProxy
    store: RemoteStore
    direct: RemoteStore
    step: StepId
    begin: int = 0

    def key(self, number: int) -> str:
        return keys.rank(self.step, number)

    def stored(self, number: int) -> bytes | None:
        """Return what the server holds."""
        try:
            return self.direct.get(self.key(number), max_bytes=16 << 20)
        except ObjectNotFoundError:
            return None

    @property
    def asked(self) -> list[Request]:
        """What was asked through the proxy since the test began."""
        return self.proxy.requests[self.begin :]


# --- calls -----------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of the store: how it is made, and whether it did what it should.

    It sends `sends` requests where nothing fails; `skip` pass before the one that faults befall.
    """

    act: Callable[[Site], object]
    is_right: Callable[[Site, object], bool]
    sends: int = 1
    skip: int = 0


def read(site: Site) -> tuple[int, bytes]:
    out = bytearray(1000)
    return site.store.read_into(site.key(0), 500, memoryview(out)), bytes(out)


def listed(site: Site) -> list[str]:
    return [entry.key for entry in site.store.list(f"ranks/{site.step}/")]


def has_all(site: Site, got: object) -> bool:
    return got == [site.key(number) for number in range(3)]


CALLS = {
    "put": Call(lambda s: s.store.put(s.key(0), NEW), lambda s, _: s.stored(0) == NEW),
    "put_new": Call(lambda s: s.store.put_new(s.key(7), NEW), lambda s, _: s.stored(7) == NEW),
    "get": Call(lambda s: s.store.get(s.key(0), max_bytes=1 << 20), lambda _, got: got == OLD),
    "read_into": Call(read, lambda _, got: got == (len(OLD), OLD[500:1500])),
    "size": Call(
        lambda s: s.store.read_into(s.key(0), 0, memoryview(bytearray())),
        lambda _, got: got == len(OLD),
    ),
    "list": Call(listed, has_all, sends=2),
    "later page": Call(listed, has_all, sends=2, skip=1),
    "delete": Call(lambda s: s.store.delete(s.key(1)), lambda s, _: s.stored(1) is None),
    "now_s": Call(lambda s: s.store.now_s(), lambda _, got: isinstance(got, float)),
}


def works_despite(site: Site, name: str, fault: Fault, times: int) -> int:
    """Make a call of which so many requests fail; return how many more than usual it sent."""
    call, begin = CALLS[name], len(site.proxy.requests)
    rule = site.proxy.fail(fault, skip=call.skip, times=times)
    assert call.is_right(site, call.act(site)), f"{name} despite {fault}"
    assert rule.hits == times
    site.proxy.clear()
    return len(site.proxy.requests) - begin - call.sends


def fails_of(
    site: Site, name: str, fault: Fault, kind: type[CkptdError] = StoreUnavailableError
) -> int:
    """Make a call of which all requests fail; return how many failed."""
    call, begin = CALLS[name], len(site.proxy.requests)
    site.proxy.fail(fault, skip=call.skip, times=None)
    with pytest.raises(kind) as caught:
        call.act(site)
    assert type(caught.value) is kind, f"{name}: {caught.value!r}"
    site.proxy.clear()
    return len(site.proxy.requests) - begin - call.skip


def together(*acts: Callable[[], object]) -> list[object]:
    """Call them at once, each on a thread; return what each returned or raised."""
    results: list[object] = [None] * len(acts)
    barrier = threading.Barrier(len(acts))

    def run(number: int) -> None:
        barrier.wait(WAIT_S)
        try:
            results[number] = acts[number]()
        except BaseException as error:  # noqa: BLE001 - told on the main thread
            results[number] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


BIG = bytes(4 << 20)
HASTY: dict[str, Callable[[Site], object]] = {
    "put": lambda s: s.store.put(s.key(9), NEW),
    "put big": lambda s: s.store.put_new(s.key(8), BIG, is_deferred=True),
    "get": lambda s: s.store.get(s.key(0), max_bytes=1 << 20),
    "read_into": lambda s: s.store.read_into(s.key(0), 1000, memoryview(bytearray(1000))),
    "list": listed,
    "delete": lambda s: s.store.delete(s.key(6)),
    "now_s": lambda s: s.store.now_s(),
}
WITH_ANSWERS = {"get", "read_into", "list", "now_s"}


# --- faults ----------------------------------------------------------------------------------


PASSING = [
    Status(500, "InternalError"), Status(503, "SlowDown"), Status(429, "TooManyRequests"),
    Status(400, "RequestTimeout"),
]  # fmt: skip

CREDENTIALS = [
    Status(400, "ExpiredToken"), Status(403, "RequestTimeTooSkewed"),
    Status(403, "InvalidAccessKeyId"), Status(403, "SignatureDoesNotMatch"),
]  # fmt: skip


class Expired(Fault):
    """Refuse one token; others pass."""

    def __init__(self, token: str) -> None:
        self.token = token

    def act(self, link: Link) -> None:
        is_old = link.request.header("x-amz-security-token") == self.token
        (Status(400, "ExpiredToken") if is_old else Fault()).act(link)


class OtherRange(Fault):
    """Answer a request for a range with another one of the same length, and say so."""

    def __str__(self) -> str:
        return "OtherRange"

    def act(self, link: Link) -> None:
        answer = link.ask()
        moved = answer.edited(
            "content-range", lambda old: old.replace("bytes 500-1499", "bytes 0-999")
        )
        link.answer(replace(moved, body=OLD[:1000]))


@dataclass(frozen=True)
class Page(Fault):
    """Answer 200 with a page of a network that wants to be logged in to, or with nothing."""

    html: bytes = b"<html><body>Please log in</body></html>"
    headers: tuple[tuple[str, str], ...] = field(default=(("Content-Type", "text/html"),))

    def act(self, link: Link) -> None:
        link.read()
        link.answer(Message("HTTP/1.1 200 OK", self.headers, self.html))


# --- checks ----------------------------------------------------------------------------------


def check_nothing_is_not_found(store: RemoteStore, kind: type[StoreError]) -> None:
    out = memoryview(bytearray(10))
    acts: dict[str, Callable[[], object]] = {
        "put": lambda: store.put("attempts/0001", b"x"),
        "put_new": lambda: store.put_new("attempts/0001", b"x"),
        "get": lambda: store.get("attempts/0001", max_bytes=10),
        "read_into": lambda: store.read_into("attempts/0001", 0, out),
        "size": lambda: store.read_into("attempts/0001", 0, out[:0]),
        "list": lambda: list(store.list("attempts/")),
        "delete": lambda: store.delete("attempts/0001"),
        "now_s": store.now_s,
        "check_root": lambda: check_root(store),
        "create_root": lambda: create_root(store),
    }
    for name, act in acts.items():
        with pytest.raises(kind) as caught:
            act()
        assert type(caught.value) is kind, f"{name}: {caught.value!r}"


def check_disconnected(proxy: FaultProxy) -> None:
    """Check that no client is connected any more."""
    for link in proxy._threads:
        link.join(WAIT_S)  # it ends with its connection
    assert [link for link in proxy._threads if link.is_alive()] == []


SECRETS = ("CANARYSECRET", "CANARYTOKEN")
PROVOKED = [
    Status(503, "SlowDown"), Status(403, "AccessDenied"), Status(403, "SignatureDoesNotMatch"),
    Status(400, "ExpiredToken"), Status(404, "NoSuchBucket"), Status(404, "NoSuchKey"),
    Status(412, "PreconditionFailed"), Status(416, "InvalidRange"), Status(418, "Teapot"),
    Status(507), OkWithError("InternalError"), ResetBefore(), Truncated(), Page(),
]  # fmt: skip


def check_silent(text: str) -> None:
    for secret in SECRETS:
        assert secret not in text, "it tells a secret"


def told(error: BaseException) -> str:
    """Return all that is shown of an error and of those that led to it."""
    text, link = "".join(traceback.format_exception(error)), error
    while link is not None:
        text += repr(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return text


def error_of(act: Callable[[], object]) -> CkptdError | None:
    try:
        act()
    except CkptdError as error:
        return error
    return None
