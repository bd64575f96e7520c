"""Models from Python: ``--factory package.module:function``."""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense import DefendedClassifier
from evaluation.errors import EvaluationError
from evaluation.folding import fast_copy
from evaluation.targets import Target


def targets_of_factory(path: str, images: Tensor) -> list[Target]:
    """The model, or the models by name, that a function without arguments returns.

    Each takes images [B, C, H, W] in [0, 1] and returns logits. The first is what the others are compared with, so let
    it be the undefended one. Attacks that know IG-Defense see its parts if a model is a DefendedClassifier.

    Args:
        images: some, to find out whether a model answers the same twice.

    Raises:
        EvaluationError: no such function, or it returns something else.
    """
    made = _call(path)
    models: dict[str, Any] = made if isinstance(made, dict) else {"model": made}
    wrong = [name for name, model in models.items() if not isinstance(model, nn.Module)]
    if wrong or not models:
        raise EvaluationError(f"expected {path} to return a torch.nn.Module, or a dict of them by name; got {made!r}")
    first = next(iter(models)) if len(models) > 1 else None
    return [Target(name, _prepared(model, images), path, path, name == first) for name, model in models.items()]


def labels_of_factory(path: str) -> list[str] | None:
    """What the function says its classes are called, by an attribute ``labels``; None if it says nothing."""
    labels = getattr(_function(path), "labels", None)
    return None if labels is None else [str(label) for label in labels]


def _call(path: str) -> object:
    function = _function(path)
    if not callable(function):
        raise EvaluationError(f"expected {path} to be a function, got {type(function).__name__}")
    made: object = function()
    return made


def _function(path: str) -> object:
    module, _, name = path.partition(":")
    if not name:
        raise EvaluationError(f"expected --factory module:function, got '{path}'")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        function: object = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise EvaluationError(f"expected a function at {path}: {error}") from error
    return function


@torch.no_grad()
def _prepared(model: nn.Module, images: Tensor) -> nn.Module:
    model = fast_copy(model)
    if not isinstance(model, DefendedClassifier):
        differs = not torch.equal(model(images), model(images))
        model.has_noise = differs  # type: ignore[assignment]  # an attribute, no parameter
    return model
