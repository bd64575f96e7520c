"""What ResNet-18's batches gain by other kinds of convolutions, and by being computed in parts.

    python benchmarks/divided_batches.py [--seconds 3] [--dtype float32]

Four engines in turns, each as ``igd serve`` has it but for what it lacks: convolutions, batches whole; products of
matrices for those of the smallest maps, batches whole; these in parts; and in parts with as many of Winograd's
convolutions as are quickest here, as served. Parts are for a server, whose event loop keeps a thread from its
processor: here is what they cost without one. And the three ways of a lone image, of which a server takes the quickest.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

from measure import paired_ratio, write_results

from models import choose_dtype_name, models, pixels_of, predictor_of
from service import openvino_chain

BATCHES = (1, 2, 4, 8, 16, 32, 64)
BLOCK_S = 0.1
WAYS = ("products", "convolutions", "row by row")  # of a lone image, in ``OpenVinoChain``'s order


def main() -> None:
    """Measure ResNet-18 of width 64."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="about, of each ratio")
    parser.add_argument("--dtype", help="in place of what dtype=auto chooses here; has results of its own")
    arguments = parser.parse_args()
    dtype, suffix = arguments.dtype or choose_dtype_name(), f"_{arguments.dtype}" if arguments.dtype else ""
    pairs = int(arguments.seconds / BLOCK_S / 2)
    write_results("lone_image" + suffix, _ways_of_a_lone_image(dtype, pairs))
    write_results("divided_batches" + suffix, _ways_of_batches(dtype, pairs))


def _ways_of_batches(dtype: str, pairs: int) -> list[dict[str, Any]]:
    whole = patch.object(openvino_chain, "MIN_BATCH_ROWS", 1 << 30)
    convolutions = patch.object(openvino_chain, "with_matrix_products", lambda part, examples: part)
    without_winograd = patch.object(openvino_chain, "winograd_variants", lambda *given: [])
    with without_winograd:
        with whole, convolutions:
            plain = _engine(dtype)
        with whole:
            products = _engine(dtype)
        parts = _engine(dtype)
    served = _engine(dtype)
    rows = []
    for batch in BATCHES:
        sides = [partial(engine, batch) for engine in (plain, products, parts, served)]
        by_products, in_parts, as_served = (
            paired_ratio(sides[0], side, pairs=pairs, block_s=BLOCK_S) for side in sides[1:]
        )
        rows.append(
            {
                "batch": batch,
                "plain ms": 1000 * as_served.a_s,
                "plain / products": by_products.median,
                "plain / products, in parts": in_parts.median,
                "plain / as served": as_served.median,
                "smallest": as_served.smallest,
                "largest": as_served.largest,
            }
        )
        print(rows[-1], flush=True)
    return rows


def _ways_of_a_lone_image(dtype: str, pairs: int) -> list[dict[str, Any]]:
    engines = []
    for i in range(len(WAYS)):
        with (
            patch.object(openvino_chain, "winograd_variants", lambda *given: []),
            patch.object(openvino_chain, "_quickest", lambda ways, *given, i=i: ways[i]),
        ):
            engines.append(partial(_engine(dtype), 1))
    ratios = [paired_ratio(engines[0], engine, pairs=pairs, block_s=BLOCK_S) for engine in engines]
    return [
        {
            "a lone image": way,
            "ms": 1000 * r.b_s,
            "products / it": r.median,
            "smallest": r.smallest,
            "largest": r.largest,
        }
        for way, r in zip(WAYS, ratios, strict=True)
    ]


def _engine(dtype: str) -> Callable[[int], object]:
    directory = next(iter(models().values()))
    predictor, defense = predictor_of(directory, dtype, "openvino")
    pixels = pixels_of(predictor, max(BATCHES))
    return lambda batch: predictor.predict(defense, pixels[:batch])


if __name__ == "__main__":
    main()
