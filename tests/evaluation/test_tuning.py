"""The shared passes give what DefendedClassifier gives, and the front is what is left when the beaten are gone."""

import tomllib
from pathlib import Path

import pytest
import torch

from defense import DefendedClassifier, SplitClassifier, leave_one_out_importance
from defense.model_config import DefenseConfig, read_config
from evaluation.tuning.passes import share_passes
from evaluation.tuning.settings import Setting, defense_block, grid, variations
from evaluation.tuning.sweep import CLEAN, Score, build, defended_logits, pareto_front, score, undefended_score
from toy_models import PixelNet, importance_of, small_conv_net

PAPER = Setting("lo-ir", "linear:input", 4, 0.01, 0.1, 1, 0.0)

IDENTITY = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", ["conv1", "conv2", "hidden", None])
@pytest.mark.parametrize("num_noise_samples", [1, 3])
def test_a_setting_on_shared_passes_answers_as_the_defended_classifier_does(
    layer: str | None, num_noise_samples: int
) -> None:
    split = SplitClassifier(small_conv_net(), layer)
    images, labels = images_of(6), torch.arange(6) % 4
    importance = leave_one_out_importance(split, [(images, labels)])
    defended = DefendedClassifier(split, importance, top_k=2, sigma=0.1, num_noise_samples=num_noise_samples)
    passes = share_passes({split.layer: split}, images, labels, sigmas=[0, 0.1], draws=6, seed=5)

    for redraw in range(2):
        generator = torch.Generator().manual_seed(5)
        noise = torch.stack([torch.randn(images.shape, generator=generator) for _ in range(6)])
        own = noise[redraw * num_noise_samples : (redraw + 1) * num_noise_samples]
        torch.testing.assert_close(defended_logits(defended, passes, redraw), defended(images, noise=own))


def test_without_noise_the_first_pass_is_the_undefended_one() -> None:
    split = SplitClassifier(small_conv_net())
    images = images_of(5)
    passes = share_passes({split.layer: split}, images, torch.zeros(5).long(), sigmas=[0], draws=2)
    importance = importance_of(split, torch.rand(4, 8))
    defended = DefendedClassifier(split, importance, top_k=3, sigma=0)
    torch.testing.assert_close(defended_logits(defended, passes, 0), defended(images))
    assert passes.noisy_logits == {}


def test_too_few_noise_draws_are_an_error_and_not_a_shorter_mean() -> None:
    split = SplitClassifier(small_conv_net())
    passes = share_passes({split.layer: split}, images_of(2), torch.zeros(2).long(), sigmas=[0.1], draws=3)
    with pytest.raises(ValueError, match="expected 4 noise draws"):
        passes.first_pass_logits(0.1, 2, redraw=1)


def test_all_sigmas_meet_the_same_noise_and_batches_do_not_repeat_it() -> None:
    split = SplitClassifier(PixelNet(IDENTITY))  # the logits are the pixels
    images = torch.full((4, 1, 1, 3), 0.5)
    labels = torch.zeros(4).long()
    passes = share_passes({split.layer: split}, images, labels, sigmas=[0.01, 0.02], draws=1, batch_size=2)
    change = {sigma: passes.noisy_logits[sigma][0] - passes.undefended_logits for sigma in (0.01, 0.02)}
    torch.testing.assert_close(change[0.02], 2 * change[0.01])
    assert len(change[0.01].unique(dim=0)) == 4


def test_a_grid_has_no_two_settings_that_do_the_same() -> None:
    values = {
        "method": ["lo-ir"],
        "layer": ["layer4"],
        "top_k": [4, 8],
        "temperature": [0.01],
        "sigma": [0, 0.1],
        "num_noise_samples": [1, 4],
        "unimportant_weight": [0.0, 1.0],
    }
    settings = grid(values)
    # By k: one without noise, two with. And one setting, whatever k and sigma, that drops nothing.
    assert len(settings) == 2 * 3 + 1
    assert sum(s.unimportant_weight == 1 for s in settings) == 1


def test_a_limited_grid_is_a_seeded_choice_of_the_whole() -> None:
    values = {name: [getattr(PAPER, name)] for name in ("method", "layer", "temperature", "num_noise_samples")}
    values |= {"top_k": list(range(1, 9)), "sigma": [0.1, 0.2, 0.3], "unimportant_weight": [0.0, 0.5]}
    some = grid(values, limit=10, seed=3)
    assert len(some) == 10
    assert some == grid(values, limit=10, seed=3)
    assert set(some) < set(grid(values))
    assert some != grid(values, limit=10, seed=4)


def test_variations_change_one_field_at_a_time() -> None:
    varied = list(variations(PAPER, {"temperature": [0.1, 1.0], "num_noise_samples": [4]}))
    assert [(s.temperature, s.num_noise_samples, s.top_k) for s in varied] == [(0.1, 1, 4), (1.0, 1, 4), (0.01, 4, 4)]


@pytest.mark.parametrize("setting", [PAPER, Setting("cd-ir", "layer3", 7, 10.0, 4 / 255, 4, 0.25)])
def test_the_defense_block_is_read_back_as_the_same_setting(setting: Setting, tiny_model: Path, tmp_path: Path) -> None:
    text = (tiny_model / "model.toml").read_text()
    without = text[: text.index("[defense]")]
    (tmp_path / "model.toml").write_text(without + defense_block(setting, ["why", "because"]))
    config = read_config(tmp_path).defense
    assert config == DefenseConfig(layer=setting.layer, **setting.arguments)
    assert tomllib.loads(defense_block(setting))["defense"]["sigma"] == setting.sigma


def scored(clean: list[float], robust: list[bool], top_k: int) -> Score:
    return Score(Setting("lo-ir", "l", top_k, 0.01, 0.1, 1, 0.0), torch.tensor(clean).float(), torch.tensor(robust))


def test_the_pareto_front_is_what_nothing_beats_and_of_equals_the_first() -> None:
    cautious = scored([0.5, 0.5, 0.5, 0.5], [True, True, False, False], 1)
    twin = scored([0.5, 0.5, 0.5, 0.5], [False, False, True, True], 2)
    bold = scored([1, 1, 1, 1], [True, False, False, False], 3)
    beaten = scored([0.5, 0.5, 0.5, 0.5], [True, False, False, False], 4)
    assert [s.setting.top_k for s in pareto_front([beaten, cautious, twin, bold])] == [1, 3]
    # On the last two images the twin is best.
    assert [s.setting.top_k for s in pareto_front([beaten, cautious, twin, bold], torch.tensor([2, 3]))] == [2, 3]


def test_an_image_is_robust_only_if_it_is_right_under_every_attack_in_every_redraw() -> None:
    split = SplitClassifier(PixelNet(IDENTITY))
    images = torch.rand(40, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    labels = split(images).argmax(1)
    setting = Setting("lo-ir", split.layer, 1, 0.01, 0.3, 1, 0.0)
    rankings = {("lo-ir", split.layer): importance_of(split, IDENTITY)}
    defended = build(setting, {split.layer: split}, rankings)
    versions = {
        name: share_passes({split.layer: split}, shown, labels, sigmas=[0.3], draws=3)
        for name, shown in {CLEAN: images, "darker": images * 0.5, "brighter": images * 1.5}.items()
    }
    found = score(setting, defended, versions, redraws=3)

    answers = [
        defended_logits(defended, passes, redraw).argmax(1) == labels
        for passes in versions.values()
        for redraw in range(3)
    ]
    assert found.robust.tolist() == [all(row) for row in torch.stack(answers, dim=1).tolist()]
    assert 0 < found.worst_case() < found.clean_accuracy() <= 1
    assert undefended_score(setting, versions).clean_accuracy() == 1
