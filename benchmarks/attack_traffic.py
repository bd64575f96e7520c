"""What an attack looks like on /metrics: clean traffic, harmless noise, PGD, Square attack, and when the alerts fire.

    python benchmarks/attack_traffic.py [--speed-up 40]

A real server of the bundled model, watched by a real Prometheus with this repository's rules. Windows of minutes would
make this two hours, so time runs faster: the rules' durations and the scrape interval are divided, the rate of images
is multiplied, and a window holds as many images as it would. Times and rates are printed as without that.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import RESULTS, write_results
from monitored import images
from monitored.client import Answers, Client, Pace, Pixels, joined, send
from monitored.prometheus import watching
from monitored.report import Phase, clean_windows, plot, row_of, write_series
from numpy.typing import NDArray
from server import igd_server

from models import BUNDLED

PLOT = Path(__file__).parents[1] / "docs/attack-traffic.png"
NUM_CLASSES, AT_ONCE = 10, 20
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """How much, in the time that passes here.

    Attributes:
        seconds: of a phase. per_s: images.
    """

    client: Client
    seconds: float
    per_s: float

    def send(self, name: str, pixels: Pixels, labels: Labels, phases: float = 1) -> Phase:
        """Send these images over and over."""
        began = time.time()
        number = round(phases * self.seconds * self.per_s)
        sent, answers = send(self.client, pixels, number=number, per_s=self.per_s, at_once=AT_ONCE)
        return Phase(name, began, time.time(), joined(answers), labels[sent])

    def attack(self, name: str, pixels: Pixels, labels: Labels, queries: int) -> tuple[Phase, Pixels]:
        """Search for adversarial images by what the server answers; the queries, and the images found."""
        pace, answers, began = Pace(self.seconds / queries), list[Answers](), time.time()

        def ask(candidates: Pixels) -> NDArray[np.float32]:
            pace.wait()
            answers.append(self.client.classify(candidates))
            return answers[-1].probabilities

        found = images.search_squares(ask, pixels, labels, queries)
        return Phase(name, began, time.time(), joined(answers), None), found


def main() -> None:
    """Send it all, print the figures, draw the picture."""
    arguments = parse_arguments()
    send_all = prepare(arguments)
    with igd_server(BUNDLED) as server, watching(server.address, speed_up=arguments.speed_up) as prometheus:
        seconds = 60 * arguments.minutes / arguments.speed_up
        traffic = Traffic(Client(server.address, NUM_CLASSES), seconds, arguments.rate * arguments.speed_up)
        phases = send_all(traffic)
        time.sleep(2 * prometheus.step_s)
        rows = [row_of(phase, phases[0], prometheus, arguments.speed_up) for phase in phases]
        plot(phases, prometheus, arguments.speed_up, PLOT)
        write_series(phases, prometheus, arguments.speed_up, RESULTS / "attack_traffic_series.json")
    write_results("attack_traffic_clean_windows", clean_windows(phases[0], NUM_CLASSES))
    write_results("attack_traffic", rows)


def prepare(arguments: argparse.Namespace) -> Callable[[Traffic], list[Phase]]:
    """Make the images, which takes minutes the first time; what sends them."""
    pixels, labels = images.test_images(arguments.data)
    few, of_few = pixels[: arguments.attacked], labels[: arguments.attacked]
    transferred, adaptive = images.pgd_on_undefended(few, of_few), images.pgd_on_defended(few, of_few)
    victims = pixels[: arguments.victims], labels[: arguments.victims]

    def send_all(traffic: Traffic) -> list[Phase]:
        def quiet() -> Phase:
            return traffic.send("clean", pixels, labels, phases=0.7)

        phases = [traffic.send("clean", pixels, labels, phases=3)]
        phases += [traffic.send("uniform\nnoise", images.with_uniform_noise(pixels), labels), quiet()]
        phases += [traffic.send("random\nsigns", images.with_random_signs(pixels), labels), quiet()]
        phases += [traffic.send("PGD,\nundefended", transferred, of_few), quiet()]
        phases += [traffic.send("PGD,\ndefended", adaptive, of_few), quiet()]
        queries, found = traffic.attack("Square\nqueries", *victims, arguments.queries)
        return [*phases, queries, quiet(), traffic.send("Square\nimages", found, victims[1])]

    return send_all


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed-up", type=float, default=40, help="how much faster time runs; 1 takes two hours")
    parser.add_argument("--minutes", type=float, default=11, help="of a phase; the alerts need some 6 to fire")
    parser.add_argument("--rate", type=float, default=10, help="images a second")
    parser.add_argument("--attacked", type=int, default=200, help="images attacked with gradients")
    parser.add_argument("--victims", type=int, default=100, help="images of the Square attack, in parallel")
    parser.add_argument("--queries", type=int, default=300, help="of the Square attack for each image, at most")
    parser.add_argument("--data", type=Path, help="folder of the idx files (default: Debian's, else a download)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
