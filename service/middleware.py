"""What holds for every request: an id, a size limit, a count, and an answer even when a bug strikes.

Plain ASGI, because starlette's BaseHTTPMiddleware hides that a client left.
"""

import logging
import re
import time
from random import Random

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
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
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id"))
        scope.setdefault("state", {}).update(request_id=request_id, arrived_at=started)
        self.log.begin(scope, headers)
        status, reason, body = 0, None, _Body(self.limit, receive)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self.limit.check_length(headers.get(b"content-length"))
            await self.app(scope, body.receive, send_with_id)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception as error:
            reason = _reason_of(error)
            if not isinstance(error, ServiceError | StoreError | DefenseError | HTTPException):
                logger.exception("request %s failed", request_id)
            if status:  # the answer has begun, there is no other to give
                raise
            answer = error_response(scope["path"], *describe(error, request_id), **scope["state"]["known"])
            await answer(scope, receive, send_with_id)
        finally:
            self.limit.held_bytes -= body.received
            seconds = time.perf_counter() - started
            self.metrics.observe_request(_endpoint(scope["path"]), status or 499, seconds, reason)
            self.log.end(scope, status or 499, seconds)


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
        if length is not None and length.isdigit() and int(length) > self.max_body_bytes:
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
