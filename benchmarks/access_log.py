"""What a log line for every request costs: /classify with IGD_ACCESS_LOG on / off, bundled model, 32 connections.

    python benchmarks/access_log.py [--seconds 6] [--rounds 5]

Two servers, one of which is idle while wrk loads the other, in turns; the ratio is the median over the rounds.
"""

import argparse
import statistics

from measure import write_results
from peers.load import saturate
from server import igd_server

from models import BUNDLED, sample_files

CONNECTIONS = 32


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    files = sample_files(BUNDLED)
    rates: dict[bool, list[float]] = {False: [], True: []}
    with igd_server(BUNDLED, access_log=False) as without, igd_server(BUNDLED, access_log=True) as with_lines:
        for server in (without, with_lines):
            saturate(server.url, CONNECTIONS, arguments.seconds / 2, bodies=files)
        for number in range(arguments.rounds):
            order = [(False, without), (True, with_lines)]
            for every, server in order if number % 2 == 0 else reversed(order):
                rates[every].append(saturate(server.url, CONNECTIONS, arguments.seconds, bodies=files).requests_per_s)
    ratios = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
    row = {
        "connections": CONNECTIONS,
        "requests/s without": statistics.median(rates[False]),
        "requests/s with a line each": statistics.median(rates[True]),
        "with / without (median)": statistics.median(ratios),
        "smallest": min(ratios),
        "largest": max(ratios),
    }
    write_results("access_log", [row])


if __name__ == "__main__":
    main()
