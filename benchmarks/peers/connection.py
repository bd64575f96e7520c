"""A keep-alive HTTP connection, no more than a load generator needs."""

import select
import socket
from urllib.parse import urlsplit


class Connection:
    """Has at most one request under way.

    Attributes:
        due_s: when the request under way was due; None while there is none.
    """

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.due_s: float | None = None
        self._received = b""

    def send(self, request: bytes, due_s: float) -> None:
        """Send a whole request.

        Raises:
            ConnectionError: closed by the server.
        """
        self.due_s = due_s
        while request:
            try:
                request = request[self.socket.send(request) :]
            except BlockingIOError:
                waiting = select.poll()
                waiting.register(self.socket, select.POLLOUT)
                waiting.poll()

    def receive(self) -> int | None:
        """The status of the answer, once that is complete.

        Raises:
            ConnectionError: closed by the server.
        """
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError("closed by the server")
        self._received += data
        if not is_complete(self._received):
            return None
        status = int(self._received[9:12])
        self._received, self.due_s = b"", None
        return status


def is_complete(answer: bytes) -> bool:
    """Whether an HTTP/1.1 answer is all there: by its Content-Length, or the last of its chunks."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    head = head.lower()
    _, found, length = head.partition(b"\r\ncontent-length:")
    if found:
        return len(body) >= int(length.partition(b"\r\n")[0])
    if b"\r\ntransfer-encoding: chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    raise ValueError(f"expected a Content-Length or chunks, got {head!r}")


def request_bytes(url: str, content_type: str, body: bytes) -> bytes:
    """A whole POST request."""
    parts = urlsplit(url)
    head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
