"""IG-Defense in torch: rank neurons once, then classify with the ones that matter (arXiv 2409.15190).

No HTTP, no Redis, no environment: everything takes arguments.
"""

from defense.clip import ClipModel
from defense.clip_dissect import clip_dissect_importance
from defense.defended import DefendedClassifier, DefendedPrediction
from defense.digest import model_digest
from defense.errors import (
    ClipError,
    DefenseError,
    ImportanceError,
    ImportanceMismatch,
    ModelDirectoryError,
    ProbeSetError,
    SplitError,
    UnreadableImage,
)
from defense.importance import NeuronImportance, load_importance
from defense.leave_one_out import leave_one_out_importance
from defense.masking import top_k_masks
from defense.model_config import ModelConfig, read_config
from defense.models import load_classifier
from defense.probe import ProbeSet, load_probe_set
from defense.ranking import check_dataset, check_servable, open_probe_set, rank_neurons
from defense.split import SplitClassifier

__all__ = [
    "ClipError",
    "ClipModel",
    "DefendedClassifier",
    "DefendedPrediction",
    "DefenseError",
    "ImportanceError",
    "ImportanceMismatch",
    "ModelConfig",
    "ModelDirectoryError",
    "NeuronImportance",
    "ProbeSet",
    "ProbeSetError",
    "SplitClassifier",
    "SplitError",
    "UnreadableImage",
    "check_dataset",
    "check_servable",
    "clip_dissect_importance",
    "leave_one_out_importance",
    "load_classifier",
    "load_importance",
    "load_probe_set",
    "model_digest",
    "open_probe_set",
    "rank_neurons",
    "read_config",
    "top_k_masks",
]
