"""What `?client=obstore` makes of the settings that s3fs's client takes: keys, regions, options."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from botocore.exceptions import CredentialRetrievalError

from ckptd.errors import ConfigError, CredentialsError
from ckptd.store import s3_obstore
from ckptd.store.open import open_store
from ckptd.store.remote import RemoteStore
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.s3_calls import Expired, Page, check_silent, together, told

Open = Callable[..., RemoteStore]

KEY = "attempts/0001"
CANARIES = {"key": "CANARYKEY", "secret": "CANARYSECRET", "token": "CANARYTOKEN"}


# --- who asks ----------------------------------------------------------------------------------


class Bare(NamedTuple):
    """An environment that tells of no credentials but those that the test writes."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def setenv(self, name: str, value: str) -> None:
        self.monkeypatch.setenv(name, value)

    def write(self, name: str, *lines: str) -> None:
        (self.folder / name).write_text("\n".join(lines))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bare:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return Bare(tmp_path, monkeypatch)


def test_n6_threads_whose_token_expired_find_the_new_one_together(
    open_obstore: Open, proxy: FaultProxy, bare: Bare
) -> None:
    lines = "[default]", "aws_access_key_id = k", "aws_secret_access_key = s"
    bare.write("credentials", *lines, "aws_session_token = OLDTOKEN")
    store = open_obstore(through=proxy, key=None, secret=None)
    store.put(KEY, b"x")
    assert proxy.requests[0].headers["x-amz-security-token"] == "OLDTOKEN"
    bare.write("credentials", *lines, "aws_session_token = NEWTOKEN")
    made = []
    resolve = s3_obstore._resolve
    bare.monkeypatch.setattr(
        s3_obstore, "_resolve", lambda *given: made.append(1) or resolve(*given)
    )
    proxy.fail(Expired("OLDTOKEN"), times=None)
    acts = (lambda n=n: store.put_new(f"attempts/{n:04d}", b"x") for n in range(100, 108))
    assert together(*acts) == [None] * 8
    assert len(made) == 1
    begin = len(proxy.requests)
    assert len(list(store.list("attempts/"))) == 9
    assert store.get(KEY, max_bytes=1) == b"x"
    tokens = {r.headers["x-amz-security-token"] for r in proxy.requests[begin:]}
    assert tokens == {"NEWTOKEN"}


PROFILE = "[profile other]\nregion = eu-west-1\naws_access_key_id = P\naws_secret_access_key = s\n"
ENV = {"AWS_ACCESS_KEY_ID": "E", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "eu-north-1"}


HERE = {"client_kwargs": {"region_name": "here"}}
ANON = {"anon": True}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (ENV, "E/us-east-1"),  # botocore knows no AWS_REGION
        ({**ENV, "AWS_DEFAULT_REGION": "eu-north-1"}, "E/eu-north-1"),
        ({"AWS_PROFILE": "other"}, "P/eu-west-1"),
        ({**ENV, "profile": "other"}, "P/eu-west-1"),
        ({**ENV, "key": "O", "secret": "s"}, "O/us-east-1"),
        ({**ENV, "key": "O", "secret": "s", **HERE}, "O/here"),
        ({**ENV, **ANON}, None),
        (ANON, None),
    ],
)
def test_n6_credentials_and_region_are_those_that_botocore_finds(
    open_obstore: Open, proxy: FaultProxy, bare: Bare, asked: dict, found: str | None
) -> None:
    bare.write("config", PROFILE)
    options: dict = {"key": None, "secret": None}
    for name, value in asked.items():
        if name.startswith("AWS_"):
            bare.setenv(name, value)
        else:
            options[name] = value
    proxy.fail(Page(b"x", (("ETag", '"x"'),)), times=None)  # moto asks who anonymous is
    open_obstore(through=proxy, **options).put(KEY, b"x")
    said = proxy.requests[0].headers.get("authorization", "")
    match = re.search(r"Credential=(\w+)/\d+/([\w-]+)/", said)
    assert (match and "/".join(match.groups())) == found


def test_n6_credentials_that_are_not_found_are_said_to_be_missing(
    open_obstore: Open, bare: Bare, caplog: pytest.LogCaptureFixture
) -> None:
    def ask() -> None:
        with pytest.raises(CredentialsError, match="AWS_PROFILE") as caught:
            open_obstore(key=None, secret=None).read_into(KEY, 0, memoryview(bytearray(1)))
        check_silent(told(caught.value))

    def fail(*_: object) -> None:
        raise CredentialRetrievalError(provider="x", error_msg="CANARYSECRET")

    ask()
    bare.write("config", "[default]", "credential_process = false CANARYSECRET")
    ask()
    bare.write("config", PROFILE)
    bare.setenv("AWS_PROFILE", "other")
    bare.monkeypatch.setattr("botocore.credentials.Credentials.get_frozen_credentials", fail)
    ask()
    check_silent(caplog.text)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"no_such": "CANARYSECRET"},
        {"config_kwargs": {"s3": "CANARYSECRET"}},
        {"client_kwargs": {"verify": "/CANARYSECRET"}},
        {"client_kwargs": "CANARYSECRET"},
        {"client_kwargs": {"region_name": "CANARYSECRET "}},
        {"s3_additional_kwargs": {"SSECustomerKey": "CANARYSECRET"}},
        {"s3_additional_kwargs": {"ServerSideEncryption": "CANARYSECRET"}},
        {"s3_additional_kwargs": {"SSEKMSKeyId": 5}},
        {"profile": "no-such-profile"},
        {"endpoint_url": "CANARYSECRET"},
    ],
    ids=str,
)
def test_options_that_have_no_meaning_are_refused_without_their_values(
    open_obstore: Open, options: dict
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_obstore(**{**CANARIES, **options}).read_into(KEY, 0, memoryview(bytearray(1)))
    assert next(iter(options)) in str(caught.value)
    check_silent(told(caught.value))


@pytest.mark.parametrize(
    ("kwargs", "headers"),
    [
        ({"ServerSideEncryption": "AES256"}, {"": "AES256"}),
        ({"ServerSideEncryption": "aws:kms"}, {"": "aws:kms"}),
        (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k", "BucketKeyEnabled": True},
            {"": "aws:kms", "-aws-kms-key-id": "k", "-bucket-key-enabled": "true"},
        ),
    ],
    ids=str,
)
def test_options_reach_every_request_that_takes_them(
    open_obstore: Open, proxy: FaultProxy, kwargs: dict, headers: dict[str, str]
) -> None:
    store = open_obstore(through=proxy, s3_additional_kwargs=kwargs, requester_pays=True)
    store.put(KEY, b"x")
    store.put_new("attempts/0002", b"x")
    assert store.get(KEY, max_bytes=1) == b"x"
    assert store.read_into(KEY, 0, memoryview(bytearray(1))) == 1
    list(store.list(""))
    sse = "x-amz-server-side-encryption"
    for asked in proxy.requests:
        found = {k.removeprefix(sse): v for k, v in asked.headers.items() if k.startswith(sse)}
        assert found == (headers if asked.method == "PUT" else {})
        assert asked.headers["x-amz-request-payer"] == "requester"


def test_a_prefix_may_hold_what_urls_may_not(open_s3: Open, bucket: str) -> None:
    url = f"s3://{bucket}/a b/ü+%41~[x]{{=&/run"
    ours, theirs = open_s3(url=url + "?client=obstore"), open_s3(url=url)
    for writer, reader, key in ((ours, theirs, KEY), (theirs, ours, "attempts/0002")):
        writer.put_new(key, b"xyz")
        assert reader.get(key, max_bytes=3) == b"xyz"
        assert reader.read_into(key, 1, memoryview(bytearray(2))) == 3
    assert [e.key for e in ours.list("")] == [KEY, "attempts/0002"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "ckptd.store.s3_obstore")
    with pytest.raises(ConfigError, match=r"pip install 'ckptd\[obstore\]'"):
        open_store("s3://bucket/run?client=obstore")
