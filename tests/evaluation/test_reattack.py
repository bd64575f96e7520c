"""Two pixels, two classes: whether an attack of radius epsilon can swap them is read off the image."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from defense import DefendedClassifier, SplitClassifier
from evaluation.attacks import Budget, Effort, attacks_by_name
from evaluation.tuning.adaptive import Judged, Reattacked, judge, pseudo_label_table, reattack
from evaluation.tuning.kept import KeptResults
from evaluation.tuning.settings import Setting
from evaluation.tuning.tune import Plan, halves, tune
from toy_models import PixelNet, importance_of

IDENTITY = [[1.0, 0.0], [0.0, 1.0]]
EFFORT = Effort(steps=10, eot=2, targets=1, queries=50, draws=2)


def pixels(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


@pytest.fixture
def split() -> SplitClassifier:
    return SplitClassifier(PixelNet(IDENTITY))  # the brighter pixel is the class


def test_only_images_whose_margin_is_above_twice_epsilon_withstand(split: SplitClassifier) -> None:
    images, labels = pixels([0.9, 0.1], [0.6, 0.5], [0.4, 0.6], [0.2, 0.8]), torch.tensor([0, 0, 0, 1])
    attacks = attacks_by_name(["apgd-ce"], EFFORT)
    found = reattack(split, images, labels, Budget(0.2), attacks, {}, redraws=3)
    assert found.clean.tolist() == [1, 1, 0, 1]
    assert found.robust.tolist() == [True, False, False, True]


def test_what_a_fixed_attack_broke_stays_broken_and_what_it_missed_the_adaptive_one_finds(
    split: SplitClassifier,
) -> None:
    images, labels = pixels([0.6, 0.5], [0.5, 0.6], [0.9, 0.1]), torch.tensor([0, 1, 0])
    useless, good = images.clone(), images.clone()
    good[0] = pixels([0.5, 0.6])
    attacks = attacks_by_name(["apgd-ce"], EFFORT)
    found = reattack(split, images, labels, Budget(0.2), attacks, {"useless": useless, "good": good}, redraws=1)
    assert found.fixed.tolist() == [False, True, True]
    assert found.robust.tolist() == [False, False, True]
    assert found.versions["worst case"].defended.tolist() == [[False, False, True]]


def test_noise_is_redrawn_for_the_judgement_and_one_unlucky_draw_counts(split: SplitClassifier) -> None:
    images, labels = pixels([0.52, 0.5]).expand(30, -1, -1, -1), torch.zeros(30).long()
    defended = DefendedClassifier(split, importance_of(split, IDENTITY), top_k=1, sigma=0.05)
    found = reattack(defended, images, labels, Budget(0.0), [], {}, redraws=8)
    assert 0.4 < found.clean.mean() < 0.8
    assert found.robust.float().mean() < 0.2
    assert torch.equal(found.robust, found.versions["clean"].defended.all(dim=0))


def test_the_judgement_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone(
    split: SplitClassifier,
) -> None:
    images, labels = pixels([0.51, 0.5]).expand(40, -1, -1, -1), torch.zeros(40).long()
    defended = DefendedClassifier(split, importance_of(split, IDENTITY), top_k=1, sigma=0.05)
    state = torch.get_rng_state()
    first = judge(defended, images, labels, redraws=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(judge(defended, images, labels, redraws=2, seed=1).defended, first.defended)
    assert not torch.equal(judge(defended, images, labels, redraws=2, seed=2).defended, first.defended)


def test_the_pseudo_label_table_counts_images_and_redraws() -> None:
    answers = Judged(
        defended=torch.tensor([[True, True, False, False], [True, False, False, True]]),
        pseudo_label=torch.tensor([[True, True, False, False], [True, False, False, False]]),
        undefended=torch.tensor([True, True, False, False]),
    )
    found = Reattacked(torch.zeros(4), torch.zeros(4).bool(), torch.zeros(4).bool(), {"some attack": answers})
    assert pseudo_label_table(found) == [
        {
            "images": "some attack",
            "pseudo_label_wrong": 0.625,
            "defended_right": 0.5,
            "undefended_right": 0.5,
            "defended_if_right": 1.0,
            "defended_if_wrong": 0.2,
            "undefended_if_right": 1.0,
            "undefended_if_wrong": 0.2,
        }
    ]


def test_the_halves_are_disjoint_complete_and_follow_from_the_seed() -> None:
    select, final = halves(11, seed=3)
    assert sorted([*select.tolist(), *final.tolist()]) == list(range(11))
    assert len(select) == 5
    assert torch.equal(halves(11, seed=3)[0], select)
    assert not torch.equal(halves(11, seed=4)[0], select)


def test_tuning_finds_the_setting_that_keeps_the_right_neurons() -> None:
    """The margin is p0 - p1 + 2 p2 = 0.5 with all neurons, p0 - p1 = 0.1 with two, p0 = 0.8 with class 0's own.

    An attack of 0.1 moves these by 0.4, 0.2 and 0.1: all but the second withstand it.
    """
    split = SplitClassifier(PixelNet([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]))
    images = pixels(*[[0.8, 0.7, 0.2]] * 8)
    labels = torch.zeros(8).long()
    masks = importance_of(split, [[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
    current = Setting("lo-ir", split.layer, 3, 0.01, 0.0, 1, 0.0)
    values = {
        "method": ["lo-ir"],
        "layer": [split.layer],
        "top_k": [1, 2, 3],
        "temperature": [0.01],
        "sigma": [0.0],
        "num_noise_samples": [1],
        "unimportant_weight": [0.0],
    }
    plan = Plan(Budget(0.1), values, ["apgd-ce"], ["apgd-ce"], EFFORT, candidates=1, vary=["top_k"], redraws=2)
    found = tune({split.layer: split}, {("lo-ir", split.layer): masks}, current, images, labels, plan)

    assert found.undefended_score.worst_case() == 1
    assert {s.setting.top_k: s.worst_case() for s in found.scores} == {1: 1.0, 2: 0.0, 3: 1.0}
    by_k = {c.setting.top_k: float(c.found.robust.float().mean()) for c in found.candidates if c.setting}
    assert by_k == {1: 1.0, 2: 0.0, 3: 1.0}
    roles = {c.setting.top_k if c.setting else None: c.roles for c in found.candidates}
    assert roles == {None: ("undefended",), 3: ("current", "varied"), 1: ("front", "varied"), 2: ("varied",)}
    assert found.chosen == current  # equal to k = 1, and it came first
    assert [c.roles for c in found.final] == [("undefended",), ("current",)]


def test_a_kept_result_comes_back_whole_and_only_for_what_it_was_computed_for(tmp_path: Path) -> None:
    judged = Judged(torch.tensor([[True, False]]), torch.tensor([[False, True]]), torch.tensor([True, True]))
    found = Reattacked(
        torch.tensor([0.5, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([False, False]),
        {"clean": judged, "an attack": judged},
    )
    kept = KeptResults(tmp_path)
    kept.get_or_compute({"seed": 0}, lambda: found)
    again = kept.get_or_compute({"seed": 0}, lambda: pytest.fail("computed twice"))
    assert torch.equal(again.clean, found.clean) and torch.equal(again.fixed, found.fixed)
    assert list(again.versions) == ["clean", "an attack"]
    assert torch.equal(again.versions["an attack"].pseudo_label, judged.pseudo_label)
    with pytest.raises(pytest.fail.Exception):
        kept.get_or_compute({"seed": 1}, lambda: pytest.fail("computed"))


def test_a_setting_that_costs_too_much_clean_accuracy_is_not_chosen() -> None:
    """Masks of one neuron: pixel 0 for class 0, pixel 2 for class 1, so class 1 is read off a pixel that is dark.

    With all neurons class 1 has p1 = 0.4 against p0 = 0.3; with its mask it has 0 against 0, and the first class wins.
    """
    split = SplitClassifier(PixelNet([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    images = pixels(*[[0.9, 0.1, 0.0]] * 6, *[[0.3, 0.4, 0.0]] * 6)
    labels = torch.tensor([0] * 6 + [1] * 6)
    rankings = {("lo-ir", split.layer): importance_of(split, [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])}
    fields = ("method", "layer", "top_k", "temperature", "sigma", "num_noise_samples", "unimportant_weight")
    harmless, harmful = ("lo-ir", split.layer, 3, 0.01, 0.0, 1, 0.0), ("lo-ir", split.layer, 1, 0.01, 0.0, 1, 0.0)
    current, values = Setting(*harmful), {f: list({a, b}) for f, a, b in zip(fields, harmless, harmful, strict=True)}
    plan = Plan(Budget(0.1), values, ["apgd-ce"], ["apgd-ce"], EFFORT, candidates=3, vary=["top_k"])
    found = tune({split.layer: split}, rankings, current, images, labels, plan)
    clean = {c.setting.top_k: float(c.found.clean.mean()) for c in found.candidates if c.setting}
    assert clean[3] == 1 and clean[1] < 0.98
    assert found.chosen == Setting(*harmless)
