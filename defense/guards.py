"""Guards: a ranking can be silently useless, and accuracy alone does not show it.

A published fork gave every class the same top-8 neurons without noticing; another found 48 of 88 neurons all zero.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from defense.errors import ImportanceError


def check_finite(scores: Tensor) -> None:
    """Refuse NaN or infinite scores [C, N].

    Raises:
        ImportanceError: with how many, and in which classes.
    """
    bad = ~torch.isfinite(scores)
    if bad.any():
        classes = bad.any(dim=1).nonzero().flatten().tolist()
        raise ImportanceError(
            f"{int(bad.sum())} of {scores.numel()} scores are NaN or infinite (classes {_some(classes)}); "
            "check the weights and that the probe images are in [0, 1]"
        )


def importance_warnings(
    scores: Tensor, class_counts: Sequence[int] | None = None, class_names: Sequence[str] = ()
) -> list[str]:
    """Sentences about what is suspicious in ``scores`` [C, N].

    Args:
        class_counts: C numbers of probe images, if known.
        class_names: C labels to name classes by; indices otherwise.
    """
    names = list(class_names) or [str(c) for c in range(scores.shape[0])]
    warnings = []
    empty = [c for c, count in enumerate(class_counts or []) if count == 0]
    if empty:
        warnings.append(
            f"{len(empty)} classes have no probe images, their scores are 0: {_some([names[c] for c in empty])}"
        )
    dead = (scores == 0).all(dim=0).nonzero().flatten().tolist()
    if dead:
        warnings.append(f"{len(dead)} of {scores.shape[1]} neurons are dead (0 for every class): {_some(dead)}")
    warnings += [
        f"{len(group)} classes share one top-{_guard_top_k(scores)} set: {_some([names[c] for c in group])}"
        for group in _classes_with_identical_top_k(scores, leave_out=set(empty))
    ]
    return warnings


def degenerate_because(scores: Tensor) -> str | None:
    """Why masks from ``scores`` [C, N] cannot depend on the class, or None if they can."""
    if (scores == 0).all():
        return "every score is 0"
    groups = _classes_with_identical_top_k(scores, leave_out=set())
    if scores.shape[0] > 1 and any(len(group) == scores.shape[0] for group in groups):
        return f"all {scores.shape[0]} classes share one top-{_guard_top_k(scores)} set"
    return None


def _guard_top_k(scores: Tensor) -> int:
    # The paper keeps 50 of 512; on narrow layers a set that holds most neurons would always be shared.
    return min(50, max(1, scores.shape[1] // 4))


def _classes_with_identical_top_k(scores: Tensor, leave_out: set[int]) -> list[list[int]]:
    if scores.shape[1] < 2:
        return []
    top = scores.topk(_guard_top_k(scores), dim=1).indices.sort(dim=1).values.tolist()
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for c, members in enumerate(top):
        if c not in leave_out:
            groups[tuple(members)].append(c)
    return [group for group in groups.values() if len(group) > 1]


def _some(items: Sequence[object], most: int = 8) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
