"""CD-IR: rank neurons by what CLIP-Dissect says about them (Oikarinen & Weng, ICLR 2023, arXiv 2204.10965).

A neuron matters for a class if the probe images that activate it most look, to CLIP, like the class's name.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from defense.errors import ImportanceError, ProbeSetError
from defense.importance import NeuronImportance
from defense.similarities import cos_cubed, rank_reorder, soft_wpmi
from defense.split import SplitClassifier

logger = logging.getLogger(__name__)

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int], None]
Similarity = Literal["soft_wpmi", "cos_cubed", "rank_reorder"]

METHODS: dict[str, str] = {
    "soft_wpmi": "cd-ir",
    "cos_cubed": "cd-ir-cos-cubed",
    "rank_reorder": "cd-ir-rank-reorder",
}


class ImageTextEncoder(Protocol):
    """What CD-IR asks of a CLIP; ``defense.clip.ClipModel`` is one."""

    def image_features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, channels, H, W] in [0, 1]."""
        ...

    def text_features(self, names: Sequence[str], template: str = "{}") -> Tensor:
        """Features [C, D] of class names."""
        ...


def clip_dissect_importance(
    split: SplitClassifier,
    batches: Batches,
    *,
    clip: ImageTextEncoder,
    class_names: Sequence[str],
    image_features: Tensor | None = None,
    similarity: Similarity = "soft_wpmi",
    prompt_template: str = "{}",
    probe_set: str = "",
    top_k: int = 100,
    a: float = 10,
    lam: float = 1,
    min_prob: float = 1e-7,
    p_start: float = 0.998,
    p_end: float = 0.97,
    progress: Progress | None = None,
) -> NeuronImportance:
    """Rank every neuron for every class by the similarity of its activations to CLIP's view of the class.

    Args:
        split: the classifier, split at the layer to rank.
        batches: (images [B, channels, H, W] in [0, 1], labels [B]) pairs, as the classifier takes them; read once,
            none is kept, and the labels play no part.
        clip: gives the text features, and the image features where none are passed.
        class_names: C names, in the order of the classifier's logits.
        image_features: [n, D], of the same images in the same order, by CLIP's own preprocessing of the originals
            (see ``ClipFeatureCache``); None: by ``clip`` from the classifier's tensors.
        similarity: the function of that name below.
        prompt_template: with ``{}`` for the class name; bare names are the paper's.
        probe_set: its name, kept with the scores.
        top_k, a, lam, min_prob, p_start, p_end: of ``soft_wpmi``.
        progress: called after each batch with the number of images done.

    Returns:
        Importance [C, N]; neurons that no image tells apart are named in its ``warnings``.

    Raises:
        ProbeSetError: no images, fewer than ``top_k``, or not as many as there are image features.
        ImportanceError: a wrong number of class names, or activations or features that are NaN or infinite.
    """
    _check_choices(similarity, class_names, split.num_classes)
    if image_features is None:
        embedded: list[Tensor] = []
        activations = collect_activations(split, _embedding(batches, clip, embedded), progress)
        image_features = torch.cat(embedded)
    else:
        activations = collect_activations(split, batches, progress)
    constants = {"top_k": top_k, "a": a, "lam": lam, "min_prob": min_prob, "p_start": p_start, "p_end": p_end}
    return dissect(
        split,
        activations,
        image_features,
        clip=clip,
        class_names=class_names,
        similarity=similarity,
        prompt_template=prompt_template,
        probe_set=probe_set,
        **constants,
    )


def dissect(
    split: SplitClassifier,
    activations: Tensor,
    image_features: Tensor,
    *,
    clip: ImageTextEncoder,
    class_names: Sequence[str],
    similarity: Similarity = "soft_wpmi",
    prompt_template: str = "{}",
    probe_set: str = "",
    **constants: float,
) -> NeuronImportance:
    """``clip_dissect_importance`` of activations that are there already.

    Args:
        activations: [n, N], of ``collect_activations``. image_features: [n, D], of the same images in the same order.
        constants: of ``soft_wpmi``; the rest as for ``clip_dissect_importance``.
    """
    _check_choices(similarity, class_names, split.num_classes)
    text_features = clip.text_features(class_names, prompt_template)
    score: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "soft_wpmi": partial(soft_wpmi, **constants),  # type: ignore[arg-type]  # top_k is an int
        "cos_cubed": cos_cubed,
        "rank_reorder": rank_reorder,
    }
    importance = NeuronImportance.ranked(
        score[similarity](activations, image_features, text_features),
        class_names=class_names,
        method=METHODS[similarity],
        layer=split.layer,
        model_digest=split.model_digest,
        num_images=len(activations),
        probe_set=probe_set,
    )
    return _with_constant_neurons_named(importance, activations)


@torch.no_grad()
def collect_activations(split: SplitClassifier, batches: Batches, progress: Progress | None = None) -> Tensor:
    """Activations of every neuron on every image, averaged over space: [n, N] float32, on the CPU.

    Raises:
        ProbeSetError: no images.
    """
    reference = next(split.parameters(), torch.empty(0))
    rows: list[Tensor] = []
    done = 0
    for images, _ in batches:
        activations = split.trunk(images.to(reference)).float()
        rows.append(activations.flatten(2).mean(2).cpu() if activations.ndim > 2 else activations.cpu())
        done += len(images)
        if progress:
            progress(done)
    if not done:
        raise ProbeSetError("expected probe images, got none; pass at least one batch")
    return torch.cat(rows)


@torch.no_grad()
def _embedding(batches: Batches, clip: ImageTextEncoder, features: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches as they are; CLIP's features of each go to ``features`` on the way."""
    for images, labels in batches:
        features.append(clip.image_features(images))
        yield images, labels


def _check_choices(similarity: str, class_names: Sequence[str], num_classes: int) -> None:
    if similarity not in METHODS:
        raise ValueError(f"expected similarity to be one of {', '.join(METHODS)}, got '{similarity}'")
    if len(class_names) != num_classes:
        raise ImportanceError(f"expected {num_classes} class names for CLIP, got {len(class_names)}")


def _with_constant_neurons_named(importance: NeuronImportance, activations: Tensor) -> NeuronImportance:
    """A neuron that answers every image alike has an arbitrary top-k: say so."""
    constant = (activations.amax(0) == activations.amin(0)).nonzero().flatten().tolist()
    if not constant:
        return importance
    shown = ", ".join(map(str, constant[:8])) + (" ..." if len(constant) > 8 else "")
    warning = f"{len(constant)} of {importance.num_neurons} neurons answer every image alike, their rank is arbitrary: "
    logger.warning("%s importance: %s%s", importance.method, warning, shown)
    return replace(importance, warnings=(*importance.warnings, warning + shown))
