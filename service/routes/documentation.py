"""What /docs shows beyond what the code says by itself."""

from typing import Any

from service.schemas import ClassifyRequest, Problem

_BINARY = {"type": "string", "format": "binary"}

CLASSIFY_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "items": _BINARY}},
            }
        },
        "image/png": {"schema": _BINARY},
        "image/jpeg": {"schema": _BINARY},
        "application/json": {"schema": ClassifyRequest.model_json_schema()},
        "application/x-npy": {"schema": _BINARY},
        "application/octet-stream": {"schema": _BINARY},
    },
}

INFERENCE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["inputs"]},
                "example": {
                    "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": ["<base64>"]}],
                    "outputs": [{"name": "probabilities"}],
                },
            },
            "application/octet-stream": {"schema": _BINARY},
        },
    }
}

CLASSIFY_TOP: dict[str, Any] = {
    "name": "top",
    "in": "query",
    "description": "How many of the most probable classes to list.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
}

_MEANINGS = {
    400: "Not an image, or a damaged one",
    401: "No key, or a wrong one",
    403: "The admin endpoints are off",
    404: "No such version or model",
    409: "Another version was activated meanwhile, or it is of other weights",
    413: "Too many bytes, pixels or images",
    415: "A body this endpoint does not read",
    422: "Well-formed, but cannot be used",
    429: "The queue is full; see Retry-After",
    503: "Not ready, draining, or the store is away",
    504: "The deadline passed",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these statuses, as problem+json."""
    schema = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": _MEANINGS[status], "content": schema} for status in statuses}


def protocol_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these statuses, as the Open Inference Protocol has them."""
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    content = {"application/json": {"schema": error}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def with_example(schema: dict[str, Any], image_base64: str) -> dict[str, Any]:
    """The OpenAPI schema with a JSON body for /classify that works as it stands."""
    content = schema["paths"]["/classify"]["post"]["requestBody"]["content"]
    content["application/json"]["example"] = {"images": [image_base64]}
    return schema
