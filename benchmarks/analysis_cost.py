"""What igd analyze costs in batches, against the same analysis one image at a time, as the official script does it.

    python benchmarks/analysis_cost.py [--pairs 3] [--images 256] [--one-by-one 16]

Both sides attack the undefended model with the same attack (APGD on the cross-entropy, as many steps), pass clean and
attacked images through it, and average the change of each group of neurons. The loop runs on fewer images and counts
for each image; the two sides take turns, on all threads.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from measure import paired_ratio, write_results
from torch import Tensor, nn

from defense import SplitClassifier, leave_one_out_importance, load_classifier, top_k_masks
from defense.resnet import CifarResNet
from evaluation.analysis import GROUPS, analyze, best_wrong_class, neuron_groups
from evaluation.attacks import Budget, Effort, attack_by_name

BATCH = 128
BUDGET = Budget(8 / 255)


def main() -> None:
    """Measure the bundled model, and the paper's ResNet-18 with random weights: speed does not depend on them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--one-by-one", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    logging.disable(logging.WARNING)  # that random images leave neurons dead is no news
    bundled = load_classifier(Path(__file__).parents[1] / "models" / "fashion-mnist")
    models = {"bundled (ResNet-18, width 16, 28x28)": bundled, "ResNet-18, width 64, 32x32": CifarResNet()}
    write_results("analysis_cost", [_measure(name, model, arguments) for name, model in models.items()])


def _measure(name: str, model: nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    split = SplitClassifier(model.requires_grad_(False))
    images = torch.rand(arguments.images, *getattr(model, "input_size", (3, 32, 32)))
    with torch.no_grad():
        # The model's own answers: all images are correct, so all are attacked.
        labels = torch.cat([split(batch).argmax(1) for batch in images.split(BATCH)])
    masks = top_k_masks(leave_one_out_importance(split, [(images, labels)]).scores, 20)
    effort = Effort(steps=arguments.steps, draws=1)

    def in_batches() -> None:
        _in_batches(split, masks, images, labels, effort)

    def one_by_one() -> None:
        few = arguments.one_by_one
        _one_by_one(split, masks, images[:few], labels[:few], effort)

    ratio = paired_ratio(one_by_one, in_batches, pairs=arguments.pairs, warm_up=1)
    more = arguments.images / arguments.one_by_one
    return {
        "model": name,
        "steps": arguments.steps,
        "one by one, images/s": arguments.one_by_one / ratio.a_s,
        "in batches, images/s": arguments.images / ratio.b_s,
        "times as fast (median)": ratio.median * more,
        "smallest": ratio.smallest * more,
        "largest": ratio.largest * more,
    }


def _in_batches(split: SplitClassifier, masks: Tensor, images: Tensor, labels: Tensor, effort: Effort) -> Tensor:
    attack = attack_by_name("apgd-ce", effort)
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    adversarial = torch.cat([attack(split, batch, true, BUDGET) for batch, true in pairs])
    found = analyze(split, masks, images, adversarial, labels, batch_size=BATCH)
    return torch.stack([found.relative_changes(group).nanmean() for group in GROUPS])


def _one_by_one(split: SplitClassifier, masks: Tensor, images: Tensor, labels: Tensor, effort: Effort) -> Tensor:
    """The official script's loop: predict, attack, predict, add up the relative changes; one image after the other."""
    attack, total = attack_by_name("apgd-ce", effort), torch.zeros(len(GROUPS))
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        before, _ = _neurons_and_logits(split, image)
        after, logits = _neurons_and_logits(split, attack(split, image, label, BUDGET))
        groups = neuron_groups(masks, label, best_wrong_class(logits, label))
        for place, members in enumerate(groups.values()):
            old, new = before[members], after[members]
            total[place] += (new - old).mean() / old.mean()
    return total / len(images)


@torch.no_grad()
def _neurons_and_logits(split: SplitClassifier, image: Tensor) -> tuple[Tensor, Tensor]:
    activations = split.trunk(image)
    return activations, split.tail(activations)


if __name__ == "__main__":
    main()
