"""Ranking a model directory: interrupted and resumed, in several processes, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from defense import NeuronImportance, ProbeSetError, check_dataset, open_probe_set, rank_neurons, ranking

FASHION_MNIST = Path(__file__).parents[2] / "models" / "fashion-mnist"
LABELS = ("cat", "dog", "fox", "owl")


class Interruption(Exception):
    """Stands for a kill."""


@pytest.fixture(autouse=True)
def _checkpoint_every_second_batch(monkeypatch):
    monkeypatch.setattr(ranking, "CHECKPOINT_EVERY", 2)


@pytest.fixture
def folder(tmp_path):
    """27 images in a dataset "files"; the ones with these numbers are damaged."""

    def write(*damaged):
        for number in range(27):
            file = tmp_path / "files" / LABELS[number % 4] / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(file)
            if number in damaged:
                file.write_bytes(b"no image")
        (tmp_path / "datasets.toml").write_text('[datasets.files]\nkind = "image-folder"\npath = "files"')
        return tmp_path / "datasets.toml"

    return write


def rank(model, datasets=None, *, until=None, **options):
    """Rank in batches of 4: the importance, the probe set and what was told of the progress; stops at ``until``."""
    probe = open_probe_set("files" if datasets else "probe", model, datasets_file=datasets)
    told = []

    def progress(done, total):
        told.append((done, total))
        if done == until:
            raise Interruption

    try:
        importance = rank_neurons(model, probe, batch_size=4, progress=progress, **options)
    except Interruption:
        importance = None
    return importance, probe, told


@pytest.mark.parametrize("method", ["lo-ir", "lo-ir-signed"])
@pytest.mark.parametrize("layer", ["layer4", "layer1"])
def test_an_interrupted_ranking_goes_on_from_its_checkpoint_to_the_same_scores(tiny_model, tmp_path, method, layer):
    options = {"method": method, "layer": layer, "checkpoint": tmp_path / "a" / "checkpoint"}
    whole, _, told = rank(tiny_model, method=method, layer=layer)
    assert told == [(done, 24) for done in range(4, 25, 4)]

    rank(tiny_model, until=12, **options)  # the third batch is lost
    resumed, _, told = rank(tiny_model, **options)

    assert told == [(12, 24), (16, 24), (20, 24), (24, 24)]
    assert torch.equal(resumed.scores, whole.scores)
    assert (resumed.num_images, resumed.warnings) == (24, whole.warnings)


def test_images_that_were_skipped_before_an_interruption_are_neither_read_nor_counted_again(
    tiny_model, tmp_path, folder
):
    datasets, checkpoint = folder(1, 5, 26), tmp_path / "checkpoint"
    whole, probe, _ = rank(tiny_model, datasets)
    skipped = [skip.index for skip in probe.skipped]

    rank(tiny_model, datasets, checkpoint=checkpoint, until=12)
    resumed, probe, told = rank(tiny_model, datasets, checkpoint=checkpoint)

    assert [done for done, _ in told] == [12, 16, 20, 24, 27]
    assert [skip.index for skip in probe.skipped] == skipped and len(skipped) == 3
    assert resumed.num_images == 24 and torch.equal(resumed.scores, whole.scores)


@pytest.mark.parametrize("changed", ["method", "layer", "weights", "images"])
def test_a_checkpoint_of_another_ranking_is_not_used(tiny_model, make_model, tmp_path, folder, caplog, changed):
    options = {"method": "lo-ir", "layer": "layer4", "checkpoint": tmp_path / "checkpoint"}
    rank(tiny_model, until=12, **options)

    model, datasets = tiny_model, None
    if changed == "weights":
        model = make_model("other", seed=1)
    elif changed == "images":
        datasets = folder()
    else:
        options[changed] = {"method": "lo-ir-signed", "layer": "layer3"}[changed]
    _, _, told = rank(model, datasets, **options)

    assert told[0][0] == 4 and "is of another ranking" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 100, None], ids=["empty", "short", "wild", "cut"])
def test_a_damaged_checkpoint_costs_no_more_than_a_warning(tiny_model, tmp_path, caplog, content):
    checkpoint = tmp_path / "checkpoint"
    rank(tiny_model, checkpoint=checkpoint, until=12)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1] if content is None else content)

    importance, _, told = rank(tiny_model, checkpoint=checkpoint)

    assert told[0][0] == 4 and importance.num_images == 24
    assert f"beginning again, the checkpoint {checkpoint} is not readable" in caplog.text


def test_a_checkpoint_that_cannot_be_written_costs_no_more_than_a_warning(tiny_model, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")

    importance, _, told = rank(tiny_model, checkpoint=tmp_path / "file" / "checkpoint")

    assert importance.num_images == 24 and told[-1] == (24, 24)
    assert "no checkpoint could be written" in caplog.text


def test_unknown_names_are_refused_with_the_known_ones(tiny_model, folder):
    datasets = folder()
    with pytest.raises(ValueError, match="one of lo-ir, lo-ir-signed, cd-ir, got 'best'"):
        rank(tiny_model, method="best")
    with pytest.raises(ProbeSetError, match="one of the datasets probe, files, got 'none'"):
        check_dataset("none", datasets)
    with pytest.raises(ProbeSetError, match="one of the datasets probe, got 'files'"):
        open_probe_set("files", tiny_model)


@pytest.fixture
def torchrun(tmp_path):
    """Rank in two processes; the importance that they write together."""

    def run(model, method, *flags, **environment):
        output = tmp_path / "ranked.safetensors"
        environment = {"OMP_NUM_THREADS": "1", "IGD_DATA_DIR": str(tmp_path)} | environment
        processes = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = ["-m", "igd", "rank", "--model", model, "--method", method, *flags, "--output", output]
        ended = subprocess.run([*processes, *command], env=os.environ | environment, capture_output=True, timeout=240)
        assert ended.returncode == 0, ended.stderr.decode()
        assert ended.stdout.decode().split() == [str(output)]  # only one of them speaks
        return NeuronImportance.from_bytes(output.read_bytes())

    return run


def assert_same(together, alone, *, scale):
    """Equal to 1e-6 of what the scores are computed from, which is of the size ``scale``."""
    assert (together.num_images, together.warnings) == (alone.num_images, alone.warnings)
    torch.testing.assert_close(together.scores, alone.scores, rtol=0, atol=1e-6 * scale)


def test_two_processes_under_torchrun_rank_by_lo_ir_as_one_does(tiny_model, folder, torchrun):
    datasets = folder(1, 2)  # 14 and 13 images, of which each process skips one
    together = torchrun(tiny_model, "lo-ir", "--dataset", "files", IGD_DATASETS=str(datasets))

    alone, _, _ = rank(tiny_model, datasets)
    assert_same(together, alone, scale=alone.scores.max().item())


@pytest.mark.skipif(not (FASHION_MNIST / "clip").is_dir(), reason="models/fashion-mnist ships no CLIP to rank with")
def test_two_processes_under_torchrun_rank_by_cd_ir_as_one_does(torchrun):
    together = torchrun(FASHION_MNIST, "cd-ir", "--images-per-class", "12")

    probe = open_probe_set("probe", FASHION_MNIST, images_per_class=12)
    # Sums of a hundred logarithms of probabilities, each down to log(1e-7).
    assert_same(together, rank_neurons(FASHION_MNIST, probe, method="cd-ir"), scale=700)
