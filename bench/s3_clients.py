"""The S3 clients that are measured: each puts the same objects and reads them back into memory."""

from __future__ import annotations

import http.client
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from bench.s3_place import Place

THREADS = 16  # as many requests as ckptd has under way
BLOCK_BYTES = 64 << 20  # above the size of any object: one request each

Part = bytes | bytearray | memoryview


class Client:
    """One way to put objects into a bucket and to read them back.

    Attributes:
        name: what tables and `--only` call it.
        needs: the distribution that it comes from, None for what ckptd itself needs.
        note: settings that are not the client's own defaults.
        pids: the processes that work for it beside this one.
        budget_bytes: what it promises to hold in memory at most, None if it promises nothing.
    """

    name = ""
    needs: str | None = None
    note = ""
    pids: Sequence[int] = ()
    budget_bytes: int | None = None

    def __init__(self, place: Place) -> None:
        self.place = place.below(self.name)

    def open(self, parts: Sequence[bytes]) -> None:
        """Get ready, as a job would before its first checkpoint; `parts` is what will be put."""

    def put(self, turn: int, parts: Sequence[bytes]) -> None:
        """Put the parts; return when the server has acknowledged them all."""
        raise NotImplementedError

    def get(self, turn: int, out: Sequence[memoryview]) -> Sequence[Part]:
        """Read what `put` stored in that turn, into `out` or into memory of the client's own."""
        raise NotImplementedError

    def discard(self, turn: int) -> None:
        """Delete what was put in that turn. Not timed."""
        del turn
        self.place.clear()

    def close(self) -> None:
        """Let go of threads and processes."""

    def key(self, turn: int, number: int) -> str:
        """Return the key of an object."""
        return f"{self.place.prefix}/{turn:04d}/{number:04d}"

    def path(self, turn: int, number: int) -> str:
        """Return what fsspec calls it."""
        return f"{self.place.bucket}/{self.key(turn, number)}"


class Threaded(Client):
    """A client whose calls block, called from a few threads."""

    threads = THREADS

    def open(self, parts: Sequence[bytes]) -> None:
        """Make the threads."""
        super().open(parts)
        self._pool = ThreadPoolExecutor(self.threads)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def each(self, call: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
        """Return what the calls return, in order; all are under way together."""
        return list(self._pool.map(call, *columns))

    def put(self, turn: int, parts: Sequence[bytes]) -> None:
        """Put an object per part."""
        self.each(lambda number, part: self.put_one(self.key(turn, number), part),
                  range(len(parts)), parts)  # fmt: skip

    def get(self, turn: int, out: Sequence[memoryview]) -> Sequence[Part]:
        """Read all objects whole."""
        return self.each(lambda number, view: self.get_one(self.key(turn, number), view),
                         range(len(out)), out)  # fmt: skip

    def put_one(self, key: str, part: bytes) -> None:
        """Put one object."""
        raise NotImplementedError

    def get_one(self, key: str, view: memoryview) -> Part:
        """Read one object."""
        raise NotImplementedError


class Floor(Threaded):
    """No client at all: the standard library's HTTP, and links that were signed beforehand."""

    name = "floor"
    note = "bare HTTP from the caller's memory and into it, no checksum, 4 threads"
    threads = 4

    def open(self, parts: Sequence[bytes]) -> None:
        """Make a client that only signs, and the connections."""
        super().open(parts)
        self._signer = self.place.client()
        self._idle: list[http.client.HTTPConnection] = []

    def close(self) -> None:
        """Close all connections."""
        super().close()
        self._signer.close()
        for connection in self._idle:
            connection.close()

    def put_one(self, key: str, part: bytes) -> None:
        """PUT it in one call of `send`."""
        self._ask("PUT", "put_object", key, part, lambda answer: answer.read())

    def get_one(self, key: str, view: memoryview) -> Part:
        """GET it into place."""
        self._ask("GET", "get_object", key, None, lambda answer: _fill(answer, view))
        return view

    def _ask(self, method: str, operation: str, key: str, body: bytes | None,
             take: Callable[[http.client.HTTPResponse], object]) -> None:  # fmt: skip
        url = urlsplit(self._signer.generate_presigned_url(
            operation, Params={"Bucket": self.place.bucket, "Key": key}
        ))  # fmt: skip
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = self._idle.pop() if self._idle else kind(url.netloc, timeout=60)
        connection.request(method, f"{url.path}?{url.query}", body)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{method}: {answer.status} {answer.read(500)!r}")
        take(answer)
        self._idle.append(connection)


def _fill(answer: http.client.HTTPResponse, view: memoryview) -> None:
    at = 0
    while at < view.nbytes and (count := answer.readinto(view[at:])):
        at += count
    if at < view.nbytes or answer.read(1):
        raise RuntimeError(f"{at} bytes and not {view.nbytes}")


class Boto3(Threaded):
    """boto3's managed transfers."""

    name = "boto3"
    needs = "boto3"
    note = "upload_fileobj and download_fileobj from 8 threads, a request per object"
    threads = 8

    def open(self, parts: Sequence[bytes]) -> None:
        """Make the client."""
        from boto3.s3.transfer import TransferConfig

        super().open(parts)
        self._client = self.place.boto3_client()
        self._config = TransferConfig(
            multipart_threshold=BLOCK_BYTES, multipart_chunksize=BLOCK_BYTES, use_threads=False,
            io_chunksize=1 << 20,
        )  # fmt: skip

    def close(self) -> None:
        """Close all connections."""
        super().close()
        self._client.close()

    def put_one(self, key: str, part: bytes) -> None:
        """Upload from a file in memory that shares the bytes."""
        self._client.upload_fileobj(io.BytesIO(part), self.place.bucket, key, Config=self._config)

    def get_one(self, key: str, view: memoryview) -> Part:
        """Download into place."""
        self._client.download_fileobj(self.place.bucket, key, _Memory(view), Config=self._config)
        return view


class _Memory(io.RawIOBase):
    """The caller's memory as a file."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._view.nbytes)[whence]
        return self._at

    def write(self, data: Any) -> int:
        begin, self._at = self._at, self._at + len(data)
        self._view[begin : self._at] = data
        return len(data)


class S3fsPipe(Client):
    """s3fs, whole objects at once on its event loop."""

    name = "s3fs-pipe"
    note = "pipe and cat of 16 objects at once, a request each"

    def open(self, parts: Sequence[bytes]) -> None:
        """Make the file system."""
        import s3fs

        del parts
        self._files = s3fs.S3FileSystem(
            **self.place.s3fs_options(), max_concurrency=1, skip_instance_cache=True,
            use_listings_cache=False,
        )  # fmt: skip

    def put(self, turn: int, parts: Sequence[bytes]) -> None:
        """Send all; s3fs limits how many are under way."""
        named = {self.path(turn, number): part for number, part in enumerate(parts)}
        self._files.pipe(named, batch_size=THREADS, chunksize=BLOCK_BYTES)

    def get(self, turn: int, out: Sequence[memoryview]) -> Sequence[Part]:
        """Return new bytes."""
        paths = [self.path(turn, number) for number in range(len(out))]
        found = self._files.cat(paths, batch_size=THREADS, on_error="raise")
        return [found[path] for path in paths]


class S3fsFile(Threaded):
    """s3fs, through its files."""

    name = "s3fs-file"
    note = "open, write and read from 4 threads, blocks of 64 MiB, no read-ahead cache"
    threads = 4

    def open(self, parts: Sequence[bytes]) -> None:
        """Make the file system."""
        import s3fs

        super().open(parts)
        self._files = s3fs.S3FileSystem(
            **self.place.s3fs_options(), skip_instance_cache=True, use_listings_cache=False,
            default_block_size=BLOCK_BYTES,
        )  # fmt: skip

    def put_one(self, key: str, part: bytes) -> None:
        """Write a file."""
        with self._files.open(f"{self.place.bucket}/{key}", "wb") as file:
            file.write(part)

    def get_one(self, key: str, view: memoryview) -> Part:
        """Read a file."""
        del view
        with self._files.open(f"{self.place.bucket}/{key}", "rb", cache_type="none") as file:
            data: bytes = file.read()
        return data


class Obstore(Threaded):
    """obstore, which is Rust's object_store."""

    name = "obstore"
    needs = "obstore"
    note = "put and get from 16 threads, a request per object, unsigned payload, no checksum"

    def open(self, parts: Sequence[bytes]) -> None:
        """Make the store."""
        from obstore.store import S3Store

        super().open(parts)
        self._store = S3Store(self.place.bucket, **obstore_options(self.place))

    def put_one(self, key: str, part: bytes) -> None:
        """Put it from the caller's memory."""
        import obstore

        obstore.put(self._store, key, part, use_multipart=False)

    def get_one(self, key: str, view: memoryview) -> Part:
        """Return memory of obstore's own."""
        import obstore

        del view
        return memoryview(obstore.get(self._store, key).bytes())


class ObstoreFsspec(Threaded):
    """obstore as a file system of fsspec."""

    name = "obstore-fsspec"
    needs = "obstore"
    note = "pipe_file and cat_file from 16 threads; it always puts parts of 5 MiB"

    def open(self, parts: Sequence[bytes]) -> None:
        """Make the file system."""
        from obstore.fsspec import FsspecStore

        super().open(parts)
        options = obstore_options(self.place)
        client = options.pop("client_options")
        self._files = FsspecStore("s3", config=options, client_options=client)

    def put_one(self, key: str, part: bytes) -> None:
        """Put it from the caller's memory."""
        self._files.pipe_file(f"s3://{self.place.bucket}/{key}", part)

    def get_one(self, key: str, view: memoryview) -> Part:
        """Return new bytes."""
        del view
        data: bytes = self._files.cat_file(f"s3://{self.place.bucket}/{key}")
        return data


def obstore_options(place: Place) -> dict[str, Any]:
    """Return the configuration of obstore's S3 store."""
    options: dict[str, Any] = {
        "access_key_id": place.key, "secret_access_key": place.secret, "region": place.region,
        "unsigned_payload": True, "client_options": {"allow_http": place.is_plain},
        "virtual_hosted_style_request": place.endpoint is None,
    }  # fmt: skip
    if place.endpoint:
        options["endpoint"] = place.endpoint
    return {**options, "session_token": place.token} if place.token else options
