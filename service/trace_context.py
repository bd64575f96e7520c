"""W3C Trace Context: the trace that a caller says a request belongs to. https://www.w3.org/TR/trace-context/"""

import re

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def trace_id_of(traceparent: bytes | None) -> str | None:
    """The trace id of a ``traceparent`` header, 32 hex digits; None where there is none, or not a valid one."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    if found is None or (found[2] is not None and traceparent and traceparent.startswith(b"00")):
        return None
    return found[1].decode()
