"""Raw HTTP requests, byte for byte, with the answers that RFC 9110 and 9112 require."""

from collections.abc import Iterator
from typing import Final, NamedTuple

CRLF: Final = b"\r\n"
HOST: Final = b"Host: localhost\r\n"
JSON: Final = b"Content-Type: application/json\r\n"
ROW: Final = b"10000"
"""Placeholder in a body for a number that the sender fills in, to find the stored job by it."""

BODY: Final = b'{"data":[[10000,1,1,1]]}'
LENGTH: Final = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED: Final = b"Transfer-Encoding: chunked\r\n"
CHUNKS: Final = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
ALIVE: Final = b"GET /health/live HTTP/1.1\r\n" + HOST
NEXT: Final = ALIVE + CRLF
POST: Final = b"POST /predict HTTP/1.1\r\n" + HOST + JSON
H2C: Final = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"

MALFORMED: Final = (400, "malformed_request")
HEADER: Final = (400, "invalid_header")
HOST_REFUSED: Final = (403, "host_refused")
ORIGIN_REFUSED: Final = (403, "origin_refused")
NO_ROUTE: Final = (404, "route_not_found")
NO_METHOD: Final = (405, "method_not_allowed")

Answer = int | tuple[int, str]


class Shape(NamedTuple):
    name: str
    sent: bytes
    answers: tuple[Answer, ...]
    closes: bool = False
    bodiless: bool = False
    """Whether the answers have no body, because the request is HEAD."""


def open_after(name: str, sent: bytes, *answers: Answer) -> Shape:
    return Shape(name, sent, answers)


def closed_after(name: str, sent: bytes, *answers: Answer) -> Shape:
    return Shape(name, sent, answers, closes=True)


def refused(name: str, sent: bytes) -> Shape:
    """Not HTTP: the server cannot know where a next request would begin, so it must close."""
    return Shape(name, sent, (MALFORMED,), closes=True)


def _plain() -> Iterator[Shape]:
    yield open_after("GET", NEXT, 200)
    yield Shape("HEAD", b"HEAD /health/live HTTP/1.1\r\n" + HOST + CRLF, (200,), bodiless=True)
    yield open_after("POST", POST + LENGTH + CRLF + BODY, 202)
    yield open_after("empty lines before a request", CRLF + CRLF + NEXT, 200)
    yield open_after("body of a GET", ALIVE + b"Content-Length: 3\r\n\r\nabc", 200)
    yield open_after(
        "body of a GET that reads as a request",
        ALIVE + b"Content-Length: %d\r\n\r\n%b" % (len(NEXT), NEXT),
        200,
    )
    yield open_after("wrong method", b"PUT /predict HTTP/1.1\r\n" + HOST + CRLF, NO_METHOD)
    yield open_after("TRACE", b"TRACE / HTTP/1.1\r\n" + HOST + CRLF, NO_METHOD)
    yield open_after(
        "several at once", NEXT * 3 + POST + LENGTH + CRLF + BODY + NEXT, 200, 200, 200, 202, 200
    )
    yield closed_after("Connection: close", ALIVE + b"Connection: close\r\n\r\n", 200)
    yield closed_after("close among other options", ALIVE + b"Connection: x, Close\r\n\r\n", 200)
    yield closed_after("a request after close", ALIVE + b"Connection: close\r\n\r\n" + NEXT, 200)
    yield closed_after("garbage after close", ALIVE + b"Connection: close\r\n\r\n\x00\xff", 200)
    yield closed_after("garbage after a request", NEXT + b"\x00\xff\r\n\r\n", 200, MALFORMED)
    yield closed_after(
        "a bad request after a submit",
        POST + LENGTH + CRLF + BODY + b"GET / HTTP/3.0\r\n\r\n",
        202,
        MALFORMED,
    )
    yield closed_after(
        "a bad body after a request", NEXT + POST + CHUNKED + CRLF + b"zz\r\n", 200, MALFORMED
    )
    yield open_after(
        "white space around values",
        b"GET / HTTP/1.1\r\nHost:\t localhost \t\r\nX:\r\nY: \r\n\r\n",
        200,
    )
    yield open_after("non-ASCII value", ALIVE + b"X: \xe9\xff\r\n\r\n", 200)


def _versions() -> Iterator[Shape]:
    old = b"GET /health/live HTTP/1.0\r\n"
    yield closed_after("HTTP/1.0", old + HOST + CRLF, 200)
    yield closed_after("HTTP/1.0 keep-alive", old + HOST + b"Connection: keep-alive\r\n\r\n", 200)
    yield closed_after("HTTP/1.0 twice", (old + HOST + CRLF) * 2, 200)
    yield closed_after("HTTP/1.0 submit", POST.replace(b"1.1", b"1.0") + LENGTH + CRLF + BODY, 202)
    for path in (b"/health/live", b"/health/ready", b"/health"):
        name = path.decode()
        yield closed_after(f"HTTP/1.0 without Host, {name}", b"GET %b HTTP/1.0\r\n\r\n" % path, 200)
        head = b"HEAD %b HTTP/1.0\r\n\r\n" % path
        yield Shape(f"HTTP/1.0 without Host, HEAD {name}", head, (200,), True, True)
    yield closed_after("HTTP/1.0 without Host elsewhere", b"GET / HTTP/1.0\r\n\r\n", HEADER)
    lone = b"POST /predict HTTP/1.0\r\n" + JSON + LENGTH + CRLF + BODY
    yield closed_after("HTTP/1.0 without Host, submit", lone, HEADER)
    yield closed_after("HTTP/1.0, two Hosts", old + HOST + HOST + CRLF, HEADER)
    yield refused("HTTP/1.0 chunked", POST.replace(b"1.1", b"1.0") + CHUNKED + CRLF + CHUNKS)
    for version in (
        b"HTTP/0.9",
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"HTTP/3.0",
        b"HTTP/1.1x",
        b"HTTP/01.1",
        b"http/1.1",
        b"HTTP/1",
        b"XTTP/1.1",
    ):
        yield refused(
            f"version {version.decode()}", b"GET /health/live %b\r\n" % version + HOST + CRLF
        )
    yield refused("no version", b"GET /health/live\r\n" + HOST + CRLF)
    yield refused(
        "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    )
    yield refused("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n")
    yield refused("SSH", b"SSH-2.0-OpenSSH_9.6\r\n")


def _request_lines() -> Iterator[Shape]:
    rest = b" HTTP/1.1\r\n" + HOST + CRLF
    yield refused("method in lower case", b"get /" + rest)
    yield refused("unknown method", b"FETCH /" + rest)
    yield refused("space before the method", b" GET /" + rest)
    yield refused("space after the version", b"GET / HTTP/1.1 \r\n" + HOST + CRLF)
    yield refused("space in the target", b"GET /health/live x" + rest)
    for name, target in {
        "tab": b"/a\tb",
        "NUL": b"/a\0b",
        "non-ASCII path": b"/\xc3\xa9",
        "non-ASCII query": b"/health/live?\xc3\xa9",
        "fragment": b"/health/live#x",
        "fragment after a query": b"/health/live?a=b#x",
        "asterisk": b"*",
        "no slash": b"health/live",
        "authority": b"localhost:80",
        "another scheme": b"ftp://localhost/health/live",
    }.items():
        yield refused(f"target: {name}", b"GET " + target + rest)
    yield open_after("target: asterisk of OPTIONS", b"OPTIONS *" + rest, NO_ROUTE)
    yield open_after("target: two slashes", b"GET //evil.example/health/live" + rest, NO_ROUTE)
    yield open_after("target: encoded slash", b"GET /health%2flive" + rest, NO_ROUTE)
    yield open_after("target: encoded line end", b"GET /health%0a" + rest, NO_ROUTE)
    yield open_after("target: line end after a name", b"GET /models/iris%0A" + rest, NO_ROUTE)
    yield open_after("target: encoded letter", b"GET /%68ealth/live" + rest, 200)
    yield open_after("target: encoded NUL", b"GET /job/%00" + rest, (404, "job_not_found"))
    yield open_after("target: dots", b"GET /health/../jobs" + rest, NO_ROUTE)
    yield open_after("target: an empty query", b"GET /health/live?" + rest, 200)


def _absolute() -> Iterator[Shape]:
    def request(target: bytes, *hosts: bytes, version: bytes = b"1.1") -> bytes:
        lines = [b"Host: %b\r\n" % host for host in hosts]
        return b"".join((b"GET ", target, b" HTTP/", version, CRLF, *lines, CRLF))

    here = b"http://localhost/health/live"
    yield open_after("absolute", request(here, b"localhost"), 200)
    yield open_after("absolute, its Host differs", request(here, b"evil.example"), 200)
    yield open_after(
        "absolute, another's", request(b"http://evil.example/", b"localhost"), HOST_REFUSED
    )
    yield open_after("absolute, https and a port", request(b"HTTPS://LOCALHOST:443/", b"a"), 200)
    yield open_after("absolute, an address", request(b"http://[::1]:80/", b"localhost"), 200)
    yield open_after("absolute, no path", request(b"http://localhost", b"localhost"), 200)
    yield open_after(
        "absolute, no path but a query",
        request(b"http://localhost?a=b", b"localhost"),
        (400, "invalid_query"),
    )
    yield closed_after("absolute, user", request(b"http://u@localhost/", b"localhost"), HEADER)
    yield closed_after(
        "absolute, user and another's", request(b"http://localhost:80@evil/", b"localhost"), HEADER
    )
    port = request(b"http://localhost:65536/", b"localhost")
    yield closed_after("absolute, no such port", port, HEADER)
    yield closed_after("absolute, no authority", request(b"http:///", b"localhost"), HEADER)
    yield open_after("absolute, no Host", request(here), HEADER)
    yield open_after("absolute, two Hosts", request(here, b"localhost", b"localhost"), HEADER)
    yield closed_after("absolute, an invalid Host", request(here, b"a b"), HEADER)
    yield closed_after(
        "absolute, HTTP/1.0 without Host", request(b"http://localhost/", version=b"1.0"), 200
    )


def _hosts() -> Iterator[Shape]:
    def request(*hosts: bytes, path: bytes = b"/health/live", method: bytes = b"GET") -> bytes:
        lines = [b"Host: %b\r\n" % host for host in hosts]
        return b"".join((method, b" ", path, b" HTTP/1.1\r\n", *lines, CRLF))

    for host in (
        b"localhost",
        b"LocalHost:8000",
        b"127.0.0.1:65535",
        b"[::1]",
        b"[::1]:1",
        b"localhost:",
    ):
        yield open_after(f"Host {host.decode()}", request(host), 200)
    for host in (
        b"evil.example",
        b"localhost.evil.example",
        b"localhost,evil",
        b"%6cocalhost",
        b"[::2]",
        b"300.1.1.1",
    ):
        yield open_after(f"Host {host.decode()}", request(host), HOST_REFUSED)
    for host in (
        b"",
        b"localhost:80@evil.example",
        b"user@localhost",
        b"localhost evil.example",
        b"localhost, localhost",
        b"localhost:http",
        b"localhost:-1",
        b"localhost:65536",
        b"localhost:80:80",
        b"localhost:000080",
        b":80",
        b"::1",
        b"[::1",
        b"[::1]x",
        b"[:::1]",
        b"[1.2.3.4]",
        b"[fe80::1%25eth0]",
        b"http://localhost",
        b"localhost/",
        b"localhost#x",
        b"localhost?x",
        b"localhost\\evil",
        b"%zz",
        b"l\xc3\xb6calhost",
        b'"localhost"',
        b"a" * 301,
    ):
        yield open_after(f"Host {host[:40]!r}", request(host), HEADER)
    yield open_after("no Host", request(), HEADER)
    yield open_after("two Hosts", request(b"localhost", b"evil.example"), HEADER)
    yield open_after("two Hosts, the other first", request(b"evil.example", b"localhost"), HEADER)
    yield open_after("two equal Hosts", request(b"localhost", b"localhost"), HEADER)
    yield open_after("two Hosts, no such route", request(b"a", b"b", path=b"/none"), HEADER)
    yield open_after("an invalid Host, no such route", request(b"a b", path=b"/none"), HEADER)
    yield open_after("no Host, no such method", request(path=b"/jobs", method=b"PUT"), HEADER)
    submit = b"POST /predict HTTP/1.1\r\n" + JSON + LENGTH
    yield open_after("submit without Host", submit + CRLF + BODY, HEADER)
    yield open_after("submit with two Hosts", submit + HOST + HOST + CRLF + BODY, HEADER)


def _single_fields() -> Iterator[Shape]:
    for line in (
        b"Origin: http://localhost\r\n",
        b"Content-Type: application/json\r\n",
        b"Authorization: Bearer a\r\n",
        b"X-API-Key: a\r\n",
        b"Idempotency-Key: a\r\n",
        b"Inference-Header-Content-Length: 1\r\n",
        b"Last-Event-ID: a\r\n",
    ):
        name = line.partition(b":")[0].decode()
        sent = POST.replace(JSON, b"") + LENGTH + line + line + CRLF + BODY
        yield open_after(f"two {name} lines", sent, HEADER)
    differing = b"Origin: http://localhost\r\nX: y\r\norigin: https://evil.example\r\n"
    yield open_after("two Origins, differing", POST + LENGTH + differing + CRLF + BODY, HEADER)
    yield open_after("two Origins of a GET", ALIVE + differing + CRLF, HEADER)
    for origin in (b"null", b"", b"https://evil.example", b"http://localhost http://localhost"):
        line = b"Origin: %b\r\n" % origin
        yield open_after(f"Origin {origin!r}", POST + LENGTH + line + CRLF + BODY, ORIGIN_REFUSED)
    own = b"Origin: http://localhost\r\n"
    yield open_after("our own Origin", POST + LENGTH + own + CRLF + BODY, 202)
    lists = b"Accept: a/b\r\nAccept: application/json\r\nPrefer: a\r\nPrefer: b\r\n"
    yield open_after("lists in several lines", POST + LENGTH + lists + CRLF + BODY, 202)
    codings = b"Content-Encoding: identity\r\nContent-Encoding: gzip\r\n"
    yield open_after(
        "two content codings", POST + LENGTH + codings + CRLF + BODY, (415, "encoding_refused")
    )


def _lines() -> Iterator[Shape]:
    for name, line in {
        "space before the colon": b"X : y\r\n",
        "tab before the colon": b"X\t: y\r\n",
        "no colon": b"Bad Header\r\n",
        "no name": b": y\r\n",
        "parentheses in a name": b"X(y): z\r\n",
        "non-ASCII name": b"X\xe9: y\r\n",
        "NUL in a name": b"X\0: y\r\n",
        "NUL in a value": b"X: a\0b\r\n",
        "control character in a value": b"X: a\x01b\r\n",
        "DEL in a value": b"X: a\x7fb\r\n",
        "bare CR in a value": b"X: a\rY: b\r\n",
        "bare LF after a line": b"X: a\nY: b\r\n",
        "folded line": b"X: a\r\n b\r\n",
        "folded line after nothing": b"X:\r\n b\r\n",
        "folded Host": b"Host: localhost\r\n\t.evil.example\r\n",
    }.items():
        yield refused(name, b"GET /health/live HTTP/1.1\r\n" + line + HOST + CRLF)
    yield refused("first line is folded", b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n")
    yield refused("bare LFs", b"GET / HTTP/1.1\nHost: localhost\n\n")
    yield refused("bare LF ends the head", ALIVE + b"\n")
    yield refused("bare CR ends the head", ALIVE + b"\r" + NEXT)
    long = (431, "headers_too_large")
    yield closed_after("long value", ALIVE + b"X: " + b"y" * 40_000 + b"\r\n\r\n", long)
    yield closed_after(
        "long target", b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n" + HOST + CRLF, long
    )


def _lengths() -> Iterator[Shape]:
    for value in (
        b"+24",
        b"-24",
        b"0x18",
        b"24, 24",
        b"24;",
        b"2 4",
        b"",
        b"1" * 30,
        b"18446744073709551640",
        b"24.0",
        b"\xd9\xa2",
    ):
        line = b"Content-Length: %b\r\n" % value
        yield refused(f"Content-Length {value!r}", POST + line + CRLF + BODY)
    yield refused("two equal Content-Lengths", POST + LENGTH + LENGTH + CRLF + BODY)
    yield refused("two Content-Lengths", POST + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY)
    yield open_after(
        "white space around Content-Length", POST + b"Content-Length:  24 \r\n\r\n" + BODY, 202
    )
    yield open_after(
        "Content-Length with leading zeros", POST + b"Content-Length: 00024\r\n\r\n" + BODY, 202
    )
    yield open_after("Content-Length 0", POST + b"Content-Length: 0\r\n\r\n", (400, "invalid_json"))
    yield open_after("no body", POST + CRLF, (400, "invalid_json"))
    yield refused("Content-Length, then chunked", POST + LENGTH + CHUNKED + CRLF + CHUNKS)
    yield refused("chunked, then Content-Length", POST + CHUNKED + LENGTH + CRLF + CHUNKS)
    for value in (
        b"identity",
        b"gzip",
        b"chunked, identity",
        b"identity, chunked",
        b"gzip, chunked",
        b"chunked, chunked",
        b",chunked",
        b"chunked,",
        b"xchunked",
        b"chunkedx",
        b"chunked;a=b",
        b'"chunked"',
        b"\x0bchunked",
        b"",
    ):
        line = b"Transfer-Encoding: %b\r\n" % value
        yield refused(f"Transfer-Encoding {value!r}", POST + line + CRLF + CHUNKS)
    yield refused(
        "Transfer-Encoding of a DELETE",
        b"DELETE /jobs HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: x\r\n\r\n",
    )
    yield refused("two Transfer-Encodings", POST + CHUNKED + CHUNKED + CRLF + CHUNKS)
    other = b"Transfer-Encoding: identity\r\n"
    yield refused("identity, then chunked", POST + other + CHUNKED + CRLF + CHUNKS)
    yield refused("chunked, then identity", POST + CHUNKED + other + CRLF + CHUNKS)
    yield refused(
        "folded Transfer-Encoding", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + CHUNKS
    )


def _chunks() -> Iterator[Shape]:
    head = POST + CHUNKED + CRLF
    chunk = b"18\r\n" + BODY + CRLF
    yield open_after("chunked", head + CHUNKS, 202)
    yield open_after("Chunked", POST + CHUNKED.replace(b"c", b"C") + CRLF + CHUNKS, 202)
    single = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY[:4]) + b"014\r\n" + BODY[4:] + CRLF
    yield open_after("several chunks", head + single + b"000\r\n\r\n", 202)
    yield open_after(
        "chunk extensions", head + b'18;a;b=c;d="e;\\""\r\n' + BODY + b"\r\n0;x\r\n\r\n", 202
    )
    for size in (b" 18", b"+18", b"-18", b"0x18", b"18 ", b"18\t", b"", b"G", b"F" * 17, b"1 8"):
        yield refused(f"chunk size {size!r}", head + size + CRLF + BODY + CRLF + b"0\r\n\r\n")
    yield refused("chunk size ended by LF", head + b"18\n" + BODY + b"\r\n0\r\n\r\n")
    yield refused("chunk ended by LF", head + b"18\r\n" + BODY + b"\n0\r\n\r\n")
    yield refused("chunk longer than its size", head + b"17\r\n" + BODY + b"\r\n0\r\n\r\n")
    yield refused("chunk extension ended by LF", head + b"18;a\n" + BODY + b"\r\n0\r\n\r\n")
    yield refused("bare CR in a chunk extension", head + b"18;a\rb\r\n" + BODY + b"\r\n0\r\n\r\n")
    yield refused("last chunk ended by LF", head + chunk + b"0\n\n")
    last = head + chunk + b"0\r\n"
    for line in (
        b"X: y",
        b"Host: evil.example",
        b"Origin: https://evil.example",
        b"Upgrade: h2c",
        b"Expect: 100-continue",
        b"Content-Type: text/plain",
    ):
        yield open_after(f"trailer {line.decode()}", last + line + b"\r\n\r\n", 202)
        yield open_after(
            f"trailer {line.decode()}, then a GET", last + line + CRLF * 2 + NEXT, 202, 200
        )
    evil = head.replace(b"localhost", b"evil.example")
    yield open_after(
        "refused Host, allowed trailer", evil + chunk + b"0\r\n" + HOST + CRLF, HOST_REFUSED
    )
    foreign = POST + CHUNKED + b"Origin: https://evil.example\r\n\r\n"
    yield open_after(
        "refused Origin, allowed trailer",
        foreign + chunk + b"0\r\nOrigin: http://localhost\r\n\r\n",
        ORIGIN_REFUSED,
    )
    for line in (
        b"Connection: close",
        b"Connection: upgrade\r\nUpgrade: h2c",
        b"Proxy-Connection: close",
        b"Content-Length: 5",
        b"Transfer-Encoding: chunked",
        b"Bad Trailer",
        b"X : y",
        b"X: a\r\n b",
        b"X: a\nY: b",
    ):
        yield refused(f"trailer {line!r}", last + line + b"\r\n\r\n")
    yield closed_after(
        "long trailer", last + b"X: " + b"y" * 40_000 + b"\r\n\r\n", (431, "headers_too_large")
    )
    yield closed_after(
        "many trailers",
        last + b"".join(b"%d:\r\n" % n for n in range(6)) + b"a:b\r\n" * 9000 + CRLF,
        (431, "headers_too_large"),
    )


def _upgrades() -> Iterator[Shape]:
    yield open_after("h2c of a GET", ALIVE + H2C + CRLF, 200)
    yield open_after("h2c of a GET, then another", ALIVE + H2C + CRLF + NEXT, 200, 200)
    yield open_after("h2c with a body", POST + H2C + LENGTH + CRLF + BODY, 202)
    yield open_after(
        "h2c with a body, then a GET", POST + H2C + LENGTH + CRLF + BODY + NEXT, 202, 200
    )
    yield open_after(
        "h2c with a chunked body", POST + H2C + CHUNKED + CRLF + CHUNKS + NEXT, 202, 200
    )
    yield open_after(
        "h2c with trailers", POST + CHUNKED + H2C + CRLF + CHUNKS[:-2] + b"X: y\r\n\r\n", 202
    )
    inner = POST + H2C + b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT
    yield open_after("h2c with a body that reads as a request", inner, (400, "invalid_json"))
    yield open_after(
        "h2c with a body after others",
        NEXT + POST + H2C + LENGTH + CRLF + BODY + NEXT,
        200,
        202,
        200,
    )
    yield open_after("h2c again and again", (POST + H2C + LENGTH + CRLF + BODY) * 3, 202, 202, 202)
    yield closed_after(
        "h2c and close",
        POST + b"Connection: close, upgrade\r\nUpgrade: h2c\r\n" + LENGTH + CRLF + BODY,
        202,
    )
    yield closed_after(
        "h2c over HTTP/1.0", POST.replace(b"1.1", b"1.0") + H2C + LENGTH + CRLF + BODY, 202
    )
    yield open_after(
        "h2c that expects 100", POST + H2C + LENGTH + b"Expect: 100-continue\r\n\r\n" + BODY, 202
    )
    yield refused(
        "h2c with an odd Transfer-Encoding",
        POST + H2C + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    )
    yield refused("h2c with two framings", POST + H2C + LENGTH + CHUNKED + CRLF + CHUNKS)
    yield open_after("h2c with two Hosts", POST + HOST + H2C + LENGTH + CRLF + BODY, HEADER)
    socket = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    yield open_after("websocket", ALIVE + socket + CRLF, 200)
    yield open_after("websocket of a POST", POST + socket + LENGTH + CRLF + BODY, 202)
    yield open_after(
        "several upgrades",
        POST + b"Connection: upgrade\r\nUpgrade: a/1, b\r\nUpgrade: c\r\n" + LENGTH + CRLF + BODY,
        202,
    )
    yield open_after("Upgrade alone", POST + b"Upgrade: h2c\r\n" + LENGTH + CRLF + BODY, 202)
    yield open_after(
        "Connection: upgrade alone", POST + b"Connection: upgrade\r\n" + LENGTH + CRLF + BODY, 202
    )
    yield refused("CONNECT", b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + CRLF + NEXT)
    yield refused(
        "CONNECT to a path", b"CONNECT /predict HTTP/1.1\r\n" + HOST + LENGTH + CRLF + BODY
    )


def _expectations() -> Iterator[Shape]:
    for value in (
        b"100-continue",
        b"100-CONTINUE",
        b"100-continue, 100-continue",
        b"something-else",
        b"",
    ):
        line = b"Expect: %b\r\n" % value
        yield open_after(f"Expect {value!r}", POST + LENGTH + line + CRLF + BODY, 202)
    twice = b"Expect: 100-continue\r\n" * 2
    yield open_after("Expect twice", POST + LENGTH + twice + CRLF + BODY, 202)
    yield open_after("Expect without a body", ALIVE + b"Expect: 100-continue\r\n\r\n", 200)
    yield open_after(
        "Expect and chunked", POST + CHUNKED + b"Expect: 100-continue\r\n\r\n" + CHUNKS, 202
    )
    old = POST.replace(b"1.1", b"1.0") + LENGTH + b"Expect: 100-continue\r\n\r\n" + BODY
    yield closed_after("Expect over HTTP/1.0", old, 202)


def _too_large() -> Iterator[Shape]:
    """The answer says `close` while the body is still being sent: no later request is handled."""
    large = b" " * 3_000_000
    after = POST + LENGTH + CRLF + BODY + NEXT
    yield closed_after(
        "a request after a body too large",
        POST + b"Content-Length: %d\r\n\r\n" % len(large) + large + after,
        (413, "body_too_large"),
    )
    yield closed_after(
        "a request after chunks too large",
        POST + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(large), large) + after,
        (413, "body_too_large"),
    )


SHAPES: Final = (
    *_plain(),
    *_versions(),
    *_request_lines(),
    *_absolute(),
    *_hosts(),
    *_single_fields(),
    *_lines(),
    *_lengths(),
    *_chunks(),
    *_upgrades(),
    *_expectations(),
    *_too_large(),
)
