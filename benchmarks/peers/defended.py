"""What every peer serves: the service's own predictor, decoder and answer, without its HTTP and its batching."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from defense import load_importance
from service.images import decode_image
from service.predictor import Pixels, Predictor, ServedDefense
from service.schemas import prediction_json

MAX_BATCH_SIZE = 64
VERSION = "of the model directory"
MAX_PIXELS = 50_000_000

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class PeerSettings:
    """How ``launch`` tells a server what to serve: the same variables for all systems."""

    model: Path
    port: int
    threads: int
    dtype: str
    compiler: str

    @classmethod
    def from_environment(cls) -> Self:
        """Of the ``PEER_*`` variables."""
        e = os.environ
        numbers = int(e["PEER_PORT"]), int(e["PEER_THREADS"])
        return cls(Path(e["PEER_MODEL"]), *numbers, e["PEER_DTYPE"], e["PEER_COMPILER"])

    def environment(self) -> dict[str, str]:
        """The variables that ``from_environment`` reads."""
        values = asdict(self) | {"model": self.model.resolve()}
        return {f"PEER_{name.upper()}": str(value) for name, value in values.items()}


class DefendedModel:
    """A model directory with its own importance, ready to serve; to be built where it will be called."""

    def __init__(self, settings: PeerSettings | None = None) -> None:
        settings = settings or PeerSettings.from_environment()
        self._predictor = Predictor(
            settings.model,
            dtype=settings.dtype,
            compiler=settings.compiler,
            threads=settings.threads,
            max_batch_size=MAX_BATCH_SIZE,
        )
        importance = load_importance(settings.model)
        if importance is None:
            raise SystemExit(f"expected an importance in {settings.model}, got none; run 'igd rank' first")
        self._defense: ServedDefense = self._predictor.prepare(VERSION, importance)

    def decode(self, body: bytes) -> Pixels:
        """The pixels of an image file."""
        return decode_image(body, self._predictor.config.input, max_pixels=MAX_PIXELS)

    def predict(self, batch: Sequence[Pixels]) -> list[Rows]:
        """[5, C] for each image: see ``service.passes.ROWS``."""
        return list(self._predictor.predict(self._defense, batch))

    def answer(self, rows: Rows) -> dict[str, Any]:
        """What ``POST /classify`` answers for one image."""
        config = self._predictor.config
        prediction = prediction_json(rows, config.labels, 5)
        return {"model": config.name, "importance_version": VERSION, "predictions": [prediction]}
