"""What ResNet-18's batches gain by products of matrices in place of small convolutions, and by being computed in parts.

    python benchmarks/divided_batches.py [--seconds 3]

Three engines in turns, each as ``igd serve`` has it but for what it lacks: convolutions, batches whole; products,
batches whole; and both, as served. Parts are for a server, whose event loop keeps a thread from its processor: here is
what they cost without one. And the three ways of a lone image, of which a server takes the quickest.
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
    pairs = int(parser.parse_args().seconds / BLOCK_S / 2)
    write_results("lone_image", _ways_of_a_lone_image(pairs))
    whole = patch.object(openvino_chain, "MIN_BATCH_ROWS", 1 << 30)
    convolutions = patch.object(openvino_chain, "with_matrix_products", lambda part, examples: part)
    with whole, convolutions:
        plain = _engine()
    with whole:
        products = _engine()
    served = _engine()
    rows = []
    for batch in BATCHES:
        sides = [partial(engine, batch) for engine in (plain, products, served)]
        by_products, by_both = (paired_ratio(sides[0], s, pairs=pairs, block_s=BLOCK_S) for s in sides[1:])
        rows.append(
            {
                "batch": batch,
                "plain ms": 1000 * by_both.a_s,
                "plain / products": by_products.median,
                "plain / products, in parts": by_both.median,
                "smallest": by_both.smallest,
                "largest": by_both.largest,
            }
        )
        print(rows[-1], flush=True)
    write_results("divided_batches", rows)


def _ways_of_a_lone_image(pairs: int) -> list[dict[str, Any]]:
    engines = []
    for i in range(len(WAYS)):
        with patch.object(openvino_chain, "_quickest", lambda ways, *example, i=i: ways[i]):
            engines.append(partial(_engine(), 1))
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


def _engine() -> Callable[[int], object]:
    directory = next(iter(models().values()))
    predictor, defense = predictor_of(directory, choose_dtype_name(), "openvino")
    pixels = pixels_of(predictor, max(BATCHES))
    return lambda batch: predictor.predict(defense, pixels[:batch])


if __name__ == "__main__":
    main()
