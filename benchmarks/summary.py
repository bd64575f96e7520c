"""The table of the README, from the results of one run of ``make bench``.

python benchmarks/summary.py
"""

import json
from typing import Any

from http_throughput import RATIO, RATIO_OF_AS_MANY
from measure import RESULTS, table_of

from models import models
from service.engine import IN_INT8

Rows = list[dict[str, Any]]


AT_ONE, AT_MANY = ("batch", 1), ("batch", 64)

# What is said of it, the target, the results that it is in, the row there, the column.
MEASURES: list[tuple[str, str, str, tuple[str, Any], str]] = [
    ("(a) defended / undefended, batch 1", "<= 1.6", "fast", AT_ONE, "defended / undefended"),
    ("... batch 1, were it as quick as its share of 64", "", "fast", AT_ONE, "share of 64 / undefended"),
    ("... batch 8", "", "fast", ("batch", 8), "defended / undefended"),
    ("... batch 64", "<= 2.05", "fast", AT_MANY, "defended / undefended"),
    ("... with IGD_INT8_FIRST_PASS, batch 1", "<= 1.6", "int8", AT_ONE, "defended / undefended"),
    ("... with IGD_INT8_FIRST_PASS, batch 8", "", "int8", ("batch", 8), "defended / undefended"),
    ("... with IGD_INT8_FIRST_PASS, batch 64", "<= 2.05", "int8", AT_MANY, "defended / undefended"),
    ("... with sigma 0, batch 1", "<= 1.05", "fast", AT_ONE, "with sigma 0"),
    ("... with sigma 0, batch 64", "<= 1.05", "fast", AT_MANY, "with sigma 0"),
    ("(b) literal defense / engine, batch 1", ">= 8 with AMX", "fast", AT_ONE, "literal / engine"),
    ("... batch 64", ">= 5 with AMX", "fast", AT_MANY, "literal / engine"),
    ("... engine in float32, batch 1", ">= 1.3", "full", AT_ONE, "literal / engine"),
    ("... engine in float32, batch 64", ">= 1.3", "full", AT_MANY, "literal / engine"),
    *(
        (f"(c) /classify / bare loop, {n} connections", f">= 0.9; bundled {target}", "http", ("connections", n), RATIO)
        for n, target in ((1, "none"), (8, "none"), *((n, ">= 0.5") for n in (32, 64, 128, 256)))
    ),
    *(
        (f"... of as many images, {n} connections", "", "http", ("connections", n), RATIO_OF_AS_MANY)
        for n in (1, 8, 32)
    ),
    *(
        (f"(d) throughput / the best peer's, {n} connections", ">= 1.2", "lead", ("load", n), "throughput ratio")
        for n in (1, 8, 32, 128)
    ),
    *(
        (f"(d) the best peer's p99 / ours, {n} connections", ">= 1.2", "lead", ("load", n), "p99 ratio")
        for n in (1, 8, 32, 128)
    ),
    *(
        (
            f"(d) the best peer's {p} / ours, {at} of the best system's saturation",
            "",
            "lead",
            ("load", at),
            f"{p} ratio",
        )
        for at in ("50%", "80%")
        for p in ("p50", "p99")
    ),
    *(
        (f"(e) goodput / its peak at {load} x saturation", target, "overload", ("load", load), "goodput / peak")
        for load, target in ((1.1, ">= 0.9"), (1.25, ">= 0.9"), (1.5, ">= 0.9"), (3.0, ""))
    ),
]


def main() -> None:
    """Print it, and write it to ``benchmarks/results/summary.md``."""
    speed = _read("engine_speed")
    results = {
        "fast": [row for row in speed if row["precision"] == speed[0]["precision"]],
        "int8": [row for row in speed if row["precision"] == speed[0]["precision"].replace(" by", IN_INT8 + " by")],
        "full": [row for row in speed if row["precision"] == "float32 by openvino"],
        "http": _read("http_throughput"),
        "lead": _read("against_peers_lead"),
        "overload": _read("overload"),
    }
    lines = [_line(what, target, results[name], *where) for what, target, name, *where in MEASURES]
    memory = {row["when"]: row["resident MiB"] for row in _read("memory")}
    growth = f"{memory['some more'] / memory['a tenth of them'] - 1:+.1%}"
    left = max(int(when.split()[0]) for when in memory if "abandoned" in when)
    what = f"(f) growth of memory from 10,000 requests on: to 100,000, {left:,} abandoned, some more"
    lines.append({"what": what, "target": "flat", "ResNet-18": "", "bundled": growth})
    table = table_of(lines)
    (RESULTS / "summary.md").write_text(table + "\n")
    print(table)


def _read(name: str) -> Rows:
    rows: Rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def _line(what: str, target: str, rows: Rows, where: tuple[str, Any], column: str) -> dict[str, Any]:
    key, value = where
    found = {row["model"]: row[column] for row in rows if row[key] == value and column in row}
    shown = {name: f"{found[name]:.2f}" if name in found else "" for name in models()}  # not all CPUs have int8
    columns = dict(zip(("ResNet-18", "bundled"), shown.values(), strict=True))
    return {"what": what, "target": target, **columns}


if __name__ == "__main__":
    main()
