"""Messages of the Open Inference Protocol v2: JSON, with tensors in it or as binary data behind it.

https://github.com/kserve/open-inference-protocol (REST), and Triton's extension "binary_tensor_data". One input,
``images``: UINT8 pixels [n, H, W, C] of the network's size, or BYTES [n], image files (base64 in JSON).
"""

import base64
import binascii
import re
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal, cast

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictBool, StrictInt, ValidationError, field_validator

from defense.model_config import InputConfig
from service.answers import Rows
from service.arrays import Pixels, as_pixels
from service.errors import TooLarge, Unprocessable
from service.passes import ROWS

EXTENSIONS = ("binary_tensor_data",)
HEADER_LENGTH = "Inference-Header-Content-Length"
INPUT = "images"
OUTPUTS = ("logits", "probabilities", "undefended_logits")
_ROW_OF = {name: ROWS.index(name) for name in OUTPUTS}
_LENGTH = re.compile("[0-9]{1,15}")
Size = Annotated[StrictInt, Field(ge=0)]


class InputParameters(BaseModel):
    """Of the input, those that mean something here."""

    binary_data_size: Size | None = None


class InputTensor(BaseModel):
    """The input; its data is here, or behind the JSON."""

    name: str
    shape: list[Size]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: Any = None


class OutputParameters(BaseModel):
    """Of an output."""

    binary_data: StrictBool | None = None
    classification: Any = None

    @field_validator("classification")
    @classmethod
    def _not_here(cls, value: object) -> object:
        if value:
            raise ValueError("the classification extension is not offered; take the output as a tensor")
        return value


class RequestedOutput(BaseModel):
    """An output that is asked for."""

    name: Literal["logits", "probabilities", "undefended_logits"]
    parameters: OutputParameters = OutputParameters()


class RequestParameters(BaseModel):
    """Of the request."""

    binary_data_output: StrictBool = False


class InferenceRequest(BaseModel):
    """A request's JSON; which parameters it has beyond these does not matter."""

    id: str | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: list[RequestedOutput] | None = None
    parameters: RequestParameters = RequestParameters()

    @field_validator("outputs")
    @classmethod
    def _each_once(cls, outputs: list[RequestedOutput] | None) -> list[RequestedOutput] | None:
        if outputs is not None and len({output.name for output in outputs}) < len(outputs):
            raise ValueError("expected each output once")
        return outputs

    def wanted(self) -> list[tuple[str, bool]]:
        """The outputs' names in the order asked for, and whether each is to be binary; by default all."""
        default = self.parameters.binary_data_output
        if not self.outputs:
            return [(name, default) for name in OUTPUTS]
        asked = [(output.name, output.parameters.binary_data) for output in self.outputs]
        return [(name, default if binary is None else binary) for name, binary in asked]


def read_request(body: bytes, header_length: str | None) -> tuple[InferenceRequest, memoryview]:
    """A request, and the binary data behind its JSON.

    Args:
        header_length: of ``HEADER_LENGTH``: bytes of JSON; None: all of them.

    Raises:
        Unprocessable: not of this protocol.
    """
    if header_length is not None and not (_LENGTH.fullmatch(header_length) and int(header_length) <= len(body)):
        raise Unprocessable(
            f"expected in {HEADER_LENGTH} the number of bytes of JSON, at most {len(body)}, got {header_length[:20]!r}"
        )
    end = len(body) if header_length is None else int(header_length)
    try:
        request = InferenceRequest.model_validate(orjson.loads(memoryview(body)[:end]))
    except orjson.JSONDecodeError as error:
        raise Unprocessable(
            f"expected JSON in the first {end} bytes ({error}); with binary data behind it, say its "
            f"length in {HEADER_LENGTH}"
        ) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors()[:3]]
        raise Unprocessable(f"not an inference request: {'; '.join(problems)}") from error
    return request, memoryview(body)[end:]


def read_tensor(
    tensor: InputTensor, binary: memoryview, config: InputConfig, *, max_images: int
) -> list[bytes] | Pixels:
    """The images in a request: files, or pixels [n, H, W, C].

    Args:
        binary: what is behind the JSON.

    Raises:
        Unprocessable: another name, type, shape, or amount of data than expected. TooLarge: more images.
    """
    if tensor.name != INPUT or tensor.datatype not in ("UINT8", "BYTES"):
        height, width, channels = (*config.size, config.channels)
        raise Unprocessable(
            f"expected the input '{INPUT}', UINT8 [n, {height}, {width}, {channels}] or BYTES [n] (image files), got "
            f"'{tensor.name[:50]}', {tensor.datatype[:20]} {tensor.shape[:8]}"
        )
    size = tensor.parameters.binary_data_size
    if (size or 0) != len(binary) or (size is None) == (tensor.data is None):
        raise Unprocessable(
            f"expected either 'data' or a binary_data_size that is the number of bytes behind the JSON, "
            f"got binary_data_size {size}, {len(binary)} bytes, and {'no ' if tensor.data is None else ''}'data'"
        )
    if tensor.shape and tensor.shape[0] > max_images:
        raise TooLarge(
            f"expected at most {max_images} images in a request, got {tensor.shape[0]}; send several requests"
        )
    if tensor.datatype == "UINT8":
        data = binary if size is not None else _numbers(tensor.data, tensor.shape)
        return as_pixels(tuple(tensor.shape), data, config)
    if len(tensor.shape) != 1 or not tensor.shape[0]:
        raise Unprocessable(f"expected shape [n] for n image files, got {tensor.shape[:8]}")
    return _split(binary, tensor.shape[0]) if size is not None else _decoded(tensor.data, tensor.shape[0])


def write_response(
    rows: Sequence[Rows], request: InferenceRequest, model: str, version: str
) -> tuple[bytes, int | None]:
    """A response's body, and the length of its JSON if binary data is behind that.

    Args:
        rows: of each image, [5, C] (``passes.ROWS``).
    """
    described: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for name, as_binary in request.wanted():
        values = np.stack([row[_ROW_OF[name]] for row in rows])
        output = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        if as_binary:
            binary.append(_little_endian(values))
            described.append(output | {"parameters": {"binary_data_size": len(binary[-1])}})
        else:
            described.append(output | {"data": values.ravel()})
    answer = {"model_name": model, "model_version": version, "outputs": described}
    if request.id is not None:
        answer["id"] = request.id
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([text, *binary]), len(text) if binary else None


def metadata(model: str, versions: list[str], config: InputConfig, num_classes: int) -> dict[str, Any]:
    """The model, as ``GET /v2/models/{name}`` describes it; a version is an importance version."""
    return {
        "name": model,
        "versions": versions,
        "platform": "ig-defense",
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *config.size, config.channels]}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, num_classes]} for name in OUTPUTS],
    }


def _little_endian(values: NDArray[np.float32]) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _numbers(data: Any, shape: list[int]) -> bytes:
    """Bytes of numbers from 0 to 255, nested like their shape, or flat."""
    for length in shape[1:]:
        if not (isinstance(data, list) and data and isinstance(data[0], list)):
            break
        if any(not isinstance(row, list) or len(row) != length for row in data):
            raise Unprocessable(
                f"expected 'data' nested like its shape {shape[:8]}, or flat; got rows of other lengths"
            )
        data = list(chain.from_iterable(data))
    try:
        if not isinstance(data, list):
            raise TypeError("it is not a list")
        # Not numpy.asarray, which makes strings of a list with one long string in it as long as that, all of them.
        return bytes(data)
    except (TypeError, ValueError) as error:
        raise Unprocessable(f"expected 'data' of whole numbers from 0 to 255: {error}") from error


def _split(binary: memoryview, count: int) -> list[bytes]:
    """Elements of a BYTES tensor, each behind its length, four bytes in little endian."""
    files, at = [], 0
    for _ in range(count):
        begin = at + 4
        at = begin + int.from_bytes(binary[at:begin], "little")
        files.append(bytes(binary[begin:at]))
    if at != len(binary):
        raise Unprocessable(
            f"expected {count} image files, each behind its length in 4 bytes (little endian), {at} bytes in all; "
            f"got {len(binary)} bytes"
        )
    return files


def _decoded(data: Any, count: int) -> list[bytes]:
    try:
        if not isinstance(data, list) or len(data) != count or not all(isinstance(file, str) for file in data):
            raise ValueError(f"it is not a list of {count} strings")
        return [base64.b64decode(cast(str, file), validate=True) for file in data]
    except (binascii.Error, ValueError) as error:
        raise Unprocessable(
            f"expected 'data' of image files in base64 ({error}); or send them as binary data"
        ) from error
