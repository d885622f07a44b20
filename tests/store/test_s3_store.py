from __future__ import annotations

from collections.abc import Iterator

import pytest

from ckptd.store.base import Store
from ckptd.store.open import open_store
from tests.contracts.store_contract import StoreContract
from tests.fakes.s3_server import MotoServer, S3Server


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    with MotoServer() as server:
        yield server


class TestS3Store(StoreContract):
    @pytest.fixture
    def store(self, moto: S3Server, request) -> Iterator[Store]:
        import secrets

        name = moto.make_bucket("b" + secrets.token_hex(8))
        store = open_store(
            f"s3://{name}/run", {"endpoint_url": moto.url, "key": "a", "secret": "b"}
        )
        yield store
        store.close()
