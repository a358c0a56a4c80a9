"""Connections to receivers that bound what a receiver may cost: all that it sends is metered."""

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any, Final

import anyio
import httpcore2
from anyio.abc import ByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

MAX_RECEIVED_BYTES: Final = 64 << 10
"""What may be received after each request: heads, interim answers, framing, body and TLS."""
_READ_BYTES: Final = 4 << 10
"""Of one read, after which other tasks have their turn."""
_BYTES_OF_READ: Final = 512
_BYTES_OF_LINE: Final = 256
"""What a read and a line count for at least: each costs time, however short it is. So there are at
most 128 reads, and 256 lines of headers and chunks."""

SocketOptions = Iterable[
    tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
]


class MeteredNetwork(httpcore2.AsyncNetworkBackend):
    """Makes connections on which a receiver that sends too much is cut off."""

    def __init__(self) -> None:
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 the name is httpcore2's
        local_address: str | None = None,
        socket_options: SocketOptions | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Raises as httpcore2's own."""
        socket = await self._network.connect_tcp(host, port, timeout, local_address, socket_options)
        meter = _Meter()
        return _Stream(_Wire(socket, meter), meter, socket)


class _Meter:
    """Counts what one connection has received since the last request."""

    def __init__(self) -> None:
        self._left = MAX_RECEIVED_BYTES

    def renew(self) -> None:
        self._left = MAX_RECEIVED_BYTES

    def spend(self, size_bytes: int) -> None:
        self._left -= size_bytes

    def check(self) -> None:
        """Call it before each read: raises RemoteProtocolError once too much was received."""
        if self._left <= 0:
            raise httpcore2.RemoteProtocolError("The receiver sent too much.")


class _Wire(ByteStream):
    """The bytes of a connection as they come, below TLS: a receiver may also send TLS messages
    without end, which are nothing to read above it."""

    def __init__(self, socket: httpcore2.AsyncNetworkStream, meter: _Meter) -> None:
        self._socket = socket
        self._meter = meter

    async def receive(self, max_bytes: int = _READ_BYTES) -> bytes:
        self._meter.check()
        data = await self._socket.read(min(max_bytes, _READ_BYTES))
        if not data:
            raise anyio.EndOfStream
        self._meter.spend(max(len(data), _BYTES_OF_READ))
        return data

    async def send(self, item: bytes) -> None:
        await self._socket.write(item)

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        await self._socket.aclose()


class _Stream(httpcore2.AsyncNetworkStream):
    """What HTTP reads and writes, with TLS or without. Time-outs of single reads and writes are not
    used: one time-out holds for a whole try."""

    def __init__(
        self, stream: ByteStream, meter: _Meter, socket: httpcore2.AsyncNetworkStream
    ) -> None:
        self._stream = stream
        self._meter = meter
        self._socket = socket

    async def read(
        self,
        max_bytes: int,
        timeout: float | None = None,  # noqa: ASYNC109 the name is httpcore2's
    ) -> bytes:
        self._meter.check()
        await asyncio.sleep(0)  # what TLS holds already is read without a wait
        try:
            data = await self._stream.receive(min(max_bytes, _READ_BYTES))
        except anyio.EndOfStream:
            return b""
        except anyio.BrokenResourceError as error:
            raise httpcore2.ReadError(str(error)) from error
        self._meter.spend(_BYTES_OF_LINE * data.count(b"\n"))
        return data

    async def write(
        self,
        buffer: bytes,
        timeout: float | None = None,  # noqa: ASYNC109 the name is httpcore2's
    ) -> None:
        """Begins a request, or goes on with it."""
        if not buffer:
            return
        self._meter.renew()
        try:
            await self._stream.send(buffer)
        except anyio.BrokenResourceError as error:
            raise httpcore2.WriteError(str(error)) from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 the name is httpcore2's
    ) -> httpcore2.AsyncNetworkStream:
        """Raises ConnectError if TLS fails, and RemoteProtocolError."""
        self._meter.renew()
        try:
            stream = await TLSStream.wrap(
                self._stream,
                ssl_context=ssl_context,
                hostname=server_hostname,
                standard_compatible=False,
                server_side=False,
            )
        except (anyio.EndOfStream, anyio.BrokenResourceError, ssl.SSLError) as error:
            await self.aclose()
            raise httpcore2.ConnectError(str(error)) from error
        except BaseException:
            await anyio.aclose_forcefully(self._stream)
            raise
        return _Stream(stream, self._meter, self._socket)

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._stream.extra(TLSAttribute.ssl_object, None)
        return self._socket.get_extra_info(info)
