"""What is read of a checkpoint on S3, seen from the server."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ckptd
from ckptd.codec.blocks import BLOCK_BYTES
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.s3_server import S3Server

MIB = 1 << 20


@pytest.fixture
def options(moto: S3Server) -> dict[str, Any]:
    return {"endpoint_url": moto.url, "key": "a", "secret": "b"}


@pytest.fixture
def root(bucket: str, options: dict[str, Any]) -> Iterator[str]:
    """A checkpoint of 48 MiB in six tensors."""
    url = f"s3://{bucket}/run"
    torch.manual_seed(1)
    state = {f"t{n}": torch.randn(2, MIB) for n in range(6)}
    with ckptd.Checkpointer(url, storage_options=options, daemon=False, slots=1) as ckpt:
        ckpt.save(1, state).result()
    return url


def fetched_bytes(proxy: FaultProxy) -> int:
    """Return how many bytes of chunks were asked for."""
    total = 0
    for asked in proxy.requests:
        if "/chunks/" in asked.path:
            found = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", asked.headers["range"])
            assert found
            total += int(found[2]) - int(found[1]) + 1
    return total


def test_one_tensor_of_many_costs_its_own_blocks_only(
    root: str, options: dict[str, Any], proxy: FaultProxy
) -> None:
    through = {**options, "endpoint_url": proxy.url}
    state = ckptd.load(root, select="t3", storage_options=through)
    torch.manual_seed(1)
    wanted = [torch.randn(2, MIB) for _ in range(4)][3]
    assert torch.equal(state["t3"], wanted)
    assert 0 < fetched_bytes(proxy) <= 8 * MIB + 2 * BLOCK_BYTES + 4096


def test_a_whole_checkpoint_costs_each_byte_once(
    root: str, options: dict[str, Any], proxy: FaultProxy
) -> None:
    through = {**options, "endpoint_url": proxy.url}
    state = ckptd.load(root, storage_options=through)
    stored = sum(entry for entry in [ckptd_stored(root, options)])
    assert len(state) == 6
    assert stored <= fetched_bytes(proxy) <= stored + 6 * 4096
    assert {asked.method for asked in proxy.requests} == {"GET"}


def test_nothing_of_the_store_is_left_in_the_process_that_restored(
    root: str, options: dict[str, Any]
) -> None:
    state = {f"t{n}": torch.zeros(2, MIB) for n in range(6)}
    with ckptd.Checkpointer(root, storage_options=options, daemon=False) as ckpt:
        assert ckpt.resume(state) is not None
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith("ckptd-s3")]
    assert state["t0"].any()


def ckptd_stored(root: str, options: dict[str, Any]) -> int:
    with ckptd.Checkpointer(root, storage_options=options, daemon=False) as ckpt:
        return ckpt.checkpoints()[0].stored_bytes
