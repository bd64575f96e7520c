"""LitServe: one worker process with the model, one API server process, a queue between them."""

from typing import Annotated, Any

import litserve as ls
from fastapi import Body

from peers.defended import MAX_BATCH_SIZE, DefendedModel, PeerSettings, Pixels, Rows


class ClassifyAPI(ls.LitAPI):
    """The hooks of a batched LitAPI; the worker process runs them all."""

    def setup(self, device: str) -> None:
        self.model = DefendedModel()

    # The annotation is what makes LitServe take a raw body: it becomes the endpoint's parameter.
    def decode_request(self, request: Annotated[bytes, Body(media_type="image/png")]) -> Pixels:
        return self.model.decode(request)

    def batch(self, inputs: list[Pixels]) -> list[Pixels]:  # arrays would be stacked, which the predictor does itself
        return list(inputs)

    def predict(self, x: list[Pixels]) -> list[Rows]:
        return self.model.predict(x)

    def unbatch(self, output: list[Rows]) -> list[Rows]:
        return output

    def encode_response(self, output: Rows) -> dict[str, Any]:
        return self.model.answer(output)


def main() -> None:
    """Serve until stopped."""
    settings = PeerSettings.from_environment()
    # batch_timeout: the default, and the fastest here: what waits is taken at once. The worker polls without a pause.
    api = ClassifyAPI(max_batch_size=MAX_BATCH_SIZE, batch_timeout=0.0, api_path="/classify")
    # fast_queue: "for high-throughput scenarios (>100 RPS)" (LitServer's docs).
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True, timeout=False)
    server.run(
        host="127.0.0.1",
        port=settings.port,
        num_api_servers=1,  # as many as workers: "recommended" (LitServer.run's docs); two were no faster here
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )


if __name__ == "__main__":
    from peers import serve_litserve  # its worker unpickles ClassifyAPI by this name, not as __main__'s

    serve_litserve.main()
