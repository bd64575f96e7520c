"""GET /model, /health/live, /health/ready, /metrics: what runs here, and how it is."""

import asyncio

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.errors import Draining, NotReady
from service.predictor import ServedDefense
from service.routes.documentation import problems
from service.runtime import Runtime, runtime_of
from service.schemas import DefenseSettings, InputDescription, ModelResponse

router = APIRouter(tags=["status"])


@router.get("/model")
async def model(request: Request) -> ModelResponse:
    """The model, its classes and input, the defense settings, and the importance version being served."""
    runtime = runtime_of(request)
    config, served = runtime.predictor.config, runtime.served
    split = served.classifier.split if served else runtime.predictor.split
    return ModelResponse(
        name=config.name,
        classes=list(config.labels),
        num_neurons=split.num_neurons,
        model_digest=split.model_digest,
        input=InputDescription(height=config.input.size[0], width=config.input.size[1], channels=config.input.channels),
        defense=DefenseSettings(layer=split.layer, **config.defense.model_dump(exclude={"layer"})),
        importance_version=served.version if served else None,
        importance_method=served.importance.method if served else None,
    )


@router.get("/health/live", responses=problems(503))
async def live(request: Request) -> JSONResponse:
    """200 while the process can answer at all."""
    check_live(runtime_of(request))
    return JSONResponse({"status": "live"})


@router.get("/health/ready", responses=problems(503))
async def ready(request: Request) -> JSONResponse:
    """200 while /classify answers with defended predictions; a store that went away does not matter."""
    runtime = runtime_of(request)
    defense = check_ready(runtime)
    return JSONResponse({"status": "ready", "importance_version": defense.version, "store_up": runtime.store_up})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    metrics = runtime_of(request).metrics
    # Thousands of lines with many classes: not on the event loop, and not behind what waits for a store that is away.
    text = await asyncio.get_running_loop().run_in_executor(metrics.thread, generate_latest, metrics.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def check_live(runtime: Runtime) -> None:
    """What liveness means.

    Raises:
        NotReady: the process is of no use any more.
    """
    if not runtime.batcher.alive:
        raise NotReady("the batch dispatcher is dead; restart the server")


def check_ready(runtime: Runtime) -> ServedDefense:
    """What readiness means.

    Returns:
        What predictions are made with.

    Raises:
        NotReady: not now, or not any more.
    """
    if runtime.leaving or not runtime.batcher.accepting:
        raise Draining("the server is shutting down")
    return runtime.defense
