"""Outcomes: what every attack did to every image, in one small file for each target, seed and block.

A file is replaced as a whole after each attack, so that a process that is killed loses one attack on one block. The
adversarial images lie beside the outcomes; they can be made again, and need not be kept.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluation.errors import EvaluationError

Record = dict[str, Any]
FORMAT = 1


class BlockFile:
    """The outcomes of one target on one block with one seed.

    The file holds ``clean`` (of each image, how many redraws are right) and, by attack, the places of the images it
    was tried on, how many redraws of the adversarial image are right, the class most of them see, and the cost.

    Args:
        folder: of the run.
        identity: what these outcomes depend on; a file with another one is refused.
    """

    def __init__(self, folder: Path, target: str, seed: int, start: int, stop: int, identity: Record) -> None:
        self.path = folder / "outcomes" / _place(target, seed, start, stop).with_suffix(".json")
        self.adversarial_folder = self.adversarial_of(folder, target, seed, start, stop)
        self.data: Record = {"format": FORMAT, **identity, "target": target, "seed": seed, "start": start, "stop": stop}
        self.data["attacks"] = {}
        if self.path.exists():
            self._take_over(read_json(self.path), identity)

    @staticmethod
    def adversarial_of(folder: Path, target: str, seed: int, start: int, stop: int) -> Path:
        """The folder of a block's adversarial images, one ``.npz`` an attack."""
        return folder / "adversarial" / _place(target, seed, start, stop)

    def save_attack(self, name: str, record: Record, adversarial: Tensor | None = None) -> None:
        """Add an attack's outcomes, and keep its images."""
        if adversarial is not None:
            self.adversarial_folder.mkdir(parents=True, exist_ok=True)
            path = self.adversarial_folder / f"{name}.npz"
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            with temporary.open("wb") as file:
                np.savez_compressed(file, places=np.array(record["attacked"]), images=adversarial.numpy())
            temporary.replace(path)
        self.data["attacks"][name] = record
        self.save()

    def save(self) -> None:
        write_json(self.path, self.data)

    def _take_over(self, stored: Record, identity: Record) -> None:
        for key, value in identity.items():
            if stored.get(key) != value:
                raise EvaluationError(
                    f"{self.path} is of another {key} (expected {value}, got {stored.get(key)}); "
                    "use another --out, or remove that file"
                )
        self.data = stored


@dataclass(frozen=True)
class Outcomes:
    """All outcomes of one target with one seed, for images 0 to n - 1 in the order of the run.

    Attributes:
        clean: [n], share of redraws that get the clean image right.
        after: by attack, [n], the smallest share of right redraws of any image found so far (clean included).
        attacked: by attack, [n] bool, whether it was tried. alone: by attack, [n], its own share, NaN if not tried.
        labels: [n]. calls: by attack, gradient and forward calls, all images together. seconds: of all attacks.
        noise_known: [n], 0 where the fixed-noise attack fools the defense under the noise that it knew.
    """

    target: str
    seed: int
    clean: NDArray[np.float64]
    after: dict[str, NDArray[np.float64]]
    alone: dict[str, NDArray[np.float64]]
    labels: NDArray[np.int64]
    calls: dict[str, tuple[int, int]]
    seconds: float
    noise_known: NDArray[np.float64] | None = None

    @property
    def worst(self) -> NDArray[np.float64]:
        """[n], the share of right redraws of the worst image found by any attack."""
        return self.clean if not self.after else list(self.after.values())[-1]

    @property
    def robust(self) -> NDArray[np.bool_]:
        """[n], whether every redraw of every image found is right."""
        return np.asarray(self.worst >= 1)

    def __len__(self) -> int:
        return len(self.clean)

    def cut(self, n: int) -> "Outcomes":
        """The same of the first n images; the cost stays that of the whole blocks, in proportion."""
        share = n / len(self)
        return replace(
            self,
            clean=self.clean[:n],
            after={name: values[:n] for name, values in self.after.items()},
            alone={name: values[:n] for name, values in self.alone.items()},
            labels=self.labels[:n],
            calls={name: (round(g * share), round(f * share)) for name, (g, f) in self.calls.items()},
            noise_known=None if self.noise_known is None else self.noise_known[:n],
        )


def read_outcomes(folder: Path, target: str, seed: int, attacks: Sequence[str], n: int | None = None) -> Outcomes:
    """Put the blocks together that have all these attacks, from the first on, up to the first that is missing.

    Raises:
        EvaluationError: not even the first block is there.
    """
    blocks: list[Record] = []
    files = (folder / "outcomes" / slug(target) / f"seed{seed}").glob("*.json")
    # Of two blocks that start at the same image, the longer one is of a later sitting.
    for block in sorted(map(read_json, files), key=lambda block: (block["start"], -block["stop"])):
        follows = block["start"] == (blocks[-1]["stop"] if blocks else 0)
        wanted = n is None or block["start"] < n
        if wanted and follows and "clean" in block and all(name in block["attacks"] for name in attacks):
            blocks.append(block)
    if not blocks:
        raise EvaluationError(f"no finished block of '{target}' with seed {seed} in {folder}; run igd evaluate first")
    outcomes = _joined(target, seed, blocks, attacks)
    return outcomes if n is None or n >= len(outcomes) else outcomes.cut(n)


def _joined(target: str, seed: int, blocks: list[Record], attacks: Sequence[str]) -> Outcomes:
    clean = np.concatenate([np.array(b["clean"]) / b["redraws"] for b in blocks])
    worst, after, alone = clean, {}, {}
    for name in attacks:
        own = np.full(blocks[-1]["stop"], np.nan)
        for block in blocks:
            record = block["attacks"][name]
            own[np.array(record["attacked"], dtype=int)] = np.array(record["correct"]) / block["redraws"]
        alone[name] = own
        worst = after[name] = np.fmin(worst, alone[name])
    return Outcomes(
        target=target,
        seed=seed,
        clean=clean,
        after=after,
        alone=alone,
        labels=np.concatenate([np.array(b["labels"]) for b in blocks]),
        calls={name: _calls([block["attacks"][name] for block in blocks]) for name in attacks},
        seconds=sum(block["attacks"][name]["seconds"] for block in blocks for name in attacks),
        noise_known=_noise_known(blocks),
    )


def _calls(records: list[Record]) -> tuple[int, int]:
    return sum(r["gradient_calls"] for r in records), sum(r["forward_calls"] for r in records)


def _noise_known(blocks: list[Record]) -> NDArray[np.float64] | None:
    """[n], 0 where the fixed-noise attack fools the defense under the noise that it knew."""
    known = np.ones(blocks[-1]["stop"])
    for block in blocks:
        record = block["attacks"].get("fixed-noise", {})
        if "correct_if_known" not in record:
            return None
        known[np.array(record["attacked"], dtype=int)] = record["correct_if_known"]
    return known


def _place(target: str, seed: int, start: int, stop: int) -> Path:
    return Path(slug(target), f"seed{seed}", f"{start:05d}-{stop:05d}")


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def read_json(path: Path) -> Record:
    """A file that ``write_json`` wrote."""
    data: Record = json.loads(path.read_text(encoding="utf-8"))
    return data


def write_json(path: Path, data: Record) -> None:
    """Replace a file as a whole: whoever reads it sees the old or the new one."""
    write_bytes(path, (json.dumps(data, separators=(",", ":")) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
