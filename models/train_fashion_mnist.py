"""Train the bundled robust Fashion-MNIST classifier from scratch, on a CPU.

    python models/train_fashion_mnist.py --data DIR --out models/fashion-mnist

Adversarial training (arXiv 1706.06083) with PGD of small steps, a radius that grows over the first epochs (curriculum,
arXiv 1805.04807), a linear warm-up and decay of the learning rate (arXiv 2001.03994) and an exponential moving average
of the weights (arXiv 2010.03593). Half of the attacked images get Gaussian noise on top, which is not clamped, since
that is what the first pass of the defense sees. Matrix work runs in bfloat16; weights stay float32.

Every epoch ends with an atomic checkpoint: after any interruption, the same command continues from there.
Progress is measured on held-out images of the training set; the test set plays no part here.
"""

import argparse
import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from fashion_mnist_data import CLASSES, correct, find_data, load_split, pgd, to_input
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from training import load_state, save_state

from defense.resnet import CifarResNet

WIDTH = 16
BLOCKS = (2, 2, 2, 2)
EPSILON = 0.1  # L-infinity radius of the evaluated attack, in units of the [0, 1] pixel range
HELD_OUT = 1000  # the last training images, never trained on
PROBE_PER_CLASS = 200
SAMPLES_PER_CLASS = 3


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights; a checkpoint made with another recipe is refused."""

    epochs: int = 10
    seed: int = 0
    limit: int | None = None  # training images used; None is all but the held-out ones
    batch: int = 128
    peak_rate: float = 0.15
    weight_decay: float = 5e-4
    average_decay: float = 0.998  # of the weights' moving average, per step
    attack_epsilon: float = 0.105  # slightly above EPSILON, for a margin
    attack_steps: int = 3
    attack_step: float = 0.45  # length of a step, as a fraction of the radius
    noise: float = 0.05  # standard deviation of the noise on every second image, in units of the [0, 1] pixel range
    warm_up: float = 0.2  # fraction of the training over which rate and radius grow
    first_radius: float = 0.3  # fraction of attack_epsilon at the first step


def build_model() -> CifarResNet:
    """The architecture of the bundled weights; it takes pixels in [0, 1], without normalization."""
    return CifarResNet(width=WIDTH, in_channels=1, num_classes=len(CLASSES), blocks=BLOCKS)


@dataclass
class Training:
    """The state that training changes: the trained model, its moving average, the momenta, the epochs done."""

    recipe: Recipe
    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.SGD
    epoch: int = 0

    @classmethod
    def start(cls, recipe: Recipe) -> "Training":
        """Seeded initial weights."""
        torch.manual_seed(recipe.seed)
        model = build_model().to(memory_format=torch.channels_last)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=recipe.peak_rate, momentum=0.9, nesterov=True)
        return cls(recipe, model, copy.deepcopy(model).requires_grad_(False).eval(), optimizer)

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
        }
        save_state(path, state)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe."""
        state = load_state(path, asdict(self.recipe))
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def augment(images: Tensor, padding: int = 2) -> Tensor:
    """Each image ``[N, H, W]`` (or ``[N, H, W, channels]``) shifted by up to ``padding`` pixels (zeros come in) and
    mirrored with probability 1/2.
    """
    count, height, width = images.shape[:3]
    padded = F.pad(images, (0, 0) * (images.ndim - 3) + (padding,) * 4)
    rows = torch.randint(2 * padding + 1, (count, 1, 1)) + torch.arange(height)[None, :, None]
    columns = torch.arange(width).expand(count, 1, width)
    columns = torch.where(torch.rand(count, 1, 1) < 0.5, columns, width - 1 - columns)
    columns = torch.randint(2 * padding + 1, (count, 1, 1)) + columns
    return padded[torch.arange(count)[:, None, None], rows, columns]


def schedule(recipe: Recipe, progress: float) -> tuple[float, float]:
    """Learning rate and attack radius when the fraction ``progress`` of the training is done."""
    grown = min(1.0, progress / recipe.warm_up)
    rate = recipe.peak_rate * min(grown, (1 - progress) / (1 - recipe.warm_up))
    radius = recipe.attack_epsilon * (recipe.first_radius + (1 - recipe.first_radius) * grown)
    return rate, radius


def train_batch(training: Training, images: Tensor, labels: Tensor, radius: float) -> float:
    """One optimizer step on adversarial examples of the current model; returns the loss."""
    recipe, model = training.recipe, training.model
    x = to_input(augment(images)).contiguous(memory_format=torch.channels_last)
    model.eval()  # the attack sees, and does not move, the running statistics
    with torch.autocast("cpu", torch.bfloat16):
        step = recipe.attack_step * radius
        x = pgd(model, x, labels, epsilon=radius, steps=recipe.attack_steps, step_size=step)
        x[::2] += recipe.noise * torch.randn_like(x[::2])
        model.train()
        logits: Tensor = model(x)
    loss = F.cross_entropy(logits.float(), labels)
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights and batch statistics a step towards the model's."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def train_epoch(training: Training, images: Tensor, labels: Tensor, progress: Progress) -> float:
    """One pass over the images in an order seeded by the epoch's number; returns the mean loss."""
    recipe, epoch = training.recipe, training.epoch
    torch.manual_seed(recipe.seed * 100_003 + epoch + 1)  # so that a resumed run draws what an unbroken one does
    batches = torch.randperm(len(images)).split(recipe.batch)
    total = 0.0
    for index, batch in enumerate(batches):
        done = (epoch + index / len(batches)) / recipe.epochs
        rate, radius = schedule(recipe, done)
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        total += train_batch(training, images[batch], labels[batch], radius)
        steps = epoch * len(batches) + index
        update_average(training.average, training.model, min(recipe.average_decay, (1 + steps) / (10 + steps)))
        progress.advance(progress.task_ids[0])
    training.epoch += 1
    return total / len(batches)


def held_out_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Clean and PGD-10 accuracy at ``EPSILON`` on the held-out training images."""
    x, generator = to_input(images), torch.Generator().manual_seed(0)
    attacked = pgd(model, x, labels, epsilon=EPSILON, steps=10, step_size=EPSILON / 5, generator=generator)
    return correct(model, x, labels) / len(x), correct(model, attacked, labels) / len(x)


def train(training: Training, images: Tensor, labels: Tensor, checkpoint: Path) -> None:
    """Run the remaining epochs; print a line and write the checkpoint after each of them."""
    held_images, held_labels = images[-HELD_OUT:], labels[-HELD_OUT:]
    images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    if training.recipe.limit is not None:
        images, labels = images[: training.recipe.limit], labels[: training.recipe.limit]
    steps = -(-len(images) // training.recipe.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(elapsed_when_finished=False)) as progress:
        progress.add_task("training", total=training.recipe.epochs * steps, completed=training.epoch * steps)
        while training.epoch < training.recipe.epochs:
            started = time.monotonic()
            loss = train_epoch(training, images, labels, progress)
            clean, robust = held_out_accuracy(training.average, held_images, held_labels)
            training.save(checkpoint)
            progress.console.print(
                f"epoch {training.epoch}/{training.recipe.epochs}: loss {loss:.3f}, held-out clean {clean:.1%}, "
                f"PGD-10 {robust:.1%}, {time.monotonic() - started:.0f} s"
            )


def write_weights(model: nn.Module, out: Path) -> None:
    """The averaged weights and batch statistics, as contiguous float32 (the batch counters stay int64)."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, out / "weights.safetensors")


def write_probe(images: Tensor, labels: Tensor, out: Path, seed: int) -> None:
    """A class-balanced draw of training images, on which later tools measure the network."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in range(len(CLASSES)):
        members = (labels == label).nonzero().flatten()
        drawn.append(members[torch.randperm(len(members), generator=generator)[:PROBE_PER_CLASS]])
    chosen = torch.cat(drawn).sort().values
    tensors = {"images": images[chosen].unsqueeze(-1).contiguous(), "labels": labels[chosen].contiguous()}
    save_file(tensors, out / "probe.safetensors", {"source": "Fashion-MNIST training set", "seed": str(seed)})


def write_samples(images: Tensor, labels: Tensor, out: Path) -> None:
    """The first test images of each class, as PNG files named by class and test index."""
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    for label, name in enumerate(CLASSES):
        slug = name.lower().replace("/", "-").replace(" ", "-")
        for index in (labels == label).nonzero().flatten()[:SAMPLES_PER_CLASS].tolist():
            Image.fromarray(images[index].numpy()).save(folder / f"{label}-{slug}-{index:04d}.png")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the robust Fashion-MNIST classifier.")
    parser.add_argument("--data", type=Path, help="folder of the idx files (default: Debian's, else a download)")
    parser.add_argument("--out", type=Path, default=Path("models/fashion-mnist"), help="folder of the results")
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/fashion-mnist-training.pt"))
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--limit", type=int, help="train on this many images only, for a trial")
    return parser.parse_args()


def main() -> None:
    """Train or continue, then write the weights, the probe and the samples."""
    arguments = parse_arguments()
    data = find_data(arguments.data)
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down many times
    images, labels = load_split(data, train=True)
    training = Training.start(Recipe(epochs=arguments.epochs, seed=arguments.seed, limit=arguments.limit))
    if arguments.checkpoint.exists():
        training.restore(arguments.checkpoint)
    train(training, images, labels, arguments.checkpoint)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_weights(training.average, arguments.out)
    write_probe(images, labels, arguments.out, arguments.seed)
    write_samples(*load_split(data, train=False), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
