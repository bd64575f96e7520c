"""Bugs in a defense: each looks more robust under a plain attack than the protocol finds, and is called by its name."""

from pathlib import Path

import pytest
import torch

from defense import DefendedClassifier
from evaluation.attacks import Budget, Effort, attack_by_name
from evaluation.outcomes import Outcomes, read_outcomes
from evaluation.protocol import run_protocol
from evaluation.sanity import Finding, check_model, check_outcomes
from evaluation.settings import RunSettings
from evaluation.targets import Target
from evaluation.test_images import Block
from toy_defenses import EPSILON, ArgmaxPseudoLabel, ConstantNoise, DetachedPseudoLabel, gray_row, two_way_defense

COUNT = 12
WARM = 0.5  # warm enough for float32 to hold the gradient through the masks
BUDGET = Budget(EPSILON, "Linf")
EFFORT = Effort(steps=20, eot=4, targets=1, queries=100, draws=3)
ATTACKS = ("apgd-ce", "bpda", "joint")
IMAGES, LABELS = gray_row(COUNT), torch.zeros(COUNT, dtype=torch.int64)


class _Images:
    """What the protocol takes of test images."""

    def blocks(self, size: int) -> list[Block]:
        return [Block(0, IMAGES, LABELS)]


def apparent_robustness(model: DefendedClassifier) -> float:
    """Of a plain attack, judged by ten answers of the model itself: what a careless evaluation reports."""
    adversarial = attack_by_name("apgd-ce", EFFORT)(model, IMAGES, LABELS, BUDGET, seed=0)
    with torch.no_grad():
        right = torch.stack([model(adversarial).argmax(dim=1) == LABELS for _ in range(10)])
    return float(right.all(dim=0).float().mean())


def protocol(model: DefendedClassifier, folder: Path) -> tuple[Outcomes, list[Finding]]:
    target = Target("defended", model, "")
    settings = RunSettings(BUDGET, ATTACKS, EFFORT, block_size=COUNT)
    run_protocol([target], _Images(), settings, folder)  # type: ignore[arg-type]
    outcomes = read_outcomes(folder, "defended", 0, ATTACKS)
    return outcomes, check_model(target, IMAGES, LABELS) + check_outcomes(outcomes)


def suspicious(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.text for finding in findings if finding.suspicious}


def test_a_sound_defense_is_as_robust_as_a_plain_attack_says_and_nothing_is_found(tmp_path):
    model = two_way_defense(temperature=WARM)
    outcomes, findings = protocol(model, tmp_path)
    assert apparent_robustness(model) <= 0.1
    assert outcomes.robust.mean() == 0
    assert suspicious(findings) == {}


@pytest.mark.parametrize(
    ("kind", "named"), [(DetachedPseudoLabel, "no gradient"), (ArgmaxPseudoLabel, "hard (an argmax)")]
)
def test_a_pseudo_label_that_attacks_cannot_see_through_is_found(kind, named, tmp_path):
    model = two_way_defense(kind, temperature=WARM)
    outcomes, findings = protocol(model, tmp_path)
    assert apparent_robustness(model) == 1
    assert outcomes.robust.mean() == 0
    assert named in suspicious(findings)["soft pseudo-label"]
    assert f"broke {COUNT} of {COUNT}" in suspicious(findings)["adaptive beats plain"]


def test_noise_with_a_constant_seed_is_found(tmp_path):
    model = two_way_defense(ConstantNoise, sigma=0.04)
    outcomes, findings = protocol(model, tmp_path)
    plain_attack = float((outcomes.after["apgd-ce"] >= 1).mean())
    assert apparent_robustness(model) > plain_attack >= outcomes.robust.mean()
    assert "the same in every call" in suspicious(findings)["fresh noise"]


def test_true_noise_is_not_called_constant():
    findings = check_model(Target("defended", two_way_defense(sigma=0.04), ""), IMAGES, LABELS)
    assert "fresh noise" not in suspicious(findings)


def test_a_gradient_that_is_zero_is_found():
    class Flat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :2].round()

    assert "12 of 12" in suspicious(check_model(Target("flat", Flat(), ""), IMAGES, LABELS))["gradients are there"]
