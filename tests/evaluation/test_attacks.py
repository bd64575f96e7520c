from dataclasses import replace

import pytest
import torch
from torch import nn

from evaluation.attacks import ATTACKS, Budget, Effort, attack_by_name, attacks_by_name
from evaluation.attacks.attack import Precision
from evaluation.attacks.surrogates import FirstPass, FixedMask, FixedNoise, first_pass_of
from evaluation.errors import EvaluationError
from toy_defenses import EPSILON, LinearModel, Staircase, distance_to_border, gray_images, gray_row, two_way_defense

SMALL = Effort(steps=20, eot=2, targets=2, queries=400, draws=2)
NORMS = ("Linf", "L2")
# How far beyond the border an attack may need to go: FAB overshoots by 5%, and random squares are no straight line.
SLACK = {"fab-t": 1.1, "square": 2.5}
SLACK_L2 = {"fab-t": 1.1, "square": 8.0}


@pytest.fixture(scope="module")
def linear() -> LinearModel:
    return LinearModel()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_crosses_a_linear_border_just_beyond_its_distance_and_not_before(linear, name, norm):
    images = gray_images(3)
    labels = linear(images).argmax(dim=1)
    distances = distance_to_border(linear, images, norm)
    slack = (SLACK if norm == "Linf" else SLACK_L2).get(name, 1.02)
    for image, label, distance in zip(images.split(1), labels.split(1), distances.tolist(), strict=True):
        for factor, broken in ((slack, True), (0.98, False)):
            budget = Budget(factor * distance, norm)
            adversarial = attack_by_name(name, SMALL)(linear, image, label, budget, seed=0)
            assert budget.allows(adversarial, image).all()
            assert (linear(adversarial).argmax(dim=1) != label).item() is broken


def test_without_a_gradient_plain_apgd_fails_and_square_breaks_it():
    model, images = Staircase(), gray_images(8)
    labels = model(images).argmax(dim=1)
    budget = Budget(3 * float(distance_to_border(model.linear, images, "Linf").max()))
    stands = {
        name: (model(attack_by_name(name, SMALL)(model, images, labels, budget)).argmax(dim=1) == labels).sum().item()
        for name in ("apgd-ce", "square")
    }
    assert stands == {"apgd-ce": 8, "square": 0}


def test_an_attack_that_opens_the_pseudo_label_breaks_what_plain_apgd_cannot():
    model, images, labels = two_way_defense(), gray_row(4), torch.zeros(4, dtype=torch.int64)
    effort = Effort(steps=20, eot=1, targets=1, queries=50, draws=1)

    def stands(name: str) -> int:
        adversarial = attack_by_name(name, effort)(model, images, labels, Budget(EPSILON), seed=0)
        return int((model(adversarial).argmax(dim=1) == labels).sum())

    assert {name: stands(name) for name in ("apgd-ce", "fixed-mask")} == {"apgd-ce": 4, "fixed-mask": 4}
    knowing = ("bpda", "bpda-cw", "joint", "noise-only-eot", "transfer-ce", "transfer-cw")
    assert {name: stands(name) for name in knowing} == dict.fromkeys(knowing, 0)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_images_may_lie_in_memory_in_any_order(linear, name):
    images = gray_images(3)
    labels = linear(images).argmax(dim=1)
    budget = Budget(1.2 * float(distance_to_border(linear, images, "Linf").min()))
    other_order = images.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert not other_order.is_contiguous()
    found = [attack_by_name(name, SMALL)(linear, x, labels, budget, seed=0) for x in (images, other_order)]
    assert torch.equal(*found)


def test_the_same_seed_finds_the_same_images_and_leaves_the_global_generator_alone():
    model, images, labels = two_way_defense(sigma=0.02), gray_row(3), torch.zeros(3, dtype=torch.int64)
    attack = attack_by_name("eot-ce", SMALL)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = attack(model, images, labels, Budget(0.03), seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(attack(model, images, labels, Budget(0.03), seed=1), first)
    assert not torch.equal(attack(model, images, labels, Budget(0.03), seed=2), first)


def test_weights_neither_collect_gradients_nor_stay_frozen(linear):
    model = two_way_defense()
    attack_by_name("fab-t", SMALL)(model, gray_row(2), torch.zeros(2, dtype=torch.int64), Budget(0.01))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_without_noise_gets_as_many_gradients_by_restarts_as_one_with_noise_by_averaging():
    effort = Effort(steps=5, eot=3, draws=1)
    still, noisy = two_way_defense(), two_way_defense(sigma=1e-6)
    images, labels = gray_row(2), torch.zeros(2, dtype=torch.int64)
    calls = [
        attack_by_name("eot-ce", effort).run(m, images, labels, Budget(0.001)).gradient_calls for m in (still, noisy)
    ]
    assert calls == [2 * 6 * 3, 2 * 6 * 3]  # images x (start and steps) x gradients


def test_calls_count_every_image_of_every_step():
    result = attack_by_name("apgd-ce", Effort(steps=7, draws=3)).run(
        two_way_defense(), gray_row(5), torch.zeros(5, dtype=torch.int64), Budget(0.001)
    )
    assert result.gradient_calls == 5 * 8
    assert result.forward_calls == 2 * 5 * 3  # judged before and after, in three draws


def test_a_fixed_mask_stays_that_of_the_clean_image():
    model, images, labels = two_way_defense(), gray_row(1), torch.zeros(1, dtype=torch.int64)
    fixed = FixedMask(model, place=0)
    fixed.hold(images, labels)
    far = images.clone()
    far[..., 1:] = 1.0  # now the first pass would say class 1
    assert model(far).argmax().item() == 1
    assert fixed(far).argmax().item() == 0


def test_fixed_noise_is_the_same_for_every_image_and_call():
    fixed = FixedNoise(two_way_defense(sigma=0.05), seed=3)
    logits = fixed(gray_row(3))
    assert torch.equal(logits, fixed(gray_row(3)))
    assert torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize("norm", NORMS)
def test_projection_keeps_what_is_allowed_and_pulls_the_rest_to_the_surface(norm):
    images = torch.full((2, 1, 2, 2), 0.5)
    budget = Budget(0.1, norm)
    near, far = images + 0.04, images + 0.3
    assert torch.allclose(budget.project(near, images), near)
    assert torch.allclose(budget.distance(budget.project(far, images), images), torch.full((2,), 0.1))
    assert not budget.allows(far, images).any()


def test_a_budget_that_is_none_is_refused():
    with pytest.raises(ValueError, match="epsilon >= 0"):
        Budget(-1.0)
    with pytest.raises(ValueError, match="'Linf' or 'L2'"):
        Budget(1.0, "L7")  # type: ignore[arg-type]


def test_an_unknown_attack_names_those_there_are():
    with pytest.raises(EvaluationError, match="apgd-ce"):
        attacks_by_name(["pgd-9000"])


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_says_what_it_looks_for(name):
    assert "Looks for:" in (ATTACKS[name].__doc__ or "")


@pytest.mark.parametrize(
    ("precision", "gradients", "queries"),
    [("float32", "float32", "float32"), ("bfloat16", "bfloat16", "float32"), ("bfloat16-queries", *["bfloat16"] * 2)],
)
def test_only_what_the_precision_names_is_computed_in_it_and_verdicts_never(precision, gradients, queries):
    verdicts = "float32"
    assert _dtypes_of_calls("apgd-ce", precision)[True] == {gradients}
    assert _dtypes_of_calls("square", precision) == {True: set(), False: {queries, verdicts}}


def _dtypes_of_calls(attack: str, precision: Precision) -> dict[bool, set[str]]:
    """The logits', by whether the call was differentiated."""
    seen: dict[bool, set[str]] = {True: set(), False: set()}

    def look(_module, inputs, logits) -> None:
        seen[inputs[0].requires_grad].add(str(logits.dtype).removeprefix("torch."))

    model, images = nn.Sequential(nn.Flatten(), nn.Linear(100, 4)), gray_images(2)
    labels = model(images).argmax(dim=1)
    model.register_forward_hook(look)
    attack_by_name(attack, replace(SMALL, precision=precision))(model, images, labels, Budget(0.01))
    return seen


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_the_first_pass_alone_is_the_first_pass_of_the_defense(sigma):
    defended = two_way_defense(sigma=sigma)
    images = gray_row(3)
    torch.manual_seed(0)
    expected = first_pass_of(defended, images)[1]
    torch.manual_seed(0)
    assert FirstPass(defended)(images).allclose(expected, atol=1e-6)
