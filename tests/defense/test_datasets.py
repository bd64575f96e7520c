import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from defense.datasets import DatasetSpec, match_classes, open_dataset, read_datasets
from defense.errors import ProbeSetError, UnreadableImage
from defense.model_config import InputConfig
from defense.probe import ArrayProbeSet, FileProbeSet, ProbeSet

LABELS = ("cat", "dog", "ice bear")
CONFIG = InputConfig(size=(4, 4), channels=3)
CIFAR_TAR = Path(__file__).parents[3] / "shared" / "cifar10" / "test-2000.tar"
CIFAR_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def gray(value: int, size: tuple[int, int] = (4, 4), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, format)
    return file.getvalue()


def class_folders(per_class: int = 2) -> dict[str, bytes]:
    """Paths and files; each image's gray value tells which one it is."""
    folders = ("Ice_Bear", "cat", "dog")
    return {f"{folder}/{i}.png": gray(100 * c + i) for c, folder in enumerate(folders) for i in range(per_class)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def opened(kind: str, path: Path, labels: tuple[str, ...] = LABELS, **options: object) -> ProbeSet:
    spec = DatasetSpec.model_validate({"kind": kind, "path": path} | options)
    return open_dataset("animals", {"animals": spec}, labels)


@pytest.fixture(params=["image-folder", "tar"])
def open_files(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., ProbeSet]:
    """Open a dataset of these files, as a folder and as a tar."""

    def open_(files: dict[str, bytes], **options: object) -> ProbeSet:
        if request.param == "tar":
            return opened("tar", write_tar(tmp_path / "animals.tar", files), **options)
        return opened("image-folder", write_folder(tmp_path / "animals", files), **options)

    return open_


def values_of(probe: ProbeSet, **options: int) -> list[int]:
    return [round(float(image.mean() * 255)) for images, _ in probe.batches(2, **options) for image in images]


# Reading


def test_images_come_in_class_order_with_the_models_indices(open_files: Callable[..., ProbeSet]) -> None:
    probe = open_files(class_folders())
    batches = list(probe.batches(4, config=CONFIG))
    assert values_of(probe) == [0, 1, 100, 101, 200, 201]
    assert probe.labels.tolist() == [2, 2, 0, 0, 1, 1] and probe.class_names == LABELS
    assert [images.shape for images, _ in batches] == [(4, 3, 4, 4), (2, 3, 4, 4)]
    assert torch.cat([labels for _, labels in batches]).tolist() == probe.labels.tolist()


def test_the_order_is_that_of_torchvisions_image_folder(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    names = ["10.png", "9.png", "B.PNG", "a.png", "sub/1.png", "sub/2/x.png", "sub-1/0.png", "Z/0.png"]
    files = {f"{folder}/{name}": gray(i) for i, name in enumerate(names) for folder in ("cat", "dog", "Ice_Bear")}
    files |= {"cat/notes.txt": b"", "README.md": b""}
    root = write_folder(tmp_path / "animals", files)
    expected = [(str(Path(path).relative_to(root)), label) for path, label in ImageFolder(str(root)).samples]
    for probe in (opened("image-folder", root), opened("tar", write_tar(tmp_path / "animals.tar", files))):
        assert isinstance(probe, FileProbeSet)
        assert [f"{f.class_name}/{f.name}" for f in probe.files] == [path for path, _ in expected]


def test_the_folder_that_a_tar_wraps_around_its_classes_does_not_count(tmp_path: Path) -> None:
    for wrapper in ("./", "data/train/"):
        files = {wrapper + name: data for name, data in class_folders().items()}
        assert values_of(opened("tar", write_tar(tmp_path / "animals.tar", files))) == [0, 1, 100, 101, 200, 201]


def test_links_and_devices_in_a_tar_are_left_out(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "animals.tar", class_folders())
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("cat/0.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert len(opened("tar", path)) == 6


def test_the_later_of_two_members_of_a_name_counts(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "animals.tar", class_folders())
    write_tar(path, {"cat/0.png": gray(77)}, "a")
    assert values_of(opened("tar", path)) == [0, 1, 77, 101, 200, 201]


@pytest.mark.parametrize("cut", [700, 1200, 1536, -512])
def test_a_tar_that_was_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "animals.tar", class_folders())
    end = path.read_bytes().rstrip(b"\0")
    path.write_bytes(end[:cut] if cut > 0 else end)
    with pytest.raises(ProbeSetError, match="to be a whole tar"):
        opened("tar", path)


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match="whole tar, not compressed"):
        opened("tar", write_tar(tmp_path / "animals.tar.gz", class_folders(), "w:gz"))


def test_pictures_of_any_size_and_mode_are_fitted_to_the_network(open_files: Callable[..., ProbeSet]) -> None:
    files = class_folders()
    files["cat/0.png"] = gray(100, (9, 5))
    for name, image in {
        "cat/1.png": Image.new("I;16", (4, 4), 101 * 257),
        "dog/0.png": Image.new("RGBA", (4, 4), (9, 9, 9, 0)),
        "dog/1.png": Image.new("P", (4, 4)),
    }.items():
        file = io.BytesIO()
        image.save(file, "PNG")
        files[name] = file.getvalue()
    probe = open_files(files)
    (batch,) = probe.batches(8, config=CONFIG)
    assert [round(float(image.mean() * 255)) for image in batch[0]] == [0, 1, 100, 101, 255, 0]
    with pytest.raises(ProbeSetError, match="of one size"):
        list(probe.batches(8))


def test_a_pass_can_start_anywhere(open_files: Callable[..., ProbeSet]) -> None:
    probe = open_files(class_folders())
    assert values_of(probe, start=3) == [101, 200, 201] and values_of(probe, start=6) == []
    with pytest.raises(ProbeSetError, match="start from 0 to 6"):
        values_of(probe, start=7)


# Unreadable images


def test_an_unreadable_image_is_skipped_and_counted(open_files: Callable[..., ProbeSet]) -> None:
    files = class_folders()
    files["cat/0.png"] = files["cat/0.png"][:40]
    probe = open_files(files | {"dog/1.png": b""})
    for _ in range(2):
        assert values_of(probe) == [0, 1, 101, 200]
        assert [skip.index for skip in probe.skipped] == [2, 5]
    assert str(probe.skipped[0]).startswith("image 2: cat/0.png cannot be read")
    labels = torch.cat([labels for _, labels in probe.batches(4)])
    assert labels.tolist() == [2, 2, 0, 1]
    with pytest.raises(UnreadableImage, match=r"dog/1\.png"):
        probe.image(5)


def test_after_an_interruption_skipped_images_are_counted_once(open_files: Callable[..., ProbeSet]) -> None:
    probe = open_files(class_folders() | {"Ice_Bear/0.png": b"", "dog/0.png": b""})
    passed = iter(probe.batches(2))
    position = len(next(passed)[0]) + len(probe.skipped)
    assert position == 2 and values_of(probe, start=position) == [100, 101, 201]
    assert [skip.index for skip in probe.skipped] == [0, 4]


@pytest.mark.parametrize(
    ("images", "unreadable", "fails"), [(30, 3, False), (30, 4, True), (600, 6, False), (600, 7, True)]
)
def test_more_than_one_percent_unreadable_is_a_failure(
    tmp_path: Path, images: int, unreadable: int, fails: bool
) -> None:
    files = dict.fromkeys((f"{c}/{i:03}.png" for c in LABELS for i in range(images // 3)), gray(1))
    files |= dict.fromkeys(list(files)[:unreadable], b"not an image")
    probe = opened("tar", write_tar(tmp_path / "animals.tar", files))
    if not fails:
        assert len(values_of(probe)) == images - unreadable
        return
    with pytest.raises(ProbeSetError, match=rf"at most 1% of probe set 'animals' \({images} images\).*cat/000\.png"):
        values_of(probe)


def test_a_picture_that_vanished_is_unreadable(tmp_path: Path) -> None:
    probe = opened("image-folder", write_folder(tmp_path / "animals", class_folders()))
    (tmp_path / "animals/cat/0.png").unlink()
    assert values_of(probe) == [0, 1, 101, 200, 201]


# Classes


@pytest.mark.parametrize(
    ("found", "labels", "indices"),
    [
        (["T_SHIRT top", "ankle-boot"], ["Ankle boot", "T-shirt/top"], [1, 0]),
        (["b", "a"], ["a", "b"], [1, 0]),
        (["a b", "A-B"], ["A-B", "a b"], [1, 0]),  # alike but for what is ignored: then nothing is
    ],
)
def test_classes_match_whatever_their_case_and_separators(
    found: list[str], labels: list[str], indices: list[int]
) -> None:
    assert match_classes(found, labels) == indices


def test_a_mismatch_shows_both_lists(open_files: Callable[..., ProbeSet]) -> None:
    with pytest.raises(ProbeSetError) as error:
        open_files(class_folders() | {"horse/0.png": gray(0)}, labels=("cat", "dog", "owl", "ice bear"))
    for part in ("without a label: horse", "labels without a class: owl", "Ice_Bear, cat, dog, horse", "cat, dog, owl"):
        assert part in str(error.value)


def test_a_dataset_with_fewer_classes_than_the_model_is_refused(open_files: Callable[..., ProbeSet]) -> None:
    with pytest.raises(ProbeSetError, match="labels without a class: owl"):
        open_files(class_folders(), labels=(*LABELS, "owl"))


def test_classes_of_other_names_are_mapped(open_files: Callable[..., ProbeSet]) -> None:
    probe = open_files(class_folders(), labels=("polar bear", "cat", "dog"), class_names={"Ice_Bear": "polar bear"})
    assert probe.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_mapping_of_a_class_that_is_not_there_is_refused(open_files: Callable[..., ProbeSet]) -> None:
    with pytest.raises(ProbeSetError, match="class_names without a class: bear"):
        open_files(class_folders(), class_names={"bear": "ice bear"})


def test_long_lists_of_classes_are_cut_short() -> None:
    with pytest.raises(ProbeSetError) as error:
        match_classes([f"n{i}" for i in range(1000)], [f"label {i}" for i in range(1000)])
    assert "and 980 more" in str(error.value) and len(str(error.value)) < 2000


# Balanced subsets


def test_a_subset_is_balanced_and_follows_from_the_seed(open_files: Callable[..., ProbeSet]) -> None:
    probe = open_files(class_folders(per_class=20))
    subset = probe.subset(3, seed=1)
    assert subset.labels.tolist() == [2, 2, 2, 0, 0, 0, 1, 1, 1] and subset.class_names == LABELS
    drawn = values_of(subset)
    assert drawn == values_of(probe.subset(3, seed=1)) == [value for value in values_of(probe) if value in drawn]
    assert values_of(subset) != values_of(probe.subset(3, seed=2))
    assert subset.digest == probe.subset(3, seed=1).digest != probe.subset(3, seed=2).digest != probe.digest
    assert values_of(probe.subset(20)) == values_of(probe)


def test_a_class_with_too_few_images_is_named(open_files: Callable[..., ProbeSet]) -> None:
    files = class_folders(per_class=3)
    del files["dog/0.png"]
    with pytest.raises(ProbeSetError, match=r"expected 3 images of each class .* fewer of dog \(2\)"):
        open_files(files).subset(3)
    with pytest.raises(ProbeSetError, match="images_per_class >= 1"):
        open_files(files).subset(0)


def test_shards_together_are_the_set(open_files: Callable[..., ProbeSet]) -> None:
    probe = open_files(class_folders())
    assert sorted(values_of(probe.shard(0, 2)) + values_of(probe.shard(1, 2))) == values_of(probe)
    assert probe.shard(0, 1) is probe


# Digests


def test_the_digest_follows_the_files(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "animals", class_folders())
    before = opened("image-folder", root).digest
    assert before == opened("image-folder", root).digest
    os.utime(root / "cat/0.png", (1, 1))
    touched = opened("image-folder", root).digest
    (root / "cat/0.png").rename(root / "cat/00.png")
    assert len({before, touched, opened("image-folder", root).digest}) == 3


def test_the_digest_of_arrays_follows_the_images_whatever_the_model_calls_them() -> None:
    images, labels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1])
    digests = {ArrayProbeSet("a", i, n).digest for i in (images, images + 1) for n in (labels, labels.flip(0))}
    assert len(digests) == 2 and ArrayProbeSet("b", images.clone(), labels).digest in digests


# Arrays


@pytest.fixture(params=["npz", "safetensors"])
def write_arrays(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    def write(images: torch.Tensor, labels: torch.Tensor, names: list[str] | None = None) -> Path:
        path = tmp_path / f"animals.{request.param}"
        if request.param == "npz":
            named = {} if names is None else {"class_names": np.array(names)}
            np.savez(path, images=images.numpy(), labels=labels.numpy(), **named)
        else:
            quoted = ", ".join(f'"{name}"' for name in names or [])
            metadata = None if names is None else {"class_names": f"[{quoted}]"}
            save_file({"images": images, "labels": labels}, path, metadata=metadata)
        return path

    return write


def some_images(n: int, *shape: int) -> torch.Tensor:
    return torch.arange(n, dtype=torch.uint8).view(n, *(1 for _ in shape)).expand(n, *shape).contiguous()


def test_stored_class_names_are_matched(write_arrays: Callable[..., Path]) -> None:
    path = write_arrays(some_images(3, 4, 4, 3), torch.tensor([0, 1, 2], dtype=torch.int32), ["ICE-BEAR", "dog", "cat"])
    probe = opened("arrays", path)
    assert probe.labels.tolist() == [2, 1, 0] and probe.labels.dtype == torch.int64
    assert values_of(probe) == [0, 1, 2]


def test_labels_without_names_are_the_models(write_arrays: Callable[..., Path]) -> None:
    path = write_arrays(some_images(3, 4, 4), torch.tensor([2, 0, 1]))
    assert opened("arrays", path).labels.tolist() == [2, 0, 1]
    renamed = opened("arrays", path, class_names={"0": "dog", "1": "cat", "2": "ice bear"})
    assert renamed.labels.tolist() == [2, 1, 0]


def test_arrays_of_the_networks_size_are_taken_as_they_are() -> None:
    images = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    config = InputConfig(size=(4, 4), channels=3, resize=6)
    (ready,) = ArrayProbeSet("a", images, torch.zeros(2, dtype=torch.int64)).batches(config=config)
    assert torch.equal(ready[0], images.permute(0, 3, 1, 2) / 255)
    (fitted,) = ArrayProbeSet("a", images, torch.zeros(2, dtype=torch.int64), ready=False).batches(config=config)
    assert fitted[0].shape == ready[0].shape and not torch.equal(fitted[0], ready[0])


def test_gray_arrays_become_rgb_for_a_network_that_takes_rgb() -> None:
    probe = ArrayProbeSet("a", some_images(2, 6, 6, 1), torch.zeros(2, dtype=torch.int64))
    (batch,) = probe.batches(config=CONFIG)
    assert batch[0].shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 4, 4, 3), torch.tensor([0, 1]), "uint8 images"),
        (some_images(2, 4, 4, 3), torch.tensor([0.0, 1.0]), "integer labels"),
        (some_images(2, 4, 4, 3), torch.tensor([0]), "expected 2 int64 probe labels"),
        (some_images(2, 4, 4, 2), torch.tensor([0, 1]), "1 or 3 channels"),
        (some_images(2, 4, 4, 3), torch.tensor([0, 3]), "labels from 0 to 2 .* got 0 to 3"),
        (some_images(2, 4, 4, 3), torch.tensor([-1, 0]), "got -1 to 0"),
    ],
)
def test_arrays_of_a_wrong_form_are_refused(
    write_arrays: Callable[..., Path], images: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(ProbeSetError, match=message):
        opened("arrays", write_arrays(images, labels))


def test_a_pickle_in_arrays_is_never_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([object()]), labels=np.array([0]))
    with pytest.raises(ProbeSetError, match="no pickles"):
        opened("arrays", tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.mat"])
def test_files_that_are_not_arrays_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(ProbeSetError, match=r"to be \.npz or \.safetensors"):
        opened("arrays", tmp_path / name)


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, (9, 9, 9, 3), np.uint8), labels=[0] * 9)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:200], whole[:100] + b"xxxxxxxx" + whole[108:], b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(ProbeSetError, match=r"to be \.npz"):
            opened("arrays", path)


# CIFAR


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torchvision's CIFAR-10 files with three images in each half, and their checksums."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    pixels = np.repeat(np.array([[1], [2], [3]], np.uint8), 3072, axis=1)
    train = write("data_batch_1", {"data": pixels, "labels": [0, 2, 1]})
    test = write("test_batch", {"data": pixels + 10, "labels": [1, 1, 1]})
    meta = write("batches.meta", {"label_names": ["dog", "cat", "ice_bear"]})
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", train]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", test]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    return tmp_path


def test_cifar_is_read_from_torchvisions_files(cifar_root: Path) -> None:
    probe = opened("cifar10", cifar_root)
    assert probe.labels.tolist() == [1, 2, 0] and values_of(probe) == [1, 2, 3]
    assert values_of(opened("cifar10", cifar_root, split="test")) == [11, 12, 13]


def test_changed_cifar_files_are_refused_before_they_are_unpickled(cifar_root: Path) -> None:
    (cifar_root / "cifar-10-batches-py/data_batch_1").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ProbeSetError, match="found none, or damaged ones; unpack https"):
        opened("cifar10", cifar_root)


@pytest.mark.skipif(not CIFAR_TAR.exists(), reason=f"the CIFAR-10 images are not at {CIFAR_TAR}")
def test_a_tar_of_real_images() -> None:
    probe = opened("tar", CIFAR_TAR, tuple(name.upper() for name in CIFAR_LABELS))
    assert len(probe) == 2000 and probe.labels.bincount().tolist() == [200] * 10
    images, labels = next(iter(probe.subset(5).batches(50, config=InputConfig(size=(32, 32)))))
    assert images.shape == (50, 3, 32, 32) and labels.bincount().tolist() == [5] * 10
    assert 0.3 < float(images.mean()) < 0.6 and not probe.skipped


# The file of datasets


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "conf/data/animals", class_folders())
    (tmp_path / "conf/datasets.toml").write_text(
        '[datasets.animals]\nkind = "image-folder"\npath = "data/animals"\n'
        '[datasets.other]\nkind = "tar"\npath = "/abs/x.tar"\nclass_names = { n01 = "cat" }\n'
    )
    monkeypatch.chdir(tmp_path)
    specs = read_datasets(Path("conf/datasets.toml"))
    monkeypatch.chdir("/")
    assert len(open_dataset("animals", specs, LABELS)) == 6
    assert specs["other"].path == Path("/abs/x.tar") and specs["other"].class_names == {"n01": "cat"}


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[datasets.a", "not valid TOML"),
        ('[datasets.a]\nkind = "zip"\npath = "x"', "datasets.a.kind: Input should be 'image-folder'"),
        ('[datasets.a]\nkind = "tar"', "datasets.a.path: Field required"),
        ('[datasets.a]\nkind = "tar"\npath = "x"\npaht = "y"', "datasets.a.paht: Extra inputs"),
        ('[a]\nkind = "tar"\npath = "x"', r"expected tables \[datasets.NAME\]"),
        ('[datasets.probe]\nkind = "tar"\npath = "x"', "got 'probe'"),
        ('[datasets."../x"]\nkind = "tar"\npath = "x"', r"got '\.\./x'"),
    ],
)
def test_a_wrong_file_of_datasets_says_what_is_wrong(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "datasets.toml").write_text(toml)
    with pytest.raises(ProbeSetError, match=message):
        read_datasets(tmp_path / "datasets.toml")


def test_a_missing_file_of_datasets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProbeSetError, match="No such file"):
        read_datasets(tmp_path / "datasets.toml")


@pytest.mark.parametrize("name", ["x", "../animals", "/etc"])
def test_an_unknown_dataset_lists_the_known_ones(name: str) -> None:
    specs = {"animals": DatasetSpec(kind="tar", path=Path("x"))}
    with pytest.raises(ProbeSetError, match=f"one of the datasets probe, animals, got '{name}'"):
        open_dataset(name, specs, LABELS)


@pytest.mark.parametrize("kind", ["image-folder", "tar", "arrays", "cifar10", "cifar100"])
def test_nothing_at_the_path_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ProbeSetError, match="dataset 'animals'"):
        opened(kind, tmp_path / "nowhere.npz")


def test_class_folders_without_images_are_refused(open_files: Callable[..., ProbeSet]) -> None:
    with pytest.raises(ProbeSetError, match="expected class folders with images"):
        open_files({"cat/a.txt": b"", "0.txt": b""})
