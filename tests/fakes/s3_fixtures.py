"""Fixtures of an S3 server; a conftest imports them by name.

The server is moto, or what `CKPTD_TEST_S3_ENDPOINT` names: there, tests use unique prefixes of the
bucket `CKPTD_TEST_S3_BUCKET`, and the credentials that the environment holds.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from ckptd.store.open import open_store
from ckptd.store.remote import RemoteStore
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.s3_server import MotoServer, S3Server

ENDPOINT = "CKPTD_TEST_S3_ENDPOINT"
BUCKET = "CKPTD_TEST_S3_BUCKET"


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """The server, started with the first test that needs it."""
    with _server() as server:
        yield server


@pytest.fixture
def bucket(moto: S3Server) -> str:
    """A place of its own for each test: "bucket", or "bucket/prefix" on a server that is real."""
    unique = f"ckptd-{uuid.uuid4().hex}"
    if isinstance(moto, MotoServer):
        return moto.make_bucket(unique)
    return f"{os.environ[BUCKET]}/{unique}"


@pytest.fixture
def proxy(moto: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the server; requests through it need not know."""
    if not isinstance(moto, MotoServer):
        pytest.skip(f"faults are made before moto only, and {ENDPOINT} is set")
    with FaultProxy(moto.url) as proxy:
        yield proxy


@pytest.fixture
def open_s3(moto: S3Server, bucket: str) -> Iterator[Callable[..., RemoteStore]]:
    """Open roots of the server, as `open_store` does; all are closed after the test.

    `through` names a proxy to go through, `url` another root; the rest are storage options.
    """
    opened: list[RemoteStore] = []

    def open_one(
        *, through: FaultProxy | None = None, url: str | None = None, **options: object
    ) -> RemoteStore:
        store = open_store(
            url or f"s3://{bucket}/run",
            {"endpoint_url": (through or moto).url, "key": moto.env.get("AWS_ACCESS_KEY_ID"),
             "secret": moto.env.get("AWS_SECRET_ACCESS_KEY"), **options},
        )  # fmt: skip
        assert isinstance(store, RemoteStore)
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def open_obstore(open_s3: Callable[..., RemoteStore], bucket: str) -> Callable[..., RemoteStore]:
    """Open the same roots through obstore; no call is tried again."""
    url = f"s3://{bucket}/run?client=obstore"
    return lambda **options: open_s3(**{"url": url, "attempts": 1, **options})


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of a `RemoteStore` between attempts, which take no time."""
    seen: list[float] = []
    clock = SimpleNamespace(sleep=seen.append, monotonic=time.monotonic)
    monkeypatch.setattr("ckptd.store.remote.time", clock)
    monkeypatch.setattr("ckptd.store.remote._RENEW_S", -1.0)  # tests share a store
    return seen


def _server() -> S3Server:
    endpoint = os.environ.get(ENDPOINT)
    if endpoint is None:
        return MotoServer()
    assert os.environ.get(BUCKET), f"{ENDPOINT} is set: name a bucket in {BUCKET} as well"
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return S3Server(endpoint, aws)
