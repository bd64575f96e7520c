"""Masks: which neurons each class keeps."""

import torch
from torch import Tensor

from defense.errors import ImportanceError
from defense.guards import check_finite


def top_k_masks(scores: Tensor, top_k: int) -> Tensor:
    """Keep the ``top_k`` most important neurons of each class.

    Args:
        scores: [C, N], higher is more important.
        top_k: neurons to keep, 1 to N (50 on CIFAR, 750 on ImageNet in the paper).

    Returns:
        Masks [C, N] of the scores' type, 1 keeps and 0 drops; each row sums to ``top_k``. Among equal scores the lower
        index is kept.

    Raises:
        ImportanceError: ``top_k`` out of range, or scores that are not a finite matrix.
    """
    if scores.ndim != 2:
        raise ImportanceError(f"expected scores [classes, neurons], got {list(scores.shape)}")
    if not 1 <= top_k <= scores.shape[1]:
        raise ImportanceError(f"expected top_k from 1 to {scores.shape[1]} (the number of neurons), got {top_k}")
    check_finite(scores)
    # A stable sort, where topk leaves ties to chance: the same ranking must give the same masks everywhere.
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return torch.zeros_like(scores).scatter_(1, order, 1)
