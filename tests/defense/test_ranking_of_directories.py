"""Rankings of model directories: the bundled one, with images that cannot be read, and what can be served."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from defense import (
    DefenseError,
    ImportanceMismatch,
    NeuronImportance,
    SplitClassifier,
    check_servable,
    leave_one_out_importance,
    load_classifier,
    load_probe_set,
    open_probe_set,
    rank_neurons,
    read_config,
)
from defense import ranking as ranking_module
from defense.probe import ArrayProbeSet
from toy_models import importance_of, small_conv_net

BUNDLED = Path(__file__).parents[2] / "models" / "fashion-mnist"


def test_the_bundled_importance_is_what_ranking_the_bundled_model_gives() -> None:
    shipped = NeuronImportance.from_bytes((BUNDLED / "importance.safetensors").read_bytes())
    again = rank_neurons(BUNDLED, load_probe_set(BUNDLED))
    torch.testing.assert_close(again.scores, shipped.scores, atol=1e-5, rtol=1e-4)
    assert (again.layer, again.model_digest, again.num_images) == (shipped.layer, shipped.model_digest, 2000)


def test_a_model_directory_is_ranked_as_its_classifier_is(tiny_model: Path) -> None:
    probe = load_probe_set(tiny_model)
    split = SplitClassifier(load_classifier(tiny_model), read_config(tiny_model).defense.layer)
    expected = leave_one_out_importance(split, probe.batches(), class_names=read_config(tiny_model).labels)
    for method, signed in (("lo-ir", False), ("lo-ir-signed", True)):
        importance = rank_neurons(tiny_model, probe, method=method, batch_size=7)
        direct = leave_one_out_importance(split, probe.batches(), signed=signed)
        torch.testing.assert_close(importance.scores, direct.scores)
        assert (importance.method, importance.class_names) == (method, expected.class_names)


class WithAnUnreadableImage(ArrayProbeSet):
    """The bundled probe images, one of which is damaged while ``broken`` is set."""

    broken: int | None = 3

    def image(self, index: int) -> Image.Image:
        if index == self.broken:
            raise ranking_module.UnreadableImage(f"image {index} is damaged")
        return super().image(index)

    def pixels(self, index: int, config: object) -> object:
        self.image(index)
        return super().pixels(index, config)  # type: ignore[arg-type]


def test_images_that_cannot_be_read_do_not_misalign_the_features_of_the_others(tmp_path: Path) -> None:
    whole = open_probe_set("probe", BUNDLED, images_per_class=12)
    images = torch.stack([torch.from_numpy(whole.pixels(i, None)) for i in range(len(whole))])
    damaged = WithAnUnreadableImage("probe", images, whole.labels)
    without = [i for i in range(len(whole)) if i != 3]

    importance = rank_neurons(BUNDLED, damaged, method="cd-ir", cache_dir=tmp_path)
    expected = rank_neurons(BUNDLED, ArrayProbeSet("probe", images[without], whole.labels[without]), method="cd-ir")

    torch.testing.assert_close(importance.scores, expected.scores)
    assert importance.num_images == len(without) and [skip.index for skip in damaged.skipped] == [3]
    damaged.broken = None  # and when it is readable again, the cache has not kept an incomplete pass
    assert rank_neurons(BUNDLED, damaged, method="cd-ir", cache_dir=tmp_path).num_images == len(whole)


def test_a_second_layer_or_model_with_other_labels_skips_the_clip_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    embed = ranking_module._Ranking._embed
    monkeypatch.setattr(ranking_module._Ranking, "_embed", lambda self, clip: passes.append(1) or embed(self, clip))
    probe = open_probe_set("probe", BUNDLED, images_per_class=12)

    rank_neurons(BUNDLED, probe, method="cd-ir", cache_dir=tmp_path)
    rank_neurons(BUNDLED, probe, method="cd-ir", layer="layer4", cache_dir=tmp_path)
    probe.labels = probe.labels.flip(0)
    rank_neurons(BUNDLED, probe, method="cd-ir", cache_dir=tmp_path)

    assert len(passes) == 1


def test_an_importance_that_could_not_be_served_is_refused(tiny_model: Path) -> None:
    importance = rank_neurons(tiny_model, load_probe_set(tiny_model))
    check_servable(tiny_model, importance)
    anonymous = NeuronImportance(importance.scores, method="mine", layer=importance.layer)
    with pytest.raises(ImportanceMismatch, match="with the digest of the weights"):
        check_servable(tiny_model, anonymous)
    with pytest.raises(DefenseError):
        split = SplitClassifier(small_conv_net(), "hidden")
        check_servable(tiny_model, importance_of(split, torch.rand(4, 8)))


def test_an_unknown_method_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"one of lo-ir, lo-ir-signed, cd-ir, got 'best'"):
        rank_neurons(tiny_model, load_probe_set(tiny_model), method="best")
