"""Neuron importance: the scores, where they came from, and their bytes on disk and in Redis."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from defense.errors import ImportanceError, ImportanceMismatch
from defense.guards import check_finite, degenerate_because, importance_warnings

logger = logging.getLogger(__name__)

FORMAT = "igd-importance/1"
IMPORTANCE_FILE = "importance.safetensors"
_METADATA_KEY = "importance"


@dataclass(frozen=True, eq=False)
class NeuronImportance:
    """How much each neuron matters for each class, with its origin.

    Attributes:
        scores: [C, N] float32, higher is more important; always finite.
        method: ``"lo-ir"``, ``"lo-ir-signed"``, ``"cd-ir"``, or a name of your own.
        layer: the split layer whose output channels are the neurons.
        model_digest: digest of the weights that were ranked, ``"sha256:..."``; empty if unknown.
        num_images: probe images that the ranking saw.
        class_names: C labels, or empty if unknown.
        probe_set: name of the probe set.
        created_at: when, in UTC.
        warnings: what the guards found (dead neurons, classes that share a top-k set, ...).

    Raises:
        ImportanceError: scores that are not a finite [C, N] matrix, or a wrong number of class names.
    """

    scores: Tensor
    method: str
    layer: str
    model_digest: str = ""
    num_images: int = 0
    class_names: tuple[str, ...] = ()
    probe_set: str = ""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scores.ndim != 2:
            raise ImportanceError(f"expected scores of shape [classes, neurons], got {list(self.scores.shape)}")
        object.__setattr__(self, "scores", self.scores.detach().to("cpu", torch.float32).contiguous())
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "warnings", tuple(self.warnings))
        check_finite(self.scores)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ImportanceError(f"expected {self.num_classes} class names, got {len(self.class_names)}")

    @classmethod
    def ranked(
        cls,
        scores: Tensor,
        *,
        class_counts: Sequence[int] | None = None,
        class_names: Sequence[str] = (),
        **origin: str | int,
    ) -> "NeuronImportance":
        """Wrap a fresh ranking: run the guards, log what they find and keep it in ``warnings``."""
        check_finite(scores)
        warnings = importance_warnings(scores, class_counts, class_names)
        for warning in warnings:
            logger.warning("%s importance: %s", origin.get("method", ""), warning)
        return cls(scores, class_names=tuple(class_names), warnings=tuple(warnings), **origin)  # type: ignore[arg-type]

    @property
    def num_classes(self) -> int:
        return self.scores.shape[0]

    @property
    def num_neurons(self) -> int:
        return self.scores.shape[1]

    @property
    def degenerate(self) -> str | None:
        """Why this ranking cannot tell classes apart, or None if it can."""
        return degenerate_because(self.scores)

    def metadata(self) -> dict[str, object]:
        """Everything but the scores, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scores"}
        return values | {
            "created_at": self.created_at.isoformat(),
            "class_names": list(self.class_names),
            "warnings": list(self.warnings),
            "num_classes": self.num_classes,
            "num_neurons": self.num_neurons,
        }

    def to_bytes(self) -> bytes:
        """Safetensors bytes: tensor ``scores`` and the metadata as JSON. The same on disk and in Redis."""
        # One metadata entry: safetensors writes several in any order, and equal importances should have equal bytes.
        values = json.dumps({"format": FORMAT} | self.metadata(), sort_keys=True)
        return save_safetensors({"scores": self.scores}, metadata={_METADATA_KEY: values})

    @classmethod
    def from_bytes(cls, data: bytes) -> "NeuronImportance":
        """Read what ``to_bytes`` wrote.

        Raises:
            ImportanceError: the bytes are damaged, or are not an importance.
        """
        try:
            scores = load_safetensors(data)["scores"]
            header_length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_length])["__metadata__"]
            values = json.loads(header[_METADATA_KEY])
            if values["format"] != FORMAT:
                raise ImportanceError(f"expected format {FORMAT}, got {values['format']}; upgrade ig-defense")
            values["created_at"] = datetime.fromisoformat(values["created_at"])
            known = {f.name for f in fields(cls)}
            return cls(scores=scores, **{name: value for name, value in values.items() if name in known})
        except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
            raise ImportanceError(
                f"these {len(data)} bytes are not a neuron importance ({error!r}); "
                "expected the safetensors file that NeuronImportance.to_bytes or 'igd importance export' writes"
            ) from error


def check_origin(importance: NeuronImportance) -> None:
    """Refuse an importance that does not say of which weights it is: nobody could tell whether it fits.

    Raises:
        ImportanceMismatch: it has no model digest.
    """
    if not importance.model_digest:
        raise ImportanceMismatch(
            "expected an importance with the digest of the weights it is of, got one without; set model_digest to "
            "defense.model_digest(model), or rank the model with 'igd rank'"
        )


def load_importance(directory: Path | str) -> NeuronImportance | None:
    """The importance that a model directory ships, or None if it ships none.

    Raises:
        ImportanceError: the file is damaged.
    """
    path = Path(directory) / IMPORTANCE_FILE
    return NeuronImportance.from_bytes(path.read_bytes()) if path.exists() else None
