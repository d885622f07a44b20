"""S3 through obstore (Rust), for nodes whose network is faster than one Python thread can serve.

Chosen by ``s3://bucket/run?client=obstore``. Endpoint, region and credentials are looked up as
botocore does it, so the same environment, profiles and options mean the same as without it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import botocore.session
import numpy as np
import obstore
from botocore.config import Config
from obstore.exceptions import BaseError
from obstore.store import S3Store

from ckptd.errors import (
    CkptdError,
    ConfigError,
    CredentialsError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from ckptd.store.base import Buffer, Entry, check_range
from ckptd.store.client import Limits, Page
from ckptd.store.codes import Answer, translate
from ckptd.units import MIB

_PAGE = 1000
_SMALL_BYTES = MIB
_LARGE_BYTES = 80 * MIB
_KEYS_LIVE_S = 300.0
_STATUS = re.compile(r"status code: ([0-9]{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_TAKEN = frozenset(
    {"key", "username", "secret", "password", "token", "anon", "profile", "endpoint_url", "use_ssl",
     "client_kwargs", "requester_pays", "s3_additional_kwargs"}
)  # fmt: skip
_HEADERS = {
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
    "BucketKeyEnabled": "sse_bucket_key_enabled",
}


class ObstoreClient:
    """See `ObjectClient`. Takes those of s3fs's options that have a meaning here.

    obstore has one deadline for all requests of a store, so there is a store for small ones and one
    for large ones.
    """

    def __init__(
        self, bucket: str, prefix: str, options: Mapping[str, object], limits: Limits
    ) -> None:
        unknown = sorted(set(options) - _TAKEN)
        if unknown:
            raise ConfigError(
                f"client=obstore knows no storage_options {unknown}; use s3fs's client"
            )
        self._bucket, self._prefix, self._options = bucket, prefix, dict(options)
        self._limits = limits
        self._stores: dict[int, S3Store] = {}
        self._versions = False

    @property
    def is_versioned(self) -> bool:
        """See `ObjectClient.is_versioned`."""
        return self._versions

    def put(self, key: str, data: Buffer, *, if_absent: bool) -> bool:
        """See `ObjectClient.put`. The server checks a SHA-256 of the bytes: the signed payload."""
        view = memoryview(data).cast("B")
        mode: Any = "create" if if_absent else "overwrite"
        with self._border(key):
            try:
                done = obstore.put(
                    self._store(view.nbytes), self._prefix + key, view,
                    mode=mode, use_multipart=False,
                )  # fmt: skip
            except obstore.exceptions.NotSupportedError:
                return False
        self._versions = self._versions or done.get("version") not in (None, "null")
        return True

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        with self._border(key):
            found = obstore.get(self._store(max_bytes), self._prefix + key)
            size = found.meta["size"]
            if size > max_bytes:
                raise StoreError(key, f"{size} bytes, more than the {max_bytes} allowed")
            return bytes(found.bytes())

    def read_into(self, key: str, offset: int, out: memoryview) -> int:
        """See `Store.read_into`."""
        wanted = (offset, offset + out.nbytes)
        with self._border(key):
            found = obstore.get(
                self._store(out.nbytes), self._prefix + key, options={"range": wanted}
            )
            size = found.meta["size"]
            check_range(key, offset, out.nbytes, size)
            raw = np.frombuffer(memoryview(found.bytes()), np.uint8)
        if len(raw) != out.nbytes:
            raise StoreUnavailableError(
                key, f"the store sent {len(raw)} of {out.nbytes} bytes; they may come later"
            )
        np.copyto(np.frombuffer(out, np.uint8), raw)
        return size

    def size(self, key: str) -> int:
        """See `ObjectClient.size`."""
        try:
            with self._border(key):
                return obstore.head(self._store(0), self._prefix + key)["size"]
        except ObjectNotFoundError:
            self.page("attempts/", None)  # a HEAD's 404 does not say whether there is a bucket
            raise

    def page(self, prefix: str, after: str | None) -> Page:
        """See `ObjectClient.page`."""
        where = (self._prefix + prefix).rstrip("/")
        with self._border(prefix):
            listed = obstore.list(self._store(0), where or None, offset=after, chunk_size=_PAGE)
            rows: list[Any] = list(next(iter(listed), ()))
        entries = [
            Entry(row["path"][len(self._prefix) :], row["size"], row["last_modified"].timestamp())
            for row in rows
        ]
        return Page(entries, rows[-1]["path"] if len(rows) >= _PAGE else None)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._border(key):
            obstore.delete(self._store(0), self._prefix + key)

    def now_s(self) -> float:
        """See `Store.now_s`: obstore shows no headers, so an object is made and deleted for it."""
        key = f"tmp/clock-{secrets.token_hex(8)}"
        self.put(key, b"", if_absent=False)
        try:
            with self._border(key):
                row = obstore.head(self._store(0), self._prefix + key)
                return row["last_modified"].timestamp()
        finally:
            self.delete(key)

    def renew(self) -> None:
        """See `ObjectClient.renew`."""
        self._stores = {}

    def close(self) -> None:
        """See `Store.close`."""
        self._stores = {}

    def _store(self, count: int) -> S3Store:
        most = _SMALL_BYTES if count <= _SMALL_BYTES else max(_LARGE_BYTES, count)
        if most not in self._stores:
            self._stores[most] = self._open(self._limits.timeout_s(most))
        return self._stores[most]

    def _open(self, timeout_s: float) -> S3Store:
        facts = _resolve(self._options)
        extra: Any = {
            name: value
            for key, name in _HEADERS.items()
            if (value := _mapping(self._options, "s3_additional_kwargs").get(key)) is not None
        }
        if self._options.get("requester_pays"):
            extra["request_payer"] = True
        return S3Store(
            self._bucket,
            endpoint=facts.meta.endpoint_url,
            region=facts.meta.region_name or "us-east-1",
            virtual_hosted_style_request=False,
            client_options={
                "timeout": timedelta(seconds=timeout_s), "allow_http": True,
                "connect_timeout": timedelta(seconds=min(10.0, timeout_s)),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
            **_who(facts, is_anonymous=bool(self._options.get("anon"))),
            **extra,
        )  # fmt: skip

    @contextmanager
    def _border(self, key: str) -> Iterator[None]:
        """Translate each error of the libraries below into one of ours that names `key`."""
        try:
            yield
        except CkptdError:
            raise
        except (BaseError, OSError) as error:
            text = str(error)
            status, code = _STATUS.search(text), _CODE.search(text)
            if status is None:
                why = text.partition("\n")[0][:200]
                raise StoreUnavailableError(key, f"s3://{self._bucket} failed ({why})") from None
            answer = Answer(int(status[1]), code[1] if code else "")
            raise translate(answer, key) from None


def _resolve(options: Mapping[str, Any]) -> Any:
    """Make a client of botocore, which sends nothing, for what it finds out."""
    given = {
        "aws_access_key_id": options.get("key") or options.get("username"),
        "aws_secret_access_key": options.get("secret") or options.get("password"),
        "aws_session_token": options.get("token"),
        "endpoint_url": options.get("endpoint_url"),
        "use_ssl": options.get("use_ssl", True),
    }
    given = {k: v for k, v in given.items() if v is not None}
    try:
        session = botocore.session.Session(profile=options.get("profile"))
        return session.create_client(
            "s3", config=Config(), **{**given, **_mapping(options, "client_kwargs")}
        )
    except (TypeError, ValueError, botocore.exceptions.BotoCoreError) as error:
        raise ConfigError(
            f"no S3 client can be made of storage_options {sorted(options)} ({type(error).__name__})"
        ) from None


def _who(client: Any, *, is_anonymous: bool) -> dict[str, Any]:
    if is_anonymous:
        return {"skip_signature": True}
    found = client._request_signer._credentials  # noqa: SLF001 - the client has no other way
    if found is None:
        raise CredentialsError(
            "",
            "no credentials were found; set AWS_PROFILE or AWS_ACCESS_KEY_ID, or storage_options",
        )

    def provide() -> dict[str, Any]:
        frozen = found.get_frozen_credentials()  # refreshed by botocore where they run out
        until = datetime.now(timezone.utc) + timedelta(seconds=_KEYS_LIVE_S)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": until,
        }

    return {"credential_provider": provide}


def _mapping(options: Mapping[str, object], name: str) -> dict[str, Any]:
    value = options.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"storage_options[{name!r}] must be a mapping")
    return dict(value)
