"""What the device gives back of an image: its rows, and the batch that it was in, for logs and traces."""

import itertools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
_PROCESS = secrets.token_hex(3)  # batches of several replicas meet in one log
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One run of a batch on the device.

    Attributes:
        size: images. began_at, ended_at: on perf_counter's clock. stage_seconds: of trunk and tail.
    """

    size: int
    began_at: float
    ended_at: float
    stage_seconds: Mapping[str, float]
    number: int = field(default_factory=_numbers.__next__)

    @property
    def id(self) -> str:
        return f"{_PROCESS}-{self.number}"


class Answer(NamedTuple):
    """Of one image: its rows [5, C] (``passes.ROWS``), and the batch."""

    rows: Rows
    batch: BatchRun


class Classified(NamedTuple):
    """Of the images of a request, in order; ``queued_at`` is on perf_counter's clock."""

    rows: list[Rows]
    batches: list[BatchRun]
    queued_at: float

    @property
    def distinct_batches(self) -> list[BatchRun]:
        """The batches that the request's images were in, in order."""
        return list({batch.number: batch for batch in self.batches}.values())
