"""What holds for every request: an id, a size limit, a count, and an answer even when a bug strikes.

Plain ASGI, because starlette's BaseHTTPMiddleware hides that a client left.
"""

import logging
import re
import time
from random import Random

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from defense import DefenseError
from importance_store import (
    CorruptImportance,
    NoActiveImportance,
    StoreError,
    VersionConflict,
    VersionNotFound,
    WrongModel,
)
from service.errors import BodiesFull, ServiceError, TooLarge, error_response
from service.metrics import Metrics
from service.request_log import RequestLog

logger = logging.getLogger(__name__)

LONGEST_LENGTH = 19  # digits of a Content-Length
LEFT = 499  # the status, in logs and metrics, of a request whose client left, as nginx has it

_KNOWN_PROBLEMS: list[tuple[type[Exception], int]] = [
    (DefenseError, 422),
    (VersionNotFound, 404),
    (NoActiveImportance, 404),
    (VersionConflict, 409),
    (WrongModel, 409),
    (CorruptImportance, 500),
    (StoreError, 503),
]
_random = Random()  # noqa: S311 - to tell requests apart; no secret, for which each would cost a system call
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")


class RequestContext:
    """Wraps the application.

    Args:
        limit: of the bodies of all requests, of this wrapper's and of others'. log: where they are told of.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, limit: "BodyLimit", log: RequestLog | None = None) -> None:
        self.app, self.metrics, self.limit, self.log = app, metrics, limit, log or RequestLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = self.begin(scope)
        status, reason, body = 0, None, _Body(self.limit, receive)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header(scope)]
            await send(message)

        try:
            self.limit.check_length(headers.get(b"content-length"))
            await self.app(scope, body.receive, send_with_id)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:
            answer, reason = self.refusal(scope, error)
            if status:  # the answer has begun, there is no other to give
                raise
            await answer(scope, receive, send_with_id)
        finally:
            self.end(scope, status or LEFT, body.received, reason)

    def begin(self, scope: Scope) -> dict[bytes, bytes]:
        """Note that a request has come; its headers."""
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state.setdefault("arrived_at", time.perf_counter())  # the connection may have noted it already
        self.log.begin(scope, headers)
        return headers

    def refusal(self, scope: Scope, error: Exception) -> tuple[Response, str | None]:
        """The answer to a request that failed, and why it was rejected if it was not at fault; a bug is logged."""
        request_id = scope["state"]["request_id"]
        if not isinstance(error, ServiceError | StoreError | DefenseError | HTTPException):
            logger.exception("request %s failed", request_id, exc_info=error)
        answer = error_response(scope["path"], *describe(error, request_id), **scope["state"]["known"])
        return answer, _reason_of(error)

    def end(self, scope: Scope, status: int, received: int, reason: str | None = None) -> None:
        """Note that a request has ended.

        Args:
            status: of the answer, or ``LEFT``. received: bytes of its body that the limit has counted.
        """
        self.limit.held_bytes -= received
        seconds = time.perf_counter() - scope["state"]["arrived_at"]
        self.metrics.observe_request(_endpoint(scope["path"]), status, seconds, reason)
        self.log.end(scope, status, seconds)


def id_header(scope: Scope) -> tuple[bytes, bytes]:
    """Of an answer: what its request is known by."""
    return b"x-request-id", scope["state"]["request_id"].encode()


def _endpoint(path: str) -> str:
    """The first part of a path; of the Open Inference Protocol's, what is the same elsewhere."""
    first, _, rest = path.strip("/").partition("/")
    if first != "v2":
        return first
    if rest.startswith("health/") or rest.endswith("/ready"):
        return "health"
    return "infer" if rest.endswith("/infer") else "model"


class BodyLimit:
    """What the bodies of the requests under way may hold.

    Args:
        max_body_bytes: a larger body gets 413, before it is read if it says its length.
        max_total_bytes: of all of them (one of the largest always fits); what comes on top gets 429.
    """

    def __init__(self, max_body_bytes: int, max_total_bytes: int) -> None:
        self.max_body_bytes, self.max_total_bytes = max_body_bytes, max(max_body_bytes, max_total_bytes)
        self.held_bytes = 0

    def check_length(self, length: bytes | None) -> None:
        """Refuse a body by its Content-Length.

        Raises:
            TooLarge: it is.
        """
        # Python reads no numbers of thousands of digits.
        if length and length.isdigit() and (len(length) > LONGEST_LENGTH or int(length) > self.max_body_bytes):
            raise body_too_large(self.max_body_bytes)

    def count(self, size: int, received: int) -> None:
        """Count ``size`` bytes more of a body of which ``received`` have come.

        Raises:
            TooLarge, BodiesFull: of this body, of all of them.
        """
        self.held_bytes += size
        if received > self.max_body_bytes:
            raise body_too_large(self.max_body_bytes)
        if self.held_bytes > self.max_total_bytes:
            raise BodiesFull(
                "the bodies of the requests under way fill the memory set aside for them; try again in 1 s", 1
            )


class _Body:
    """Counts what a request's body holds of the limits."""

    def __init__(self, limit: BodyLimit, receive: Receive) -> None:
        self._limit, self._receive, self.received = limit, receive, 0

    async def receive(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.received += size
        self._limit.count(size, self.received)
        return message


def describe(error: Exception, request_id: str) -> tuple[int, str, dict[str, str]]:
    """Status, detail and headers that a client is told; of a bug, no more than where to look for it."""
    if isinstance(error, ServiceError):
        return error.status, error.detail, error.headers
    if isinstance(error, HTTPException):  # of starlette's parser of forms
        return error.status_code, error.detail, dict(error.headers or {})
    for kind, status in _KNOWN_PROBLEMS:
        if isinstance(error, kind):
            return status, str(error), {"Retry-After": "1"} if status == 503 else {}
    return 500, f"an unexpected error; the server's log has it under request {request_id}", {}


def _reason_of(error: Exception) -> str | None:
    """Why a request was rejected that was not at fault itself."""
    if isinstance(error, ServiceError):
        return error.reason
    refused = isinstance(error, StoreError) and describe(error, "")[0] == 503
    return "store" if refused else None


def body_too_large(max_body_bytes: int) -> TooLarge:
    """The answer to a body over the limit."""
    return TooLarge(
        f"expected a body of at most {max_body_bytes} bytes; send fewer or smaller images, or raise IGD_MAX_BODY_MB",
        {"Connection": "close"},
    )


def _request_id(given: bytes | None) -> str:
    return given.decode() if given and _REQUEST_ID.fullmatch(given) else f"{_random.getrandbits(128):032x}"
