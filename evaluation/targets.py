"""Targets: the defense, and the controls that run beside it on the same images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense import DefendedClassifier, NeuronImportance, SplitClassifier
from defense.model_config import DefenseConfig
from evaluation.attacks import FirstPass, has_noise
from evaluation.folding import fast_copy

UNDEFENDED = "undefended"
NOISE_ONLY = "noise only"
CONTROLS = (UNDEFENDED, NOISE_ONLY, "random masks", "without noise")


@dataclass(frozen=True)
class Target:
    """Something to attack.

    Attributes:
        name: as in reports. model: images [B, C, H, W] to logits [B, C]. about: one sentence.
        fingerprint: what tells it from another target of the same name, for runs that are continued.
        is_control: no defense, but what a defense is compared with.
    """

    name: str
    model: nn.Module
    about: str
    fingerprint: str = ""
    is_control: bool = False

    @property
    def has_noise(self) -> bool:
        return has_noise(self.model)


def defense_targets(
    split: SplitClassifier,
    importances: Mapping[str, NeuronImportance],
    settings: DefenseConfig,
    *,
    controls: Sequence[str] = CONTROLS,
    random_masks: int = 1,
) -> list[Target]:
    """The undefended model, one defense for each importance, and the other controls, in that order.

    Args:
        importances: by the name that the report shows.
        controls: which of ``CONTROLS``; the undefended model is always one.
        random_masks: how many random rankings.
    """
    defenses = {name: DefendedClassifier(split, i, **settings.arguments) for name, i in importances.items()}
    targets = [_target(UNDEFENDED, split, "The same weights, one pass.", split.model_digest, True)]
    targets += [_target(name, d, f"IG-Defense, {_settings(d)}.", _print(d)) for name, d in defenses.items()]
    if settings.sigma and NOISE_ONLY in controls:
        any_defense = next(iter(defenses.values()))
        about = f"The noisy first pass alone, no masks; sigma {settings.sigma:.4g}."
        targets.append(_target(NOISE_ONLY, FirstPass(any_defense), about, f"{settings.sigma}", True))
    if "random masks" in controls:
        for seed in range(random_masks):
            masked = DefendedClassifier(split, random_importance(split, seed), **settings.arguments)
            about = f"Masks of the same k drawn at random (seed {seed})."
            targets.append(_target(f"random masks {seed}", masked, about, _print(masked), True))
    if settings.sigma and "without noise" in controls:
        still = settings.model_copy(update={"sigma": 0.0})
        for name, importance in importances.items():
            masked = DefendedClassifier(split, importance, **still.arguments)
            targets.append(_target(without_noise(name), masked, "Masks without noise.", _print(masked)))
    return targets


def without_noise(name: str) -> str:
    """The name of a defense with masks only."""
    return f"{name}, no noise"


def random_importance(split: SplitClassifier, seed: int) -> NeuronImportance:
    """A ranking that knows nothing."""
    scores = torch.rand(split.num_classes, split.num_neurons, generator=torch.Generator().manual_seed(seed))
    return NeuronImportance(scores, method=f"random-{seed}", layer=split.layer, model_digest=split.model_digest)


@torch.no_grad()
def two_passes_without_masks(split: SplitClassifier, settings: DefenseConfig, images: Tensor) -> float:
    """The largest difference of a logit between the undefended model and the defense that keeps every neuron.

    It must be rounding: the defense's second pass is then the undefended model, whatever the first one says.
    """
    everything = settings.model_copy(update={"top_k": split.num_neurons})
    defended = DefendedClassifier(split, random_importance(split, 0), **everything.arguments)
    return float((defended(images) - split(images)).abs().max())


def _target(name: str, model: nn.Module, about: str, fingerprint: str, is_control: bool = False) -> Target:
    return Target(name, fast_copy(model), about, fingerprint, is_control)


def _settings(defended: DefendedClassifier) -> str:
    return (
        f"k = {defended.top_k} of {defended.split.num_neurons}, sigma {defended.sigma:.4g}, "
        f"temperature {defended.temperature:g}, {defended.num_noise_samples} draw(s)"
    )


def _print(defended: DefendedClassifier) -> str:
    masks = "".join(str(int(v)) for v in (defended.masks > 0.5).flatten())
    return f"{_settings(defended)}|{defended.unimportant_weight}|{hex(int(masks, 2))}"
