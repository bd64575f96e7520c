"""What ``model.toml`` says: architecture, input, labels, defense settings."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from defense.errors import ModelDirectoryError

CONFIG_FILE = "model.toml"
Positive = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArchitectureConfig(BaseModel):
    """``[architecture]``: a name from ``defense.models.ARCHITECTURES`` or ``torchvision/<name>``, and its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class InputConfig(_Section):
    """``[input]``: what the network takes and how an image becomes that.

    Attributes:
        size: (height, width) in pixels that the network takes.
        channels: 1 (gray) or 3 (RGB).
        mean, std: of each channel, in [0, 1]; applied inside the model. Default: no normalization.
        resize: the image's shorter side is resized to this many pixels (bilinear, antialiased), then the center is
            cropped to ``size``. Default: just large enough for the crop.
    """

    size: tuple[Positive, Positive]
    channels: Annotated[int, Field(ge=1, le=3)] = 3
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    resize: Positive | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "InputConfig":
        if self.channels == 2:
            raise ValueError("expected channels = 1 (gray) or 3 (RGB), got 2")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"expected {name} to have {self.channels} values, one a channel, got {len(values)}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected mean and std together, got one of them")
        if self.resize is not None and self.resize < max(self.size):
            raise ValueError(f"expected resize >= size, got resize = {self.resize} and size = {list(self.size)}")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.channels, *self.size)


class DefenseConfig(_Section):
    """``[defense]``: the arguments of DefendedClassifier, and the layer to split after; the paper's by default."""

    layer: str | None = None
    top_k: Positive = 50
    temperature: Annotated[float, Field(gt=0)] = 0.01
    sigma: Annotated[float, Field(ge=0)] = 4 / 255
    num_noise_samples: Positive = 1
    unimportant_weight: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def arguments(self) -> dict[str, Any]:
        """What DefendedClassifier takes."""
        return self.model_dump(exclude={"layer"})


class ModelConfig(_Section):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    architecture: ArchitectureConfig
    input: InputConfig
    defense: DefenseConfig = DefenseConfig()

    @model_validator(mode="after")
    def _unique_labels(self) -> "ModelConfig":
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise ValueError(f"expected labels to differ, these stand twice: {', '.join(twice)}")
        return self


def read_config(directory: Path | str) -> ModelConfig:
    """Read and check ``model.toml`` of a model directory.

    Raises:
        ModelDirectoryError: no such directory or file, not TOML, or a field that is missing, unknown or out of range.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        return ModelConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ModelDirectoryError(
            f"expected a model directory with {CONFIG_FILE} at '{directory}', found none; see models/README.md"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelDirectoryError(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ModelDirectoryError(f"{path}: {problems}") from error
