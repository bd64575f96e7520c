"""The table of the README, from the results of one run of ``make bench``.

python benchmarks/summary.py
"""

import json
from collections.abc import Callable
from typing import Any

from measure import RESULTS, table_of

from models import models

Rows = list[dict[str, Any]]


def main() -> None:
    """Print it, and write it to ``benchmarks/results/summary.md``."""
    speed, http, lead, overload = map(_read, ("engine_speed", "http_throughput", "against_peers_lead", "overload"))
    fast = [row for row in speed if row["precision"] == speed[0]["precision"]]
    full = [row for row in speed if row["precision"] == "float32 by openvino"]
    lines = [
        _line(
            "(a) defended / undefended, batch 1", "<= 1.6", fast, lambda r: _at(r, "batch", 1, "defended / undefended")
        ),
        _line("... batch 8", "", fast, lambda r: _at(r, "batch", 8, "defended / undefended")),
        _line("... batch 64", "<= 2.05", fast, lambda r: _at(r, "batch", 64, "defended / undefended")),
        _line("... with sigma 0, batch 1", "<= 1.05", fast, lambda r: _at(r, "batch", 1, "with sigma 0")),
        _line("... with sigma 0, batch 64", "<= 1.05", fast, lambda r: _at(r, "batch", 64, "with sigma 0")),
        _line(
            "(b) literal defense / engine, batch 1",
            ">= 8 with AMX",
            fast,
            lambda r: _at(r, "batch", 1, "literal / engine"),
        ),
        _line("... batch 64", ">= 5 with AMX", fast, lambda r: _at(r, "batch", 64, "literal / engine")),
        _line("... float32, batch 1", ">= 1.3", full, lambda r: _at(r, "batch", 1, "literal / engine")),
        _line("... float32, batch 64", ">= 1.3", full, lambda r: _at(r, "batch", 64, "literal / engine")),
        *(
            _line(
                f"(c) /classify / bare loop, {n} connections",
                ">= 0.9; bundled >= 0.5",
                http,
                lambda r, n=n: _at(r, "connections", n, "/classify / bare loop"),
            )
            for n in (32, 64, 128, 256)
        ),
        *(
            _line(
                f"(d) throughput / best peer's, {n} connections",
                ">= 1.2",
                lead,
                lambda r, n=n: _at(r, "load", n, "throughput ratio"),
            )
            for n in (1, 8, 32, 128)
        ),
        *(
            _line(
                f"(d) best peer's p99 / ours, {load}",
                ">= 1.2",
                lead,
                lambda r, load=load: _at(r, "load", load, "p99 ratio"),
            )
            for load in (1, 8, 32, 128, "50%", "80%")
        ),
        _line("(e) goodput at 1.1 to 1.5 x saturation / peak, least", ">= 0.9", overload, _least_goodput),
    ]
    memory = _read("memory")
    growth = f"{memory[-1]['resident MiB'] / memory[1]['resident MiB'] - 1:+.1%}"
    lines.append(
        {"what": "(f) memory after 100,000 requests and 1,000 abandoned ones", "target": "flat", "bundled": growth}
    )
    table = table_of([{"what": "", "target": "", **dict.fromkeys(_short_names(), "")} | line for line in lines])
    (RESULTS / "summary.md").write_text(table + "\n")
    print(table)


def _read(name: str) -> Rows:
    rows: Rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def _short_names() -> dict[str, str]:
    """Column -> model."""
    return dict(zip(("ResNet-18", "bundled"), models(), strict=True))


def _line(what: str, target: str, rows: Rows, value: Callable[[Rows], float]) -> dict[str, Any]:
    columns = {
        short: f"{value([row for row in rows if row['model'] == name]):.2f}" for short, name in _short_names().items()
    }
    return {"what": what, "target": target, **columns}


def _at(rows: Rows, key: str, value: object, column: str) -> float:
    return float(next(row[column] for row in rows if row[key] == value))


def _least_goodput(rows: Rows) -> float:
    return min(row["goodput / peak"] for row in rows if row["load"] > 1)


if __name__ == "__main__":
    main()
