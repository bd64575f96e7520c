"""What a tuning starts from: splits, rankings, and the values to try."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from defense import NeuronImportance, SplitClassifier, load_probe_set, rank_neurons
from defense.model_config import DefenseConfig
from evaluation.errors import EvaluationError
from evaluation.folding import fast_copy
from evaluation.tuning.tune import Report


def splits_of(classifier: nn.Module, layers: Sequence[str | None]) -> dict[str, SplitClassifier]:
    """The classifier split at each layer, by the layer's full name; the first is the one that is attacked."""
    splits = {}
    for layer in layers:
        split = SplitClassifier(classifier.requires_grad_(False), layer)
        fast = fast_copy(split)
        assert isinstance(fast, SplitClassifier)
        splits[split.layer] = fast
    return splits


def rankings_of(
    directory: Path,
    splits: Mapping[str, SplitClassifier],
    methods: Sequence[str],
    files: Mapping[str, Path],
    report: Report,
) -> dict[tuple[str, str], NeuronImportance]:
    """Importances by (method, layer): each method at each layer, on the model directory's probe set, and the files.

    Raises:
        EvaluationError: no ranking at all, or a file of a layer that is not the only one that is tried.
    """
    rankings = {}
    for method in methods:
        for layer in splits:
            rankings[method, layer] = rank_neurons(
                directory,
                load_probe_set(directory),
                method=method,
                layer=layer,
                progress=lambda done, total, what=f"ranking: {method} at {layer}": report(what, done, total),  # type: ignore[misc]
            )
    for name, file in files.items():
        importance = NeuronImportance.from_bytes(file.read_bytes())
        if list(splits) != [importance.layer]:
            raise EvaluationError(
                f"expected files of rankings at the one layer that is tried, got {file} of '{importance.layer}' and "
                f"the layers {', '.join(splits)}; rank with --method, or try that layer alone"
            )
        rankings[name, importance.layer] = importance
    if not rankings:
        raise EvaluationError("expected a ranking to try, got none; pass --method or --importance")
    return rankings


def values_of(
    current: DefenseConfig, given: Mapping[str, Sequence[Any]], *, num_neurons: int, epsilon: float
) -> dict[str, Sequence[Any]]:
    """What to try of each field of ``Setting``: what is given, else the default.

    model.toml's value comes first, so that it is chosen among equals.
    """
    defaults: dict[str, Sequence[Any]] = {
        "top_k": [max(1, num_neurons // part) for part in (16, 8, 4, 2)],
        "sigma": [0.0, epsilon / 4, epsilon / 2, epsilon],
    }
    values: dict[str, Sequence[Any]] = {}
    for name, chosen in given.items():
        first = [] if name in ("method", "layer") else [getattr(current, name)]
        values[name] = list(dict.fromkeys([*first, *(chosen or defaults.get(name, ()))]))
    return values
