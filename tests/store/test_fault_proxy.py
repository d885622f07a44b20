"""Each fault of the proxy does what it says: no more, no less."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.fakes import fault_proxy as faults
from tests.fakes.fault_proxy import WAIT_S, FaultProxy

BODY = bytes(range(100))
DATE = "Wed, 01 Jul 2026 12:00:00 GMT"
ROW = "<Contents><Key>{}</Key><LastModified>2026-07-01T12:00:00.000Z</LastModified></Contents>"
LISTING = f"<ListBucketResult><Name>b</Name>{''.join(map(ROW.format, 'xyz'))}</ListBucketResult>"


class Upstream(ThreadingHTTPServer):
    """Keeps what is put; every get answers with the same part of an object, or a listing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.headers: dict[str, str] = {}
        self.connections = 0

    def handle_error(self, *_: object) -> None:
        """The proxy may go away in mid-request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        self.server.headers = dict(self.headers.items())
        if self.headers["Transfer-Encoding"]:
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT":
            self.server.objects[self.path] = data
        is_list = "list-type=2" in self.path
        answer = LISTING.encode() if is_list else BODY if self.command in ("GET", "HEAD") else b""
        self.send_response_only(200)
        self.send_header("Date", DATE)
        self.send_header("Content-Type", "application/xml" if is_list else "binary/octet-stream")
        self.send_header("Content-Range", "bytes 700-799/1000")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer if self.command != "HEAD" else b"")

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(upstream: Upstream) -> Iterator[FaultProxy]:
    with FaultProxy(f"http://127.0.0.1:{upstream.server_port}") as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    client = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=WAIT_S)
    yield client
    client.close()


def ask(client, method="GET", target="/b/k", body=None, **headers):
    """Return the status, the headers and the body of an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    client.request(method, target, body, named)
    answer = client.getresponse()
    return answer.status, answer.headers, answer.read()


def raw(proxy: FaultProxy, head: str) -> socket.socket:
    """Send a head and return the connection."""
    address = proxy.url.removeprefix("http://").split(":")
    sock = socket.create_connection((address[0], int(address[1])), timeout=WAIT_S)
    sock.sendall((head + "\r\n\r\n").encode())
    return sock


def everything(sock: socket.socket) -> bytes:
    """Return what comes until the connection ends."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def flipped_bits(one: bytes, other: bytes) -> list[int]:
    """Return where the bits differ, by their bytes."""
    assert len(one) == len(other)
    pairs = enumerate(zip(one, other, strict=True))
    return [at for at, (a, b) in pairs for bit in range(8) if (a ^ b) >> bit & 1]


def test_requests_pass_as_they_came_on_connections_that_last(proxy, client, upstream) -> None:
    assert ask(client, "PUT", "/b/a%20b%2Fc?x-id=Put", b"data", Host="h:1")[0] == 200
    assert upstream.headers["Host"] == "h:1"
    assert upstream.objects == {"/b/a%20b%2Fc?x-id=Put": b"data"}
    assert ask(client, "HEAD")[0] == 200
    assert ask(client)[2] == BODY
    assert (proxy.connections, upstream.connections) == (1, 1)
    first = proxy.requests[0]
    assert first[:3] == ("PUT", "/b/a b/c", "x-id=Put")
    assert (first.headers["content-length"], first.status) == ("4", 200)
    assert [request.method for request in proxy.requests] == ["PUT", "HEAD", "GET"]


def test_a_head_keeps_the_length_that_it_tells(client) -> None:
    _, headers, body = ask(client, "HEAD")
    assert (headers["Content-Length"], body) == ("100", b"")


def test_a_chunked_body_arrives_whole(client, upstream) -> None:
    ask(client, "PUT", body=iter([b"one", b"two"]))
    assert upstream.objects == {"/b/k": b"onetwo"}


def test_the_proxy_says_continue_itself(proxy, upstream) -> None:
    head = "PUT /b/k HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue"
    with raw(proxy, f"{head}\r\nConnection: close") as sock:
        assert sock.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert not upstream.asked
        sock.sendall(b"data")
        assert everything(sock).startswith(b"HTTP/1.1 200 ")
    assert upstream.objects == {"/b/k": b"data"}


def test_a_rule_befalls_what_it_names_as_often_as_it_says(proxy, client, upstream) -> None:
    rule = proxy.fail(faults.Status(503), method="PUT", key="b/c", query="id=a/b", skip=1, times=2)
    passing = [("GET", "/b/c?id=a%2Fb"), ("PUT", "/b/d?id=a/b"), ("PUT", "/b/c?id=b")]
    assert [ask(client, *request)[0] for request in passing] == [200] * 3
    assert [ask(client, "PUT", "/b%2Fc?id=a%2Fb")[0] for _ in range(4)] == [200, 503, 503, 200]
    assert rule.hits == 2
    proxy.fail(faults.Status(500), times=None)
    assert [ask(client)[0] for _ in range(3)] == [500] * 3
    proxy.clear()
    assert ask(client)[0] == 200
    assert [request.status for request in proxy.requests[3:7]] == [200, 503, 503, 200]


def test_a_status_comes_with_an_error_of_s3_and_headers(proxy, client, upstream) -> None:
    proxy.fail(faults.Status(503, "SlowDown", {"Retry-After": "7"}))
    status, headers, body = ask(client, "PUT", body=b"data")
    assert (status, headers["Retry-After"]) == (503, "7")
    assert b"<Error><Code>SlowDown</Code>" in body
    assert not upstream.asked
    assert ask(client)[0] == 200
    assert proxy.connections == 1


@pytest.mark.parametrize("reads", [False, True])
def test_a_reset_before_keeps_the_server_unasked(proxy, client, upstream, reads) -> None:
    proxy.fail(faults.ResetBefore(reads=reads))
    with pytest.raises(ConnectionResetError) as caught:
        ask(client, "PUT", body=b"data")
    assert not isinstance(caught.value, http.client.RemoteDisconnected)
    assert not upstream.asked
    assert proxy.requests[0].status is None


def test_a_reset_after_comes_when_the_server_has_acted(proxy, client, upstream) -> None:
    proxy.fail(faults.ResetAfter())
    with pytest.raises(ConnectionResetError) as caught:
        ask(client, "PUT", body=b"data")
    assert not isinstance(caught.value, http.client.RemoteDisconnected)
    assert upstream.objects == {"/b/k": b"data"}
    assert proxy.requests[0].status is None


@pytest.mark.parametrize(
    ("reads", "heard"), [(True, b"HTTP/1.1 100 Continue\r\n\r\n"), (False, b"")]
)
def test_silence_lasts_until_the_proxy_closes(proxy, upstream, reads, heard) -> None:
    rule = proxy.fail(faults.Silent(reads=reads))
    head = "PUT /b/k HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue"
    with raw(proxy, head) as sock:
        proxy.wait_hits(rule)
        if reads:
            assert sock.recv(len(heard), socket.MSG_PEEK | socket.MSG_WAITALL) == heard
            sock.sendall(b"data")
        proxy.close()
        assert everything(sock) == heard
    assert not upstream.asked


def test_silence_ends_when_the_client_goes(proxy) -> None:
    rule = proxy.fail(faults.Silent())
    with raw(proxy, "GET /b/k HTTP/1.1\r\nHost: h"):
        proxy.wait_hits(rule)
        (thread,) = proxy._threads
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_slow_answer_comes_piece_by_piece(proxy, client) -> None:
    proxy.fail(faults.Slow(4000))
    assert ask(client)[2] == BODY
    proxy.fail(faults.Slow(5))  # 20 s for all of it
    client.request("GET", "/b/k")
    answer = client.getresponse()
    assert answer.read(1) == BODY[:1]
    proxy.close()
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        answer.read()


def test_a_slow_reader_takes_the_request_piece_by_piece(proxy, client, upstream) -> None:
    proxy.fail(faults.Slow(4000, reads=True))
    assert ask(client, "PUT", body=BODY)[0] == 200
    assert upstream.objects == {"/b/k": BODY}
    rule = proxy.fail(faults.Slow(5, reads=True))
    client.request("PUT", "/b/late", BODY)
    proxy.wait_hits(rule)
    proxy.close()
    assert "/b/late" not in upstream.objects


def test_a_truncated_body_is_shorter_than_its_length(proxy, client) -> None:
    proxy.fail(faults.Truncated(keep=0.3))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(client)
    assert (caught.value.partial, caught.value.expected) == (BODY[:30], 70)


def test_a_short_body_has_the_length_that_it_tells(proxy, client) -> None:
    proxy.fail(faults.Short(keep=0.3))
    _, headers, body = ask(client)
    assert (body, headers["Content-Length"]) == (BODY[:30], "30")
    assert headers["Content-Range"] == "bytes 700-799/1000"
    proxy.fail(faults.Short(keep=0.3, adapts_range=True))
    assert ask(client)[1]["Content-Range"] == "bytes 700-729/1000"


@pytest.mark.parametrize(("at", "place"), [(0.0, 0), (0.5, 50), (1.0, 99)])
def test_a_flip_is_of_one_bit(proxy, client, upstream, at, place) -> None:
    proxy.fail(faults.Flip(at))
    assert flipped_bits(ask(client)[2], BODY) == [place]
    proxy.fail(faults.FlipRequest(at))
    assert ask(client, "PUT", body=BODY)[0] == 200
    assert flipped_bits(upstream.objects["/b/k"], BODY) == [place]


def test_an_error_may_come_with_status_200(proxy, client, upstream) -> None:
    proxy.fail(faults.OkWithError("InternalError"), method="POST")
    status, _, body = ask(client, "POST", "/b/k?uploadId=1", b"<Complete/>")
    assert status == 200
    assert b"<Error><Code>InternalError</Code>" in body
    assert not upstream.asked


def test_delete_errors_name_every_key(proxy, client, upstream) -> None:
    proxy.fail(faults.DeleteErrors("AccessDenied"), query="delete")
    keys = b"<Object><Key>x&amp;y</Key></Object><Object><Key>z</Key></Object>"
    status, _, body = ask(client, "POST", "/b?delete", b"<Delete>" + keys + b"</Delete>")
    assert status == 200
    found = re.findall(rb"<Error><Key>(.*?)</Key><Code>(.*?)</Code>", body)
    assert found == [(b"x&amp;y", b"AccessDenied"), (b"z", b"AccessDenied")]
    assert not upstream.asked


def test_headers_are_stripped_on_the_way_to_the_server(proxy, client, upstream) -> None:
    proxy.strip_headers = {"if-none-match"}
    ask(client, "PUT", body=b"", If_None_Match="*", X_Other="1")
    assert "If-None-Match" not in upstream.headers
    assert upstream.headers["X-Other"] == "1"
    assert proxy.requests[0].headers["if-none-match"] == "*"


def test_the_clock_of_the_server_may_be_wrong(proxy, client) -> None:
    proxy.clock_shift_s = -3600.0
    _, headers, body = ask(client, target="/b?list-type=2")
    assert parsedate_to_datetime(headers["Date"]).hour == 11
    assert body.count(b"<LastModified>2026-07-01T11:00:00.000Z<") == 3


def test_listings_may_come_unsorted(proxy, client) -> None:
    proxy.unsorted_listings = True
    body = ask(client, target="/b?list-type=2")[2].decode()
    assert re.findall("<Key>(.)</Key>", body) == ["z", "y", "x"]
    assert len(body) == len(LISTING)


def test_a_server_that_is_gone_ends_the_connection(client, proxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with FaultProxy(f"http://127.0.0.1:{port}") as lonely:
        with raw(lonely, "GET /b/k HTTP/1.1\r\nHost: h") as sock:
            assert everything(sock) == b""


def test_nothing_is_left_of_a_closed_proxy(proxy, client) -> None:
    ask(client)
    proxy.close()
    assert not [thread for thread in threading.enumerate() if "fault-proxy" in thread.name]
    with pytest.raises(ConnectionRefusedError):
        raw(proxy, "GET / HTTP/1.1")
