"""A client of /classify that keeps what the answers say of the defense."""

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
SMALL_MARGIN = 0.1


@dataclass(frozen=True)
class Answers:
    """What was answered of n images, in order.

    Attributes:
        probabilities: [n, C], defended. undefended, pseudo_label: [n], classes.
    """

    probabilities: NDArray[np.float32]
    undefended: NDArray[np.int64]
    pseudo_label: NDArray[np.int64]

    @property
    def defended(self) -> NDArray[np.int64]:
        return self.probabilities.argmax(1)

    def signs(self) -> dict[str, NDArray[np.bool_]]:
        """What /metrics counts of each image."""
        second, first = np.partition(self.probabilities, -2)[:, -2:].T
        return {
            "changed": self.defended != self.undefended,
            "disagrees": self.pseudo_label != self.undefended,
            "small margin": first - second <= SMALL_MARGIN,
        }


class Client:
    """One connection to a server."""

    def __init__(self, address: str, num_classes: int) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        self._num_classes = num_classes

    def classify(self, pixels: Pixels) -> Answers:
        """Send images [n, H, W] of one channel as one request."""
        shape = ",".join(map(str, (*pixels.shape, 1)))
        headers = {"Content-Type": f"application/octet-stream; shape={shape}"}
        self._connection.request("POST", f"/classify?top={self._num_classes}", pixels.tobytes(), headers)
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"expected 200, got {answer.status}: {body[:200]!r}")
        return self._answers(json.loads(body)["predictions"])

    def _answers(self, predictions: list[dict[str, Any]]) -> Answers:
        probabilities = np.zeros((len(predictions), self._num_classes), np.float32)
        for row, prediction in zip(probabilities, predictions, strict=True):
            for entry in prediction["top"]:
                row[entry["class_id"]] = entry["probability"]
        undefended, pseudo_label = (
            np.array([prediction[key]["class_id"] for prediction in predictions])
            for key in ("undefended", "pseudo_label")
        )
        return Answers(probabilities, undefended, pseudo_label)


class Pace:
    """Waits until what comes next is due; what was late is not made up for."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s, self._due_s = interval_s, 0.0

    def wait(self) -> None:
        """Wait for the next turn."""
        now_s = time.monotonic()
        time.sleep(max(0.0, self._due_s - now_s))
        self._due_s = max(self._due_s, now_s) + self._interval_s


def send(
    client: Client, pixels: Pixels, *, number: int, per_s: float, at_once: int
) -> tuple[NDArray[np.int64], list[Answers]]:
    """Send so many images at a rate, from the first one on, and over and over if there are fewer.

    Args:
        per_s: images a second. at_once: images in a request.

    Returns:
        Which image each answer is of, [number], and the answers, a request each.
    """
    pace, order, answers = Pace(at_once / per_s), np.arange(number) % len(pixels), []
    for some in np.split(order, range(at_once, number, at_once)):
        pace.wait()
        answers.append(client.classify(pixels[some]))
    return order, answers


def joined(answers: list[Answers]) -> Answers:
    """As one."""
    fields = ("probabilities", "undefended", "pseudo_label")
    return Answers(*(np.concatenate([getattr(each, field) for each in answers]) for field in fields))
