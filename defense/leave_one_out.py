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
    running = LeaveOneOut(split, signed=signed, tail_batch_size=tail_batch_size)
    for images, labels in batches:
        running.add(images, labels)
        if progress:
            progress(running.num_images)
    return running.importance(class_names=class_names, probe_set=probe_set)


class LeaveOneOut:
    """LO-IR under way: sums over the images so far. What ``leave_one_out_importance`` loops over.

    ``sums`` and ``counts`` are all there is to it: save and restore them to go on after an interruption, add those of
    several processes to rank in parallel.

    Attributes:
        sums: [C, N] float64, changes of the own class's logit.
        counts: [C] int64, images of each class.
    """

    def __init__(self, split: SplitClassifier, *, signed: bool = False, tail_batch_size: int = 1024) -> None:
        self.split, self.signed, self.tail_batch_size = split, signed, tail_batch_size
        self.sums = torch.zeros(split.num_classes, split.num_neurons, dtype=torch.float64)
        self.counts = torch.zeros(split.num_classes, dtype=torch.int64)

    @property
    def num_images(self) -> int:
        return int(self.counts.sum())

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Add a batch: images [B, channels, H, W] in [0, 1], labels [B].

        Raises:
            ProbeSetError: labels that are not classes of the model.
        """
        _check_batch(images, labels, self.split.num_classes)
        reference, labels = next(self.split.parameters(), self.sums), labels.cpu()
        changes = logit_changes(self.split, images.to(reference), labels.to(reference.device), self.tail_batch_size)
        self.sums.index_add_(0, labels, (changes if self.signed else changes.abs()).double().cpu())
        self.counts += torch.bincount(labels, minlength=self.split.num_classes)

    def importance(self, *, class_names: Sequence[str] = (), probe_set: str = "") -> NeuronImportance:
        """The mean changes so far.

        Raises:
            ProbeSetError: no image was added. ImportanceError: NaN or infinite scores.
        """
        if not self.counts.any():
            raise ProbeSetError("expected probe images, got none; pass at least one batch")
        return NeuronImportance.ranked(
            (self.sums / self.counts.clamp(min=1).unsqueeze(1)).float(),
            class_counts=self.counts.tolist(),
            class_names=class_names,
            method="lo-ir-signed" if self.signed else "lo-ir",
            layer=self.split.layer,
            model_digest=self.split.model_digest,
            num_images=self.num_images,
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
