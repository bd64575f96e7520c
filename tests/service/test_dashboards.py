"""Every panel of every dashboard, asked of a real Prometheus that scrapes a real server under load."""

import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
DASHBOARDS = sorted((REPOSITORY / "docker/grafana/dashboards").glob("*.json"))
CONFIG = """
global: {{scrape_interval: 250ms, evaluation_interval: 250ms}}
rule_files: ["{rules}/*.yml"]
scrape_configs:
  - job_name: ig-defense
    static_configs: [{{targets: ["{target}"]}}]
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def server(start_igd, tiny_model):
    with start_igd.serve(tiny_model).client() as client:
        yield client


@pytest.fixture
def prometheus(server, tmp_path, until):
    """A client of a Prometheus that scrapes the server."""
    program = shutil.which("prometheus") or pytest.skip("prometheus is not installed; install Debian's package of it")
    config, address = tmp_path / "prometheus.yml", f"127.0.0.1:{free_port()}"
    config.write_text(
        CONFIG.format(rules=REPOSITORY / "docker/prometheus/rules", target=server.base_url.netloc.decode())
    )
    flags = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}", f"--web.listen-address={address}"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([program, *flags], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=30) as client:
            until(lambda: is_ready(client), "Prometheus")
            yield client
    finally:
        process.terminate()
        process.wait()


def is_ready(client):
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def ask(prometheus, query):
    answer = prometheus.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    return answer["data"]["result"]


def queries(dashboard):
    """Title and PromQL of each query, with values for Grafana's variables."""
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel.get("targets", []):
            expr = re.sub(r"\$__(rate_interval|range)", "1m", target["expr"])
            yield panel["title"], expr.replace("$instance", ".*")


def test_every_panel_has_an_answer(server, prometheus, until):
    def count_of_classified():
        for _ in range(5):
            assert server.post("/classify", content=png(), headers={"Content-Type": "image/png"}).status_code == 200
        found = ask(prometheus, "sum(rate(igd_predictions_total[1m]))")
        return found and float(found[0]["value"][1]) > 0

    until(count_of_classified, "predictions in Prometheus")
    assert len(DASHBOARDS) == 3
    for path in DASHBOARDS:
        for title, query in queries(path):
            until(lambda q=query: ask(prometheus, q), f"an answer to '{title}' of {path.name}, {query}")


def test_the_dashboards_can_be_drawn_without_grafana(prometheus, until, tmp_path):
    until(lambda: ask(prometheus, "igd_importance_info"), "a scrape")
    now = time.time()
    command = [sys.executable, REPOSITORY / "docker/grafana/draw.py", str(prometheus.base_url)]
    subprocess.run([*command, "--from", str(now - 60), "--to", str(now), "--output", tmp_path], check=True)
    pictures = {path.stem.removeprefix("dashboard-"): Image.open(path) for path in tmp_path.glob("dashboard-*.png")}
    assert set(pictures) == {path.stem for path in DASHBOARDS}
    assert all(len(picture.convert("L").getcolors()) > 20 for picture in pictures.values())  # not blank


def test_the_server_answers_what_prometheus_reads_without_a_complaint(server, prometheus, until):
    until(lambda: ask(prometheus, 'up{job="ig-defense"} == 1'), "a scrape")
    (target,) = prometheus.get("/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
