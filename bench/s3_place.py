"""Where the benchmark of S3 clients puts its objects: a server of its own, or one that was named."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

import botocore.session
from botocore.config import Config

_REGION = "us-east-1"


class PlaceError(Exception):
    """There is no server to measure against; the message says what to do."""


class Place(NamedTuple):
    """A prefix of a bucket, and what a client needs to write there.

    `endpoint` None is AWS itself; `server_pid` is that of a server which was started for this run.
    """

    bucket: str
    prefix: str
    endpoint: str | None
    region: str
    key: str
    secret: str
    token: str | None = None
    server_pid: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether requests go without TLS."""
        return (self.endpoint or "").startswith("http://")

    @property
    def addressing(self) -> str:
        """How a bucket is named in requests: in the path, unless this is AWS."""
        return "path" if self.endpoint else "virtual"

    def below(self, name: str) -> Place:
        """Return the place below a folder of this one."""
        return self._replace(prefix=f"{self.prefix}/{name}")

    def config(self, **more: Any) -> dict[str, Any]:
        """Return settings of botocore that are fast and alike for all that are built on it.

        Bodies are covered by a CRC-32, which botocore adds by itself, and not by a SHA-256 as well.
        """
        s3 = {"addressing_style": self.addressing, "payload_signing_enabled": False}
        return {
            "s3": s3, "response_checksum_validation": "when_required",
            "max_pool_connections": 64, **more,
        }  # fmt: skip

    def client(self) -> Any:
        """Return a botocore client."""
        return botocore.session.Session().create_client("s3", **self._arguments())

    def boto3_client(self) -> Any:
        """Return the client that boto3 makes, which can move files."""
        import boto3

        return boto3.session.Session().client("s3", **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "endpoint_url": self.endpoint, "region_name": self.region,
            "aws_access_key_id": self.key, "aws_secret_access_key": self.secret,
            "aws_session_token": self.token, "config": Config(**self.config()),
        }  # fmt: skip

    def s3fs_options(self) -> dict[str, Any]:
        """Return the options of `s3fs.S3FileSystem`."""
        return {
            **self.ckptd_options(), "config_kwargs": self.config(),
            "client_kwargs": {"region_name": self.region},
        }  # fmt: skip

    def ckptd_options(self) -> dict[str, object]:
        """Return the `storage_options` of a Checkpointer."""
        found: dict[str, object] = {"key": self.key, "secret": self.secret}
        if self.endpoint:
            found["endpoint_url"] = self.endpoint
        else:
            found["client_kwargs"] = {"region_name": self.region}
        return {**found, "token": self.token} if self.token else found

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each object here, by its key."""
        pages = self._own_client().get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + "/"
        )  # fmt: skip
        return {row["Key"]: row["Size"] for page in pages for row in page.get("Contents", ())}

    def clear(self, keys: list[str] | None = None) -> None:
        """Delete these objects; without names all that is here, uploads that were begun included."""
        client = self._own_client()
        for key in self.sizes() if keys is None else keys:
            client.delete_object(Bucket=self.bucket, Key=key)
        if keys is None:
            with contextlib.suppress(Exception):  # some servers list no uploads
                self._abort_uploads(client)

    def _own_client(self) -> Any:
        return _client_of(self._replace(prefix=""))

    def _abort_uploads(self, client: Any) -> None:
        answer = client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix + "/")
        for upload in answer.get("Uploads", ()):
            client.abort_multipart_upload(
                Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )


@functools.lru_cache(maxsize=1)
def _client_of(place: Place) -> Any:
    return place.client()  # a tenth of a second each


@contextlib.contextmanager
def open_place(endpoint: str | None, bucket: str | None) -> Iterator[Place]:
    """Give a place that is empty, and take it away again; start a server if none is named.

    Raises:
        PlaceError: the server that is named cannot be used.
    """
    if endpoint is None and bucket is None:
        yield from _on_own_server()
        return
    place = _named(endpoint, bucket)
    _export(place)
    try:
        place.sizes()
    except Exception as error:
        raise PlaceError(f"cannot list s3://{bucket} at {endpoint or 'AWS'}: {error}") from error
    try:
        yield place
    finally:
        place.clear()


def _on_own_server() -> Iterator[Place]:
    from tests.fakes.s3_server import KEYS, MotoServer  # needs moto, of the group dev

    key, secret = KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"]
    with MotoServer() as server:
        bucket = server.make_bucket("bench")
        place = Place(bucket, _unique(), server.url, _REGION, key, secret, server_pid=server.pid)
        _export(place)
        yield place


def _named(endpoint: str | None, bucket: str | None) -> Place:
    if not bucket:
        raise PlaceError("--endpoint needs --bucket, a bucket that exists")
    session = botocore.session.Session()
    found = session.get_credentials()
    if found is None:
        raise PlaceError("no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    keys = found.get_frozen_credentials()
    region = session.get_config_variable("region") or _REGION
    return Place(bucket, _unique(), endpoint, region, keys.access_key, keys.secret_key, keys.token)


def _unique() -> str:
    return f"ckptd-bench-{uuid.uuid4().hex[:12]}"


def _export(place: Place) -> None:
    """Set what the clients read that take no credentials as arguments."""
    os.environ["AWS_ACCESS_KEY_ID"] = place.key
    os.environ["AWS_SECRET_ACCESS_KEY"] = place.secret
    os.environ["AWS_DEFAULT_REGION"] = os.environ["AWS_REGION"] = place.region
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    if place.token:
        os.environ["AWS_SESSION_TOKEN"] = place.token
    if place.server_pid is not None:
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
