"""BentoML: one service, one worker, one batchable API that takes the file as the request's body."""

from typing import Any, Self

import bentoml
from starlette.requests import Request
from starlette.responses import JSONResponse

from peers.defended import MAX_BATCH_SIZE, DefendedModel, PeerSettings


# Descriptors of our own: with inferred ones BentoML builds a JSON schema for each request, a quarter of its speed here.
class Files(bentoml.IODescriptor):
    """What a batchable API takes is a list; one request is a list of one."""

    files: list[bytes]

    @classmethod
    async def from_http_request(cls, request: Request, serde: object) -> Self:
        return cls.model_construct(files=[await request.body()])


class Answers(bentoml.IODescriptor):
    """One request's part of a batch's answers."""

    answers: list[dict[str, Any]]

    @classmethod
    async def to_http_response(cls, obj: list[dict[str, Any]], serde: object) -> JSONResponse:
        return JSONResponse(obj[0])


# "Adaptive batching" in BentoML's docs: batchable and max_batch_size. There is no wait to set: the dispatcher finds it
# itself; max_latency_ms (left at its default) is when it gives a request up with 503. The service that the docs put
# before a batchable one costs a second process and an HTTP call for each request: a third of the throughput here.
@bentoml.service(
    workers=1,
    traffic={"timeout": 60},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Classifier:
    """The model and its one endpoint."""

    def __init__(self) -> None:
        self.model = DefendedModel()

    # A def, which BentoML runs in a thread: in its event loop (async def) was no faster.
    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, input_spec=Files, output_spec=Answers)
    def classify(self, files: list[bytes]) -> list[dict[str, Any]]:
        rows = self.model.predict([self.model.decode(file) for file in files])
        return [self.model.answer(row) for row in rows]


if __name__ == "__main__":
    from peers.serve_bentoml import Classifier as Service  # its worker imports it by this name, not as __main__'s

    Service.serve_http(host="127.0.0.1", port=PeerSettings.from_environment().port)
