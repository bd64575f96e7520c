"""What goes over HTTP, as pydantic models: the contract that /docs shows."""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class ClassifyRequest(BaseModel):
    """The JSON form of a request; raw bytes or multipart are cheaper."""

    images: list[str] = Field(min_length=1, description="image files, base64")


class LabelProbability(BaseModel):
    """A class and its probability."""

    label: str
    class_id: int
    probability: float


class Prediction(LabelProbability):
    """What both passes say of one image; the label itself is of the defended prediction."""

    top: list[LabelProbability] = Field(description="the most probable classes, defended")
    undefended: LabelProbability = Field(description="of the same clean image without a mask")
    pseudo_label: LabelProbability = Field(description="of the noisy first pass: the largest class weight")
    changed: bool = Field(description="whether the defended label differs from the undefended one")


class ClassifyResponse(BaseModel):
    """Predictions in the order of the request's images, all under one importance version."""

    model: str
    importance_version: str
    predictions: list[Prediction]


class Problem(BaseModel):
    """An RFC 9457 problem."""

    type: str = "about:blank"
    title: str
    status: int
    detail: Any
    request_id: str
    trace_id: str | None = Field(None, description="of the request's traceparent, if it had one")


class DefenseSettings(BaseModel):
    """The defense as it is applied."""

    layer: str
    top_k: int
    temperature: float
    sigma: float
    num_noise_samples: int
    unimportant_weight: float


class InputDescription(BaseModel):
    """What the network takes; images of other sizes are resized and cropped to it."""

    height: int
    width: int
    channels: int


class ModelResponse(BaseModel):
    """The model that is served."""

    name: str
    classes: list[str]
    num_neurons: int
    model_digest: str
    input: InputDescription
    defense: DefenseSettings
    importance_version: str | None = Field(description="the version served now; null while there is none")
    importance_method: str | None = None


class VersionResponse(BaseModel):
    """One importance version in the store."""

    version: str
    active: bool
    method: str
    layer: str
    num_images: int
    probe_set: str
    created_at: datetime
    warnings: list[str]
    size_bytes: int
    sha256: str


class ImportanceListResponse(BaseModel):
    """The versions in the store, newest first."""

    model: str
    serving: str | None = Field(description="the version this replica serves")
    active: str | None = Field(description="the version the store says to serve")
    store_up: bool
    problem: str | None = Field(None, description="why this replica does not serve the active version")
    versions: list[VersionResponse]


class RankRequest(BaseModel):
    """What to rank, and what to do with the ranking."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["lo-ir", "lo-ir-signed", "cd-ir"] = "lo-ir"
    dataset: str = Field("probe", description="a name from IGD_DATASETS, or 'probe': the model directory's own")
    layer: str | None = Field(None, description="the split layer; model.toml's by default")
    images_per_class: Annotated[int, Field(ge=1)] | None = Field(None, description="a seeded balanced draw; null: all")
    activate: bool = Field(True, description="serve it at once, on every replica")
    force: bool = Field(False, description="activate it even if it cannot tell classes apart")


class JobState(StrEnum):
    """Where a ranking job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


class JobProgress(BaseModel):
    """How far a job is."""

    done: int = Field(0, description="images done, of all passes")
    total: int | None = None
    rate: float | None = Field(None, description="images a second")
    eta_s: float | None = Field(None, description="seconds left at this rate")


class RankingJob(BaseModel):
    """A ranking job as the API shows it."""

    id: str
    state: JobState
    progress: JobProgress
    error: str | None = Field(None, description="why it failed, in a sentence")
    version: str | None = Field(None, description="the importance version it published")
    activated: bool | None = None
    notes: list[str] = Field(default_factory=list, description="what the guards found, what was skipped")
    log: list[str] = Field(default_factory=list, description="the last lines of its log")
    request: RankRequest
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None


class RankingJobList(BaseModel):
    """The jobs, newest first."""

    jobs: list[RankingJob]


class NeuronScore(BaseModel):
    """A neuron (channel of the layer's output) and its importance."""

    neuron: int
    score: float


class ImportanceResponse(BaseModel):
    """One version as the importance dictionary: for each class its most important neurons."""

    version: str
    active: bool
    metadata: dict[str, Any]
    classes: dict[str, list[NeuronScore]]


def prediction_json(rows: NDArray[np.float32], labels: Sequence[str], top: int) -> dict[str, Any]:
    """A ``Prediction`` as plain JSON values, from one image's rows of the predictor (``passes.ROWS``)."""
    defended, undefended, class_weights = rows[:3]
    order = (-defended).argsort(kind="stable")[:top]
    listed = [
        {"label": labels[c], "class_id": c, "probability": round(p, 6)}
        for c, p in zip(order.tolist(), defended[order].tolist(), strict=True)
    ]
    undefended_best = _most_probable(undefended, labels)
    return listed[0] | {
        "top": listed,
        "undefended": undefended_best,
        "pseudo_label": _most_probable(class_weights, labels),
        "changed": listed[0]["class_id"] != undefended_best["class_id"],
    }


def _most_probable(probabilities: NDArray[np.float32], labels: Sequence[str]) -> dict[str, Any]:
    c = int(probabilities.argmax())
    return {"label": labels[c], "class_id": c, "probability": round(probabilities.item(c), 6)}
