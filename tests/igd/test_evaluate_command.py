"""``igd evaluate`` as a process: it is killed, continued, spread over processes, and reports."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from outcome_records import records

TESTS = Path(__file__).parent.parent
ATTACKS = "apgd-ce,transfer-cw,bpda"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Images around gray, 1 x 10 pixels, of class 0."""
    path = tmp_path_factory.mktemp("data") / "grays.npz"
    pixels = np.random.default_rng(0).integers(110, 140, (24, 1, 10, 1), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.zeros(24, np.int64))
    return path


def command(data: Path, out: Path, *more: str, launcher: tuple[str, ...] = ("-m", "igd")) -> list[str]:
    size = "-n 24 --block-size 4 --steps 60 --eot 6 --redraws 4"
    options = f"--factory toy_factory:make --epsilon 0.1 {size}".split()
    return [
        *(sys.executable, *launcher, "evaluate", *options, "--attacks", ATTACKS),
        *("--data", str(data), "--out", str(out), *more),
    ]


def environment() -> dict[str, str]:
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finished = run(*command(data, folder, "--curve", "8"))
    assert finished.returncode == 0, finished.stderr
    return folder


def test_a_killed_run_loses_one_attack_on_one_block_at_most_and_ends_with_the_same_outcomes(data, whole, tmp_path):
    process = subprocess.Popen(command(data, tmp_path, "--curve", "0"), env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "outcomes").rglob("*.json"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = {path: path.read_bytes() for path in (tmp_path / "outcomes").rglob("*.json")}
    finished = [path for path, text in left.items() if len(json.loads(text)["attacks"]) == len(ATTACKS.split(","))]
    assert 3 <= len(finished) < 12  # it was killed on its way
    again = run(*command(data, tmp_path, "--curve", "0"))
    assert again.returncode == 0, again.stderr
    assert all(path.read_bytes() == left[path] for path in finished)  # taken over, time and all
    assert records(tmp_path) == {k: v for k, v in records(whole).items() if not k.startswith("curve")}
    assert len(json.loads((tmp_path / "manifest.json").read_text())["sittings"]) == 2


def test_torchrun_spreads_blocks_over_processes_with_the_same_outcomes(data, whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "igd")
    finished = run(*command(data, tmp_path, "--curve", "0", launcher=launcher))
    assert finished.returncode == 0, finished.stderr
    assert records(tmp_path) == records(whole)
    assert (tmp_path / "report.md").exists()


def test_the_report_says_what_the_defense_buys_and_has_every_picture(whole):
    report = json.loads((whole / "report.json").read_text())
    rows = {row["target"]: row for row in report["targets"]}
    assert rows["undefended"]["clean"] == 1
    assert rows["defended"]["robust"] <= rows["defended"]["robust_one_draw"] <= rows["defended"]["clean"]
    assert rows["defended"]["gradient_calls_an_image"] > 0
    text = (whole / "report.md").read_text()
    assert "Worst-case gain of defended over undefended" in text
    assert "Looks for:" in text
    for name in ("targets", "attacks", "broken-by", "curve", "images"):
        assert (whole / f"{name}.png").stat().st_size > 10_000
        assert f"![{name}.png]" in text
    curve = [point["robust"] for point in report["curves"]["undefended"]]
    assert curve[0] == 1
    assert curve[-1] == 0


def test_the_manifest_has_what_it_takes_to_repeat_the_run(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["run"]["settings"]["effort"]["steps"] == 60
    assert manifest["run"]["images_digest"].startswith("sha256:")
    sitting = manifest["sittings"][0]
    assert "--epsilon 0.1" in sitting["command"]
    assert sitting["versions"]["torch"]


def test_other_settings_in_the_same_folder_are_refused_in_one_sentence(data, whole):
    refused = run(*command(data, whole, "--curve", "0", "--epsilon", "0.2"))
    assert refused.returncode == 1
    assert "another settings" in refused.stderr
    assert "Traceback" not in refused.stderr
