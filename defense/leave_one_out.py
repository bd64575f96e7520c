"""LO-IR: leave one neuron out and watch the logit (Kulkarni & Weng, ECCV 2024, section 3)."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from defense.errors import ProbeSetError
from defense.importance import NeuronImportance
from defense.split import SplitClassifier

Batches = Iterable[tuple[Tensor, Tensor]]
Progress = Callable[[int], None]


def leave_one_out_importance(
    split: SplitClassifier,
    batches: Batches,
    *,
    signed: bool = False,
    class_names: Sequence[str] = (),
    probe_set: str = "",
    tail_batch_size: int = 1024,
    progress: Progress | None = None,
) -> NeuronImportance:
    """Rank every neuron for every class by how much the class's logit changes without it.

    The score of neuron j for class c is the mean, over the probe images of class c, of the change of logit c when
    neuron j is zeroed. Where the tail is affine (the paper's layer) one gradient through the tail gives every neuron's
    change exactly: ``d logit_c / d activation_j * activation_j``. Elsewhere the trunk runs once for each batch and only
    the tail for each neuron, many neurons at a time.

    Args:
        split: the classifier, split at the layer to rank.
        batches: (images [B, channels, H, W] in [0, 1], labels [B]) pairs on any device; read once, none is kept.
        signed: the paper's equation (a neuron that lowers its class's logit scores negative); the default is the
            absolute change, as in the official code.
        class_names: C labels, kept with the scores. probe_set: its name, kept too.
        tail_batch_size: activations that go through the tail at once, for layers whose tail is not affine.
        progress: called after each batch with the number of images done.

    Returns:
        Importance [C, N]; classes without images score 0 and are named in its ``warnings``.

    Raises:
        ProbeSetError: no images, or labels that are not classes of the model.
        ImportanceError: NaN or infinite scores.
    """
    sums = torch.zeros(split.num_classes, split.num_neurons, dtype=torch.float64)
    counts = torch.zeros(split.num_classes, dtype=torch.int64)
    reference = next(split.parameters(), sums)
    for images, labels in batches:
        _check_batch(images, labels, split.num_classes)
        changes = logit_changes(split, images.to(reference), labels.to(reference.device), tail_batch_size)
        changes = (changes if signed else changes.abs()).double().cpu()
        sums.index_add_(0, labels.cpu(), changes)
        counts += torch.bincount(labels.cpu(), minlength=split.num_classes)
        if progress:
            progress(int(counts.sum()))
    if not counts.any():
        raise ProbeSetError("expected probe images, got none; pass at least one batch")
    return NeuronImportance.ranked(
        (sums / counts.clamp(min=1).unsqueeze(1)).float(),
        class_counts=counts.tolist(),
        class_names=class_names,
        method="lo-ir-signed" if signed else "lo-ir",
        layer=split.layer,
        model_digest=split.model_digest,
        num_images=int(counts.sum()),
        probe_set=probe_set,
    )


def logit_changes(split: SplitClassifier, images: Tensor, labels: Tensor, tail_batch_size: int = 1024) -> Tensor:
    """How much each image's own logit falls without each neuron, [B, N]: with it minus without it.

    Args:
        images: [B, channels, H, W], in [0, 1]; labels: [B], the logit to watch.
    """
    with torch.no_grad():
        activations, *bypass = split.cut(images)
    if split.tail_is_affine:
        return _changes_of_affine_tail(split, activations, labels)
    return _changes_by_omission(split, activations, bypass, labels, tail_batch_size)


def _changes_of_affine_tail(split: SplitClassifier, activations: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        activations = activations.detach().requires_grad_()
        own_logits = split.tail(activations).gather(1, labels.unsqueeze(1))
        (gradient,) = torch.autograd.grad(own_logits.sum(), activations)
    return (gradient * activations.detach()).reshape(*activations.shape[:2], -1).sum(2)


@torch.no_grad()
def _changes_by_omission(
    split: SplitClassifier, activations: Tensor, bypass: Sequence[Tensor], labels: Tensor, tail_batch_size: int
) -> Tensor:
    batch, num_neurons = activations.shape[:2]
    own = labels.unsqueeze(1)
    with_all = split.tail(activations, *bypass).gather(1, own)
    without = []
    for left_out in torch.arange(num_neurons, device=labels.device).split(max(1, tail_batch_size // batch)):
        repeated = activations.repeat(len(left_out), *(1,) * (activations.ndim - 1)).unflatten(0, (-1, batch))
        repeated[torch.arange(len(left_out)), :, left_out] = 0
        logits = split.tail(repeated.flatten(0, 1), *(b.repeat(len(left_out), *(1,) * (b.ndim - 1)) for b in bypass))
        without.append(logits.gather(1, own.repeat(len(left_out), 1)).view(-1, batch))
    return with_all - torch.cat(without).T


def _check_batch(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if len(images) != len(labels):
        raise ProbeSetError(f"expected a label for each image, got {len(images)} images and {len(labels)} labels")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ProbeSetError(
            f"expected labels from 0 to {num_classes - 1} (the model's classes), "
            f"got {int(labels.min())} to {int(labels.max())}; use a probe set of the model's own classes"
        )
