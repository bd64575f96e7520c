"""The protocol: every attack on every target, image by image, resumable.

An image is robust only if it withstands every attack in every noise draw. An attack is tried only on images that most
redraws still get right after the attacks before it: what is broken already cannot become more broken.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from defense import DefendedClassifier
from defense.shards import rank_and_world
from evaluation.attacks import ATTACKS, FixedNoise
from evaluation.outcomes import BlockFile, Record
from evaluation.settings import RunSettings
from evaluation.targets import Target
from evaluation.test_images import Block, TestImages

Progress = Callable[[str], None]


def run_protocol(
    targets: Sequence[Target],
    test_images: TestImages,
    settings: RunSettings,
    folder: Path,
    *,
    keep_adversarial: bool = True,
    progress: Progress = lambda step: None,
) -> None:
    """Attack all targets, or go on where an earlier run ended; of several processes, each takes a share of the blocks.

    Blocks are in the outermost loop: whenever a run is interrupted, the finished blocks compare all targets.

    Args:
        folder: where the outcomes are. progress: is told of each step that is done, new or taken over.

    Raises:
        EvaluationError: the folder has outcomes of another model, dataset or of other settings.
    """
    rank, world = rank_and_world()
    for index, block in enumerate(test_images.blocks(settings.block_size)):
        if index % world == rank:
            for target in targets:
                for seed in settings.seeds:
                    _BlockRun(target, block, settings, folder, seed, keep_adversarial).run(progress)


def num_steps(targets: Sequence[Target], n: int, settings: RunSettings) -> int:
    """How many steps ``run_protocol`` reports, over all processes."""
    blocks = -(-n // settings.block_size)
    return blocks * len(targets) * len(settings.seeds) * (1 + len(settings.attacks))


class _BlockRun:
    """One target, one block, one seed."""

    def __init__(
        self, target: Target, block: Block, settings: RunSettings, folder: Path, seed: int, keep_adversarial: bool
    ) -> None:
        self.target, self.block, self.settings, self.seed = target, block, settings, seed
        self.keep_adversarial = keep_adversarial
        identity = {
            "images": block.digest,
            "settings": settings.digest(target.fingerprint),
            "redraws": settings.redraws,
            "labels": block.labels.tolist(),
        }
        self.file = BlockFile(folder, target.name, seed, block.start, block.stop, identity)

    def run(self, progress: Progress) -> None:
        if "clean" not in self.file.data:
            self.file.data["clean"] = self._judge(self.block.images, self.block.labels, "clean").tolist()
            self.file.save()
        progress(f"{self.target.name}: clean")
        right = torch.tensor(self.file.data["clean"])
        for name in self.settings.attacks:
            standing = (right > self.settings.redraws / 2).nonzero().flatten()
            record = self._outcome_of(name, standing)
            attacked = torch.tensor(record["attacked"], dtype=torch.int64) - self.block.start
            right[attacked] = torch.minimum(right[attacked], torch.tensor(record["correct"], dtype=right.dtype))
            progress(f"{self.target.name}: {name}")

    def _outcome_of(self, name: str, standing: Tensor) -> Record:
        """Of an earlier run if that attacked the same images, else of now."""
        places = (standing + self.block.start).tolist()
        stored: Record | None = self.file.data["attacks"].get(name)
        if stored is not None and stored["attacked"] == places:
            return stored
        record, adversarial = self._attack(name, standing)
        record["attacked"] = places
        self.file.save_attack(name, record, adversarial if self.keep_adversarial and places else None)
        return record

    def _attack(self, name: str, standing: Tensor) -> tuple[Record, Tensor]:
        images, labels = self.block.images[standing], self.block.labels[standing]
        began, model, budget = time.perf_counter(), self.target.model, self.settings.budget
        if not len(standing):
            return {"correct": [], "gradient_calls": 0, "forward_calls": 0, "seconds": 0.0}, images
        attack = ATTACKS[name](self.settings.effort)
        result = attack.run(model, images, labels, budget, seed=seed_of(self.seed, name, self.block.start))
        record: Record = {
            "correct": self._judge(result.images, labels, name).tolist(),
            "gradient_calls": result.gradient_calls,
            "forward_calls": result.forward_calls + self.settings.redraws * len(standing),
        }
        if name == "fixed-noise" and self.target.has_noise:
            record["correct_if_known"] = _right_with_known_noise(model, result.images, labels).tolist()
        record["seconds"] = round(time.perf_counter() - began, 2)
        return record, result.images

    def _judge(self, images: Tensor, labels: Tensor, purpose: str) -> Tensor:
        """How many of the redraws get each image right, [B]; fresh noise, always in float32."""
        seed = seed_of(self.seed, f"judge {purpose}", self.block.start)
        return right_draws(self.target.model, images, labels, self.settings.redraws, seed)


@torch.no_grad()
def right_draws(model: nn.Module, images: Tensor, labels: Tensor, redraws: int, seed: int) -> Tensor:
    """How many of so many noise draws get each image right, [B] int64.

    A DefendedClassifier is handed its noise: a mistake in how it draws its own would flatter it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        right = [_with_fresh_noise(model, images).argmax(dim=1) == labels for _ in range(redraws)]
    return torch.stack(right).sum(dim=0)


def _with_fresh_noise(model: nn.Module, images: Tensor) -> Tensor:
    if isinstance(model, DefendedClassifier) and model.sigma:
        noise = torch.randn((model.num_noise_samples, *images.shape), dtype=images.dtype, device=images.device)
        answer: Tensor = model(images, noise)
    else:
        answer = model(images)
    return answer


@torch.no_grad()
def _right_with_known_noise(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    known = FixedNoise(model) if isinstance(model, DefendedClassifier) else model
    right: Tensor = known(images).argmax(dim=1) == labels
    return right.int()


def seed_of(seed: int, purpose: str, start: int) -> int:
    """A seed for this purpose on the block that starts there; the same for every target, so that they are paired."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{purpose}|{start}".encode()).digest()[:4])
