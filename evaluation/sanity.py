"""Sanity: signs that robustness is not what it looks like.

Athalye et al., arXiv 1802.00420; Carlini et al., arXiv 1902.06705. Each check says what it looked at and whether it
found anything. None proves that an evaluation is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense import DefendedClassifier
from evaluation.attacks import first_pass
from evaluation.outcomes import Outcomes
from evaluation.targets import Target

TRANSFERS = ("transfer-ce", "transfer-cw", "transfer-t", "noise-only-eot")
KNOWING = ("bpda", "bpda-cw", "joint", "fixed-mask", "fixed-noise", "eot-ce", "eot-dlr", "eot-t")
MANY = 0.02  # of the images: more than a restart of the same attack breaks by luck


@dataclass(frozen=True)
class Finding:
    """What a check says of a target; ``suspicious`` if its robustness should not be believed without a closer look."""

    target: str
    check: str
    suspicious: bool
    text: str


def check_model(target: Target, images: Tensor, labels: Tensor) -> list[Finding]:
    """Look at the model itself: is its noise fresh, do gradients come through?

    Args:
        images: [B, C, H, W], some clean ones. labels: [B].
    """
    findings = [_check_noise(target, images), _check_zero_gradients(target, images, labels)]
    if isinstance(target.model, DefendedClassifier):
        findings.append(_check_pseudo_label(target.name, target.model))
    return findings


def check_outcomes(outcomes: Outcomes) -> list[Finding]:
    """Look at which attacks broke what: those without the defense's gradient should not beat those with it."""
    findings = []
    for check, names, meaning in (
        ("transfer beats white box", TRANSFERS, "the defense's own gradient does not lead where it is weak"),
        ("square beats gradients", ("square",), "gradients are masked: a search without any finds more"),
        ("adaptive beats plain", KNOWING, "a plain APGD overstates the robustness"),
    ):
        broke, tried = newly_broken(outcomes, names)
        if tried:
            share = broke / len(outcomes)
            text = f"broke {broke} of {len(outcomes)} images that stood before ({', '.join(tried)})"
            many = share > MANY
            findings.append(Finding(outcomes.target, check, many, text + (f": {meaning}" if many else "")))
    return findings


def newly_broken(outcomes: Outcomes, names: Sequence[str]) -> tuple[int, list[str]]:
    """How many images lost their majority of draws, or their first draw, to these attacks; and which of them ran."""
    broke, before = 0, outcomes.clean
    for name, after in outcomes.after.items():
        if name in names:
            broke += int(((before >= 1) & (after < 1)).sum())
        before = after
    return broke, [name for name in names if name in outcomes.after]


def check_curve(accuracies: Mapping[float, float], target: str) -> Finding:
    """Robust accuracy must go to zero: in a large enough ball there is an image of another class.

    Args:
        accuracies: robust accuracy by epsilon.
    """
    largest = max(accuracies)
    left = accuracies[largest]
    text = f"{left:.1%} are left at epsilon {largest:g}"
    return Finding(target, "nothing withstands everything", left > MANY, text)


@torch.no_grad()
def _check_noise(target: Target, images: Tensor) -> Finding:
    # Of a defense, the first pass: a certain pseudo-label hides the noise from the second.
    noisy = first_pass(target.model)
    claims, differs = target.has_noise, not torch.equal(noisy(images), noisy(images))
    text = {
        (True, True): "two calls on the same images differ, as they must with noise",
        (False, False): "two calls on the same images agree; it has no noise",
        (True, False): "the noise is the same in every call: it is no noise, and its seed is part of the model",
        (False, True): "two calls on the same images differ, but the model says it has no noise",
    }[claims, differs]
    return Finding(target.name, "fresh noise", claims != differs, text)


def _check_zero_gradients(target: Target, images: Tensor, labels: Tensor) -> Finding:
    images = images.clone().requires_grad_(True)
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(target.model(images), labels, reduction="sum")
    gradient = torch.autograd.grad(loss, images, allow_unused=True)[0] if loss.requires_grad else None
    zero = len(images) if gradient is None else int((gradient.flatten(1).abs().amax(dim=1) == 0).sum())
    text = f"the gradient of the cross-entropy is zero for {zero} of {len(images)} clean images"
    return Finding(target.name, "gradients are there", zero > 0, text)


def _check_pseudo_label(name: str, model: DefendedClassifier) -> Finding:
    """Logits that differ by the order of a temperature must share the weight, and it must have a gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, model.split.num_classes)
    logits = (torch.randn(shape, generator=generator) * model.temperature).requires_grad_(True)
    with torch.enable_grad():
        weights = model.pseudo_label(logits)
        total = (weights * torch.randn(shape, generator=generator)).sum()
    problems = []
    if bool((weights.amax(dim=1) == 1).all()):
        problems.append("the pseudo-label is hard (an argmax), not a softmax")
    gradient = torch.autograd.grad(total, logits, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None or not bool(gradient.any()):
        problems.append("the pseudo-label has no gradient (detached): attacks cannot see the way through the masks")
    return Finding(name, "soft pseudo-label", bool(problems), "; ".join(problems) or "soft, and with a gradient")
