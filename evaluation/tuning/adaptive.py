"""Attack one setting itself: a sweep on images that were attacked beforehand flatters every setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defense import DefendedClassifier, SplitClassifier
from evaluation.attacks import Attack, Budget

Progress = Callable[[int], None]
Model = DefendedClassifier | SplitClassifier


@dataclass(frozen=True)
class Judged:
    """What a model says of one version of the images, in several redraws of its noise.

    Attributes:
        defended, pseudo_label: [redraws, n] bool, whether the second and the first pass are right; for a classifier
            without a defense both are its only pass, and there is one redraw.
        undefended: [n] bool, whether one pass over the image without noise and masks is right.
    """

    defended: Tensor
    pseudo_label: Tensor
    undefended: Tensor


@torch.no_grad()
def judge(
    model: Model, images: Tensor, labels: Tensor, *, redraws: int, seed: int = 0, batch_size: int = 256
) -> Judged:
    """Classify every image in ``redraws`` fresh draws of the noise (one where there is none)."""
    if isinstance(model, SplitClassifier):
        right = torch.cat([model(batch).argmax(1) for batch in images.split(batch_size)]) == labels
        return Judged(right[None], right[None], right)
    redraws = redraws if model.sigma else 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = [_redraw(model, images, labels, batch_size) for _ in range(redraws)]
    return Judged(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]), rows[0][2])


def _redraw(model: DefendedClassifier, images: Tensor, labels: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    predictions = [model.predict(batch) for batch in images.split(batch_size)]
    answers = ((p.logits, p.class_weights, p.undefended_logits) for p in predictions)
    return tuple(torch.cat([part.argmax(1) for part in parts]) == labels for parts in zip(*answers, strict=True))


@dataclass(frozen=True)
class Reattacked:
    """A model under fixed and adaptive attacks.

    Attributes:
        clean: [n] float, in how many redraws an untouched image is right.
        fixed, robust: [n] bool, whether an image is right in every redraw, untouched and under the fixed attacks
            alone, and under the adaptive ones, too.
        versions: what the model says of ``"clean"``, of each fixed attack's images, and of the ``"worst case"``: of
            each image the attacked copy that broke it, or the last one that did not.
    """

    clean: Tensor
    fixed: Tensor
    robust: Tensor
    versions: dict[str, Judged]


def reattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    budget: Budget,
    attacks: Sequence[Attack],
    fixed: Mapping[str, Tensor],
    *,
    redraws: int,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Reattacked:
    """Image-wise worst case of fixed attacks and of attacks on the model itself, over redraws of its noise.

    Only images that stand so far are attacked.

    Args:
        attacks: run on the model itself, in this order.
        fixed: attacked copies of the images, by the name of their attack.
        progress: called with how many (image, attack) pairs are done or need not be done.
    """
    versions = {"clean": judge(model, images, labels, redraws=redraws, seed=seed)}
    standing, worst = versions["clean"].defended.all(dim=0), images.clone()
    for name, attacked in fixed.items():
        versions[name] = judge(model, attacked, labels, redraws=redraws, seed=seed)
        standing, worst = _keep_worst(standing, worst, attacked, versions[name])
    withstood_fixed = standing
    for number, attack in enumerate(attacks):
        attacked = _attack_standing(model, worst, images, labels, standing, budget, attack, seed, batch_size)
        answers = judge(model, attacked, labels, redraws=redraws, seed=seed + 1 + number)
        standing, worst = _keep_worst(standing, worst, attacked, answers)
        if progress:
            progress((number + 1) * len(images))
    versions["worst case"] = judge(model, worst, labels, redraws=redraws, seed=seed)
    clean = versions["clean"].defended.float().mean(dim=0)
    return Reattacked(clean, withstood_fixed, standing, versions)


def _keep_worst(standing: Tensor, worst: Tensor, attacked: Tensor, answers: Judged) -> tuple[Tensor, Tensor]:
    """Which images stand after another attack, and their copies: the one that broke an image stays for good."""
    kept = torch.where(standing.view(-1, *(1,) * (worst.ndim - 1)), attacked, worst)
    return standing & answers.defended.all(dim=0), kept


def _attack_standing(
    model: Model,
    worst: Tensor,
    images: Tensor,
    labels: Tensor,
    standing: Tensor,
    budget: Budget,
    attack: Attack,
    seed: int,
    batch_size: int,
) -> Tensor:
    attacked = worst.clone()
    for number, batch in enumerate(standing.nonzero().flatten().split(batch_size)):
        if len(batch):
            attacked[batch] = attack(model, images[batch], labels[batch], budget, seed=seed + number)
    return attacked


def pseudo_label_table(found: Reattacked) -> list[dict[str, float | str | None]]:
    """How often the pseudo-label is wrong, and what becomes of the prediction then; over images and redraws.

    ``defended_if_right`` is the share of right defended predictions where the pseudo-label is right, and so on; None
    where there is no such case. ``undefended_if_wrong`` is of one pass over the same images.
    """
    return [{"images": name, **_pseudo_label_row(answers)} for name, answers in found.versions.items()]


def _pseudo_label_row(answers: Judged) -> dict[str, float | None]:
    right, undefended = answers.pseudo_label, answers.undefended.expand_as(answers.pseudo_label)
    return {
        "pseudo_label_wrong": _mean(~right),
        "defended_right": _mean(answers.defended),
        "undefended_right": _mean(undefended),
        "defended_if_right": _mean(answers.defended[right]),
        "defended_if_wrong": _mean(answers.defended[~right]),
        "undefended_if_right": _mean(undefended[right]),
        "undefended_if_wrong": _mean(undefended[~right]),
    }


def _mean(holds: Tensor) -> float | None:
    return round(float(holds.float().mean()), 4) if holds.numel() else None
