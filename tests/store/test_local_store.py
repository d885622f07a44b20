from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.store.local import LocalStore
from tests.contracts.store_contract import StoreContract


class TestLocalStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(str(tmp_path / "root"))


class TestLocalStoreBuffered(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(str(tmp_path / "root"), is_direct=False)


class TestLocalStoreNamedTemps(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(str(tmp_path / "deep" / "down" / "root"), is_unnamed=False)
