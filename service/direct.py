"""POST /classify of one small image, answered without a task: it waits for nothing but the device."""

import asyncio
import time
from collections.abc import Callable
from typing import cast

from starlette.responses import Response
from starlette.types import Scope

from service import arrays
from service.answers import Answer, Classified
from service.arrays import Pixels
from service.decoding import SMALL_BYTES, NotOnTheSpot
from service.logs import log_context
from service.middleware import LEFT, LONGEST_LENGTH, RequestContext
from service.routes.admission import deadline_exceeded
from service.routes.auth import check_api_key
from service.routes.bodies import media_type_of, shape_of
from service.routes.classify import PATH, answer_of, read_top
from service.runtime import Runtime

LARGEST_BODY = 65536  # where uvicorn stops reading a body until it is asked for more


def may_be_direct(scope: Scope) -> bool:
    """Whether it is worth while to wait for the rest of a request that has just begun, before a task is made for it."""
    if scope["path"] != PATH or scope["method"] != "POST":
        return False
    media_type, _ = media_type_of(header_of(scope, b"content-type"))
    if media_type.startswith("image/"):
        largest = SMALL_BYTES
    elif media_type in arrays.MEDIA_TYPES:
        largest = LARGEST_BODY
    else:
        return False
    length = header_of(scope, b"content-length")
    return len(length) <= LONGEST_LENGTH and length.isdecimal() and int(length) <= largest


def header_of(scope: Scope, name: bytes) -> str:
    """A header's value, empty where there is none; starlette's ``Headers`` take several times as long."""
    for key, value in scope["headers"]:
        if key == name:
            return cast(bytes, value).decode("latin-1")
    return ""


class DirectRequest:
    """What ``RequestContext``, ``classify`` and ``classified`` do, one after the other, in a request's callbacks.

    Args:
        context: what holds for every request.
        respond: sends the answer; called once at most, not if the client has left.
    """

    def __init__(
        self, context: RequestContext, runtime: Runtime, scope: Scope, respond: Callable[[Response], None]
    ) -> None:
        self._context, self._runtime, self._scope, self._respond = context, runtime, scope, respond
        self._received = self._places = 0
        self._answer: asyncio.Future[Answer] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def begin(self, body: bytes) -> bool:
        """Put the image on its way, or refuse it; False if the request has to take the way of all others."""
        before = log_context.get()
        headers = self._context.begin(self._scope)
        try:
            self._context.limit.check_length(headers.get(b"content-length"))
            self._enqueue(body)
        except NotOnTheSpot:
            self._let_go()
            self._context.limit.held_bytes -= self._received
            return False
        except Exception as error:  # noqa: BLE001 - the client is told, and what is a bug is logged
            self._fail(error)
        finally:
            log_context.set(before)  # this is a connection's context; the future's callback has its own
        return True

    def leave(self) -> None:
        """The client has left: the device need not see its image any more."""
        if self._answer:
            log_context.set(self._scope["state"]["known"])  # in the connection's context, which ends with it
            self._let_go()
            self._context.end(self._scope, LEFT, self._received)

    def _enqueue(self, body: bytes) -> None:
        runtime, scope = self._runtime, self._scope
        settings, batcher = runtime.settings, runtime.batcher
        check_api_key(header_of(scope, b"authorization"), settings.api_keys)
        self._top = read_top(scope["query_string"])
        self._defense = runtime.defense
        batcher.take_places(1)
        self._places, self._received = 1, len(body)
        self._context.limit.count(len(body), len(body))
        self._answer = runtime.enqueue(self._defense, self._image(body))
        self._queued_at = time.perf_counter()
        remaining_s = settings.deadline_s - (self._queued_at - scope["state"]["arrived_at"])
        if remaining_s <= 0:
            raise deadline_exceeded(settings.deadline_s)
        self._deadline = self._answer.get_loop().call_later(remaining_s, self._miss_deadline)
        self._answer.add_done_callback(self._answered)

    def _image(self, body: bytes) -> bytes | Pixels:
        media_type, parameters = media_type_of(header_of(self._scope, b"content-type"))
        if media_type.startswith("image/"):
            return body
        pixels = arrays.read_pixels(body, media_type, self._runtime.predictor.config.input, shape_of(parameters))
        if len(pixels) != 1:
            raise NotOnTheSpot
        return cast(Pixels, pixels[0])

    def _answered(self, answer: "asyncio.Future[Answer]") -> None:
        if self._answer is None:  # nobody waits any more; an error is looked at, or asyncio would log it
            answer.cancelled() or answer.exception()
            return
        self._let_go()
        try:
            rows, batch = answer.result()
            found = Classified([rows], [batch], self._queued_at)
            self._scope["state"]["classified"] = found
            response = answer_of(self._runtime, self._defense, found, self._top)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
        else:
            self._end(response)

    def _miss_deadline(self) -> None:
        self._fail(deadline_exceeded(self._runtime.settings.deadline_s))

    def _fail(self, error: Exception) -> None:
        self._let_go()
        self._end(*self._context.refusal(self._scope, error))

    def _let_go(self) -> None:
        answer, self._answer = self._answer, None
        if answer:
            answer.cancel()
        if self._deadline:
            self._deadline.cancel()
        self._runtime.batcher.in_flight -= self._places
        self._places = 0

    def _end(self, response: Response, reason: str | None = None) -> None:
        try:
            self._respond(response)
        finally:
            self._context.end(self._scope, response.status_code, self._received, reason)
