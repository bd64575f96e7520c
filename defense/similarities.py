"""CLIP-Dissect's similarities between neurons and concepts (Oikarinen & Weng, ICLR 2023, arXiv 2204.10965).

Each takes activations [n, N] of n images, CLIP's image features [n, D] and text features [C, D], and gives [C, N].
All neurons at once, a chunk of bounded memory at a time.
"""

from collections.abc import Iterator
from math import comb, log

import torch
import torch.nn.functional as F
from torch import Tensor

from defense.errors import ImportanceError, ProbeSetError

MAX_BYTES = 32 * 2**20  # of one chunk's largest temporary; larger ones fall out of the CPU's cache


def soft_wpmi(
    activations: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    *,
    top_k: int = 100,
    a: float = 10,
    lam: float = 1,
    min_prob: float = 1e-7,
    p_start: float = 0.998,
    p_end: float = 0.97,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Soft weighted pointwise mutual information of each class name and each neuron (CLIP-Dissect, section 3.2).

    With P[i, c] = softmax over the names of ``a`` times CLIP's cosine similarities, and ``p_r`` the chance that the
    r-th of a neuron's ``top_k`` most activating images is an example of its concept, falling from p_start to p_end::

        log p(D | c) = sum over r of log(1 + p_r (P[image_r, c] - 1) + min_prob)
        score        = log p(D | c) - lam * log(mean over neurons of p(D | c))

    Args:
        activations: [n, N], averaged over space. image_features: [n, D]. text_features: [C, D]; neither normalized.
        max_bytes: of a chunk's largest temporary. The neurons are scored chunk by chunk, which changes no result.

    Returns:
        [C, N] float32.

    Raises:
        ProbeSetError: fewer than ``top_k`` images, or not as many activations as image features.
        ImportanceError: NaN or infinite activations or features.
    """
    _check_inputs(activations, image_features, text_features, needed=top_k)
    num_neurons, num_classes = activations.shape[1], len(text_features)
    probabilities = _cosines(image_features, text_features)
    for rows in probabilities.split(max(1, max_bytes // (4 * num_classes))):
        rows.copy_(rows.mul_(a).softmax(dim=1))
    p = (p_start - torch.arange(top_k, device=activations.device) / top_k * (p_start - p_end)).view(1, -1, 1)
    log_likelihood = torch.empty(num_neurons, num_classes, device=activations.device)
    for neurons in _chunks(num_neurons, max_bytes // 4, per_neuron=max(top_k * num_classes, len(activations))):
        images = _rows_of(activations, neurons).topk(top_k, dim=1).indices
        # The reference's order of operations: in float32, another one differs by 1e-4.
        likelihood = probabilities[images].sub_(1).mul_(p).add_(1).add_(min_prob)
        log_likelihood[neurons] = likelihood.log_().sum(dim=1)
    log_mean = log_likelihood.logsumexp(dim=0) - log(num_neurons)
    return (log_likelihood - lam * log_mean).T.contiguous()


@torch.no_grad()
def cos_cubed(
    activations: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    *,
    min_norm: float = 1e-3,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Cosine, over the images, between a neuron's activations and CLIP's similarities, both centered and cubed.

    Cubing lets the images that stand out decide (CLIP-Dissect, section 3.2).

    Args:
        activations: [n, N], averaged over space. image_features: [n, D]. text_features: [C, D]; neither normalized.
        min_norm: least norm to divide by, so that a constant neuron scores 0.
        max_bytes: of a chunk's largest temporary; see ``soft_wpmi``, errors too.

    Returns:
        [C, N] float32, in [-1, 1].
    """
    _check_inputs(activations, image_features, text_features)
    similarities = _cosines(image_features, text_features)
    for classes in _chunks(len(text_features), max_bytes // 8, per_neuron=len(activations)):
        similarities[:, classes] = _centered_cubed(similarities[:, classes], min_norm)
    scores = torch.empty(len(text_features), activations.shape[1], device=activations.device)
    for neurons in _chunks(activations.shape[1], max_bytes // 8, per_neuron=len(activations)):
        scores[:, neurons] = similarities.T @ _centered_cubed(activations[:, neurons], min_norm)
    return scores


@torch.no_grad()
def rank_reorder(
    activations: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    *,
    p: int = 3,
    top_fraction: float = 0.05,
    scale_p: float = 0.5,
    min_similarity: float = 1e-3,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """How well CLIP's order of a neuron's top images restores their activations (CLIP-Dissect, section 3.2).

    The top activations are handed out again in the order of CLIP's similarity to the name. The score is minus
    the mean ``|difference| ** p``, divided by that of a random order and by the mean similarity to the power
    ``scale_p``. The reference draws five random orders; here it is their expectation, so that a ranking is repeatable.

    Args:
        activations: [n, N], averaged over space. image_features: [n, D]. text_features: [C, D]; neither normalized.
        top_fraction: of the images, the most activating ones; at least two must remain.
        min_similarity: least mean similarity to divide by: the power of a negative one would be NaN.
        max_bytes: of a chunk's largest temporary; see ``soft_wpmi``, errors too.

    Returns:
        [C, N] float32, at most 0. A neuron whose top activations are all the same counts as ordered at random.
    """
    top = int(len(activations) * top_fraction)
    if top < 2:
        raise ProbeSetError(f"expected 2 images in the top {top_fraction:g} of them, got {top}; use more images")
    _check_inputs(activations, image_features, text_features)
    similarities = _cosines(image_features, text_features)
    scores = torch.empty(len(text_features), activations.shape[1], device=activations.device)
    per_neuron = max(6 * top * len(text_features), len(activations))
    for neurons in _chunks(activations.shape[1], max_bytes // 4, per_neuron=per_neuron):
        highest = _rows_of(activations, neurons).topk(top, dim=1)
        seen = similarities[highest.indices].transpose(1, 2).contiguous()  # [chunk, C, top]
        error = _reordering_error(highest.values, seen, p) / seen.mean(2).clamp(min=min_similarity) ** scale_p
        scores[:, neurons] = -error.T
    return scores


def _reordering_error(descending: Tensor, similarities: Tensor, p: int) -> Tensor:
    """Error of CLIP's order over that of a random one, [chunk, C]."""
    by_similarity = similarities.argsort(dim=2, stable=True)
    actual = descending.unsqueeze(1).expand_as(similarities).gather(2, by_similarity)
    error = (actual - descending.flip(1).unsqueeze(1)).abs().pow(p).mean(2)
    baseline = _random_order_error(descending, p).unsqueeze(1)
    return torch.where(baseline > 0, error / baseline.clamp(min=torch.finfo(error.dtype).tiny), 1.0)


def _random_order_error(descending: Tensor, p: int) -> Tensor:
    """Mean of ``|x_i - x_j| ** p`` over all pairs of each row, by prefix sums of powers: no [top, top] matrix."""
    spread = (descending[:, :1] - descending[:, -1:]).double()
    # In [-1/2, 1/2], so that the powers neither overflow nor cancel.
    x = (descending.double() - descending[:, -1:].double()) / torch.where(spread > 0, spread, 1.0) - 0.5
    pairs = torch.zeros_like(x)
    for m in range(p + 1):
        earlier = x.pow(p - m).cumsum(1) - x.pow(p - m)
        pairs += comb(p, m) * (-x).pow(m) * earlier
    return (2 * pairs.sum(1) / x.shape[1] ** 2 * spread.squeeze(1) ** p).clamp(min=0).to(descending.dtype)


def _centered_cubed(columns: Tensor, min_norm: float) -> Tensor:
    cubed = (columns - columns.mean(0, keepdim=True)).pow_(3)
    return cubed.div_(cubed.norm(dim=0, keepdim=True).clamp(min=min_norm))


def _cosines(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Cosine similarity of every image and every name, [n, C] float32."""
    return F.normalize(image_features.float(), dim=1) @ F.normalize(text_features.float(), dim=1).T


def _rows_of(activations: Tensor, neurons: slice) -> Tensor:
    """[chunk, n], contiguous. Copied before it is transposed, too: torch transposes a whole matrix 3x faster."""
    return activations[:, neurons].contiguous().T.contiguous()


def _chunks(count: int, max_elements: int, *, per_neuron: int) -> Iterator[slice]:
    size = max(1, max_elements // per_neuron)
    return (slice(start, start + size) for start in range(0, count, size))


def _check_inputs(activations: Tensor, image_features: Tensor, text_features: Tensor, needed: int = 1) -> None:
    if len(activations) != len(image_features):
        raise ProbeSetError(
            f"expected CLIP features of the {len(activations)} probe images, got {len(image_features)}; "
            "compute them from the same images in the same order"
        )
    if not 1 <= needed <= len(activations):
        raise ProbeSetError(f"expected at least top_k = {needed} probe images, got {len(activations)}; lower top_k")
    bad = {
        "neurons have NaN or infinite activations": ~torch.isfinite(activations.sum(0)),
        "images have NaN or infinite CLIP features": ~torch.isfinite(image_features.sum(1)),
        "class names have NaN or infinite CLIP features": ~torch.isfinite(text_features.sum(1)),
    }
    for what, which in bad.items():
        if which.any():
            raise ImportanceError(f"{int(which.sum())} of {len(which)} {what}; check the weights of that model")
