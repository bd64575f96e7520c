"""Settings of the defense, grids of them, and the ``[defense]`` block that says one in model.toml."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from defense.model_config import DefenseConfig


@dataclass(frozen=True)
class Setting:
    """All that a user may choose.

    Attributes:
        method: which ranking (``"lo-ir"``, ``"cd-ir"``, ... or a file's name); it is not part of model.toml.
        layer, top_k, temperature, sigma, num_noise_samples, unimportant_weight: as in ``DefendedClassifier``.
    """

    method: str
    layer: str
    top_k: int
    temperature: float
    sigma: float
    num_noise_samples: int
    unimportant_weight: float

    @property
    def arguments(self) -> dict[str, Any]:
        """What DefendedClassifier takes."""
        return {name: value for name, value in asdict(self).items() if name not in ("method", "layer")}

    def __str__(self) -> str:
        noise = f"sigma {self.sigma:.4g} x {self.num_noise_samples}" if self.sigma else "no noise"
        kept = f", dropped kept at {self.unimportant_weight:g}" if self.unimportant_weight else ""
        return f"{self.method} at {self.layer}, k {self.top_k}, temperature {self.temperature:g}, {noise}{kept}"


def grid(values: Mapping[str, Sequence[Any]], *, limit: int | None = None, seed: int = 0) -> list[Setting]:
    """Every combination of the values of each field, without repetitions.

    Several noise samples without noise, and any mask that drops nothing, are one setting each: only one stays.

    Args:
        values: of each field of ``Setting``.
        limit: keep a seeded random choice of that many, for layers whose tail is slow.
    """
    combinations = (Setting(**dict(zip(values, row, strict=True))) for row in itertools.product(*values.values()))
    settings = list({_canonical(setting, values): setting for setting in reversed(list(combinations))}.values())[::-1]
    if limit is None or len(settings) <= limit:
        return settings
    chosen = set(random.Random(seed).sample(range(len(settings)), limit))  # noqa: S311
    return [setting for index, setting in enumerate(settings) if index in chosen]


def _canonical(setting: Setting, values: Mapping[str, Sequence[Any]]) -> Setting:
    """One representative of all settings that do the same."""
    first = {name: choices[0] for name, choices in values.items()}
    if setting.unimportant_weight == 1:  # nothing is dropped: the undefended classifier, whatever else is set
        return Setting(**first | {"unimportant_weight": 1.0})
    return setting if setting.sigma else replace(setting, num_noise_samples=first["num_noise_samples"])


def variations(setting: Setting, values: Mapping[str, Sequence[Any]]) -> Iterator[Setting]:
    """The setting with one of its fields changed, to each of the field's values in turn."""
    for name, choices in values.items():
        yield from (replace(setting, **{name: value}) for value in choices)


def defense_block(setting: Setting, comments: Sequence[str] = ()) -> str:
    """The setting as the ``[defense]`` block of model.toml.

    Args:
        comments: lines that stand under the header.
    """
    config = DefenseConfig(layer=setting.layer, **setting.arguments)
    lines = ["[defense]", *(f"# {comment}" for comment in comments)]
    lines += [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value!r}"
        for name, value in config.model_dump().items()
    ]
    return "\n".join(lines) + "\n"
