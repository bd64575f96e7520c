"""POST /classify: image files in, defended predictions out."""

import asyncio
import base64
import binascii
import time
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from service.errors import DeadlineExceeded, TooLarge, Unprocessable, UnsupportedMediaType
from service.routes.auth import require_api_key
from service.routes.documentation import CLASSIFY_BODY, problems
from service.runtime import runtime_of
from service.schemas import ClassifyRequest, ClassifyResponse, prediction_json

router = APIRouter(tags=["classify"])

T = TypeVar("T")


@router.post(
    "/classify",
    summary="Classify images under the defense",
    response_model=ClassifyResponse,
    responses=problems(400, 401, 413, 415, 422, 429, 503, 504),
    openapi_extra={"requestBody": CLASSIFY_BODY},
    dependencies=[Depends(require_api_key)],
)
async def classify(
    request: Request,
    top: Annotated[int, Query(ge=1, le=1000, description="How many of the most probable classes to list.")] = 5,
) -> JSONResponse:
    """Send one image file as the body (`Content-Type: image/png`, `image/jpeg`, ...), one or more as multipart fields
    named `images`, or base64 in JSON. The server takes bytes only; it never fetches a URL.

    Each prediction is made twice: a first pass on a slightly noisy copy says which classes are likely, a second pass
    classifies with only the neurons that matter for those. `undefended` is what the model says without that.
    """
    runtime = runtime_of(request)
    defense = runtime.defense
    remaining_s = runtime.settings.deadline_s - (time.perf_counter() - request.state.arrived_at)
    try:
        async with asyncio.timeout(remaining_s):
            files = await read_image_files(request, max_images=runtime.settings.max_images)
            rows = await while_connected(request, runtime.classify(defense, files))
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"no answer within {runtime.settings.deadline_s:g} s; send fewer images, or raise IGD_DEADLINE_S"
        ) from error
    config = runtime.predictor.config
    return JSONResponse(
        {
            "model": config.name,
            "importance_version": defense.version,
            "predictions": [prediction_json(row, config.labels, top) for row in rows],
        }
    )


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves: nobody would read it.

    Raises:
        ClientDisconnect: the client left.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return await task
    finally:
        departure.cancel()
        task.cancel()


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_image_files(request: Request, *, max_images: int) -> list[bytes]:
    """The image files in a body of any of the three forms.

    Raises:
        UnsupportedMediaType, Unprocessable, TooLarge: the body is none of them, holds none, or too many.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type.startswith("image/"):
        files = [await request.body()]
    elif media_type == "multipart/form-data":
        files = await _files_of_form(request, max_images)
    elif media_type == "application/json":
        files = _files_of_json(await request.body())
    else:
        raise UnsupportedMediaType(
            "expected Content-Type image/*, multipart/form-data or application/json, got "
            f"'{media_type or 'none'}'; with curl: -H 'Content-Type: image/png' --data-binary @image.png"
        )
    if len(files) > max_images:
        raise _too_many(max_images)
    return files


def _too_many(max_images: int) -> TooLarge:
    return TooLarge(f"expected at most {max_images} images in a request, got more; send several requests")


async def _files_of_form(request: Request, max_images: int) -> list[bytes]:
    try:
        async with request.form(max_files=max_images) as form:
            uploads = form.getlist("images")
            if not uploads or not all(isinstance(upload, UploadFile) for upload in uploads):
                raise Unprocessable(
                    f"expected one or more files in the multipart field 'images', got the fields {sorted(set(form))}; "
                    "with curl: -F images=@image.png"
                )
            return [await upload.read() for upload in uploads if isinstance(upload, UploadFile)]
    except HTTPException as error:  # of starlette's parser
        if error.detail.startswith("Too many files"):
            raise _too_many(max_images) from error
        raise
    except UnicodeError as error:
        raise Unprocessable(f"expected names in the charset of the Content-Type, got others: {error}") from error


def _files_of_json(body: bytes) -> list[bytes]:
    try:
        images = ClassifyRequest.model_validate_json(body).images
        return [base64.b64decode(image, validate=True) for image in images]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Unprocessable(f'expected {{"images": ["<base64>", ...]}}; {where}: {first["msg"]}') from error
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"expected images as plain base64 (no data: prefix), got other text: {error}") from error
