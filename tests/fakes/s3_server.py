"""An S3 server: moto in a process of its own, strict where S3 is strict and moto is not."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

REPOSITORY = Path(__file__).parent.parent.parent
REGION = "us-east-1"
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",  # moto checks no signature
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
}
_START_S = 60.0
_SETTINGS = {
    "S3_IGNORE_SUBDOMAIN_BUCKETNAME": "true",
    # Objects stay in memory; above this, 5 MiB by default, moto writes each to a file in /tmp.
    "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 30),
}

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class S3Server:
    """A server at `url`, and what it holds as seen by plain botocore.

    Wherever a bucket is named, "bucket/some/prefix" names the part of it below the prefix: keys
    are relative to it. Processes that `env` is given to may use the server.
    """

    def __init__(self, url: str, env: dict[str, str]) -> None:
        self.url = url
        self.env = env

    def make_bucket(self, name: str, *, versioned: bool = False) -> str:
        """Create a bucket and return its name."""
        self.client.create_bucket(Bucket=name)
        if versioned:
            self.client.put_bucket_versioning(
                Bucket=name, VersioningConfiguration={"Status": "Enabled"}
            )
        return name

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return the current objects, in order of their keys."""
        name, prefix = _split(bucket)
        found = {}
        for key in self._listed("list_objects_v2", "Contents", name, prefix):
            answer = self.client.get_object(Bucket=name, Key=key)
            with answer["Body"] as body:
                found[key[len(prefix) :]] = body.read()
        return dict(sorted(found.items()))

    def uploads(self, bucket: str) -> list[str]:
        """Return the keys of multipart uploads that were begun and neither finished nor aborted."""
        name, prefix = _split(bucket)
        found = self._listed("list_multipart_uploads", "Uploads", name, prefix)
        return sorted(key[len(prefix) :] for key in found if key.startswith(prefix))

    @cached_property
    def client(self) -> Any:
        """A botocore client of this server; used from one thread at a time."""
        import botocore.session
        from botocore.config import Config

        path_style = {"addressing_style": "path"}
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name=self.env.get("AWS_DEFAULT_REGION", REGION),
            aws_access_key_id=self.env.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=self.env.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=self.env.get("AWS_SESSION_TOKEN"),
            config=Config(s3=path_style, proxies={}, retries={"total_max_attempts": 1}),
        )

    def _listed(self, call: str, rows: str, bucket: str, prefix: str) -> Iterator[str]:
        for page in self.client.get_paginator(call).paginate(Bucket=bucket, Prefix=prefix):
            yield from (row["Key"] for row in page.get(rows, ()))

    def stop(self) -> None:
        """End what was started; may be called again."""
        if "client" in self.__dict__:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class MotoServer(S3Server):
    """moto on a free port of 127.0.0.1; the process leads its own group and ends with this one.

    Its requests are handled one after another, each when its body has come whole. Signatures are
    not checked; checksums are: `Content-MD5`, `x-amz-content-sha256`, `x-amz-checksum-*`.
    """

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._popen = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fakes.s3_server"],
            env={**os.environ, **KEYS, **_SETTINGS}, cwd=REPOSITORY, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self.pid = self._popen.pid
        try:
            super().__init__(f"http://127.0.0.1:{self._wait_port()}", dict(KEYS))
        except BaseException:
            self.stop()
            raise

    @property
    def log(self) -> str:
        """What the process wrote to stderr: the traceback of each answer 500."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def stop(self) -> None:
        super().stop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        for file in (self._popen.stdin, self._popen.stdout, self._log):
            assert file is not None
            file.close()

    def _wait_port(self) -> int:
        """Wait for the line that the process writes when it listens."""
        out = self._popen.stdout
        assert out is not None
        ready, _, _ = select.select([out], [], [], _START_S)
        line = out.readline() if ready else b""
        assert line.strip().isdigit(), f"moto did not start: {self.log}"
        return int(line)


def _split(bucket: str) -> tuple[str, str]:
    name, _, prefix = bucket.partition("/")
    return name, prefix and prefix.rstrip("/") + "/"


# What follows runs in the process that MotoServer starts.


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, app: App) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.app = app
        # One request at a time: moto looks whether a key exists and creates it afterwards, so
        # that two racing `If-None-Match: *` could both win. In S3 one does.
        self.turn = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in mid-request is no event."""


class _Connection(BaseHTTPRequestHandler):
    """HTTP/1.1 with keep-alive, which the development server that comes with moto cannot."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        body = self._body()
        status, headers, answer = self._refusal(body) or self._ask(body)
        self.send_response(status)
        for name, value in headers:
            is_length = name.lower() == "content-length" and self.command != "HEAD"
            if not is_length and name.lower() not in ("connection", "date", "server"):
                self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _body(self) -> bytes:
        """Read the whole body; what a client did not finish is never seen by moto."""
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self._exactly(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(1024).partition(b";")[0], 16):
            parts.append(self._exactly(size))
            self._exactly(2)
        while self.rfile.readline(65536).strip():
            pass  # trailers
        return b"".join(parts)

    def _exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionAbortedError
        return data

    def _refusal(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes] | None:
        """Refuse a body that does not match its checksums, as S3 does: moto compares none."""
        sums: dict[str, Callable[[], bytes]] = {
            "content-md5": lambda: hashlib.md5(body).digest(),
            "x-amz-checksum-sha1": lambda: hashlib.sha1(body).digest(),
            "x-amz-checksum-sha256": lambda: hashlib.sha256(body).digest(),
            "x-amz-checksum-crc32": lambda: binascii.crc32(body).to_bytes(4, "big"),
        }
        for name, digest in sums.items():
            said = self.headers.get(name)
            if said is not None and said != base64.b64encode(digest()).decode():
                return _error(400, "BadDigest")
        said = self.headers.get("x-amz-content-sha256", "")
        if len(said) == 64 and said != hashlib.sha256(body).hexdigest():
            return _error(400, "XAmzContentSHA256Mismatch")
        return None

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Let moto answer."""
        head: list[Any] = []

        def start(status: str, headers: list[tuple[str, str]], exc: object = None) -> None:
            head[:] = [int(status[:3]), headers]

        try:
            with self.server.turn:
                answer = b"".join(self.server.app(self._environ(body), start))
        except Exception as error:  # noqa: BLE001 - S3 answers 500 to whatever breaks in it
            # moto looks an upload up without asking whether it is there.
            if isinstance(error, KeyError) and "uploadId=" in self.path:
                return _error(404, "NoSuchUpload")
            traceback.print_exc()
            return _error(500, "InternalError")
        return head[0], head[1], answer

    def _environ(self, body: bytes) -> dict[str, Any]:
        path, _, query = self.path.partition("?")
        host, port = self.server.server_address[:2]
        environ = {
            "REQUEST_METHOD": self.command, "SCRIPT_NAME": "", "QUERY_STRING": query,
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "RAW_URI": self.path, "REQUEST_URI": self.path, "SERVER_PROTOCOL": "HTTP/1.1",
            "SERVER_NAME": host, "SERVER_PORT": str(port), "REMOTE_ADDR": "127.0.0.1",
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body),
            "wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "wsgi.input_terminated": True,  # else werkzeug copies the body in 64 KiB steps
        }  # fmt: skip
        for name, value in self.headers.items():
            environ["HTTP_" + name.upper().replace("-", "_")] = value
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ.pop("HTTP_CONTENT_LENGTH", None)
        environ["CONTENT_TYPE"] = environ.pop("HTTP_CONTENT_TYPE", "")
        environ["CONTENT_LENGTH"] = str(len(body))
        return environ


def _error(status: int, code: str) -> tuple[int, list[tuple[str, str]], bytes]:
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return status, [("Content-Type", "application/xml")], body.encode()


def _serve() -> None:
    """Serve until the parent is gone: its end closes stdin."""
    from moto.moto_server.werkzeug_app import create_backend_app

    app = create_backend_app("s3")
    app.config["PROPAGATE_EXCEPTIONS"] = True
    with _Server(app) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()
        os._exit(0)


if __name__ == "__main__":
    _serve()
