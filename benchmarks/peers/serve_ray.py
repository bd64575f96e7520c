"""Ray Serve: one replica that batches, behind Serve's HAProxy (see ``systems`` for the flags)."""

import signal

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from peers.defended import MAX_BATCH_SIZE, DefendedModel, PeerSettings, Pixels, Rows


# max_ongoing_requests well above max_batch_size, as "Performance Tuning" advises; its default of 5 would cap batches.
@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Classifier:
    """The model behind one endpoint."""

    def __init__(self) -> None:
        self.model = DefendedModel()

    async def __call__(self, request: Request) -> JSONResponse:
        pixels = self.model.decode(await request.body())
        return JSONResponse(self.model.answer(await self.predict(pixels)))

    # No wait: while a batch runs, the next one gathers ("Dynamic Request Batching": small waits where latency counts).
    # In the replica's loop, not in a thread: for these models that was twice as fast, they would fight for the GIL.
    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=0.0)
    async def predict(self, batch: list[Pixels]) -> list[Rows]:
        return self.model.predict(batch)


def main() -> None:
    """Serve until stopped."""
    settings = PeerSettings.from_environment()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": settings.port})
    serve.run(Classifier.bind(), route_prefix="/classify", logging_config={"enable_access_log": False})
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    from peers import serve_ray  # so that its workers import Classifier, rather than unpickle one of __main__

    serve_ray.main()
