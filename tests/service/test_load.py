"""A real server under many requests at once: each gets an answer, and its own."""

import asyncio
import io
import re
import shutil

import httpx
import numpy as np
import pytest
from PIL import Image

from defense import load_importance
from service.predictor import Predictor

PNG = {"Content-Type": "image/png"}


def images(count, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def gather_posts(server, bodies, headers=PNG, path="/classify?top=1000", connections=200):
    """Post all bodies at once; the answers, in order."""
    limits = httpx.Limits(max_connections=connections)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, trust_env=False) as client:
        return await asyncio.gather(*(client.post(path, content=body, headers=headers) for body in bodies))


def undefended(answer):
    (prediction,) = answer.json()["predictions"]
    return prediction["undefended"]["class_id"], prediction["undefended"]["probability"]


def test_each_of_a_thousand_concurrent_requests_gets_the_answer_to_its_own_image(start_igd, tiny_model):
    pixels = images(1000)
    predictor = Predictor(tiny_model, compiler="none", dtype="float32")
    defense = predictor.prepare("v", load_importance(tiny_model))
    rows = np.concatenate([predictor.predict(defense, part) for part in np.split(pixels, 20)])[:, 1]  # without noise
    expected = [(int(row.argmax()), float(row.max())) for row in rows]
    server = start_igd.serve(tiny_model, "--dtype", "float32")

    answers = asyncio.run(gather_posts(server, [png(image) for image in pixels]))

    assert [answer.status_code for answer in answers] == [200] * 1000
    found = [undefended(answer) for answer in answers]
    assert len(set(found)) > 900  # or an answer could be another's and nobody would know
    for (class_id, probability), own in zip(found, expected, strict=True):
        assert class_id == own[0] and probability == pytest.approx(own[1], abs=2e-5)
    with server.client() as client:
        batches = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if "batch_size" in line)
    assert float(batches["igd_batch_size_count"]) < 980  # some did travel together


def test_requests_of_many_images_under_load_get_the_defended_answers_to_their_own(start_igd, tiny_model, tmp_path):
    still = shutil.copytree(tiny_model, tmp_path / "still")
    text = (still / "model.toml").read_text()
    (still / "model.toml").write_text(re.sub(r"(?m)^sigma = .*$", "sigma = 0.0", text))
    requests = images(1400).reshape(200, 7, 8, 8, 3)
    predictor = Predictor(still, compiler="none", dtype="float32")
    defense = predictor.prepare("v", load_importance(still))
    expected = [predictor.predict(defense, list(pixels))[:, 0].max(1) for pixels in requests]
    server = start_igd.serve(still, "--dtype", "float32", "--max-batch-size", 16, "--max-queue", 2000)

    headers = {"Content-Type": "application/octet-stream; shape=7,8,8,3"}
    answers = asyncio.run(gather_posts(server, [pixels.tobytes() for pixels in requests], headers))

    found = [[prediction["probability"] for prediction in answer.json()["predictions"]] for answer in answers]
    assert len({tuple(probabilities) for probabilities in found}) > 190
    assert np.concatenate(found) == pytest.approx(np.concatenate(expected), abs=2e-5)


def test_files_and_arrays_of_the_same_pixels_get_the_same_answer(start_igd, tiny_model):
    pixels = images(3)
    saved = io.BytesIO()
    np.save(saved, pixels)
    server = start_igd.serve(tiny_model, "--dtype", "float32", "--max-batch-size", 2)
    forms = {
        "application/x-npy": saved.getvalue(),
        "application/octet-stream": pixels.tobytes(),
        "application/octet-stream; shape=3,8,8,3": pixels.tobytes(),
    }
    with server.client() as client:
        files = client.post("/classify", files=[("images", (f"{i}.png", png(p))) for i, p in enumerate(pixels)])
        expected = [p["undefended"]["probability"] for p in files.json()["predictions"]]
        for content_type, body in forms.items():
            answer = client.post("/classify", content=body, headers={"Content-Type": content_type})
            assert answer.status_code == 200, answer.text
            found = [p["undefended"]["probability"] for p in answer.json()["predictions"]]
            assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/octet-stream", 422),
        ("application/x-npy", 422),
        ("application/octet-stream; shape=1,8,8,4", 422),
        ("application/x-hdf5", 415),
    ],
)
def test_an_array_that_does_not_fit_is_refused_with_a_sentence(start_igd, tiny_model, content_type, status):
    with start_igd.serve(tiny_model).client() as client:
        answer = client.post("/classify", content=b"x" * 191, headers={"Content-Type": content_type})
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json" and len(answer.json()["detail"]) > 30


def test_more_than_the_queue_holds_gets_429_and_when_to_come_back(start_igd, tiny_model):
    server = start_igd.serve(tiny_model, "--max-queue", 4, "--max-batch-size", 1)
    answers = asyncio.run(gather_posts(server, [png(image) for image in images(300)]))

    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["Retry-After"]) <= 30
            assert "the queue holds 4" in answer.json()["detail"]
    with server.client() as client:  # nothing of it is left
        assert client.post("/classify", content=png(images(1)[0]), headers=PNG).status_code == 200
        assert "\nigd_in_flight 0.0" in client.get("/metrics").text


def test_time_in_the_queue_counts_against_the_deadline(start_igd, tiny_model):
    server = start_igd.serve(tiny_model, "--deadline-s", 0.15, "--max-batch-size", 1)
    with server.client() as client:
        client.post("/classify", content=png(images(1)[0]), headers=PNG)
    answers = asyncio.run(gather_posts(server, [png(image) for image in images(600)]))

    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 504} and 504 in statuses
    assert all("no answer within 0.15 s" in a.json()["detail"] for a in answers if a.status_code == 504)
