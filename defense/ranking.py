"""Rank a model directory on a probe set by any method: resumable, and in several processes under torchrun."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from defense.checkpoint import Checkpoint
from defense.clip import ClipModel
from defense.clip_cache import ClipFeatureCache
from defense.clip_dissect import collect_activations, dissect
from defense.datasets import OWN_PROBE_SET, open_dataset, read_datasets
from defense.defended import DefendedClassifier
from defense.errors import ProbeSetError, UnreadableImage
from defense.importance import NeuronImportance, check_origin
from defense.leave_one_out import LeaveOneOut
from defense.model_config import ModelConfig, read_config
from defense.models import load_classifier
from defense.probe import ProbeSet, SkippedImage, load_probe_set
from defense.shards import gather_rows, rank_and_world, sum_over_shards
from defense.split import SplitClassifier

METHODS = ("lo-ir", "lo-ir-signed", "cd-ir")
CLIP_DIRECTORY = "clip"
CHECKPOINT_EVERY = 20  # batches

RankProgress = Callable[[int, int], None]


def rank_neurons(
    directory: Path | str,
    probe: ProbeSet,
    *,
    method: str = "lo-ir",
    layer: str | None = None,
    batch_size: int = 128,
    device: str = "cpu",
    checkpoint: Path | None = None,
    cache_dir: Path | None = None,
    progress: RankProgress | None = None,
) -> NeuronImportance:
    """Rank the neurons of a model directory.

    With torch.distributed initialized (``torchrun -m igd rank``), each process ranks every n-th image, and all get the
    result.

    Args:
        probe: its labels are the model's classes.
        method: ``"lo-ir"``, ``"lo-ir-signed"`` or ``"cd-ir"``.
        layer: the split layer; model.toml's by default.
        checkpoint: file to go on from (of this process), written every 20 batches; the caller removes it when the
            result is safe. CD-IR goes on from ``cache_dir`` instead.
        cache_dir: where CLIP's image features are kept for the next ranking.
        progress: called after each batch with the images done, of how many, in this process.

    Raises:
        DefenseError: see ``leave_one_out_importance``, ``clip_dissect_importance`` and ``ProbeSet.batches``.
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got '{method}'")
    config = read_config(directory)
    split = SplitClassifier(load_classifier(directory).to(device), layer or config.defense.layer)
    ranking = _Ranking(split, config, probe, batch_size, progress or (lambda done, total: None))
    if method == "cd-ir":
        return ranking.clip_dissect(clip_of(directory, device), cache_dir)
    identity = {"method": method, "layer": split.layer, "weights": split.model_digest, "probe": ranking.shard.digest}
    identity["labels"] = hashlib.sha256(ranking.shard.labels.numpy().tobytes()).hexdigest()
    return ranking.leave_one_out(method == "lo-ir-signed", Checkpoint(checkpoint, identity) if checkpoint else None)


def open_probe_set(
    name: str, directory: Path | str, *, datasets_file: Path | None = None, images_per_class: int | None = None
) -> ProbeSet:
    """A probe set by name: ``"probe"``, the model directory's own, or one that the file of datasets lists.

    Args:
        images_per_class: draw that many of each class, always the same ones; None for all.

    Raises:
        ProbeSetError: no such set, it cannot be read, or its classes are not the model's.
    """
    check_dataset(name, datasets_file)
    if name == OWN_PROBE_SET:
        probe: ProbeSet = load_probe_set(directory)
    else:
        specs = read_datasets(datasets_file) if datasets_file else {}
        probe = open_dataset(name, specs, read_config(directory).labels)
    return probe if images_per_class is None else probe.subset(images_per_class)


def check_dataset(name: str, datasets_file: Path | None) -> None:
    """Refuse a name that no probe set has, without opening any.

    Raises:
        ProbeSetError: it lists the names there are.
    """
    names = [OWN_PROBE_SET, *(sorted(read_datasets(datasets_file)) if datasets_file else [])]
    if name not in names:
        raise ProbeSetError(
            f"expected one of the datasets {', '.join(names)}, got '{name}'; add it to the file that IGD_DATASETS names"
        )


def check_servable(directory: Path | str, importance: NeuronImportance) -> None:
    """Refuse an importance that the model directory cannot be served with, at its own layer.

    Raises:
        DefenseError: another model, or it does not say of which, no such layer, or fewer neurons there than
            model.toml's top_k.
    """
    check_origin(importance)
    split = SplitClassifier(load_classifier(directory), importance.layer)
    DefendedClassifier(split, importance, **read_config(directory).defense.arguments)


def clip_of(directory: Path | str, device: str = "cpu") -> ClipModel:
    """The CLIP that a model directory ships in ``clip/``; else the paper's ViT-B/16 of OpenAI.

    Raises:
        ClipError: it cannot be loaded, and what to do.
    """
    own = Path(directory) / CLIP_DIRECTORY
    return ClipModel.from_directory(own, device=device) if own.is_dir() else ClipModel(device=device)


class _Ranking:
    """What the methods share: the split, this process's share of the images, and how far it is."""

    def __init__(
        self, split: SplitClassifier, config: ModelConfig, probe: ProbeSet, batch_size: int, progress: RankProgress
    ) -> None:
        self.split, self.config, self.probe_name = split, config, probe.name
        self.rank, self.world = rank_and_world()
        self.shard = probe.shard(self.rank, self.world)
        self._batch_size, self._progress = batch_size, progress

    def leave_one_out(self, signed: bool, checkpoint: Checkpoint | None) -> NeuronImportance:
        """LO-IR, going on from the checkpoint."""
        running, start = LeaveOneOut(self.split, signed=signed), 0
        if checkpoint and (saved := checkpoint.load()):
            running.sums, running.counts, start = saved["sums"], saved["counts"], int(saved["position"])
            self.shard.skipped = [
                SkippedImage(i, "unreadable, before an interruption") for i in saved["skipped"].tolist()
            ]
        for number, (images, labels) in enumerate(self._batches(start), start=1):
            running.add(images, labels)
            position = running.num_images + len(self.shard.skipped)
            self._progress(position, len(self.shard))
            if checkpoint and number % CHECKPOINT_EVERY == 0:
                skipped = torch.tensor([skip.index for skip in self.shard.skipped], dtype=torch.int64)
                position_tensor = torch.tensor(position)
                checkpoint.save(
                    {"sums": running.sums, "counts": running.counts, "position": position_tensor, "skipped": skipped}
                )
        sum_over_shards(running.sums, running.counts)
        return running.importance(class_names=self.config.labels, probe_set=self.probe_name)

    def clip_dissect(self, clip: ClipModel, cache_dir: Path | None) -> NeuronImportance:
        """CD-IR. Its checkpoint is the cache: CLIP's pass is the long one."""
        count = len(self.shard)
        features = self._image_features(clip, cache_dir)
        activations = collect_activations(
            self.split, self._batches(0), lambda done: self._progress(count + done, 2 * count)
        )
        unreadable = {skip.index for skip in self.shard.skipped}
        readable = torch.tensor([i for i in range(count) if i not in unreadable])
        embedded = torch.isfinite(features[readable]).all(1)  # an image that CLIP's pass could not read has no features
        indices = self.rank + self.world * readable[embedded]
        return dissect(
            self.split,
            gather_rows(activations[embedded], indices),
            gather_rows(features[readable[embedded]], indices),
            clip=clip,
            class_names=self.config.labels,
            probe_set=self.probe_name,
        )

    def _batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.shard.batches(self._batch_size, config=self.config.input, start=start)

    def _image_features(self, clip: ClipModel, cache_dir: Path | None) -> Tensor:
        """CLIP's features [n, D] of the originals, by its own preprocessing; NaN where an image cannot be read."""
        if cache_dir is None:
            return self._embed(clip)
        return ClipFeatureCache(cache_dir).get_or_compute(self.shard.digest, clip.digest, lambda: self._embed(clip))

    def _embed(self, clip: ClipModel) -> Tensor:
        count, features = len(self.shard), torch.empty(0)
        for first in range(0, count, self._batch_size):
            last = min(first + self._batch_size, count)
            images = {i: image for i in range(first, last) if (image := self._image(i))}
            if images:
                rows = clip.image_features_of(list(images.values()))
                features = features if len(features) else torch.full((count, rows.shape[1]), torch.nan)
                features[list(images)] = rows
            self._progress(last, 2 * count)
        if not len(features):
            raise ProbeSetError(f"none of the {count} probe images can be read")
        return features

    def _image(self, index: int) -> Image.Image | None:
        try:
            return self.shard.image(index)
        except UnreadableImage:  # counted, and perhaps too many, in the classifier's pass over the same images
            return None
