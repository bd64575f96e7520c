"""The application: routes around one runtime."""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import error_response
from service.metrics import Metrics
from service.middleware import BodyLimit, RequestContext
from service.request_log import RequestLog
from service.routes import classify, importance, inference_protocol, ranking, status
from service.routes.documentation import with_example
from service.runtime import Runtime
from service.settings import Settings

if TYPE_CHECKING:
    from service.spans import Spans

logger = logging.getLogger(__name__)

DESCRIPTION = """An image classifier under IG-Defense (Kulkarni & Weng, ECCV 2024): every prediction is made twice, the
second time with only the neurons that matter for the classes the first pass believes in. No training.

```
curl{key} -H 'Content-Type: image/png' --data-binary @{sample} '{address}/classify?top=3'
curl{key} -F images=@{sample} -F images=@{sample} {address}/classify
curl -H 'Authorization: Bearer ADMIN_KEY' -H 'Content-Type: application/json' \\
  -d '{{"method": "lo-ir"}}' {address}/rank-neurons
```
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application; its lifespan starts and stops everything.

    Args:
        settings: by default from the environment.
    """
    settings = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not app.state.runtime.started:  # 'igd serve' starts it before uvicorn
            await app.state.runtime.start()
        yield
        await app.state.runtime.stop()
        if spans:
            await asyncio.to_thread(spans.close)

    # The offline variant brings the page's scripts along: a security service loads nothing from elsewhere.
    app: FastAPI = FastAPIOffline(title="IG-Defense", version="0.1.0", lifespan=lifespan)
    app.state.runtime = Runtime(settings, metrics)
    for module in (classify, inference_protocol, importance, ranking, status):
        app.include_router(module.router)
    limit = BodyLimit(settings.max_body_bytes, int(settings.max_total_mb * 1_000_000))
    spans = _open_spans(settings)
    log = RequestLog(every=settings.access_log, slow_s=settings.slow_request_s, spans=spans)
    app.add_middleware(RequestContext, metrics=metrics, limit=limit, log=log)
    app.state.direct_classify = RequestContext(classify.classify_directly, metrics=metrics, limit=limit, log=log)
    app.add_exception_handler(HTTPException, _http_problem)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _validation_problem)  # type: ignore[arg-type]
    _show_examples(app, settings)
    return app


class DirectClassify:
    """The application, but POST /classify goes around FastAPI, whose layers cost more than all that a request needs.

    Its route is registered all the same: for /docs, and for where the application is mounted under a path.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app, self._classify = app, app.state.direct_classify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "http" and scope["path"] == classify.PATH and scope["method"] == "POST":
            scope["app"] = self._app
            await self._classify(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _http_problem(request: Request, error: HTTPException) -> Response:
    detail = error.detail
    if error.status_code == 404 and detail == "Not Found":
        detail = f"nothing is at {request.url.path}; see /docs"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        detail = f"{request.method} is not allowed at {request.url.path}; use {headers.get('Allow', 'another method')}"
    return error_response(request.url.path, error.status_code, detail, headers, **request.state.known)


def _validation_problem(request: Request, error: RequestValidationError) -> Response:
    problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return error_response(request.url.path, 422, "; ".join(problems), **request.state.known)


def _open_spans(settings: Settings) -> "Spans | None":
    """Where spans go; None unless OpenTelemetry's variables name a place and the extra is installed."""
    if not settings.exports_traces:
        return None
    try:
        from service.spans import Spans
    except ImportError as error:
        logger.warning("no traces are sent (%s): pip install 'ig-defense[otel]', or unset OTEL_EXPORTER_OTLP_*", error)
        return None
    return Spans()


def _show_examples(app: FastAPI, settings: Settings) -> None:
    """Examples that work as they stand: with the address, the sample image and the keys of this server."""
    sample = next(iter(sorted((settings.model / "samples").glob("*.png"))), None)
    image = base64.b64encode(sample.read_bytes()).decode() if sample else None
    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain_openapi()
        schema["info"]["description"] = DESCRIPTION.format(
            sample=sample or "image.png",
            address=app.state.runtime.address,
            key=" -H 'Authorization: Bearer API_KEY'" if settings.api_keys else "",
        )
        return with_example(schema, image) if image else schema

    app.openapi = openapi  # type: ignore[method-assign]
