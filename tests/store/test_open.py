from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import ConfigError
from ckptd.store.local import LocalStore
from ckptd.store.memory import MemoryStore
from ckptd.store.open import normalise_url, open_store
from ckptd.store.remote import RemoteStore


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("/data/run", "/data/run"),
        ("/data//run/", "/data/run"),
        ("//data/run", "/data/run"),
        ("/data/x/../run/.", "/data/run"),
        ("file:///data/run", "/data/run"),
        ("FILE:///data/run/", "/data/run"),
        ("file://localhost/data/run", "/data/run"),
        ("file:/data/run", "/data/run"),
        ("file:///data/my%20run", "/data/my run"),
        ("/data/my%20run", "/data/my%20run"),
        ("/data/a:/b", "/data/a:/b"),
        ("/", "/"),
        ("memory://x", "memory://x"),
        ("memory://x/y-1.0", "memory://x/y-1.0"),
    ],
)
def test_a_root_has_one_name(written: str, meant: str) -> None:
    assert normalise_url(written) == meant


def test_relative_paths_start_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalise_url("runs/42") == str(tmp_path / "runs/42")
    assert normalise_url("a:b") == str(tmp_path / "a:b")


def test_links_above_the_root_are_resolved_and_the_root_itself_is_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/root").symlink_to("elsewhere")
    assert normalise_url(f"{tmp_path}/link/root") == f"{tmp_path}/real/root"


@given(st.text(max_size=30))
def test_any_text_is_refused_or_has_a_stable_form(text: str) -> None:
    try:
        once = normalise_url(text)
    except ConfigError:
        return
    assert normalise_url(once) == once
    assert os.path.isabs(once) or "://" in once


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("S3://bucket/run/", "s3://bucket/run"),
        ("s3a://bucket/a/b c/", "s3://bucket/a/b c"),
        ("s3n://bucket", "s3://bucket"),
        ("gs://b/r/", "gs://b/r"),
        ("abfs://container@account.dfs.core.windows.net/x", None),
    ],
)
def test_a_root_in_an_object_store_has_one_name(written: str, meant: str | None) -> None:
    assert normalise_url(written) == (meant or written)


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///x", "s3:/bucket/x", "s3://b", "s3://bucket//x", "s3://bucket/../x",
     "s3://bucket/./x", "s3://bucket/x?versionId=1", "s3://bucket/x#y", "s3://bucket/a*",
     "s3://bu cket/x", "s3://bucket/\n", "gs://", "http://x/y", "https://x/y", "zip:///x"],
)  # fmt: skip
def test_what_cannot_be_a_root_in_an_object_store_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


def test_a_service_that_nobody_knows_or_that_lacks_its_package_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing that fsspec knows"):
        open_store("nosuch://bucket/run")
    with pytest.raises(ConfigError, match="gcsfs"):
        open_store("gs://bucket/run")


def test_an_s3_store_opens_and_sends_nothing() -> None:
    store = open_store("s3://bucket/run", {"endpoint_url": "http://127.0.0.1:9", "retry_s": 1})
    assert isinstance(store, RemoteStore)
    assert store.url == "s3://bucket/run"
    store.close()
    store.close()


@pytest.mark.parametrize(
    "options",
    [{"retry_s": 0}, {"attempts": "3"}, {"request_timeout_s": True}, {"nosuchthing": "canary"},
     {"config_kwargs": 3}, {"config_kwargs": {"nosuchthing": "canary"}}, {"key": "a", "username": "canary"}],
)  # fmt: skip
def test_s7_options_that_cannot_be_are_refused_without_their_values(
    options: dict[str, object],
) -> None:
    def use() -> None:
        with closing(open_store("s3://bucket/run", options)) as store:
            store.get("ckptd.json", max_bytes=1)

    with pytest.raises(ConfigError) as caught:
        use()
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "~/run", "~", "a\0b", "memory://", "memory:///", "memory://a//b", "file://host/x"]
)  # fmt: skip
def test_what_cannot_be_a_root_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


def test_a_path_opens_a_local_store_and_touches_nothing(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/root/", {})
    assert isinstance(store, LocalStore)
    assert store.url == f"{tmp_path}/root"
    assert list(tmp_path.iterdir()) == []


def test_memory_stores_are_shared_by_name(request: pytest.FixtureRequest) -> None:
    store = open_store(f"memory://{request.node.name}")
    assert isinstance(store, MemoryStore)
    assert open_store(store.url) is store
    assert open_store(store.url + "/2") is not store


@pytest.mark.parametrize("url", ["/data/run", "memory://x"])
def test_s7_options_that_mean_nothing_are_refused_without_their_values(url: str) -> None:
    with pytest.raises(ConfigError, match="key") as caught:
        open_store(url, {"key": "canary"})
    assert "canary" not in str(caught.value)
