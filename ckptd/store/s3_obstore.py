"""S3 through obstore (Rust), for nodes whose network is faster than one Python thread can serve.

Chosen by ``s3://bucket/run?client=obstore``. Endpoint, region and credentials are looked up as
botocore does it, so the same environment, profiles and options mean the same as without it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import obstore
from botocore.exceptions import (
    BotoCoreError,
    ConfigNotFound,
    ConfigParseError,
    InvalidConfigError,
    ProfileNotFound,
)
from obstore.exceptions import BaseError, NotSupportedError, UnauthenticatedError
from obstore.store import S3Store

from ckptd.errors import (
    CkptdError,
    ConfigError,
    CredentialsError,
    StoreUnavailableError,
    StoreUnsupportedError,
)
from ckptd.store.base import Buffer, check_range
from ckptd.store.client import Limits, Page
from ckptd.store.codes import Answer, translate
from ckptd.store.s3 import S3Client
from ckptd.store.s3_settings import S3Settings, mapping_of
from ckptd.units import MIB

_SMALL_BYTES = MIB
_LARGE_BYTES = 80 * MIB
_KEYS_LIVE_S = 300.0
_SETTINGS = (
    TypeError, ValueError, ConfigNotFound, ConfigParseError, InvalidConfigError, ProfileNotFound,
)  # fmt: skip
_STATUS = re.compile(r"status code: ([0-9]{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_REDIRECT = "redirect without LOCATION"
_WHERE = re.compile(r"Error performing [A-Z]+ \S+ in \S+ - ")  # the URL may hold a password
_TAKEN = frozenset(
    {"key", "username", "secret", "password", "token", "anon", "profile", "endpoint_url", "use_ssl",
     "client_kwargs", "requester_pays", "s3_additional_kwargs"}
)  # fmt: skip
_CLIENT_KWARGS = frozenset(
    {"region_name", "endpoint_url", "use_ssl", "aws_access_key_id", "aws_secret_access_key",
     "aws_session_token"}
)  # fmt: skip
_HEADERS = {
    "ServerSideEncryption": "server_side_encryption",
    "SSEKMSKeyId": "sse_kms_key_id",
    "BucketKeyEnabled": "sse_bucket_key_enabled",
}


class ObstoreClient:
    """See `ObjectClient`. Takes those of s3fs's options that have a meaning here.

    Only bytes of objects go through obstore, and other calls through `S3Client`: obstore takes an
    error or a login page that comes with status 200 for a listing of nothing, cannot go on in the
    listing of a directory bucket, does not show the server's clock, and asks for sizes by HEAD,
    whose answer does not say why it fails.

    obstore has one deadline for all requests of a store, so there is a store for small ones and one
    for large ones.
    """

    def __init__(
        self, bucket: str, prefix: str, options: Mapping[str, object], limits: Limits
    ) -> None:
        _refuse_unknown("storage_options", options, _TAKEN)
        for name, known in (("client_kwargs", _CLIENT_KWARGS), ("s3_additional_kwargs", _HEADERS)):
            _refuse_unknown(f"storage_options[{name!r}]", mapping_of(options, name), known)
        self._bucket, self._prefix, self._options = bucket, prefix, dict(options)
        self._limits = limits
        self._opening = threading.Lock()  # guards the next two: one thread makes what is not there
        self._facts: Any = None
        self._stores: dict[int, S3Store] = {}
        self._versions = False
        self._s3fs = S3Client(bucket, prefix, options, limits)

    @property
    def is_versioned(self) -> bool:
        """See `ObjectClient.is_versioned`."""
        return self._versions

    def put(self, key: str, data: Buffer, *, if_absent: bool) -> bool:
        """See `ObjectClient.put`.

        Without TLS the server checks a SHA-256 of the bytes: the signed payload. That takes twice the
        time of all the rest; where TLS guards the way the payload is not signed.
        """
        view = memoryview(data).cast("B")
        mode: Any = "create" if if_absent else "overwrite"
        try:
            with self._border(key):
                done = obstore.put(
                    self._store(view.nbytes), self._prefix + key, view,
                    mode=mode, use_multipart=False,
                )  # fmt: skip
        except StoreUnsupportedError:
            if not if_absent:
                raise
            return False
        self._versions = self._versions or done.get("version") not in (None, "null")
        return True

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """See `Store.get`."""
        return self._s3fs.get(key, max_bytes=max_bytes)  # its deadline goes by what is there

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
        return self._s3fs.size(key)

    def page(self, prefix: str, after: str | None) -> Page:
        """See `ObjectClient.page`."""
        return self._s3fs.page(prefix, after)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._s3fs.delete(key)

    def now_s(self) -> float:
        """See `Store.now_s`."""
        return self._s3fs.now_s()

    def renew(self) -> None:
        """See `ObjectClient.renew`."""
        self._forget()
        self._s3fs.renew()

    def close(self) -> None:
        """See `Store.close`."""
        self._forget()
        self._s3fs.close()

    def _forget(self) -> None:
        with self._opening:
            self._facts, self._stores = None, {}

    def _store(self, count: int) -> S3Store:
        longest = 1 << max(0, count - 1).bit_length()
        most = next(size for size in (_SMALL_BYTES, _LARGE_BYTES, longest) if count <= size)
        with self._opening:
            if most not in self._stores:
                self._facts = self._facts or _resolve(self._s3fs.settings, self._options)
                self._stores[most] = self._open(self._limits.timeout_s(most))
            return self._stores[most]

    def _open(self, timeout_s: float) -> S3Store:
        who = _who(self._facts, is_anonymous=bool(self._options.get("anon")))
        extra: Any = {
            name: value
            for key, name in _HEADERS.items()
            if (value := mapping_of(self._options, "s3_additional_kwargs").get(key)) is not None
        }
        if self._options.get("requester_pays"):
            extra["request_payer"] = True
        try:
            return S3Store(
                self._bucket,
                endpoint=self._facts.meta.endpoint_url,
                region=self._facts.meta.region_name or "us-east-1",
                virtual_hosted_style_request=False,
                unsigned_payload=self._facts.meta.endpoint_url.startswith("https:"),
                client_options={
                    "timeout": timedelta(seconds=timeout_s), "allow_http": True,
                    "connect_timeout": timedelta(seconds=min(10.0, timeout_s)),
                },
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},
                **who,
                **extra,
            )  # fmt: skip
        except (BaseError, TypeError, ValueError) as error:
            raise _unfit(self._options, error) from None

    @contextmanager
    def _border(self, key: str) -> Iterator[None]:
        """Translate each error of the libraries below into one of ours that names `key`.

        obstore's texts go on with what it was told and with tracebacks: only their first line is
        shown.
        """
        try:
            yield
        except CkptdError:
            raise
        except (BaseError, OSError) as error:
            if (answer := _answer_of(error)) is not None:
                raise translate(answer, key) from None
            why = _WHERE.sub("", str(error).partition("\n")[0])[:200]
            if isinstance(error, UnauthenticatedError):
                raise _no_credentials(key, "they cannot be renewed") from None
            raise StoreUnavailableError(key, f"s3://{self._bucket} failed ({why})") from None


def _answer_of(error: Exception) -> Answer | None:
    """Read out of an error what the server answered; None where it did not."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None:
        return Answer(int(status[1]), code[1] if code else "")
    if isinstance(error, NotSupportedError):
        return Answer(501, "NotImplemented")
    # 301 and 307 look alike here; S3 names a location with each 307.
    return Answer(301, "") if _REDIRECT in text else None


def _resolve(settings: S3Settings, options: Mapping[str, object]) -> Any:
    """Make a client of botocore, which sends nothing, for what it finds out."""
    try:
        return settings.make_plain_client()
    except _SETTINGS as error:
        raise _unfit(options, error) from None
    except BotoCoreError as error:  # it asks for credentials, and does nothing else that may fail
        raise _no_credentials("", type(error).__name__) from None


def _who(client: Any, *, is_anonymous: bool) -> dict[str, Any]:
    if is_anonymous:
        return {"skip_signature": True}
    found = client._request_signer._credentials  # noqa: SLF001 - the client has no other way
    if found is None:
        raise _no_credentials("", "none were found")

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


def _no_credentials(key: str, why: str) -> CredentialsError:
    return CredentialsError(
        key, f"no usable credentials ({why}); set AWS_PROFILE or AWS_ACCESS_KEY_ID, or "
        "storage_options",
    )  # fmt: skip


def _refuse_unknown(where: str, given: Mapping[str, object], known: Collection[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"client=obstore knows no {where} {unknown}; use s3fs's client")


def _unfit(options: Mapping[str, object], error: Exception) -> ConfigError:
    """Say that options do not fit, without their values and without what `error` quotes of them."""
    why = str(error) if isinstance(error, ProfileNotFound) else type(error).__name__
    return ConfigError(f"no S3 client can be made of storage_options {sorted(options)} ({why})")
