"""The images in the body of a request, in any of the forms that /classify reads."""

import base64
import binascii

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from defense.model_config import InputConfig
from service import arrays
from service.arrays import Pixels
from service.errors import TooLarge, Unprocessable, UnsupportedMediaType
from service.schemas import ClassifyRequest


async def read_images(request: Request, config: InputConfig, *, max_images: int) -> list[bytes] | Pixels:
    """Image files, still to be decoded, or pixels [n, H, W, C] of the network's size.

    Raises:
        UnsupportedMediaType, Unprocessable, TooLarge: the body is of no known form, holds none, or too many.
    """
    media_type, parameters = media_type_of(request.headers.get("content-type", ""))
    images: list[bytes] | Pixels
    if media_type.startswith("image/"):
        images = [await read_body(request)]
    elif media_type == "multipart/form-data":
        images = await _files_of_form(request, max_images)
    elif media_type == "application/json":
        images = _files_of_json(await read_body(request), max_images)
    elif media_type in arrays.MEDIA_TYPES:
        images = arrays.read_pixels(await read_body(request), media_type, config, shape_of(parameters))
    else:
        raise UnsupportedMediaType(
            "expected Content-Type image/*, multipart/form-data, application/json, application/x-npy or "
            f"application/octet-stream, got '{media_type or 'none'}'; "
            "with curl: -H 'Content-Type: image/png' --data-binary @image.png"
        )
    if len(images) > max_images:
        raise too_many_images(max_images)
    return images


async def read_body(request: Request) -> bytes:
    """All of a request's body.

    Raises:
        ClientDisconnect: the client left.
    """
    # Not request.body(), which costs several times as much for a body that is there at once.
    chunks = []
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def media_type_of(content_type: str) -> tuple[str, str]:
    """What a body is said to be, in lower case, and with which parameters."""
    media_type, _, parameters = content_type.partition(";")
    return media_type.strip().lower(), parameters


def shape_of(parameters: str) -> str | None:
    """The parameter ``shape``, of bare bytes."""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "shape":
            return value.strip(' "')
    return None


def too_many_images(max_images: int) -> TooLarge:
    """The answer to more images than one request may have."""
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
            raise too_many_images(max_images) from error
        raise
    except UnicodeError as error:
        raise Unprocessable(f"expected names in the charset of the Content-Type, got others: {error}") from error


def _files_of_json(body: bytes, max_images: int) -> list[bytes]:
    # Millions of strings would be made before they could be counted. Base64 has no comma, a data: prefix has one.
    if body.count(b",") > 2 * max_images:
        raise too_many_images(max_images)
    try:
        images = ClassifyRequest.model_validate_json(body).images
        return [base64.b64decode(image, validate=True) for image in images]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Unprocessable(f'expected {{"images": ["<base64>", ...]}}; {where}: {first["msg"]}') from error
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(f"expected images as plain base64 (no data: prefix), got other text: {error}") from error
