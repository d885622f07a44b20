"""What saves the state of a job in S3: torch's DCP, AWS's connector for it, and ckptd."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
import torch.distributed.checkpoint as dcp
import xxhash

import ckptd
from bench.content import look_trained
from bench.engine import WAIT_S
from bench.s3_clients import Client, Part, Threaded
from ckptd.cli import status
from ckptd.model import keys
from ckptd.store.open import open_store
from ckptd.store.remote import TRAITS
from ckptd.wire.address import socket_path

_WIDTH = 4096


def tensors_of(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """Return a tensor of bytes for each part, in the same memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bytes cannot be written to, and are not
        return {
            f"{number:04d}": torch.frombuffer(part, dtype=torch.uint8)
            for number, part in enumerate(parts)
        }


class DcpFsspec(Client):
    """DCP with the writer and reader that come with torch, on s3fs."""

    name = "dcp-fsspec"
    threads = 8
    note = "FsspecWriter on s3fs, 8 threads and files, blocks of 50 MiB (s3fs's own)"

    def put(self, turn: int, parts: Sequence[bytes]) -> None:
        """Save; nothing to sync in an object store."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        writer = FsspecWriter(
            self._url(turn), thread_count=self.threads, sync_files=False,
            **self.place.s3fs_options(),
        )  # fmt: skip
        dcp.save(tensors_of(parts), storage_writer=writer, no_dist=True)

    def get(self, turn: int, out: Sequence[memoryview]) -> Sequence[Part]:
        """Load in place."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

        reader = FsspecReader(self._url(turn), **self.place.s3fs_options())
        dcp.load(tensors_of(out), storage_reader=reader, no_dist=True)
        return out

    def _url(self, turn: int) -> str:
        return f"s3://{self.place.bucket}/{self.place.prefix}/{turn:04d}"


class DcpS3torch(DcpFsspec):
    """DCP with the writer and reader of s3torchconnector, on AWS's common runtime."""

    name = "dcp-s3torch"
    needs = "s3torchconnector"
    note = "S3StorageWriter and S3StorageReader, 8 threads and files, parts of 32 MiB"

    def open(self, parts: Sequence[bytes]) -> None:
        """Make the client; the writer has no argument for an endpoint and gets it afterwards."""
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client

        del parts
        config = S3ClientConfig(
            force_path_style=self.place.endpoint is not None, part_size=32 << 20
        )
        self._client = S3Client(
            self.place.region, endpoint=self.place.endpoint, s3client_config=config
        )

    def put(self, turn: int, parts: Sequence[bytes]) -> None:
        """Save."""
        from s3torchconnector.dcp import S3StorageWriter

        writer = S3StorageWriter(self.place.region, self._url(turn), thread_count=self.threads)
        writer.fs._client = self._client
        dcp.save(tensors_of(parts), storage_writer=writer, no_dist=True)

    def get(self, turn: int, out: Sequence[memoryview]) -> Sequence[Part]:
        """Load in place."""
        from s3torchconnector.dcp import S3StorageReader

        reader = S3StorageReader(self.place.region, self._url(turn))
        reader.fs._client = self._client
        dcp.load(tensors_of(out), storage_reader=reader, no_dist=True)
        return out


class CkptdClient(Threaded):
    """The store that ckptd's daemon writes to, alone."""

    name = "ckptd-client"
    note = f"put_new and read_into, as a save and a restore do, from {TRAITS.requests} threads"
    threads = TRAITS.requests
    window_bytes = TRAITS.window_bytes
    query = ""

    def open(self, parts: Sequence[bytes]) -> None:
        """Open the store."""
        super().open(parts)
        url = f"s3://{self.place.bucket}/{self.place.prefix}{self.query}"
        self._store = open_store(url, self.place.ckptd_options())

    def close(self) -> None:
        """End its loop."""
        super().close()
        self._store.close()

    def put(self, turn: int, parts: Sequence[bytes]) -> None:
        """Create a chunk per part."""
        names = [self._name(turn, number) for number in range(len(parts))]
        self.each(self._store.put_new, names, parts)

    def get(self, turn: int, out: Sequence[memoryview]) -> Sequence[Part]:
        """Read windows, as a restore does."""
        step = self.window_bytes
        reads = [
            (self._name(turn, number), at, view[at : at + step])
            for number, view in enumerate(out)
            for at in range(0, view.nbytes, step)
        ]
        self.each(self._store.read_into, *zip(*reads, strict=True))
        return out

    @staticmethod
    def _name(turn: int, number: int) -> str:
        digest = xxhash.xxh3_128_hexdigest(f"{turn} {number}".encode())
        return keys.ChunkId(digest, keys.StepId(attempt=1, step=turn)).key


class CkptdObstoreClient(CkptdClient):
    """The same through the optional client."""

    name = "ckptd-client-obstore"
    note = "as ckptd-client, with ?client=obstore"
    needs = "obstore"
    query = "?client=obstore"


class Ckptd(Client):
    """A whole save: chunks, the rank's record and the commit, by a daemon that runs already."""

    name = "ckptd"
    note = 'compression="none": put is from save() to the commit, get is ckptd.restore()'
    compression = "none"
    query = ""
    budget_bytes = TRAITS.budget_bytes

    def open(self, parts: Sequence[bytes]) -> None:
        """Reserve both slots and begin to start the daemon."""
        self._tensors = self.state(parts)
        self._ckpt = self._checkpointer()
        self._ckpt.prepare({"tensors": self._tensors})
        self._ckpt._preparation.join()

    def state(self, parts: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """Return what is saved."""
        return tensors_of(parts)

    def put(self, turn: int, parts: Sequence[bytes]) -> None:
        """Save, and wait until it is durable."""
        del parts
        handle = self._ckpt.save(turn, {"tensors": self._tensors})
        self._ckpt.wait(WAIT_S)
        if not handle.is_done:
            raise RuntimeError(f"step {turn} was not durable within {WAIT_S} s")
        if not self.pids:  # the first save, which does not count
            options = self._ckpt.options
            path = socket_path(options.url, options.storage_options, os.environ)
            answer = status._ask(path)
            if isinstance(answer, str):
                raise RuntimeError(f"the daemon does not answer: {answer}")
            self.pids = [answer["pid"]]

    def get(self, turn: int, out: Sequence[memoryview]) -> Sequence[Part]:
        """Restore into live tensors, as another job would that goes on from here."""
        del turn
        ckptd.restore(
            self._ckpt.options.url, {"tensors": self.live(out)},
            storage_options=self.place.ckptd_options(),
        )  # fmt: skip
        return out

    def live(self, out: Sequence[memoryview]) -> dict[str, torch.Tensor]:
        """Return the tensors that are filled."""
        return tensors_of(out)

    def discard(self, turn: int) -> None:
        """Delete what belongs to the step; the attempt stays."""
        mark = str(keys.StepId(attempt=self._ckpt.attempt.ordinal, step=turn))
        self.place.clear([key for key in self.place.sizes() if mark in key])

    def close(self) -> None:
        """Say goodbye to the daemon, which then ends."""
        self._ckpt.close()

    def _checkpointer(self) -> ckptd.Checkpointer:
        return ckptd.Checkpointer(
            f"s3://{self.place.bucket}/{self.place.prefix}{self.query}", compression=self.compression,
            storage_options=self.place.ckptd_options(),
        )  # fmt: skip


class CkptdObstore(Ckptd):
    """The same through the optional client."""

    name = "ckptd-obstore"
    note = "as ckptd, with ?client=obstore"
    needs = "obstore"
    query = "?client=obstore"


class CkptdAuto(Ckptd):
    """The defaults, on weights that look trained."""

    name = "ckptd-auto"
    note = 'compression="auto" on fp32 weights that look trained: MB/s of the state, less is stored'
    compression = "auto"

    def state(self, parts: Sequence[bytes]) -> dict[str, torch.Tensor]:
        """Make weights of as many bytes."""
        made = {f"{n:04d}": torch.empty(len(p) // 4) for n, p in enumerate(parts)}
        for tensor in made.values():
            look_trained(tensor.view(-1, min(_WIDTH, len(tensor))))
        return made

    def live(self, out: Sequence[memoryview]) -> dict[str, torch.Tensor]:
        """Return the same memory as weights."""
        return {name: part.view(torch.float32) for name, part in tensors_of(out).items()}


def expected(client: Client, parts: Sequence[bytes]) -> Sequence[Part]:
    """Return what a client must read back."""
    if isinstance(client, CkptdAuto):
        return [memoryview(t.numpy()).cast("B") for t in client._tensors.values()]
    return parts
