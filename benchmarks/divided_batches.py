"""What ResNet-18's batches gain by other kinds of convolutions, and by being computed in parts.

    python benchmarks/divided_batches.py [--seconds 3] [--dtype float32]

Five engines in turns: convolutions, batches whole; products of matrices for those of the smallest maps, batches whole;
both in parts; and as served, in parts with what a trial at load found the quickest here of convolutions, products and
more or less of Winograd's. Parts are for a server, whose event loop keeps a thread from its processor: here is what
they cost without one. And the three ways of a lone image, of which a server takes the quickest.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

from measure import paired_ratio, write_results

from models import choose_dtype_name, models, pixels_of, predictor_of
from service import openvino_chain, openvino_ways

BATCHES = (1, 2, 4, 8, 16, 32, 64)
BLOCK_S = 0.1
WAYS = ("convolutions", "products", "row by row")  # of a lone image, in ``OpenVinoChain``'s order


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
    whole = patch.object(openvino_ways, "MIN_BATCH_ROWS", 2 * (1 + max(BATCHES)))  # of an image, with its noisy copy
    convolutions = patch.object(openvino_chain, "with_matrix_products", lambda part, examples: part)
    always_products = patch.object(openvino_chain, "_quickest", partial(_way_of_a_lone_image, WAYS.index("products")))
    with patch.object(openvino_chain, "winograd_variants", lambda *given: []):
        with convolutions:
            plain_in_parts = _engine(dtype)
            with whole:
                plain = _engine(dtype)
        with always_products:
            products_in_parts = _engine(dtype)
            with whole:
                products = _engine(dtype)
    served = _engine(dtype)
    sides = {
        "products": products,
        "in parts": plain_in_parts,
        "products, in parts": products_in_parts,
        "as served": served,
    }
    rows = []
    for batch in BATCHES:
        ratios = {
            name: paired_ratio(partial(plain, batch), partial(side, batch), pairs=pairs, block_s=BLOCK_S)
            for name, side in sides.items()
        }
        as_served = ratios["as served"]
        rows.append(
            {
                "batch": batch,
                "plain ms": 1000 * as_served.a_s,
                **{f"plain / {name}": ratio.median for name, ratio in ratios.items()},
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
            patch.object(openvino_chain, "_quickest", partial(_way_of_a_lone_image, i)),
        ):
            engines.append(partial(_engine(dtype), 1))
    products = engines[WAYS.index("products")]
    ratios = [paired_ratio(products, engine, pairs=pairs, block_s=BLOCK_S) for engine in engines]
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


def _way_of_a_lone_image(number: int, ways: Sequence[Any], inputs: Sequence[Any], constant: object) -> object:
    return ways[number if len(inputs[0]) == 1 else -1]  # of batches the last, which is with products


def _engine(dtype: str) -> Callable[[int], object]:
    directory = next(iter(models().values()))
    predictor, defense = predictor_of(directory, dtype, "openvino")
    pixels = pixels_of(predictor, max(BATCHES))
    return lambda batch: predictor.predict(defense, pixels[:batch])


if __name__ == "__main__":
    main()
