"""Logs: JSON lines for machines, readable ones on a terminal; lines of a request or job say which one they are of."""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

# One variable for all, set once a request; structlog's own has one for each name.
log_context: ContextVar[Mapping[str, str]] = ContextVar("log_context", default=MappingProxyType({}))


def configure_logging(level: str, log_format: str) -> None:
    """Let everything that logs in this process write one line an event on stderr.

    Args:
        level: debug to error. log_format: ``"json"``, ``"text"``, or ``"auto"``: text on a terminal, else JSON.
    """
    as_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    common: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_context,
    ]
    number: int = logging.getLevelName(level.upper())
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_rendering(as_text)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    logging.captureWarnings(True)
    structlog.configure(  # straight to stderr: by way of the standard library's loggers a line takes longer
        processors=[*common, *_rendering(as_text)],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=True,
    )


def _rendering(as_text: bool) -> list[Processor]:
    if as_text:
        # Not the default traceback, which shows local variables: keys and images are among them.
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_as_json)]


def _add_context(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {**event, **log_context.get()}


def _as_json(event: EventDict, default: Callable[[Any], Any], **options: Any) -> str:
    try:
        return orjson.dumps(event, default).decode()
    except TypeError:  # a file name that is no UTF-8
        return json.dumps(event, default=default)
