"""What the defense costs on one engine (a), and what the engine gains over the paper's words taken literally (b).

    python benchmarks/engine_speed.py [--seconds 3]

(a) a defended prediction / an undefended one, from pixels on the host to probabilities on the host, on the same engine;
with noise, the same with a first pass in int8, and with sigma = 0; and, for one image, its share of a defended batch of
64 in place of its prediction, which is what (a) could come down to if a lone image were computed at the rate of many.
(b) two full passes of the float32 model in PyTorch, with the masks averaged image by image, / the engine's defended
prediction. All of them take turns of a tenth of a second, and a ratio is the median of paired ratios. OpenMP waits as
it does by default, which is quicker for PyTorch's side (``igd serve`` has it sleep).
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import paired_ratio, plot_bars, seconds, write_results
from torch import Tensor

from defense import top_k_masks
from defense.model_config import DefenseConfig
from models import choose_dtype_name, models, pixels_of, predictor_of
from service.compilers import EngineError
from service.engine import IN_INT8
from service.openvino_chain import OpenVinoChain
from service.openvino_part import fixed_sizes
from service.passes import to_images
from service.predictor import DEFAULT_THREADS, Pixels, Predictor, ServedDefense, joined

BATCHES = (1, 8, 64)
BLOCK_S = 0.1
ENGINES = (
    ("bfloat16", "openvino"),
    ("bfloat16", "openvino", "int8"),
    ("bfloat16", "none"),
    ("float32", "openvino"),
    ("float32", "openvino", "int8"),
    ("float32", "none"),
)


def main() -> None:
    """Measure every engine on both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="about, of each ratio")
    parser.add_argument("--engines", nargs="*", default=["+".join(e) for e in ENGINES if e[0] in precisions()])
    arguments = parser.parse_args()
    rows = [
        row
        for name, directory in models().items()
        for engine in arguments.engines
        for row in measure_engine(name, directory, *engine.split("+"), seconds_each=arguments.seconds)
    ]
    write_results("engine_speed", rows)
    _plot(rows)


def precisions() -> set[str]:
    """Those that this machine's hardware multiplies; others would be emulated, and take minutes."""
    return {"float32", choose_dtype_name()}


def measure_engine(
    name: str, directory: Path, dtype: str, compiler: str, first_pass: str = "", *, seconds_each: float
) -> list[dict[str, Any]]:
    """A row for each batch size; none if this machine lacks the precision or the compiler."""
    try:
        noisy = predictor_of(directory, dtype, compiler, int8=first_pass == "int8")
        still = _without_noise(*noisy)
    except EngineError as error:
        print(f"{'+'.join(filter(None, (dtype, compiler, first_pass)))} is left out: {error}")
        return []
    if first_pass and not noisy[1].int8_first_pass:
        print(f"{dtype}+{compiler}+{first_pass} is left out: {noisy[1].engine.name} is quicker here, or more exact")
        return []
    rows = []
    many = max(BATCHES)
    of_many = _call(noisy, pixels_of(noisy[0], many))
    for batch in BATCHES:
        pixels = pixels_of(noisy[0], batch)
        defended = _call(noisy, pixels)
        undefended = partial(Undefended(*noisy), pixels)
        literal = partial(LiteralDefense(*noisy), pixels)
        a = _ratio(defended, undefended, seconds_each)
        a_still = _ratio(_call(still, pixels), undefended, seconds_each)
        share = _ratio(of_many, undefended, seconds_each).median / many if batch == 1 else ""
        b = _ratio(literal, defended, seconds_each)
        rows.append(
            {
                "model": name,
                "precision": noisy[1].engine.name.replace("torch.", ""),
                "batch": batch,
                "undefended ms": 1000 * a.b_s,
                "defended ms": 1000 * a.a_s,
                "defended / undefended": a.median,
                "smallest": a.smallest,
                "largest": a.largest,
                f"share of {many} / undefended": share,
                "with sigma 0": a_still.median,
                "literal ms": 1000 * b.a_s,
                "literal / engine": b.median,
            }
        )
        print(rows[-1], flush=True)
    return rows


def _ratio(a: Callable[[], object], b: Callable[[], object], seconds_each: float) -> Any:
    a(), b()
    pairs = int(seconds_each / (max(BLOCK_S, seconds(a)) + max(BLOCK_S, seconds(b))))
    return paired_ratio(a, b, pairs=max(9, pairs), block_s=BLOCK_S)


def _call(served: tuple[Predictor, ServedDefense], pixels: list[Pixels]) -> Callable[[], object]:
    predictor, defense = served
    return lambda: predictor.predict(defense, pixels)


def _without_noise(predictor: Predictor, defense: ServedDefense) -> tuple[Predictor, ServedDefense]:
    """The same predictor with sigma = 0."""
    still = copy.copy(predictor)
    config = predictor.config
    still.config = config.model_copy(update={"defense": config.defense.model_copy(update={"sigma": 0.0})})
    return still, still.prepare(defense.version, defense.importance)


class Undefended:
    """What the service would do without a defense: one pass on the same engine, and as little around it."""

    def __init__(self, predictor: Predictor, defense: ServedDefense) -> None:
        self._engine, self._chain = defense.engine, None
        if defense.compiler == "openvino":
            front, back = Trunk(self._engine.folded_trunk).eval(), Probabilities(self._engine.folded_tail).eval()
            blank, nothing = torch.from_numpy(joined(pixels_of(predictor, 2))), torch.zeros(1)
            threads, sizes = DEFAULT_THREADS, fixed_sizes(max(BATCHES))
            self._chain = OpenVinoChain(front, back, self._engine.dtype, [blank], nothing, threads, sizes)
            self._nothing = nothing.numpy()

    @torch.inference_mode()
    def __call__(self, pixels: list[Pixels]) -> object:
        batch = joined(pixels)
        if self._chain:
            return self._chain((batch,), self._nothing)[0]
        return self._engine.tail(*self._engine.cut(to_images(torch.from_numpy(batch)))).softmax(1).numpy()


class Trunk(torch.nn.Module):
    """Pixels to what crosses the split."""

    def __init__(self, trunk: torch.nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        values: tuple[Tensor, ...] = self.trunk(to_images(pixels))
        return values


class Probabilities(torch.nn.Module):
    """What crosses the split to probabilities; the last input is there for the chain's sake."""

    def __init__(self, tail: torch.nn.Module) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, *values: Tensor) -> Tensor:
        *crossing, nothing = values
        logits: Tensor = self.tail(*crossing)
        return logits.softmax(1) + nothing


class LiteralDefense:
    """The paper's words: a pass on a noisy image, masks averaged image by image, a pass with them; float32."""

    def __init__(self, predictor: Predictor, defense: ServedDefense) -> None:
        self._predictor, self._split = predictor, predictor.split
        self._settings: DefenseConfig = predictor.config.defense
        self._masks = top_k_masks(defense.importance.scores, self._settings.top_k).float()

    @torch.inference_mode()
    def __call__(self, pixels: list[Pixels]) -> object:
        engines_threads = torch.get_num_threads()
        torch.set_num_threads(DEFAULT_THREADS)  # an engine that leaves little to PyTorch takes all but one away from it
        try:
            return self._both_passes(pixels)
        finally:
            torch.set_num_threads(engines_threads)

    def _both_passes(self, pixels: list[Pixels]) -> object:
        images = to_images(torch.from_numpy(joined(pixels)))
        noisy = images + self._settings.sigma * torch.randn_like(images)
        weights = (self._split(noisy) / self._settings.temperature).softmax(1)
        masks = torch.zeros(len(images), self._masks.shape[1])
        for i in range(len(images)):
            masks[i] = weights[i] @ self._masks
        return self._masked(images, masks).softmax(1).cpu().numpy()

    def _masked(self, images: Tensor, masks: Tensor) -> Tensor:
        activations, *bypass = self._split.cut(images)
        return self._split.tail(activations * masks.reshape(*masks.shape, *(1,) * (activations.ndim - 2)), *bypass)


def _plot(rows: list[dict[str, Any]]) -> None:
    for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        chosen = [row for row in rows if row["model"] == model]
        labels = [f"{_two_lines(row['precision'])}\nbatch {row['batch']}" for row in chosen]
        columns = ("defended / undefended", "with sigma 0", "literal / engine")
        bars = {column: [row[column] for row in chosen] for column in columns}
        plot_bars(f"engine_speed_{i}", labels, bars, "ratio of latencies", model)


def _two_lines(precision: str) -> str:
    return precision.replace(IN_INT8, "\nint8 first").replace(" by ", "\n")


if __name__ == "__main__":
    main()
