"""Score every setting on the shared passes: masking and the tail only."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defense import DefendedClassifier, NeuronImportance, SplitClassifier
from evaluation.tuning.passes import SharedPasses
from evaluation.tuning.settings import Setting

CLEAN = "clean"
Rankings = Mapping[tuple[str, str], NeuronImportance]  # of (method, layer)


@dataclass(frozen=True)
class Score:
    """What a setting does to the images that were given.

    Attributes:
        clean: [n] float, in how many of the redraws of the noise an untouched image is classified correctly.
        robust: [n] bool, whether an image is classified correctly untouched and under every attack, in every redraw.
    """

    setting: Setting
    clean: Tensor
    robust: Tensor

    def clean_accuracy(self, images: Tensor | slice = slice(None)) -> float:
        """Of all images, or of those chosen by index."""
        return float(self.clean[images].mean())

    def worst_case(self, images: Tensor | slice = slice(None)) -> float:
        """Worst-case accuracy of all images, or of those chosen by index."""
        return float(self.robust[images].float().mean())


def build(setting: Setting, splits: Mapping[str, SplitClassifier], rankings: Rankings) -> DefendedClassifier:
    """The defended classifier of a setting."""
    importance = rankings[setting.method, setting.layer]
    return DefendedClassifier(splits[setting.layer], importance, **setting.arguments)


@torch.no_grad()
def defended_logits(defended: DefendedClassifier, passes: SharedPasses, redraw: int) -> Tensor:
    """[n, C], equal to calling the classifier with that redraw's noise."""
    first = passes.first_pass_logits(defended.sigma, defended.num_noise_samples, redraw)
    return defended.second_pass(first, *passes.activations[defended.split.layer])


def score(setting: Setting, defended: DefendedClassifier, versions: Mapping[str, SharedPasses], redraws: int) -> Score:
    """Judge a setting on the clean version of the images and on the attacked ones.

    Args:
        versions: ``CLEAN`` and one for each attack.
        redraws: of the noise; without noise there is one.
    """
    correct = {name: correct_in_each(defended, passes, redraws) for name, passes in versions.items()}
    robust = torch.stack([rows.all(dim=0) for rows in correct.values()]).all(dim=0)
    return Score(setting, correct[CLEAN].float().mean(dim=0), robust)


def correct_in_each(defended: DefendedClassifier, passes: SharedPasses, redraws: int) -> Tensor:
    """[redraws, n] bool."""
    redraws = redraws if defended.sigma else 1
    return torch.stack(
        [defended_logits(defended, passes, redraw).argmax(1) == passes.labels for redraw in range(redraws)]
    )


def undefended_score(setting: Setting, versions: Mapping[str, SharedPasses]) -> Score:
    """The same of the classifier without a defense; ``setting`` is only a name for it."""
    correct = {name: passes.undefended_logits.argmax(1) == passes.labels for name, passes in versions.items()}
    return Score(setting, correct[CLEAN].float(), torch.stack(list(correct.values())).all(dim=0))


def sweep(
    settings: Sequence[Setting],
    splits: Mapping[str, SplitClassifier],
    rankings: Rankings,
    versions: Mapping[str, SharedPasses],
    *,
    redraws: int,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """Score all settings; ``progress`` is called with how many are done."""
    scores = []
    for setting in settings:
        scores.append(score(setting, build(setting, splits, rankings), versions, redraws))
        if progress:
            progress(len(scores))
    return scores


def pareto_front(scores: Iterable[Score], images: Tensor | slice = slice(None)) -> list[Score]:
    """Those that no other beats in clean or worst-case accuracy without losing in the other; best worst case first.

    Of equals the first stays.
    """
    front: list[Score] = []
    best_clean = -1.0
    for candidate in sorted(scores, key=lambda s: (-s.worst_case(images), -s.clean_accuracy(images))):
        if candidate.clean_accuracy(images) > best_clean:
            front.append(candidate)
            best_clean = candidate.clean_accuracy(images)
    return front
