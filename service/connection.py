"""uvicorn's HTTP connection, with a shorter way for classifications that need no task."""

import asyncio
import logging
import time
from typing import Any, cast

from starlette.responses import Response
from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.direct import DirectRequest, may_be_direct
from service.errors import ProblemResponse
from service.middleware import RequestContext, id_header
from service.runtime import Runtime

LARGEST_HEAD, HEAD_S = 65536, 60.0  # bytes of a request's line and headers, and the time in which they are to come
HOLD_S, LOOK_S = 0.005, 0.001  # for the rest of a request: many clients send head and body one after the other

logger = logging.getLogger(__name__)


class _HeadTooLarge(Exception):
    """A request's line and headers are longer than ``LARGEST_HEAD``."""


def _nothing() -> None:
    """Nobody is to be told."""


class Connection(HttpToolsProtocol):
    """One client's.

    uvicorn makes a task for each request and speaks ASGI with it: for a small model that costs more than everything
    else. Here a classification of one small image is begun in the parser's callback and answered in its future's;
    what this leaves alone, or cannot do, goes to the application as ever.

    Args:
        context: what holds for every request. arguments: uvicorn's.
    """

    def __init__(self, context: RequestContext, runtime: Runtime, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._context, self._runtime = context, runtime
        self._receiving = False
        self._read = self._head_bytes = 0  # bytes of this piece; of a request's head, but for the piece it begins in
        self._in_head = self._head_begun = False  # a request's is still to come; it begins in this piece
        self._head_deadline: asyncio.TimerHandle | None = None
        self._held: RequestResponseCycle | None = None  # its body is still to come
        self._give_up: asyncio.TimerHandle | None = None
        self._direct: DirectRequest | None = None  # under way

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """A client has come."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Whatever the client sent."""
        self._receiving, self._read, self._head_begun = True, len(data), False
        super().data_received(data)
        self._receiving = False
        if self._in_head:
            self._head_bytes += 0 if self._head_begun else self._read  # before it may be the rest of another request
            self._wait_for_head()
        if self._held and not self._give_up:
            self._give_up = self.loop.call_later(HOLD_S, self._start_held_after_a_look)

    def on_message_begin(self) -> None:
        """The parser has seen a request's first byte."""
        super().on_message_begin()
        self._in_head, self._head_begun, self._head_bytes = True, True, 0

    def on_headers_complete(self) -> None:
        """The parser has seen a request's head."""
        self._in_head = False
        if self._head_deadline:
            self._head_deadline.cancel()
            self._head_deadline = None
        if not self._head_begun or self._read > LARGEST_HEAD:  # else it came whole, in a piece that is small enough
            headers = sum(len(name) + len(value) + len(": \r\n") for name, value in self.headers)
            self._head_bytes = len(self.url) + headers
            if self._head_bytes > LARGEST_HEAD:
                raise _HeadTooLarge  # the parser's error, of which uvicorn tells the client
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or too long a one; the connection's last answer."""
        if self._head_bytes <= LARGEST_HEAD:
            super().send_400_response(msg)
            return
        detail = f"expected at most {LARGEST_HEAD} bytes of request line and headers; send fewer or shorter headers"
        problem = ProblemResponse(431, detail, {"Connection": "close"})
        self._send(problem, problem.raw_headers)
        self.transport.close()

    def on_message_complete(self) -> None:
        """The parser has seen a whole request."""
        super().on_message_complete()
        held = self._take_held()
        if not held:
            return
        self._receiving = False  # one in a turn of the loop: others are to have theirs, whatever is refused here
        try:
            self._begin(held)
        except Exception:  # the parser would take it for a fault of the client's
            logger.exception("a request could not be begun")
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or the answer was the last."""
        super().connection_lost(exc)
        if self._head_deadline:
            self._head_deadline.cancel()
        self._start_held()
        if direct := self._direct:
            self._direct = None
            direct.leave()

    def _wait_for_head(self) -> None:
        """Neither without end nor for ever: no other limit holds for a request before its head is there."""
        if self.transport.is_closing():
            return
        if self._head_bytes > LARGEST_HEAD:
            self.send_400_response("")
        elif not self._head_deadline:
            self._head_deadline = self.loop.call_later(HEAD_S, self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # Where uvicorn calls this otherwise, everything goes to the application.
        if self.transport.is_closing():  # after a refusal that was the connection's last
            return
        self._unset_keepalive_if_required()  # a request before this one may have been refused a moment ago
        waits = cycle.waiting_for_100_continue or self.flow.write_paused
        if self._receiving and app is self.app and not waits and may_be_direct(cast(Scope, cycle.scope)):
            self._held = cycle
            cycle.scope["state"]["arrived_at"] = time.perf_counter()
        else:
            super()._start_asgi_task(cycle, app)

    def _start_held_after_a_look(self) -> None:
        """A busy loop comes to its timers before it reads: the rest may have been there all the time."""
        self._give_up = self.loop.call_later(LOOK_S, self._start_held)

    def _start_held(self) -> None:
        if held := self._take_held():
            super()._start_asgi_task(held, self.app)

    def _take_held(self) -> RequestResponseCycle | None:
        held, self._held = self._held, None
        if self._give_up:
            self._give_up.cancel()
            self._give_up = None
        return held

    def _begin(self, cycle: RequestResponseCycle) -> None:
        def respond(response: Response) -> None:
            self._direct = None
            try:
                self._write(cycle, response)
            except Exception:
                self.transport.close()
                raise

        request = DirectRequest(self._context, self._runtime, cast(Scope, cycle.scope), respond)
        self._direct = request  # it may be over before the next line
        body = bytes(cycle.body)
        if request.begin(body):
            # Nobody counts what the one holds, and with the other only the collector would find the two of us.
            cycle.body, cycle.on_response = bytearray(), _nothing
        else:
            self._direct = None
            super()._start_asgi_task(cycle, self.app)

    def _send(self, response: Response, headers: list[tuple[bytes, bytes]]) -> None:
        lines = [part for name, value in headers for part in (name, b": ", value, b"\r\n")]
        self.transport.write(b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n", response.body]))

    def _write(self, cycle: RequestResponseCycle, response: Response) -> None:
        """As ``cycle.send``, which has to be awaited."""
        if self.transport.is_closing():
            return
        headers = [*self.server_state.default_headers, *response.raw_headers, id_header(cast(Scope, cycle.scope))]
        if CLOSE_HEADER in headers:
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            headers.append(CLOSE_HEADER)
        self._send(response, headers)
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()
