"""A plain FastAPI handler, one process, no batching: what one writes first."""

from threading import Lock
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI

from peers.defended import DefendedModel, PeerSettings


def create_app(model: DefendedModel) -> FastAPI:
    """The application; its handler is a ``def``, as FastAPI's docs advise for code that blocks: a pool of threads."""
    app = FastAPI(openapi_url=None)
    one_at_a_time = Lock()  # of the pool's 40 threads: the predictor is not to be called by several at once

    @app.post("/classify")
    def classify(body: Annotated[bytes, Body(media_type="image/png")]) -> dict[str, Any]:
        pixels = model.decode(body)
        with one_at_a_time:
            [rows] = model.predict([pixels])
        return model.answer(rows)

    return app


if __name__ == "__main__":
    settings = PeerSettings.from_environment()
    app = create_app(DefendedModel(settings))
    # uvicorn[standard], so uvloop and httptools: "fastapi run", as its docs advise, takes the same.
    uvicorn.run(app, host="127.0.0.1", port=settings.port, access_log=False, log_level="warning")
