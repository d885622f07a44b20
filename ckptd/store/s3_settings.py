"""How the S3 client is made: by s3fs, of the caller's options and of what must be so."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

import s3fs
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.handlers import add_expect_header
from botocore.session import Session
from s3fs.utils import ParamKwargsHelper

from ckptd.errors import ConfigError

MAX_CONNECTIONS = 64
_OF_SESSION = frozenset({"profile"})
_LATER = object()  # stands for the session until there is one: None would make s3fs make its own
_OF_AIO = frozenset({"connector_args", "http_session_cls", "warm_up_loader_caches"})
_UNUSED = frozenset({"self", "kwargs", "loop", "asynchronous", "session"})


class S3Settings:
    """Makes clients. `options` are those of `s3fs.S3FileSystem`, which belongs to `loop`.

    Raises:
        ConfigError: they do not fit. Neither message nor chain has their values.
    """

    def __init__(self, options: Mapping[str, object], loop: asyncio.AbstractEventLoop) -> None:
        self._names = sorted(options)
        known = set(inspect.signature(s3fs.S3FileSystem.__init__).parameters) - _UNUSED
        unknown = sorted(set(options) - known - _OF_SESSION)
        if unknown:
            raise ConfigError(f"s3fs knows no storage_options {unknown}; see s3fs.S3FileSystem")
        chosen: dict[str, Any] = {k: v for k, v in options.items() if k not in _OF_SESSION}
        self._profile: Any = options.get("profile")
        for name in ("client_kwargs", "s3_additional_kwargs"):
            chosen[name] = mapping_of(chosen, name)
        for url in (chosen.get("endpoint_url"), chosen["client_kwargs"].get("endpoint_url")):
            if "@" in urlsplit(str(url or "")).netloc:
                raise ConfigError(
                    "endpoint_url must not hold a user or a password; use key, secret"
                )
        chosen |= {
            "config_kwargs": _config(chosen, self._profile),
            "session": _LATER,
            "asynchronous": True, "loop": loop,
            "skip_instance_cache": True, "use_listings_cache": False,
        }  # fmt: skip
        try:
            self.files = s3fs.S3FileSystem(**chosen)
        except (TypeError, ValueError, KeyError) as error:
            raise self._unfit(error) from None

    async def make_client(self) -> Any:
        """Make a client of aiobotocore, which looks for credentials anew; nothing is sent.

        Raises:
            ConfigError: as above.
        """
        session = AioSession(profile=self._profile)  # one that has cached no credentials
        session.register_component("data_loader", _loader())
        self.files.session = session
        try:
            client = await self.files.set_session(refresh=True)
        except (TypeError, ValueError) as error:
            raise self._unfit(error) from None
        # That header makes a request hang for ever where the server answers neither yes nor no.
        client.meta.events.unregister("before-call.s3", add_expect_header)
        client.meta.events.register("before-call.s3.HeadBucket", _ask_once)
        return client

    def make_plain_client(self) -> Any:
        """Make a client of botocore from the same options, as s3fs does; nothing is sent.

        Raises:
            ConfigError: as above.
        """
        files = self.files
        given = {
            "aws_access_key_id": files.key, "aws_secret_access_key": files.secret,
            "aws_session_token": files.token, "endpoint_url": files.endpoint_url,
            "use_ssl": files.use_ssl,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        config = {k: v for k, v in files.config_kwargs.items() if k not in _OF_AIO}
        if files.anon:
            given = {k: v for k, v in given.items() if not k.startswith("aws_")}
            config["signature_version"] = UNSIGNED
        session = Session(profile=self._profile)
        session.register_component("data_loader", _loader())
        try:
            client = session.create_client(
                "s3", config=Config(**config), **{**given, **files.client_kwargs}
            )
        except (TypeError, ValueError) as error:
            raise self._unfit(error) from None
        client.meta.events.register("before-call.s3.HeadBucket", _ask_once)
        if not hasattr(files, "_kwargs_helper"):  # which s3fs's own client makes
            files._kwargs_helper = ParamKwargsHelper(client)  # noqa: SLF001
        return client

    def added_to(self, operation: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call, with what the options say of encryption and the like."""
        added: dict[str, Any] = self.files._get_s3_method_kwargs(operation, **arguments)  # noqa: SLF001
        return added

    def _unfit(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"no S3 client can be made of storage_options {self._names} ({type(error).__name__}); "
            "they are the options of s3fs.S3FileSystem"
        )


def mapping_of(options: Mapping[str, object], name: str) -> dict[str, Any]:
    """Return an option that is a mapping itself, empty if it is not there.

    Raises:
        ConfigError: it is something else.
    """
    value = options.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"storage_options[{name!r}] must be a mapping")
    return dict(value)


def _config(options: Mapping[str, object], profile: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "connect_timeout": 10, "read_timeout": 20, "max_pool_connections": MAX_CONNECTIONS,
        # Every block has a hash of ours, and botocore would check whole objects only.
        "response_checksum_validation": "when_required",
        **mapping_of(options, "config_kwargs"),
        "retries": {"mode": "standard", "total_max_attempts": 1},
    }  # fmt: skip
    name = "request_checksum_calculation"
    try:
        found = config.get(name) or Session(profile=profile).get_config_variable(name)
    except BotoCoreError as error:
        raise ConfigError(f"the profile of S3 cannot be used: {error}") from None
    if str(found).lower() != "when_required":
        # A checksum and a signed payload would be the same twice; the second costs a SHA-256.
        config["s3"] = {"payload_signing_enabled": False, **mapping_of(config, "s3")}
    return config


class _Unasked:
    """The answer to a request that was not sent."""

    status_code = 400


_has_asked: ContextVar[bool] = ContextVar("has_asked", default=False)


def _ask_once(**_: object) -> tuple[type[_Unasked], dict[str, Any]] | None:
    """Let a request ask for the bucket's region once.

    Sent elsewhere without being told where, botocore asks by `HeadBucket`; if that is answered the
    same, as by a proxy that sends everybody to https, it would ask for ever
    (`botocore.utils.S3RegionRedirectorv2`).
    """
    if not _has_asked.get():
        _has_asked.set(True)
        return None
    return _Unasked, {"Error": {}, "ResponseMetadata": {"HTTPHeaders": {}}}


@functools.cache
def _loader() -> Any:
    """Return botocore's descriptions of services, each parsed once for this process.

    To parse that of S3 takes a tenth of a second, nine tenths of making a client.
    """
    return AioSession().get_component("data_loader")
