"""/v2: the Open Inference Protocol, for clients of Triton, KServe and MLServer."""

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from service.arrays import Pixels
from service.errors import NotFound, UnsupportedMediaType
from service.inference_protocol import (
    EXTENSIONS,
    HEADER_LENGTH,
    InferenceRequest,
    metadata,
    read_request,
    read_tensor,
    write_response,
)
from service.predictor import ServedDefense
from service.routes.admission import classified
from service.routes.auth import check_api_key, documents_api_key
from service.routes.bodies import read_body
from service.routes.documentation import INFERENCE_BODY, protocol_errors
from service.routes.status import check_live, check_ready
from service.runtime import Runtime, runtime_of

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

MODEL, VERSION = "/models/{name}", "/models/{name}/versions/{version}"


@router.get("")
async def server(request: Request) -> JSONResponse:
    """The server, and the extensions that it has."""
    return JSONResponse({"name": "ig-defense", "version": request.app.version, "extensions": EXTENSIONS})


@router.get("/health/live", responses=protocol_errors(503))
async def live(request: Request) -> JSONResponse:
    """200 while the process can answer at all."""
    check_live(runtime_of(request))
    return JSONResponse({"live": True})


@router.get("/health/ready", responses=protocol_errors(503))
async def ready(request: Request) -> JSONResponse:
    """200 while inference answers."""
    check_ready(runtime_of(request))
    return JSONResponse({"ready": True})


@router.get(MODEL, responses=protocol_errors(404))
@router.get(VERSION, responses=protocol_errors(404))
async def model(request: Request, name: str, version: str | None = None) -> JSONResponse:
    """The model's input and outputs; its version is the importance version being served."""
    runtime = runtime_of(request)
    check_served(runtime, name, version)
    config, served = runtime.predictor.config, runtime.served
    versions = [served.version] if served else []
    return JSONResponse(metadata(config.name, versions, config.input, len(config.labels)))


@router.get(f"{MODEL}/ready", responses=protocol_errors(404, 503))
@router.get(f"{VERSION}/ready", responses=protocol_errors(404, 503))
async def model_ready(request: Request, name: str, version: str | None = None) -> JSONResponse:
    """200 while inference answers."""
    runtime = runtime_of(request)
    check_served(runtime, name)
    check_ready(runtime)
    check_served(runtime, name, version)
    return JSONResponse({"name": name, "ready": True})


@router.post(
    f"{MODEL}/infer",
    responses=protocol_errors(400, 401, 404, 413, 415, 422, 429, 503, 504),
    openapi_extra=INFERENCE_BODY,
    dependencies=[Depends(documents_api_key)],
)
@router.post(
    f"{VERSION}/infer",
    responses=protocol_errors(400, 401, 404, 413, 415, 422, 429, 503, 504),
    openapi_extra=INFERENCE_BODY,
    dependencies=[Depends(documents_api_key)],
)
async def infer(request: Request, name: str, version: str | None = None) -> Response:
    """Classify a batch. Input `images`: `UINT8` pixels `[n, height, width, channels]` of the network's own size, or
    `BYTES` `[n]`, image files (base64 in JSON). Outputs, `FP32` `[n, classes]`, those asked for or all: `logits` and
    `probabilities` of the defended prediction, `undefended_logits` of the same images without the defense.

    Tensors are in the JSON, or behind it as binary data (`Inference-Header-Content-Length`, `binary_data_size`,
    `binary_data`, `binary_data_output`).
    """
    runtime = runtime_of(request)
    check_api_key(request.headers.get("authorization"), runtime.settings.api_keys)
    check_served(runtime, name)
    check_version(runtime.defense, version)
    body = InferenceBody(request, runtime)
    defense, answers = await classified(request, body.read)
    check_version(defense, version)  # another may have been activated between the one look and the other
    with runtime.metrics.stage("encode"):
        content, json_length = write_response(answers.rows, body.message, name, defense.version)
    if json_length is None:
        return Response(content, media_type="application/json")
    return Response(content, headers={HEADER_LENGTH: str(json_length)}, media_type="application/octet-stream")


class InferenceBody:
    """A request's body.

    Attributes:
        message: its JSON, once it is read.
    """

    message: InferenceRequest

    def __init__(self, request: Request, runtime: Runtime) -> None:
        self._request, self._runtime = request, runtime

    async def read(self) -> list[bytes] | Pixels:
        """Its images.

        Raises:
            UnsupportedMediaType, Unprocessable, TooLarge: it is compressed, not of this protocol, or has too many.
        """
        headers = self._request.headers
        if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
            raise UnsupportedMediaType(f"expected a body that is not compressed, got Content-Encoding '{coding[:20]}'")
        self.message, binary = read_request(await read_body(self._request), headers.get(HEADER_LENGTH))
        config, max_images = self._runtime.predictor.config.input, self._runtime.settings.max_images
        return read_tensor(self.message.inputs[0], binary, config, max_images=max_images)


def check_served(runtime: Runtime, name: str, version: str | None = None) -> None:
    """Refuse what is not served here.

    Raises:
        NotFound: another model, or another version of its importance.
    """
    own = runtime.predictor.config.name
    if name != own:
        raise NotFound(f"expected the model '{own}', which is served here, got '{name[:100]}'")
    check_version(runtime.served, version)


def check_version(served: ServedDefense | None, version: str | None) -> None:
    """Refuse another version than this, if one was asked for.

    Raises:
        NotFound: it was.
    """
    if version is not None and (served is None or version != served.version):
        now = f"'{served.version}' is" if served else "none is"
        raise NotFound(f"version '{version[:100]}' is not being served, {now}; leave it out, or activate it")
