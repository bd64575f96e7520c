"""What an attack does to neurons: the observation that IG-Defense rests on (arXiv 2409.15190, Fig. 2).

Under an attack that succeeds the important neurons of the true class should fall and those of the attack's class rise;
under one that fails all should fall. ``analyze`` measures it for many images at once, at any layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from defense import SplitClassifier

TRUE, ATTACKED, OTHERS, UNIMPORTANT = "true class", "attack's class", "other classes", "unimportant"
TRUE_ONLY, ATTACKED_ONLY = "true class only", "attack's class only"
GROUPS = (TRUE, ATTACKED, OTHERS, UNIMPORTANT, TRUE_ONLY, ATTACKED_ONLY)


@dataclass(frozen=True)
class Analysis:
    """Neurons before and after an attack, of the images that were classified correctly before it.

    Attributes:
        indices: [n], of these images in what was given. labels: [n], their true classes.
        attack_classes: [n], see ``best_wrong_class``.
        successful: [n], whether the attack changed the prediction.
        before, after: [n, N], activations averaged over space.
        members: of each group, [n, N] bool, its neurons for each image.
    """

    indices: Tensor
    labels: Tensor
    attack_classes: Tensor
    successful: Tensor
    before: Tensor
    after: Tensor
    members: dict[str, Tensor]

    def changes(self, group: str) -> Tensor:
        """[n], how much the mean activation of the group's neurons rose; NaN where the group is empty."""
        return _mean_of(self.after - self.before, self.members[group])

    def relative_changes(self, group: str) -> Tensor:
        """[n], ``changes`` over the mean (absolute) activation of the same neurons before, as in the official code.

        NaN where these neurons were all silent, or the group is empty.
        """
        clean = _mean_of(self.before.abs(), self.members[group])
        return self.changes(group) / torch.where(clean > 0, clean, torch.nan)


@torch.no_grad()
def analyze(
    split: SplitClassifier,
    masks: Tensor,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Analysis:
    """Compare the neurons of images with those of their attacked copies.

    Images that are misclassified before the attack are left out, as in the paper.

    Args:
        split: the attacked (undefended) classifier, split at the layer to look at.
        masks: [C, N], 1 for the important neurons of each class.
        images, adversarial: [n, channels, H, W] in [0, 1]; labels: [n].
        progress: called after each batch with the images done.
    """
    before, after, kept, wrong, fooled = [], [], [], [], []
    done = 0
    for clean, attacked, true in zip(*(t.split(batch_size) for t in (images, adversarial, labels)), strict=True):
        clean_logits, clean_neurons = _run(split, clean)
        logits, neurons = _run(split, attacked)
        correct = clean_logits.argmax(1) == true
        kept.append(correct.nonzero().flatten() + done)
        before.append(clean_neurons[correct])
        after.append(neurons[correct])
        wrong.append(best_wrong_class(logits, true)[correct])
        fooled.append((logits.argmax(1) != true)[correct])
        done += len(true)
        if progress:
            progress(done)
    indices, attack_classes = torch.cat(kept), torch.cat(wrong)
    groups = neuron_groups(masks, labels[indices], attack_classes)
    return Analysis(
        indices, labels[indices], attack_classes, torch.cat(fooled), torch.cat(before), torch.cat(after), groups
    )


def best_wrong_class(logits: Tensor, labels: Tensor) -> Tensor:
    """The attack's class [B] of logits [B, C]: what a successful attack made of the image, and what a failed one came
    closest to.
    """
    return logits.scatter(1, labels.unsqueeze(1), -torch.inf).argmax(dim=1)


def neuron_groups(masks: Tensor, labels: Tensor, attack_classes: Tensor) -> dict[str, Tensor]:
    """Which neurons [n, N] belong to which group, for each image.

    The first four are the official code's: the top-k of the true class and of the attack's class may share neurons,
    which an attack pulls both ways; the two ``... only`` groups are without those.

    Args:
        masks: [C, N]; labels, attack_classes: [n].
    """
    important = masks > 0
    true, attacked, any_class = important[labels], important[attack_classes], important.any(dim=0)
    return {
        TRUE: true,
        ATTACKED: attacked,
        OTHERS: any_class & ~true & ~attacked,
        UNIMPORTANT: (~any_class).expand_as(true),
        TRUE_ONLY: true & ~attacked,
        ATTACKED_ONLY: attacked & ~true,
    }


def _run(split: SplitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and activations averaged over space [B, N]."""
    activations, *bypass = split.cut(images)
    return split.tail(activations, *bypass), activations.flatten(2).mean(2) if activations.ndim > 2 else activations


def _mean_of(values: Tensor, members: Tensor) -> Tensor:
    count = members.sum(dim=1)
    return (values * members).sum(dim=1) / torch.where(count > 0, count, torch.nan)
