"""A request's line in the log, and its spans: both are written when it has ended, from what is known by then."""

import time
from typing import TYPE_CHECKING, Any

import structlog
from starlette.types import Scope

from service.answers import Classified
from service.logs import log_context
from service.trace_context import trace_id_of

if TYPE_CHECKING:
    from service.spans import Spans

logger = structlog.get_logger()

SLOW_LINES_PER_S = 10


class RequestLog:
    """Writes a line for requests that failed by the server's fault or were slow; for every one, if asked.

    Args:
        every: a line for every request; else for 5xx but 503, and for slow classifications, of those at most
            ``SLOW_LINES_PER_S``: under overload all are slow, and lines cost throughput.
        slow_s: what slow is. spans: where spans go, if anywhere.
    """

    def __init__(self, *, every: bool = False, slow_s: float = 1.0, spans: "Spans | None" = None) -> None:
        self._every, self._slow_s, self._spans = every, slow_s, spans
        self._second, self._lines, self._left_out = 0, 0, 0

    def begin(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Note what a request is known by, for all that is logged while it is served."""
        state = scope["state"]
        known = {"request_id": state["request_id"]}
        if trace_id := trace_id_of(headers.get(b"traceparent")):
            known["trace_id"] = trace_id
        if self._spans:
            state["span"] = self._spans.begin(scope, headers)
            known["trace_id"] = self._spans.trace_id(state["span"])
        state["known"] = known
        log_context.set(known)

    def end(self, scope: Scope, status: int, seconds: float) -> None:
        """Write what is to be written of a request that has ended."""
        classified: Classified | None = scope["state"].get("classified")
        if self._spans:
            self._spans.end(scope["state"]["span"], status, classified)
        is_slow = classified is not None and seconds > self._slow_s
        if self._every or _is_fault(status) or (is_slow and self._may_write_slow_one()):
            self._write(scope, status, seconds, classified)

    def _may_write_slow_one(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        self._lines += 1
        self._left_out += self._lines > SLOW_LINES_PER_S
        return self._lines <= SLOW_LINES_PER_S

    def _write(self, scope: Scope, status: int, seconds: float, classified: Classified | None) -> None:
        event: dict[str, Any] = {"logger": __name__, "method": scope["method"], "path": _path(scope)}
        event |= {"status": status, "total_ms": _ms(seconds)}
        if classified:
            event |= _timings(classified, scope["state"]["arrived_at"])
        if self._left_out:
            event["slow_lines_left_out"], self._left_out = self._left_out, 0
        write = logger.error if _is_fault(status) else logger.info
        write("request", **event)


def _is_fault(status: int) -> bool:
    """Whether it is the server's; 503 is how it says that it is not the moment."""
    return status >= 500 and status != 503


def _path(scope: Scope) -> str:
    """As it was sent, without the query: a client decides what is in it, and a line is to stay one."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw[:200].decode("ascii", "backslashreplace")


def _timings(classified: Classified, arrived_at: float) -> dict[str, Any]:
    """Where a classification's time went, in milliseconds; of the whole batches that its images were in."""
    batches = classified.distinct_batches
    return {
        "images": len(classified.rows),
        "batch": batches[0].id if len(batches) == 1 else [batch.id for batch in batches],
        "batch_size": sum(batch.size for batch in batches),
        "read_ms": _ms(classified.queued_at - arrived_at),
        "queue_ms": _ms(max(batch.began_at for batch in batches) - classified.queued_at),
        "trunk_ms": _ms(sum(batch.stage_seconds["trunk"] for batch in batches)),
        "tail_ms": _ms(sum(batch.stage_seconds["tail"] for batch in batches)),
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
