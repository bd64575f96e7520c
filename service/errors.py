"""What the service answers when it cannot answer, as problem+json (RFC 9457).

::

    ServiceError
    ├── BadImage             400  not an image, or a damaged one
    ├── InvalidKey           401  no key, or a wrong one
    ├── Forbidden            403  the endpoint is switched off
    ├── NotFound             404  no such thing
    ├── Conflict             409  not in the state it is in
    ├── TooLarge             413  bytes, pixels or number of images
    ├── UnsupportedMediaType 415  a body this endpoint does not read
    ├── Unprocessable        422  well-formed, but not something that can be classified
    ├── QueueFull            429  try again after Retry-After seconds
    │   └── BodiesFull       429  ... of memory for bodies
    ├── NotReady             503  no importance yet, or no store
    │   └── Draining         503  shutting down
    └── DeadlineExceeded     504  the request took longer than deadline_s

Every detail is a sentence that says what to do.
"""

import json
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import JSONResponse


class ServiceError(Exception):
    """Base: a status code and a sentence.

    Attributes:
        reason: of a rejection, for ``igd_rejected_total``; None where the client is at fault.
    """

    status = 500
    reason: str | None = None

    def __init__(self, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail, self.headers = detail, headers or {}


class BadImage(ServiceError):
    """Not an image, or a damaged one."""

    status = 400


class InvalidKey(ServiceError):
    """No key, or a wrong one."""

    status = 401

    def __init__(self, detail: str) -> None:
        super().__init__(detail, {"WWW-Authenticate": "Bearer"})


class Forbidden(ServiceError):
    """The endpoint is switched off."""

    status = 403


class NotFound(ServiceError):
    """No such thing."""

    status = 404


class Conflict(ServiceError):
    """Not possible in the state it is in."""

    status = 409


class TooLarge(ServiceError):
    """Too many bytes, pixels or images."""

    status = 413


class UnsupportedMediaType(ServiceError):
    """A body this endpoint does not read."""

    status = 415


class Unprocessable(ServiceError):
    """Well-formed, but not something that can be classified."""

    status = 422


class QueueFull(ServiceError):
    """More images wait than the queue holds."""

    status = 429
    reason = "queue_full"

    def __init__(self, detail: str, retry_after_s: int) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_s)})


class BodiesFull(QueueFull):
    """The bodies under way hold all the memory that they may."""

    reason = "bodies_full"


class NotReady(ServiceError):
    """No importance yet, the dispatcher is dead, or the store is away."""

    status = 503
    reason = "not_ready"

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail, {"Retry-After": str(retry_after_s)})


class Draining(NotReady):
    """Shutting down."""

    reason = "draining"


class DeadlineExceeded(ServiceError):
    """The request took longer than its deadline."""

    status = 504
    reason = "deadline"


def error_response(
    path: str, status: int, detail: str, headers: dict[str, str] | None = None, **members: Any
) -> JSONResponse:
    """The answer to a request that failed: a problem, but at /v2 what the Open Inference Protocol says of errors.

    Args:
        members: of the problem.
    """
    if path == "/v2" or path.startswith("/v2/"):
        return _QuickJSONResponse({"error": detail}, status, headers)
    return ProblemResponse(status, detail, headers, **members)


class _QuickJSONResponse(JSONResponse):
    """Under overload most answers are refusals, and json took a fifth of a refusal's time."""

    def render(self, content: Any) -> bytes:
        try:
            return orjson.dumps(content)
        except TypeError:  # what a client may send and UTF-8 or 64 bits cannot hold, repeated to it
            return json.dumps(content).encode()


class ProblemResponse(_QuickJSONResponse):
    """An RFC 9457 problem."""

    media_type = "application/problem+json"

    def __init__(self, status: int, detail: Any, headers: dict[str, str] | None = None, **members: Any) -> None:
        content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
        super().__init__(content | members, status, headers)
