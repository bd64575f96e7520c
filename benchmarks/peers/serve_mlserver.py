"""MLServer: a custom runtime with adaptive batching, and a custom handler that takes the file as the request's body.

The client sends the PNG itself, as to the others. Over the V2 protocol it would be base64 in JSON, which MLServer takes
in at 0.6 to 0.9 of the speed; the handler makes the same V2 request of the body and gives it to MLServer's batcher.
"""

import json

import uvloop
from fastapi import Request, Response
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.context import model_context
from mlserver.handlers import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput, ResponseOutput

from peers.defended import MAX_BATCH_SIZE, DefendedModel, PeerSettings


class DefendedRuntime(MLModel):
    """The model as a custom inference runtime."""

    async def load(self) -> bool:
        self.model = DefendedModel()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Image files in, answers out: BYTES [B] both."""
        batch = [self.model.decode(file) for file in payload.inputs[0].data]
        answers = [json.dumps(self.model.answer(rows)) for rows in self.model.predict(batch)]
        output = ResponseOutput(name="answers", datatype="BYTES", shape=[len(answers)], data=answers)
        return InferenceResponse(model_name=self.name, outputs=[output])

    @custom_handler(rest_path="/classify")
    async def classify(self, request: Request) -> Response:
        """One request of a batch: once the model is loaded, ``self.predict`` is MLServer's batcher."""
        file = RequestInput(name="files", datatype="BYTES", shape=[1], data=[await request.body()])
        with model_context(self.settings):  # the batcher counts its queue by model
            batched = await self.predict(InferenceRequest(inputs=[file]))
        return Response(batched.outputs[0].data[0], media_type="application/json")


# "Adaptive Batching" in MLServer's docs: both values by experiment; a time of 0 would turn it off, and less was faster.
MODEL = ModelSettings(
    name="classify", implementation=DefendedRuntime, max_batch_size=MAX_BATCH_SIZE, max_batch_time=0.00001
)


async def serve() -> None:
    """Serve until stopped; what ``mlserver start`` does."""
    settings = PeerSettings.from_environment()
    server = MLServer(
        Settings(
            host="127.0.0.1",
            http_port=settings.port,
            grpc_port=settings.port + 1,
            # "Parallel Inference": 0 keeps the model in the server's process. With one worker process it was slower
            # here (and MLServer 1.7.1's workers do not start with uvloop 0.22 or newer).
            parallel_workers=0,
            metrics_endpoint=None,
            gzip_enabled=False,
            debug=False,
        )
    )
    await server.start([MODEL])


if __name__ == "__main__":
    uvloop.run(serve())
