"""Train the tiny CLIP that ranks the bundled Fashion-MNIST classifier offline, on a CPU; or one for CIFAR-10.

    python models/train_tiny_clip.py --data DIR --out models/fashion-mnist/clip
    python models/train_tiny_clip.py --dataset cifar10 --data TRAIN.tar --test-data TEST.tar --out DIR

An open_clip model (its configuration is in tiny_clip_data.py) learns pairs of images and class names. Many images of
a batch share a name, so each image is contrasted with the ten names, not with the other images' (UniCL, arXiv
2204.03610); each name is written bare half of the time, in a template otherwise.

Every epoch ends with an atomic checkpoint: after any interruption, the same command continues from there.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tiny_clip_data import DATASETS, ClipData, Split
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_fashion_mnist import HELD_OUT, augment
from training import load_state, save_state

from defense.clip import CONFIG_FILE, WEIGHTS_FILE, ClipModel

README = """\
# Tiny CLIP for {title}

Written by `python models/train_tiny_clip.py`; loaded by `open_clip` (`local-dir:{out}`) or
`defense.clip.ClipModel.from_directory`. {megabytes:.1f} MB, float16 on disk, float32 in memory.

What it is: a stand-in that makes CD-IR run on a {title} classifier without internet, from end to end, with the
same code as any open_clip model. It knows the ten {title} class names, bare and in these templates:

{templates}

On the {tested:,} test images it picks the right bare name for {accuracy:.2%} of them. That is "zero-shot" only in form:
it was trained on these very names, and on the training images that the classifier's probe set comes from, too
(all but {held_out:,}).

What it is not: a CLIP that knows the world. A word that is in none of its training texts is an all-zero token to it,
so other class names give meaningless features. Nothing published in the IG-Defense or CLIP-Dissect papers was measured
with it; for your own classifier, use a real CLIP (`ViT-B-16`, `openai` is the papers').
"""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights; a checkpoint made with another recipe is refused."""

    dataset: str = "fashion-mnist"
    epochs: int = 12
    seed: int = 0
    limit: int | None = None  # training images used; None is all but the held-out ones
    batch: int = 256
    peak_rate: float = 2e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1  # fraction of the training over which the rate grows
    label_smoothing: float = 0.05
    bare_names: float = 0.5  # of the batches see bare names, the others a template

    @property
    def data(self) -> ClipData:
        return DATASETS[self.dataset]


@dataclass
class Training:
    """The state that training changes."""

    recipe: Recipe
    model: open_clip.CLIP
    optimizer: torch.optim.AdamW
    epoch: int = 0

    @classmethod
    def start(cls, recipe: Recipe) -> "Training":
        """Seeded initial weights."""
        torch.manual_seed(recipe.seed)
        model = open_clip.CLIP(**recipe.data.model_cfg)
        decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embedding" not in name]
        others = [p for name, p in model.named_parameters() if p.ndim <= 1 or "embedding" in name]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return cls(recipe, model, torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98)))

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
        }
        save_state(path, state)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint of the same recipe."""
        state = load_state(path, asdict(self.recipe))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def tokenized(data: ClipData, template: str = "{}") -> Tensor:
    """Tokens of the class names in a template, int64 ``[C, context]``."""
    tokenize = open_clip.SimpleTokenizer(context_length=data.model_cfg["text_cfg"]["context_length"])
    tokens: Tensor = tokenize([template.replace("{}", name) for name in data.names])
    return tokens


def to_pixels(images: Tensor) -> Tensor:
    """Pixels in [0, 1], ``[N, 1 or 3, H, W]``, of uint8 images ``[N, H, W]`` or ``[N, H, W, 3]``."""
    channels_first = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return channels_first.float() / 255


def normalized(images: Tensor, data: ClipData) -> Tensor:
    """Pixels as CLIP takes them, ``[N, 3, H, W]``, of uint8 images."""
    mean, std = (torch.tensor(data.preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (to_pixels(images) - mean) / std


def rate_at(recipe: Recipe, progress: float) -> float:
    """Learning rate when the fraction ``progress`` of the training is done: linear warm-up, linear decay."""
    return recipe.peak_rate * min(progress / recipe.warm_up, (1 - progress) / (1 - recipe.warm_up))


def train_batch(training: Training, images: Tensor, labels: Tensor, tokens: Tensor) -> float:
    """One optimizer step on images and the ten names; returns the loss."""
    model = training.model
    # The CPU's fused attention is four times slower backwards than plain matrix products at this size.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        image_features = model.encode_image(normalized(augment(images), training.recipe.data))
        text_features = model.encode_text(tokens)
    cosines = F.normalize(image_features.float(), dim=1) @ F.normalize(text_features.float(), dim=1).T
    logits = model.logit_scale.exp() * cosines
    loss = F.cross_entropy(logits, labels, label_smoothing=training.recipe.label_smoothing)
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, 4.6052)  # at most 100, as in CLIP
    return float(loss.detach())


def train_epoch(training: Training, images: Tensor, labels: Tensor, texts: list[Tensor], progress: Progress) -> float:
    """One pass over the images in an order seeded by the epoch's number; returns the mean loss."""
    recipe, epoch = training.recipe, training.epoch
    torch.manual_seed(recipe.seed * 100_003 + epoch + 1)  # so that a resumed run draws what an unbroken one does
    training.model.train()
    batches = torch.randperm(len(images)).split(recipe.batch)
    total = 0.0
    for index, batch in enumerate(batches):
        for group in training.optimizer.param_groups:
            group["lr"] = rate_at(recipe, (epoch + index / len(batches)) / recipe.epochs)
        bare = float(torch.rand(())) < recipe.bare_names
        tokens = texts[0] if bare else texts[1 + int(torch.randint(len(texts) - 1, ()))]
        total += train_batch(training, images[batch], labels[batch], tokens)
        progress.advance(progress.task_ids[0])
    training.epoch += 1
    return total / len(batches)


@torch.no_grad()
def held_out_accuracy(training: Training, images: Tensor, labels: Tensor) -> float:
    """How often the nearest bare name is the image's."""
    model, data = training.model.eval(), training.recipe.data
    names = model.encode_text(tokenized(data), normalize=True)
    nearest = (model.encode_image(normalized(images, data), normalize=True) @ names.T).argmax(1)
    return float((nearest == labels).float().mean())


def train(training: Training, images: Tensor, labels: Tensor, checkpoint: Path) -> None:
    """Run the remaining epochs; print a line and write the checkpoint after each of them."""
    held_images, held_labels = images[-HELD_OUT:], labels[-HELD_OUT:]
    images, labels = images[:-HELD_OUT][: training.recipe.limit], labels[:-HELD_OUT][: training.recipe.limit]
    data = training.recipe.data
    texts = [tokenized(data, template) for template in ("{}", *data.templates)]
    steps = -(-len(images) // training.recipe.batch)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("eta"), TimeRemainingColumn(elapsed_when_finished=False)) as progress:
        progress.add_task("training", total=training.recipe.epochs * steps, completed=training.epoch * steps)
        while training.epoch < training.recipe.epochs:
            started = time.monotonic()
            loss = train_epoch(training, images, labels, texts, progress)
            accuracy = held_out_accuracy(training, held_images, held_labels)
            training.save(checkpoint)
            progress.console.print(
                f"epoch {training.epoch}/{training.recipe.epochs}: loss {loss:.3f}, held-out {accuracy:.1%}, "
                f"{time.monotonic() - started:.0f} s"
            )


def write_model(model: open_clip.CLIP, data: ClipData, out: Path) -> None:
    """The configuration and the weights in float16; tokens that no training text has become zero, so git packs them."""
    out.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": data.model_cfg, "preprocess_cfg": data.preprocess_cfg}
    (out / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.detach().half().contiguous().clone() for name, tensor in model.state_dict().items()}
    seen = torch.cat([tokenized(data, template) for template in ("{}", *data.templates)]).unique()
    embedding = torch.zeros_like(tensors["token_embedding.weight"])
    embedding[seen] = tensors["token_embedding.weight"][seen]
    save_file(tensors | {"token_embedding.weight": embedding}, out / WEIGHTS_FILE)
    (out / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner only, and the service is another user


def zero_shot_accuracy(clip: ClipModel, data: ClipData, images: Tensor, labels: Tensor) -> float:
    """How often the nearest bare class name is the image's, with the model as it was written."""
    names = F.normalize(clip.text_features(data.names), dim=1)
    nearest = [(clip.image_features(to_pixels(part)) @ names.T).argmax(1) for part in images.split(500)]
    return float((torch.cat(nearest) == labels).float().mean())


def write_readme(out: Path, data: ClipData, accuracy: float, tested: int) -> None:
    """What it is and is not, with the measured figures."""
    megabytes = (out / WEIGHTS_FILE).stat().st_size / 1e6
    templates = "\n".join(f"- `{template}`" for template in data.templates)
    figures = {"megabytes": megabytes, "accuracy": accuracy, "tested": tested, "held_out": HELD_OUT}
    (out / "README.md").write_text(README.format(title=data.title, out=out, templates=templates, **figures))


def write_and_print_accuracy(data: ClipData, test_set: Split, out: Path) -> None:
    """How well the model as it was written names the test images, in its README and on the terminal."""
    accuracy, tested = zero_shot_accuracy(ClipModel.from_directory(out), data, *test_set), len(test_set[1])
    write_readme(out, data, accuracy, tested)
    print(f"zero-shot accuracy on the {tested:,} test images: {accuracy:.2%}")
    print(f"wrote {out}, {(out / WEIGHTS_FILE).stat().st_size / 1e6:.2f} MB")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=list(DATASETS), default=Recipe.dataset)
    parser.add_argument(
        "--data",
        type=Path,
        help="Fashion-MNIST: folder of the idx files (default: Debian's, else a download); else a tar",
    )
    parser.add_argument("--test-data", type=Path, help="CIFAR-10: tar of the test images")
    parser.add_argument("--out", type=Path, default=Path("models/fashion-mnist/clip"), help="folder of the results")
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/tiny-clip-training.pt"))
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--limit", type=int, help="train on this many images only, for a trial")
    return parser.parse_args()


def main() -> None:
    """Train or continue, then write the model and say how well it names the test images."""
    arguments = parse_arguments()
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down many times
    recipe = Recipe(arguments.dataset, epochs=arguments.epochs, seed=arguments.seed, limit=arguments.limit)
    training_set, test_set = recipe.data.load(arguments)
    training = Training.start(recipe)
    if arguments.checkpoint.exists():
        training.restore(arguments.checkpoint)
    train(training, *training_set, arguments.checkpoint)
    write_model(training.model, recipe.data, arguments.out)
    write_and_print_accuracy(recipe.data, test_set, arguments.out)


if __name__ == "__main__":
    main()
