"""RunSettings: what decides the numbers of a run; presets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from evaluation.attacks import ATTACKS, Budget, Effort, check_attack_names
from evaluation.errors import EvaluationError

_AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")


@dataclass(frozen=True)
class RunSettings:
    """What decides the numbers of a run, beside the model and the images.

    Attributes:
        budget: how far adversarial images may be.
        attacks: names, in the order in which they run; each attacks only what stands after the ones before.
        effort: how hard they try.
        redraws: noise draws under which every adversarial image is judged; an image is robust if all get it right.
        seeds: the whole protocol runs once for each.
        block_size: images that are attacked together, and what an interruption loses at most.
    """

    budget: Budget
    attacks: tuple[str, ...]
    effort: Effort = field(default_factory=Effort)
    redraws: int = 10
    seeds: tuple[int, ...] = (0,)
    block_size: int = 100

    def __post_init__(self) -> None:
        check_attack_names(self.attacks)
        if self.redraws < 1 or self.block_size < 1 or not self.seeds:
            raise EvaluationError("expected redraws >= 1, block_size >= 1 and at least one seed")

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def digest(self, target: str) -> str:
        """Of everything that decides an image's outcome on a target of this fingerprint; not of n, nor of the seeds."""
        deciding = self.as_dict() | {"seeds": None, "attacks": None, "target": target}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Preset:
    """A choice of attacks, effort and images."""

    about: str
    attacks: tuple[str, ...]
    effort: Effort
    n: int


PRESETS = {
    "quick": Preset(
        "minutes on two cores: one attack of each kind, with few steps",
        ("apgd-ce", "transfer-cw", "bpda-cw", "joint", "square"),
        Effort(steps=20, eot=4, targets=3, queries=300),
        n=100,
    ),
    "standard": Preset(
        "AutoAttack, its standard version and its version for randomized defenses",
        (*_AUTOATTACK[:2], "eot-ce", "eot-dlr", *_AUTOATTACK[2:]),
        Effort(),
        n=500,
    ),
    "adaptive": Preset("every attack, with AutoAttack's effort", tuple(ATTACKS), Effort(), n=500),
}


def preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        EvaluationError: there is none of that name.
    """
    if name not in PRESETS:
        raise EvaluationError(f"expected one of the presets {', '.join(PRESETS)}, got '{name}'")
    return PRESETS[name]


def with_effort(effort: Effort, given: dict[str, object]) -> Effort:
    """An effort with what is given (not None) in its place."""
    return replace(effort, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def curve_epsilons(epsilon: float, factors: Sequence[float] = (0.25, 0.5, 1, 2, 4, 8)) -> list[float]:
    """Radii of the accuracy-over-epsilon curve; the largest are beyond any defense, and no image may withstand them."""
    return [round(epsilon * factor, 10) for factor in factors]
