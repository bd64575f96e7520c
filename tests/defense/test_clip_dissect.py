import json
import logging
from collections.abc import Callable, Iterator, Sequence
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from defense import (
    ClipError,
    ImportanceError,
    ProbeSetError,
    SplitClassifier,
    load_classifier,
    load_probe_set,
    read_config,
)
from defense.clip import CONFIG_FILE, WEIGHTS_FILE, ClipModel
from defense.clip_cache import ClipFeatureCache
from defense.clip_dissect import clip_dissect_importance, collect_activations
from defense.similarities import cos_cubed, rank_reorder, soft_wpmi
from toy_models import PixelNet, small_conv_net

GOLDEN = Path(__file__).parents[1] / "data" / "official_rn18_w16.npz"
BUNDLED = Path(__file__).parents[2] / "models" / "fashion-mnist"
NAMES = ["cat", "dog", "fox", "owl"]
Scoring = Callable[..., Tensor]


class FakeClip:
    """Images are their own features (their first three pixels); names are the unit vectors."""

    def __init__(self) -> None:
        self.images_seen = 0
        self.prompts: list[str] = []

    def image_features(self, images: Tensor) -> Tensor:
        self.images_seen += len(images)
        return images.flatten(1)[:, :3]

    def text_features(self, names: Sequence[str], template: str = "{}") -> Tensor:
        self.prompts += [template.replace("{}", name) for name in names]
        return torch.eye(len(names), 3)


def random_inputs(n: int = 60, neurons: int = 7, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (n, neurons), (n, 16), (classes, 16)
    # Shifted, as CLIP's are, so that most cosines are positive.
    activations, images, texts = (torch.randn(*shape, generator=generator) for shape in shapes)
    return activations, images + 0.5, texts + 0.5


def conv_batches(n: int = 40) -> list[tuple[Tensor, Tensor]]:
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return list(zip(images.split(16), (torch.arange(n) % 4).split(16), strict=True))


# --- the official implementation, and the definitions ---


def test_soft_wpmi_equals_the_official_implementation() -> None:
    names = ("layer4_activations", "clip_image_features", "clip_text_features", "soft_wpmi")
    with np.load(GOLDEN) as golden:
        activations, images, texts, expected = (torch.from_numpy(golden[name]) for name in names)
    torch.testing.assert_close(soft_wpmi(activations, images, texts), expected, rtol=1e-4, atol=1e-4)


def test_soft_wpmi_of_a_toy() -> None:
    # Cosines are the identity, so at a = log 3 image i is of class i with P = 3/4, of the other with 1/4.
    # Neuron j is highest on image j; with p = 1, log p(D | c) is log 3/4 or log 1/4; the mean over neurons is 1/2.
    scores = soft_wpmi(torch.eye(2), torch.eye(2) * 7, torch.eye(2), top_k=1, a=log(3), p_start=1, p_end=0, min_prob=0)
    torch.testing.assert_close(scores, torch.tensor([[log(1.5), log(0.5)], [log(0.5), log(1.5)]]))


def test_soft_wpmi_trusts_the_highest_images_most() -> None:
    # p falls from 1 by (1 - 0) / 2: the second image counts as 1 + 1/2 (P - 1). lam = 0 leaves log p(D | c) alone.
    scores = soft_wpmi(
        torch.eye(2), torch.eye(2), torch.eye(2), top_k=2, a=log(3), lam=0, p_start=1, p_end=0, min_prob=0
    )
    own, other = log(3 / 4) + log(5 / 8), log(1 / 4) + log(7 / 8)
    torch.testing.assert_close(scores, torch.tensor([[own, other], [other, own]]))


def test_cos_cubed_of_a_toy() -> None:
    # Cosines with name 0: (1, 0, 0), centered and cubed (8, -1, -1) / 27; with name 1: the opposite.
    # Neuron 0: the same direction. Neuron 1: (0, 3, 0), centered and cubed (-1, 8, -1). Neuron 2: constant.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    scores = cos_cubed(torch.tensor([[5.0, 0.0, 4.0], [0.0, 3.0, 4.0], [0.0, 0.0, 4.0]]), images, torch.eye(2))
    torch.testing.assert_close(scores, torch.tensor([[1.0, -15 / 66, 0.0], [-1.0, 15 / 66, 0.0]]))


def test_rank_reorder_of_a_toy() -> None:
    # Cosines of the three images with name 0: 1, .866, 0, in the order of the neuron's activations 3, 1, 0: no error.
    # With name 1: 0, 1/2, 1, the reverse: errors |3-0|, 0, |0-3|, mean 2. A random order's mean over the nine pairs is
    # 2 (2 + 3 + 1) / 9 = 4/3; the mean cosine is 1/2. So minus 2 / (4/3) / (1/2) = -3.
    images = torch.tensor([[1.0, 0.0], [0.75**0.5, 0.5], [0.0, 1.0]])
    activations = torch.tensor([[3.0], [1.0], [0.0]])
    scores = rank_reorder(activations, images, torch.eye(2), p=1, top_fraction=1, scale_p=1)
    torch.testing.assert_close(scores, torch.tensor([[0.0], [-3.0]]))


def literal_soft_wpmi(activations: Tensor, images: Tensor, texts: Tensor, top_k: int = 100) -> Tensor:
    probabilities = (10 * F.normalize(images) @ F.normalize(texts).T).softmax(1)
    evidence = torch.zeros(len(texts), activations.shape[1])
    for j in range(activations.shape[1]):
        for rank, image in enumerate(activations[:, j].argsort(descending=True)[:top_k]):
            p = 0.998 - rank / top_k * (0.998 - 0.97)
            evidence[:, j] += (1 + p * (probabilities[image] - 1) + 1e-7).log()
    log_mean = evidence.logsumexp(1, keepdim=True) - log(activations.shape[1])
    return evidence - log_mean


def literal_cos_cubed(activations: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    cosines = F.normalize(images) @ F.normalize(texts).T
    scores = torch.zeros(len(texts), activations.shape[1])
    for j in range(activations.shape[1]):
        for c in range(len(texts)):
            q, clip = activations[:, j], cosines[:, c]
            scores[c, j] = F.cosine_similarity((q - q.mean()) ** 3, (clip - clip.mean()) ** 3, dim=0)
    return scores


def literal_rank_reorder(activations: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    cosines = F.normalize(images) @ F.normalize(texts).T
    scores = torch.zeros(len(texts), activations.shape[1])
    for j in range(activations.shape[1]):
        top = activations[:, j].argsort(descending=True)[: len(images) // 20]
        t = activations[top, j]
        at_random = ((t[:, None] - t[None, :]).abs() ** 3).mean()
        for c in range(len(texts)):
            reordered = t.sort().values[cosines[top, c].argsort().argsort()]
            mean_cosine = cosines[top, c].mean().clamp(min=1e-3)
            scores[c, j] = -((t - reordered).abs() ** 3).mean() / at_random / mean_cosine**0.5
    return scores


@pytest.mark.parametrize(
    ("vectorized", "literal", "n"),
    [
        (soft_wpmi, literal_soft_wpmi, 120),
        (cos_cubed, literal_cos_cubed, 50),
        (rank_reorder, literal_rank_reorder, 200),
    ],
)
def test_scores_equal_the_literal_loop(vectorized: Scoring, literal: Scoring, n: int) -> None:
    inputs = random_inputs(n)
    # Log-likelihoods reach -500, in float32, before they are subtracted from each other.
    torch.testing.assert_close(vectorized(*inputs), literal(*inputs), rtol=1e-4, atol=3e-4)


# --- chunks, guards, errors ---


@pytest.mark.parametrize("scoring", [soft_wpmi, cos_cubed, rank_reorder])
def test_chunking_does_not_matter(scoring: Scoring) -> None:
    inputs = random_inputs(n=120)
    torch.testing.assert_close(scoring(*inputs, max_bytes=1), scoring(*inputs, max_bytes=2**30), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scoring(*inputs, max_bytes=2000), scoring(*inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scoring", [soft_wpmi, cos_cubed, rank_reorder])
def test_arguments_are_left_unchanged(scoring: Scoring) -> None:
    inputs = random_inputs(n=120)
    scoring(*inputs)
    for tensor, fresh in zip(inputs, random_inputs(n=120), strict=True):
        assert torch.equal(tensor, fresh)


@pytest.mark.parametrize("scoring", [soft_wpmi, cos_cubed, rank_reorder])
def test_dead_neurons_and_zero_features_give_finite_scores(scoring: Scoring) -> None:
    activations, images, texts = random_inputs(n=120)
    activations[:, 2] = 0
    images[5] = 0
    assert torch.isfinite(scoring(activations, images - 1, texts)).all()  # negative cosines, too


@pytest.mark.parametrize("scoring", [soft_wpmi, cos_cubed, rank_reorder])
@pytest.mark.parametrize(("which", "message"), [(0, "1 of 7 neurons"), (1, "1 of 120 images"), (2, "1 of 5 class")])
def test_nan_is_an_error_that_says_where(scoring: Scoring, which: int, message: str) -> None:
    inputs = random_inputs(n=120)
    inputs[which][3, 3] = float("nan")
    with pytest.raises(ImportanceError, match=f"{message} .*NaN"):
        scoring(*inputs)


def test_a_probe_set_smaller_than_top_k_is_refused() -> None:
    with pytest.raises(ProbeSetError, match="at least top_k = 100 probe images, got 60"):
        soft_wpmi(*random_inputs(n=60))
    with pytest.raises(ProbeSetError, match=r"2 images in the top 0\.05"):
        rank_reorder(*random_inputs(n=39))


def test_features_of_other_images_are_refused() -> None:
    activations, images, texts = random_inputs(n=120)
    with pytest.raises(ProbeSetError, match="120 probe images, got 119"):
        cos_cubed(activations, images[:-1], texts)


# --- from classifier to importance ---


def test_activations_are_averaged_over_space() -> None:
    split, progress = SplitClassifier(small_conv_net(), "conv2"), []
    activations = collect_activations(split, conv_batches(), progress.append)
    images = torch.cat([images for images, _ in conv_batches()])
    torch.testing.assert_close(activations, split.trunk(images).detach().mean((2, 3)))
    assert progress == [16, 32, 40]


def test_an_importance_knows_where_it_came_from() -> None:
    split = SplitClassifier(small_conv_net(), "bn")
    importance = clip_dissect_importance(
        split, conv_batches(), clip=FakeClip(), class_names=NAMES, top_k=10, probe_set="probe"
    )
    assert importance.scores.shape == (4, 6)
    assert (importance.method, importance.layer, importance.num_images) == ("cd-ir", "bn", 40)
    assert (importance.model_digest, importance.probe_set) == (split.model_digest, "probe")
    assert importance.class_names == tuple(NAMES)


@pytest.mark.parametrize(
    ("similarity", "method", "scoring"),
    [("cos_cubed", "cd-ir-cos-cubed", cos_cubed), ("rank_reorder", "cd-ir-rank-reorder", rank_reorder)],
)
def test_other_similarities_have_their_own_method_name(similarity: str, method: str, scoring: Scoring) -> None:
    split, clip = SplitClassifier(small_conv_net()), FakeClip()
    importance = clip_dissect_importance(split, conv_batches(), clip=clip, class_names=NAMES, similarity=similarity)
    images = torch.cat([images for images, _ in conv_batches()])
    expected = scoring(split.trunk(images), clip.image_features(images), clip.text_features(NAMES))
    assert importance.method == method
    torch.testing.assert_close(importance.scores, expected, rtol=1e-4, atol=1e-5)


def test_given_features_skip_the_clip_pass_and_prompts_are_templated() -> None:
    split, clip, batches = SplitClassifier(small_conv_net()), FakeClip(), conv_batches()
    computed = clip_dissect_importance(split, iter(batches), clip=clip, class_names=NAMES, top_k=10)
    features = torch.cat([clip.image_features(images) for images, _ in batches])
    clip.images_seen, clip.prompts = 0, []
    given = clip_dissect_importance(
        split, batches, clip=clip, class_names=NAMES, image_features=features, prompt_template="a {}.", top_k=10
    )
    assert (clip.images_seen, clip.prompts[0]) == (0, "a cat.")
    assert torch.equal(given.scores, computed.scores)


def test_probe_batches_are_read_once() -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from conv_batches()

    importance = clip_dissect_importance(
        SplitClassifier(small_conv_net()), batches(), clip=FakeClip(), class_names=NAMES, top_k=10
    )
    assert importance.num_images == 40


def test_a_neuron_that_answers_every_image_alike_is_named_in_the_warnings(caplog: pytest.LogCaptureFixture) -> None:
    split = SplitClassifier(PixelNet([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]))
    images = torch.tensor([[0.1, 0.9, -1.0], [0.8, 0.3, -2.0]]).view(2, 1, 1, 3)  # ReLU silences the last one
    importance = clip_dissect_importance(
        split, [(images, torch.tensor([0, 1]))], clip=FakeClip(), class_names=["cat", "dog"], top_k=1
    )
    assert any("1 of 3 neurons answer every image alike" in w and w.endswith(": 2") for w in importance.warnings)
    assert "answer every image alike" in caplog.text


def test_unusable_arguments_are_refused_before_any_work() -> None:
    split, clip = SplitClassifier(small_conv_net()), FakeClip()
    with pytest.raises(ImportanceError, match="4 class names for CLIP, got 2"):
        clip_dissect_importance(split, conv_batches(), clip=clip, class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="soft_wpmi, cos_cubed, rank_reorder, got 'wpmi'"):
        clip_dissect_importance(split, conv_batches(), clip=clip, class_names=NAMES, similarity="wpmi")  # type: ignore[arg-type]
    with pytest.raises(ProbeSetError, match="got none"):
        clip_dissect_importance(split, [], clip=clip, class_names=NAMES)
    assert clip.images_seen == 0


# --- the cache ---


def features_through(cache: ClipFeatureCache, clip: FakeClip, images: Tensor) -> Tensor:
    return cache.get_or_compute("sha256:images", "sha256:clip", lambda: clip.image_features(images))


def test_a_second_model_or_layer_skips_the_clip_pass(tmp_path: Path) -> None:
    clip, images = FakeClip(), torch.cat([images for images, _ in conv_batches()])
    for layer in ("conv1", "linear:input"):
        clip_dissect_importance(
            SplitClassifier(small_conv_net(), layer),
            conv_batches(),
            clip=clip,
            class_names=NAMES,
            image_features=features_through(ClipFeatureCache(tmp_path / "clip"), clip, images),
            top_k=10,
        )
    assert clip.images_seen == 40
    assert len(list((tmp_path / "clip").iterdir())) == 1


def test_other_images_or_another_clip_are_other_entries(tmp_path: Path) -> None:
    cache = ClipFeatureCache(tmp_path)
    cache.put("data", "clip", torch.ones(2, 3))
    assert cache.get("data", "other clip") is None
    assert cache.get("other data", "clip") is None
    assert torch.equal(cache.get("data", "clip"), torch.ones(2, 3))


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_entry_is_computed_again_with_a_log_line(
    damage: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, clip, images = ClipFeatureCache(tmp_path), FakeClip(), torch.rand(4, 3, 8, 8)
    expected = features_through(cache, clip, images)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(features_through(cache, clip, images), expected)
    assert f"{path} is damaged" in caplog.text
    assert clip.images_seen == 8
    assert torch.equal(features_through(cache, clip, images), expected)
    assert clip.images_seen == 8


def test_an_entry_under_a_wrong_name_is_not_believed(tmp_path: Path) -> None:
    cache = ClipFeatureCache(tmp_path)
    cache.put("data", "clip", torch.ones(2, 3))
    cache.path("data", "clip").rename(cache.path("other data", "clip"))
    assert cache.get("other data", "clip") is None


def test_a_directory_that_cannot_be_written_costs_the_cache_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    cache = ClipFeatureCache(tmp_path / "file")
    assert cache.get_or_compute("data", "clip", lambda: torch.ones(2, 3)).shape == (2, 3)
    assert "cannot cache" in caplog.text


# --- open_clip ---


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model of random weights, a fraction of the bundled one's size."""
    import open_clip

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "head_width": 8, "patch_size": 14},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 4, "heads": 1, "layers": 1},
    }
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("clip")
    (directory / CONFIG_FILE).write_text(json.dumps({"model_cfg": config}))
    weights = open_clip.CLIP(**config).state_dict()
    save_file({name: tensor.half().contiguous() for name, tensor in weights.items()}, directory / WEIGHTS_FILE)
    return directory


@pytest.fixture(scope="module")
def clip(clip_directory: Path) -> ClipModel:
    return ClipModel.from_directory(clip_directory)


def picture(size: tuple[int, int]) -> tuple[Image.Image, Tensor]:
    """A smooth RGB picture, and the same as a tensor [1, 3, H, W]."""
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    return image, torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (40, 90)])
def test_tensors_and_pictures_get_the_same_features(clip: ClipModel, size: tuple[int, int]) -> None:
    image, tensor = picture(size)
    # Pictures are rounded to 8 bits after resizing, tensors are not.
    torch.testing.assert_close(clip.image_features(tensor), clip.image_features_of([image]), atol=0.02, rtol=0.02)


def test_gray_images_count_as_rgb(clip: ClipModel) -> None:
    gray = torch.rand(3, 1, 28, 28)
    assert torch.equal(clip.image_features(gray), clip.image_features(gray.repeat(1, 3, 1, 1)))
    with pytest.raises(ClipError, match=r"\[B, 3 or 1, H, W\], got \[2, 4, 8, 8\]"):
        clip.image_features(torch.rand(2, 4, 8, 8))


def test_text_features_do_not_depend_on_the_batch(clip: ClipModel) -> None:
    names = [f"class {c}" for c in range(5)]
    torch.testing.assert_close(clip.text_features(names), clip.text_features(names, batch_size=2))
    torch.testing.assert_close(clip.text_features(["cat"], "a {}"), clip.text_features(["a cat"]))
    with pytest.raises(ClipError, match=r"expected a prompt template with \{\}"):
        clip.text_features(names, "a photo")


def test_a_clip_digest_is_of_weights_and_preprocessing(clip: ClipModel, clip_directory: Path, tmp_path: Path) -> None:
    config = json.loads((clip_directory / CONFIG_FILE).read_text())
    (tmp_path / WEIGHTS_FILE).write_bytes((clip_directory / WEIGHTS_FILE).read_bytes())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert ClipModel.from_directory(tmp_path).digest == clip.digest
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"preprocess_cfg": {"mean": [0.5] * 3}}))
    assert ClipModel.from_directory(tmp_path).digest != clip.digest


def test_a_clip_that_cannot_be_loaded_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"expected open_clip_config.json .*train_tiny_clip.py"):
        ClipModel.from_directory(tmp_path)
    with pytest.raises(ClipError, match=r"pretrained='no such tag'.*offline, pass a file of its weights"):
        ClipModel("ViT-B-16", "no such tag")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ClipError, match="offline"):
        ClipModel("RN50", tmp_path / "broken.safetensors")


@pytest.mark.parametrize(("pretrained", "quick_gelu"), [("openai", True), ("laion2b_s34b_b88k", False)])
def test_weights_run_with_the_activation_they_were_trained_with(
    pretrained: str, quick_gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    asked: list[tuple[str, str, bool]] = []

    def create(name: str, pretrained: str, *, force_quick_gelu: bool) -> None:
        asked.append((name, pretrained, force_quick_gelu))
        raise OSError("no internet")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    with pytest.raises(ClipError, match="no internet"):
        ClipModel("ViT-B/16", pretrained)
    assert asked == [("ViT-B-16", pretrained, quick_gelu)]


@pytest.mark.skipif(
    not (BUNDLED / "clip" / WEIGHTS_FILE).exists() or not (BUNDLED / "weights.safetensors").exists(),
    reason=f"the weights of the bundled classifier and its CLIP are not in {BUNDLED}; models/README.md trains them",
)
def test_the_bundled_model_is_ranked_offline(tmp_path: Path) -> None:
    config, probe = read_config(BUNDLED), load_probe_set(BUNDLED)
    clip, cache = ClipModel.from_directory(BUNDLED / "clip"), ClipFeatureCache(tmp_path)
    features = cache.get_or_compute(
        probe.digest,
        clip.digest,
        lambda: torch.cat([clip.image_features(images) for images, _ in probe.batches()]),
    )
    texts = F.normalize(clip.text_features(config.labels))
    zero_shot = (F.normalize(features) @ texts.T).argmax(1) == probe.labels
    assert zero_shot.float().mean() > 0.8

    split = SplitClassifier(load_classifier(BUNDLED), config.defense.layer)
    importance = clip_dissect_importance(
        split, probe.batches(), clip=clip, class_names=config.labels, image_features=features, probe_set=probe.name
    )
    assert importance.scores.shape == (split.num_classes, split.num_neurons)
    assert importance.degenerate is None
    # A class's own images excite the neurons that its name ranks highest more than other images do.
    activations = collect_activations(split, probe.batches())
    z = (activations - activations.mean(0)) / activations.std(0).clamp(min=1e-6)
    for c, top in enumerate(importance.scores.topk(config.defense.top_k).indices):
        own = probe.labels == c
        assert z[own][:, top].mean() > z[~own][:, top].mean()
