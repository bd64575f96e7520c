"""POST /classify: images in, defended predictions out."""

from functools import partial

import orjson
from fastapi import APIRouter, Depends
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.answers import Classified
from service.errors import Unprocessable
from service.predictor import ServedDefense
from service.routes.admission import classified
from service.routes.auth import check_api_key, documents_api_key
from service.routes.bodies import read_images
from service.routes.documentation import CLASSIFY_BODY, CLASSIFY_TOP, problems
from service.runtime import Runtime, runtime_of
from service.schemas import ClassifyResponse, prediction_json

router = APIRouter(tags=["classify"])

PATH = "/classify"
DEFAULT_TOP, MAX_TOP = 5, 1000


@router.post(
    PATH,
    summary="Classify images under the defense",
    response_model=ClassifyResponse,
    responses=problems(400, 401, 413, 415, 422, 429, 503, 504),
    openapi_extra={"requestBody": CLASSIFY_BODY, "parameters": [CLASSIFY_TOP]},
    dependencies=[Depends(documents_api_key)],
)
async def classify(request: Request) -> Response:
    """Send one image file as the body (`Content-Type: image/png`, `image/jpeg`, ...), one or more as multipart fields
    named `images`, or base64 in JSON; or, with nothing to decode, uint8 pixels `[n, height, width, channels]` of the
    network's own size as `application/x-npy` (what `numpy.save` writes) or `application/octet-stream` (the bare bytes).
    The server takes bytes only; it never fetches a URL.

    Each prediction is made twice: a first pass on a slightly noisy copy says which classes are likely, a second pass
    classifies with only the neurons that matter for those. `undefended` is what the model says without that.
    """
    runtime = runtime_of(request)
    settings, config = runtime.settings, runtime.predictor.config
    check_api_key(request.headers.get("authorization"), settings.api_keys)
    top = read_top(request.scope["query_string"])
    reading = partial(read_images, request, config.input, max_images=settings.max_images)
    defense, answers = await classified(request, reading)
    return answer_of(runtime, defense, answers, top)


async def classify_directly(scope: Scope, receive: Receive, send: Send) -> None:
    """``classify`` as a bare ASGI application, without FastAPI's routing and validation around it."""
    response = await classify(Request(scope, receive))
    await response(scope, receive, send)


def answer_of(runtime: Runtime, defense: ServedDefense, answers: Classified, top: int) -> Response:
    """The predictions, as JSON."""
    config = runtime.predictor.config
    with runtime.metrics.stage("encode"):
        answer = {
            "model": config.name,
            "importance_version": defense.version,
            "predictions": [prediction_json(row, config.labels, top) for row in answers.rows],
        }
        return Response(orjson.dumps(answer), media_type="application/json")


def read_top(query: bytes) -> int:
    """The query parameter ``top``.

    Raises:
        Unprocessable: not a number in range.
    """
    text = QueryParams(query).get("top") if query else None
    try:
        top = DEFAULT_TOP if text is None else int(text)
    except ValueError:
        top = 0
    if not 1 <= top <= MAX_TOP:
        raise Unprocessable(f"query.top: expected a whole number from 1 to {MAX_TOP}, got {str(text)[:50]!r}")
    return top
