"""S3 and what speaks its protocol, through the clients that s3fs makes.

s3fs reads the settings (endpoint, profile, encryption, …) and builds the client; requests go to that
client directly. s3fs's own calls would try again below our deadline, turn errors into a few
`OSError`s, and keep listings (see docs/design.md, section 9).
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import botocore.exceptions as boto
from aiohttp import ClientError as HttpError
from urllib3.exceptions import HTTPError as PlainHttpError

from ckptd.errors import (
    CkptdError,
    ConfigError,
    CredentialsError,
    StoreError,
    StoreUnavailableError,
    StoreUnsupportedError,
)
from ckptd.store.base import Buffer, Entry
from ckptd.store.bodies import Body, Target, fill
from ckptd.store.client import Limits, Page
from ckptd.store.codes import answer_of, translate
from ckptd.store.loop import LoopThread
from ckptd.store.s3_reader import S3Reader, check_object, size_of
from ckptd.store.s3_settings import S3Settings

_NO_CREDENTIALS = (
    boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError,
    boto.NoAuthTokenError, boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError,
    boto.TokenRetrievalError, boto.RefreshWithMFAUnsupportedError,
)  # fmt: skip
_SETTINGS = (
    boto.ParamValidationError, boto.InvalidRegionError, boto.NoRegionError, boto.ProfileNotFound,
    boto.InvalidConfigError, boto.UnknownServiceError, boto.InvalidEndpointConfigurationError,
    boto.ConfigParseError, boto.ConfigNotFound,
)  # fmt: skip
_USER = re.compile(r"//[^/@\s]+@")  # in a URL, perhaps with a password
_UNAVAILABLE = (
    TimeoutError, asyncio.TimeoutError, boto.BotoCoreError, HttpError, PlainHttpError, OSError,
)  # fmt: skip


class S3Client:
    """See `ObjectClient`. Objects of one bucket, below `prefix` (empty, or with a slash at its end).

    `options` are those of `s3fs.S3FileSystem`. Its event loop runs on a thread of its own, which
    ends, with all connections, in `close`.

    Attributes:
        settings: what clients are made of.
    """

    def __init__(
        self, bucket: str, prefix: str, options: Mapping[str, object], limits: Limits
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._limits = limits
        self._loop = LoopThread("ckptd-s3")
        self._is_checked = False  # whether requests carry checksums; the client's settings say
        self._versions = False
        self._building = asyncio.Lock()  # of the loop's tasks, one builds the client
        self._client: Any = None
        self._former: list[Any] = []
        try:
            self.settings = S3Settings(options, self._loop.loop)
        except ConfigError:
            self._loop.close()
            raise
        self._reader = S3Reader(self.settings, bucket)

    @property
    def is_versioned(self) -> bool:
        """See `ObjectClient.is_versioned`."""
        return self._versions

    def put(self, key: str, data: Buffer, *, if_absent: bool) -> bool:
        """See `ObjectClient.put`. The server checks a CRC-32 of the bytes, if it is to be sent."""
        view = memoryview(data).cast("B")
        kwargs: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        try:
            with self._border(key):
                if self._client is None:
                    self._run(self._connected(), 0)
                if self._is_checked:
                    digest = zlib.crc32(view).to_bytes(4, "big")
                    kwargs["ChecksumCRC32"] = base64.b64encode(digest).decode()
                answer = self._run(
                    self._call("put_object", key, Body=Body(view), **kwargs), view.nbytes
                )
        except StoreUnsupportedError:
            if not if_absent:
                raise
            return False
        except StoreUnavailableError as error:
            if _is_redirect(error.__cause__):
                self.page("attempts/", None)  # from a listing, botocore learns the region
            raise
        if not answer.get("ETag"):
            raise StoreUnavailableError(key, "the answer to a PUT names no object; read back")
        self._versions = self._versions or answer.get("VersionId", "null") != "null"
        return True

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        with self._border(key):
            # The answer's length is not known yet; how long it may take is decided when it is.
            data: bytes = self._run(self._get(key, max_bytes), max_bytes)
            return data

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """See `Store.read_into`."""
        with self._border(key):
            timeout_s = self._limits.timeout_s(out.nbytes)
            return self._reader.read(self._prefix + key, key, offset, out, timeout_s)

    def size(self, key: str) -> int:
        """See `ObjectClient.size`."""
        with self._border(key):
            size: int = self._run(self._size(key), 0)
            return size

    def page(self, prefix: str, after: str | None) -> Page:
        """See `ObjectClient.page`."""
        where = self._prefix + prefix
        kwargs = {"ContinuationToken": after} if after else {}
        with self._border(prefix):
            answer = self._run(self._call("list_objects_v2", None, Prefix=where, **kwargs), 0)
        if "IsTruncated" not in answer:
            raise StoreUnavailableError(prefix, "what the store answered is no listing")
        after = answer.get("NextContinuationToken") if answer["IsTruncated"] else None
        if answer["IsTruncated"] and not after:
            raise StoreUnavailableError(prefix, "the listing ends before its last page")
        entries = [
            Entry(row["Key"][len(self._prefix) :], row["Size"], row["LastModified"].timestamp())
            for row in answer.get("Contents", ())
        ]
        return Page(entries, after)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._border(key):
            self._run(self._call("delete_object", key), 0)

    def now_s(self) -> float:
        """See `Store.now_s`: the time at which the server answered a listing of one name."""
        with self._border("attempts/"):
            where = self._prefix + "attempts/"
            answer = self._run(self._call("list_objects_v2", None, Prefix=where, MaxKeys=1), 0)
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
        try:
            return email.utils.parsedate_to_datetime(date).timestamp()
        except (TypeError, ValueError):
            raise StoreUnavailableError("attempts/", "the store does not tell the time") from None

    def renew(self) -> None:
        """See `ObjectClient.renew`. Requests under way end on the client that they began with."""
        self._reader.renew()
        client, self._client = self._client, None
        if client is not None:
            self._former.append(client)

    def close(self) -> None:
        """See `Store.close`."""
        self.renew()
        try:
            while self._former:
                self._run(self._former.pop().close(), 0)
        except TimeoutError:
            pass  # the loop goes, and what is open with it
        finally:
            self._loop.close()
            self._reader.close()

    # --- one request -------------------------------------------------------------------------------

    def _run(self, coroutine: Any, count: int) -> Any:
        return self._loop.run(coroutine, self._limits.timeout_s(count))

    async def _connected(self) -> Any:
        """Return the client; build it if there is none. Nothing is sent."""
        async with self._building:
            if self._client is None:
                client = await self.settings.make_client()
                config = client.meta.config
                self._is_checked = config.request_checksum_calculation != "when_required"
                self._client = client
            return self._client

    async def _call(self, method: str, key: str | None, **kwargs: Any) -> Any:
        await self._connected()
        # That one, or one of the bucket's own region.
        client = await self.settings.files.get_s3(self._bucket)
        operation = getattr(client, method)
        if key is not None:
            kwargs["Key"] = self._prefix + key
        kwargs["Bucket"] = self._bucket
        # Encryption and the like, from the options, as far as the operation takes them.
        return await operation(**self.settings.added_to(operation, kwargs))

    async def _get(self, key: str, max_bytes: int) -> bytes:
        answer = await asyncio.wait_for(self._call("get_object", key), self._limits.timeout_s(0))
        count = answer["ContentLength"]
        async with answer["Body"] as body:
            check_object(answer, key)
            if count > max_bytes:
                body.close()
                raise StoreError(key, f"{count} bytes, more than the {max_bytes} allowed")
            data = bytearray(count)
            filling = fill(body, Target(memoryview(data)), key)
            await asyncio.wait_for(filling, self._limits.timeout_s(count))
        return bytes(data)

    async def _size(self, key: str) -> int:
        """Ask for one byte: the answer to a HEAD has no body that says why something failed."""
        try:
            answer = await self._call("get_object", key, Range="bytes=0-0")
        except boto.ClientError as error:
            if answer_of(error.response).status == 416:
                return 0
            raise
        answer["Body"].close()
        return size_of(answer, key)

    @contextmanager
    def _border(self, key: str) -> Iterator[None]:
        """Translate each error of the libraries below into one of ours that names `key`."""
        try:
            yield
        except CkptdError:
            raise
        except boto.ClientError as error:
            raise translate(answer_of(error.response), key) from error
        except _NO_CREDENTIALS as error:
            raise CredentialsError(
                key, f"no usable credentials for s3://{self._bucket} ({error}); set AWS_PROFILE or "
                "AWS_ACCESS_KEY_ID, or storage_options",
            ) from error  # fmt: skip
        except _SETTINGS as error:
            raise ConfigError(f"s3://{self._bucket}: {error}") from error
        except _UNAVAILABLE as error:
            why = _USER.sub("//", str(error) or type(error).__name__)
            cause = error if why == str(error) else None  # which would tell all the same
            raise StoreUnavailableError(key, f"s3://{self._bucket} failed ({why})") from cause


def _is_redirect(error: BaseException | None) -> bool:
    """Tell whether aiohttp was sent elsewhere with a body that it cannot send again."""
    sent = getattr(error, "kwargs", {}).get("error")
    return isinstance(sent, HttpError) and "redirect" in str(sent)
