"""The data sets: what is read, from where, how it is checked, and what is said when it is not there."""

import builtins
import gzip
import hashlib
import io
import os
import pickle
import socket
import struct
import sys
import time
import urllib.request
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_digits

from experiments.datasets import DatasetError, ImageData, _download, cifar10, fashionmnist, load, mnist, names, svhn

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_DATA = Path(os.environ.get("PYRO_AVI_DATA") or REPOSITORY.parent / "shared" / "data")
MODULES = {"cifar10": cifar10, "fashionmnist": fashionmnist, "mnist": mnist, "svhn": svhn}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test finds data that it was not given."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYRO_AVI_DATA", raising=False)


# Small files in the published formats.


def idx_file(images):
    """[N, H, W] as MNIST is published."""
    return gzip.compress(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())


def python2_batch(rows):
    """[N, 3072] in a dictionary as Python 2 pickled it for CIFAR10: strings are bytes."""

    def string(value):
        return b"T" + struct.pack("<i", len(value)) + value

    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", size) for size in rows.shape) + b"\x86"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + string(rows.tobytes()) + b"tb"
    return b"\x80\x02}(" + string(b"labels") + b"]" + string(b"data") + array + b"u."


def mat_file(images):
    """[N, 3, 32, 32] as SVHN is published."""
    stream = io.BytesIO()
    savemat(stream, {"X": images.transpose(2, 3, 1, 0), "y": np.zeros((len(images), 1), np.uint8)})
    return stream.getvalue()


def place(root, file, content):
    path = root / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return replace(file, size=len(content), md5=hashlib.md5(content).hexdigest())


@pytest.fixture(params=sorted(MODULES))
def published(request, tmp_path, monkeypatch):
    """A small data set under the published name: name, root, and its train and test pixels."""
    root, name, module = tmp_path / "published", request.param, MODULES[request.param]
    rng = np.random.default_rng(0)
    shape = (1, 28, 28) if "mnist" in name else (3, 32, 32)
    train, test = (rng.integers(0, 256, (size, *shape), dtype=np.uint8) for size in (10, 4))
    train[0, 0, 0, :2] = 0, 255
    if name == "cifar10":
        batches = zip(cifar10.TRAIN, np.split(train.reshape(10, -1), 5), strict=True)
        tables = tuple(place(root, file, python2_batch(rows)) for file, rows in batches)
        monkeypatch.setattr(cifar10, "TRAIN", tables)
        monkeypatch.setattr(cifar10, "TEST", place(root, cifar10.TEST, python2_batch(test.reshape(4, -1))))
    else:
        encode = mat_file if name == "svhn" else lambda images: idx_file(images[:, 0])
        monkeypatch.setattr(module, "TRAIN", place(root, module.TRAIN, encode(train)))
        monkeypatch.setattr(module, "TEST", place(root, module.TEST, encode(test)))
    return name, root, train, test


def files_of(name):
    module = MODULES[name]
    train = module.TRAIN if isinstance(module.TRAIN, tuple) else (module.TRAIN,)
    return (*train, module.TEST)


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Names and subsets.


def test_every_data_set_has_a_name_and_helpers_have_none():
    assert {"digits", *MODULES} <= set(names()) and not any(name.startswith("_") for name in names())


@pytest.mark.parametrize("name", names())
def test_every_data_set_gives_images_or_says_how_to_get_them(name, tmp_path):
    try:
        images = load(name, data_dir=tmp_path, num_train=10)
    except DatasetError as error:
        assert str(tmp_path) in str(error) and "--download" in str(error) and "--data-dir" in str(error)
        return
    assert images.name == name and len(images.train) == 10 and len(images.test) >= 1
    for part in (images.train, images.test):
        assert part.dtype == torch.float32 and part.dim() == 4 and part.shape[1:] == images.train.shape[1:]
        assert part.min() >= 0 and part.max() <= 1 and part.max() > 0.5
    assert torch.equal(load(name, data_dir=tmp_path, num_train=10).train, images.train)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["imagenet", "_idx", "", "mnist.TRAIN", "Fashion MNIST", None, 3])
def test_unknown_name(name):
    with pytest.raises(DatasetError, match=", ".join(names())) as caught:
        load(name)
    assert repr(name) in str(caught.value)


def test_names_in_any_case():
    assert load("DIGITS").name == "digits"
    with pytest.raises(DatasetError, match="FashionMNIST/raw"):
        load("FashionMNIST")


def test_digits_are_the_bundled_ones_split_once():
    images = load("digits")
    assert images.name == "digits"
    assert images.train.shape == (1437, 1, 8, 8) and images.test.shape == (360, 1, 8, 8)
    assert images.train.min() == 0 and images.train.max() == 1
    original = load_digits().images.reshape(-1, 64).astype(np.float32) / 16
    both = torch.cat([images.train, images.test]).flatten(1).numpy()
    # Equal as multisets of rows: no row is lost, none is in both parts.
    assert np.array_equal(both[np.lexsort(both.T)], original[np.lexsort(original.T)])


def test_the_split_of_digits_never_changes():
    """Results on digits compare only as long as the same rows are held out."""
    images = load("digits", seed=7)
    pixels = (images.test * 16).to(torch.uint8).numpy().tobytes()
    assert hashlib.md5(pixels).hexdigest() == "3181d5d84254ba98ecd5ca689eedc72e"


def test_subset_is_decided_by_name_number_and_seed_alone(published):
    name, root, train, _ = published
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load(name, data_dir=root, num_train=6, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(load(name.upper(), data_dir=root, num_train=6, seed=3).train, first.train)
    assert not torch.equal(load(name, data_dir=root, num_train=6, seed=4).train, first.train)
    everything = load(name, data_dir=root)
    assert torch.equal(first.test, everything.test)
    positions = [row for row in range(10) if (everything.train[row] == first.train).flatten(1).all(1).any()]
    assert len(positions) == 6 and torch.equal(everything.train[positions], first.train)


def test_a_subset_of_everything_is_everything():
    assert torch.equal(load("digits", num_train=1437, seed=5).train, load("digits").train)


@pytest.mark.parametrize("num_train", [0, -1, 1438])
def test_num_train_out_of_range(num_train):
    with pytest.raises(DatasetError, match=f"from 1 to 1,437.*got {num_train:,}"):
        load("digits", num_train=num_train)


# Reading.


def test_published_formats_are_read_pixel_for_pixel(published):
    name, root, train, test = published
    before = contents(root)
    images = load(name, data_dir=root)
    assert images.name == name
    assert np.array_equal(images.train.numpy(), train.astype(np.float32) / 255)
    assert np.array_equal(images.test.numpy(), test.astype(np.float32) / 255)
    assert images.train.is_contiguous() and images.test.is_contiguous()
    assert contents(root) == before


def test_the_data_folder_is_the_argument_else_the_variable_else_data(published, monkeypatch, tmp_path):
    name, root, _, _ = published
    with pytest.raises(DatasetError, match="elsewhere/data/"):
        load(name)
    monkeypatch.setenv("PYRO_AVI_DATA", "")
    with pytest.raises(DatasetError, match="elsewhere/data/"):
        load(name)
    monkeypatch.setenv("PYRO_AVI_DATA", str(root))
    assert len(load(name).train) == 10
    with pytest.raises(DatasetError, match="another/"):
        load(name, data_dir=tmp_path / "another")
    monkeypatch.delenv("PYRO_AVI_DATA")
    Path("data").symlink_to(root)
    assert len(load(name).train) == 10


def test_a_home_folder_is_expanded(published, monkeypatch):
    name, root, _, _ = published
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(load(name, data_dir=f"~/{root.name}").train) == 10


@pytest.mark.parametrize(
    ("name", "sizes", "mean", "std"),
    [("MNIST", (60_000, 10_000), 0.1307, 0.3081), ("FashionMNIST", (60_000, 10_000), 0.2860, 0.3530)],
)
def test_the_real_files(name, sizes, mean, std):
    if not (REAL_DATA / name / "raw").is_dir():
        pytest.skip(f"no {name} in {REAL_DATA}")
    images = load(name, data_dir=REAL_DATA)
    assert images.train.shape == (sizes[0], 1, 28, 28) and images.test.shape == (sizes[1], 1, 28, 28)
    assert images.train.mean().item() == pytest.approx(mean, abs=5e-5)
    assert images.train.std().item() == pytest.approx(std, abs=5e-5)
    assert images.train.min() == 0 and images.train.max() == 1


def test_idx_labels_are_refused(tmp_path, monkeypatch):
    labels = gzip.compress(struct.pack(">2I", 0x801, 100) + bytes(100))
    monkeypatch.setattr(mnist, "TRAIN", place(tmp_path, mnist.TRAIN, labels))
    with pytest.raises(DatasetError, match="0x00000803; got 0x00000801"):
        load("mnist", data_dir=tmp_path)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    content = pickle.dumps({b"data": Malicious(marker)}, protocol=2)
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    monkeypatch.setattr(cifar10, "TRAIN", (place(tmp_path, cifar10.TRAIN[0], content),))
    with pytest.raises(DatasetError, match="asks for .*It was not loaded"):
        load("cifar10", data_dir=tmp_path)
    assert not marker.exists()


def test_batches_pickled_by_any_numpy_are_read(tmp_path, monkeypatch):
    rows = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, -1)
    content = pickle.dumps({b"data": rows}, protocol=4)
    monkeypatch.setattr(cifar10, "TRAIN", (place(tmp_path, cifar10.TRAIN[0], content),))
    monkeypatch.setattr(cifar10, "TEST", place(tmp_path, cifar10.TEST, content))
    assert np.array_equal(load("cifar10", data_dir=tmp_path).test.flatten(1).numpy(), rows.astype(np.float32) / 255)


# Files that are missing or wrong.


def assert_both_ways(message, file, root):
    assert '- python -m pip install ".[vision]", then run again with --download\n' in message
    assert all(url in message for url in file.urls)
    target = f"unpack it in {root}" if file.archive_md5 else f"place it at {root / file.path}"
    assert target in message
    assert "--data-dir" in message and "PYRO_AVI_DATA" in message


def damaged(content):
    return {
        "truncated": content[:-5],
        "not the published file": content[:-1] + bytes([content[-1] ^ 1]),
    }


@pytest.mark.parametrize("verdict", ["truncated", "not the published file"])
@pytest.mark.parametrize("which", [0, -1])
def test_damaged_file(published, which, verdict):
    name, root, _, _ = published
    file = files_of(name)[which]
    path = root / file.path
    content = damaged(path.read_bytes())[verdict]
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        load(name, data_dir=root)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected the published file of {file.size:,} bytes, md5 {file.md5}; ")
    assert f"got {len(content):,} bytes, md5 {hashlib.md5(content).hexdigest()}: {verdict}." in message
    assert_both_ways(message, file, root)


@pytest.mark.parametrize("which", [0, -1])
def test_missing_file(published, which):
    name, root, _, _ = published
    file = files_of(name)[which]
    (root / file.path).unlink()
    with pytest.raises(DatasetError) as caught:
        load(name, data_dir=root)
    message = str(caught.value)
    assert f"{root / file.path}: expected the published file of {file.size:,} bytes, md5 {file.md5}; " in message
    assert "No such file or directory" in message
    assert_both_ways(message, file, root)


def test_missing_folder_and_a_file_in_its_place(tmp_path):
    with pytest.raises(DatasetError, match="No such file or directory"):
        load("svhn", data_dir=tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="Not a directory"):
        load("svhn", data_dir=tmp_path / "file")
    (tmp_path / "train_32x32.mat").mkdir()
    with pytest.raises(DatasetError, match="it is a directory, not a regular file: not the published file"):
        load("svhn", data_dir=tmp_path)


@pytest.mark.parametrize("kind", ["a FIFO", "a character device", "100 GB"])
def test_what_reading_would_wait_for_is_named_before(published, kind):
    name, root, _, _ = published
    file = files_of(name)[0]
    path = root / file.path
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "100 GB":
        with open(path, "wb") as sparse:
            sparse.truncate(100 * 10**9)
    else:
        path.symlink_to("/dev/zero")
    for download in (False, True):
        with pytest.raises(DatasetError) as caught:
            load(name, data_dir=root, download=download)
        said = "it has 100,000,000,000 bytes, more than" if kind == "100 GB" else f"it is {kind}, not a regular file"
        assert str(caught.value).startswith(f"{path}: expected the published file") and said in str(caught.value)
        assert "move away what lies there" in str(caught.value)


def test_published_sums_are_complete_and_distinct():
    files = [file for name in MODULES for file in files_of(name)]
    assert len({file.md5 for file in files}) == len({file.path for file in files}) == len(files) == 12
    sums = [file.md5 for file in files] + [cifar10.TEST.archive_md5]
    assert all(len(md5) == 32 and int(md5, 16) for md5 in sums)


# Downloads.


class Torchvision:
    """Stands in for ``torchvision.datasets.utils``: delivers copies of files by their names, and remembers its calls."""

    def __init__(self, source, fails=()):
        self.source, self.fails, self.calls, self.limits = source, fails, [], []

    def download_url(self, url, root, filename, md5):
        self.calls.append(url)
        self.limits.append(socket.getdefaulttimeout())
        path = Path(root, filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(self.calls) <= len(self.fails):
            path.write_bytes(b"half")
            raise self.fails[len(self.calls) - 1]
        if url == cifar10.TEST.urls[0]:
            assert md5 == cifar10.TEST.archive_md5
            path.write_bytes(b"the archive")
        else:
            (content,) = (content for name, content in self.source.items() if name.name == filename)
            path.write_bytes(content)
            assert hashlib.md5(content).hexdigest() == md5

    def extract_archive(self, from_path, to_path):
        assert Path(from_path).read_bytes() == b"the archive"
        for path, content in self.source.items():
            target = Path(to_path, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(_download, "PAUSES", (0.0, 0.0))


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in where ``torchvision`` is imported from."""

    def install(utils):
        package, subpackage = ModuleType("torchvision"), ModuleType("torchvision.datasets")
        package.datasets, subpackage.utils = subpackage, utils
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", subpackage)
        return utils

    return install


def emptied(root):
    """Takes all files out of a folder and returns them."""
    files = {path.relative_to(root): content for path, content in contents(root).items()}
    for path in files:
        (root / path).unlink()
    return files


def test_download_fetches_what_is_missing(published, install):
    name, root, train, _ = published
    before = contents(root)
    utils = install(Torchvision(emptied(root)))
    images = load(name, data_dir=root, download=True)
    assert np.array_equal(images.train.numpy(), train.astype(np.float32) / 255)
    # One archive holds all batches of CIFAR10; the others are two files.
    assert utils.calls == ([cifar10.TEST.urls[0]] if name == "cifar10" else [f.urls[0] for f in files_of(name)])
    assert set(utils.limits) == {_download.TIMEOUT} and socket.getdefaulttimeout() is None
    assert contents(root) == before | {root / ".downloads" / "lock": b""}


@pytest.mark.parametrize("in_the_way", ["half a file", "a folder", "a link to nothing"])
def test_download_replaces_nobodys_file(published, install, in_the_way):
    name, root, _, _ = published
    utils = install(Torchvision(emptied(root)))
    file = files_of(name)[-1]
    path = root / file.path
    if in_the_way == "a folder":
        path.mkdir()
    elif in_the_way == "a link to nothing":
        path.symlink_to("nothing")
    else:
        path.write_bytes(b"half")
    with pytest.raises(DatasetError, match="move away what lies there; nothing is replaced") as caught:
        load(name, data_dir=root, download=True)
    assert str(path) in str(caught.value) and file.urls[0] not in (utils.calls if name != "cifar10" else [])
    assert path.is_dir() or path.is_symlink() or path.read_bytes() == b"half"


def test_what_appears_during_a_download_is_kept(published, install):
    name, root, _, _ = published
    utils = install(Torchvision(emptied(root)))
    file = files_of(name)[0]
    deliver = utils.download_url

    def meanwhile(*arguments):
        deliver(*arguments)
        (root / file.path).parent.mkdir(exist_ok=True, parents=True)
        (root / file.path).write_bytes(b"mine")

    utils.download_url = meanwhile
    with pytest.raises(DatasetError, match="truncated"):
        load(name, data_dir=root, download=True)
    assert (root / file.path).read_bytes() == b"mine"


def test_half_a_download_has_no_name_in_the_data_folder(published, install):
    name, root, _, _ = published
    source = emptied(root)
    utils = install(Torchvision(source, fails=[TimeoutError("timed out")] * 9))
    with pytest.raises(DatasetError, match="the download failed, 3 times: .* gave TimeoutError: timed out"):
        load(name, data_dir=root, download=True)
    assert {path for path in root.rglob("*") if path.is_file() and ".downloads" not in path.parts} == set()
    utils.fails, utils.calls = [TimeoutError("timed out"), ConnectionResetError(104, "reset")], []
    assert len(load(name, data_dir=root, download=True).test) == 4


def test_where_there_are_no_hard_links_files_are_renamed(published, install, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    name, root, _, _ = published
    install(Torchvision(emptied(root)))
    assert len(load(name, data_dir=root, download=True).test) == 4


def test_a_server_that_says_nothing_is_left_after_a_while(tmp_path, install, monkeypatch):
    images = idx_file(np.zeros((3, 28, 28), np.uint8))
    silent = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{silent.getsockname()[1]}/images.gz"
    for name in ("TRAIN", "TEST"):
        file = place(tmp_path, getattr(mnist, name), images)
        monkeypatch.setattr(mnist, name, replace(file, urls=(url,)))
    emptied(tmp_path)
    # As torchvision opens it.
    utils = install(Torchvision({}))
    utils.download_url = lambda url, *arguments: urllib.request.urlopen(url)
    monkeypatch.setattr(_download, "TIMEOUT", 0.1)
    begin = time.monotonic()
    with silent, pytest.raises(DatasetError, match="3 times: http://127.*timed out"):
        load("mnist", data_dir=tmp_path, download=True)
    assert time.monotonic() - begin < 20


def test_download_of_what_is_there_needs_no_torchvision(published, monkeypatch):
    name, root, _, _ = published
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert len(load(name, data_dir=root, download=True).train) == 10
    assert len(load("digits", download=True).test) == 360


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'torchvision'"),
        # What torchvision raises beside a CPU-only torch.
        RuntimeError("operator torchvision::nms does not exist"),
        OSError("libcudart.so: cannot open shared object file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_torchvision_cannot_be_imported(published, monkeypatch, error):
    name, root, _, _ = published
    emptied(root)
    genuine = builtins.__import__

    def failing(module, *args, **kwargs):
        if module.partition(".")[0] == "torchvision":
            raise error
        return genuine(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", failing)
    with pytest.raises(DatasetError) as caught:
        load(name, data_dir=root, download=True)
    message = str(caught.value)
    assert f"torchvision, which downloads it, cannot be imported ({type(error).__name__}: {error})" in message
    assert "built for another torch" in message
    assert_both_ways(message, files_of(name)[0], root)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("File not found or corrupted."), IncompleteRead(b"")],
    ids=lambda error: type(error).__name__,
)
def test_download_fails(published, install, error):
    name, root, _, _ = published
    file = files_of(name)[0]
    utils = install(Torchvision(emptied(root), fails=[error] * 3 * len(file.urls)))
    with pytest.raises(DatasetError) as caught:
        load(name, data_dir=root, download=True)
    message = str(caught.value)
    assert utils.calls == 3 * list(file.urls)
    assert all(f"{url} gave {type(error).__name__}: {error}" in message for url in file.urls)
    assert_both_ways(message, file, root)


def test_the_second_source_is_tried_when_the_first_fails(tmp_path, install, monkeypatch):
    images = idx_file(np.arange(3 * 784, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28))
    monkeypatch.setattr(mnist, "TRAIN", place(tmp_path, mnist.TRAIN, images))
    monkeypatch.setattr(mnist, "TEST", place(tmp_path, mnist.TEST, images))
    utils = install(Torchvision(emptied(tmp_path), fails=[OSError("no route")]))
    assert len(load("mnist", data_dir=tmp_path, download=True).train) == 3
    assert utils.calls == [*mnist.TRAIN.urls, mnist.TEST.urls[0]]


def test_a_download_that_delivers_something_else_is_refused(published, install, monkeypatch):
    name, root, _, _ = published
    emptied(root)
    silent = ModuleType("utils")
    silent.download_url = lambda url, root, name, md5: Path(root, name).touch() if name.endswith(".tar.gz") else None
    silent.extract_archive = lambda *arguments: None
    install(silent)
    with pytest.raises(DatasetError, match="No such file or directory"):
        load(name, data_dir=root, download=True)


# A user's own data.

GOOD = torch.full((3, 1, 2, 2), 0.5)


def with_pixel(value):
    images = GOOD.clone()
    images[1, 0, 0, 1] = value
    return images


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (GOOD.numpy(), GOOD, "train: expected a torch.Tensor, got ndarray"),
        (GOOD, GOOD.double(), "test: expected dtype torch.float32, got torch.float64"),
        ((GOOD * 255).byte(), GOOD, r"train: .* got torch.uint8. For 8-bit pixels: images.float\(\) / 255"),
        (GOOD[:, 0], GOOD, r"train: expected images \[N, C, H, W\].*got shape \[3, 2, 2\]"),
        (GOOD, GOOD[:0], r"test: .* no dimension empty, got shape \[0, 1, 2, 2\]"),
        (GOOD[..., :0], GOOD, r"train: .* got shape \[3, 1, 2, 0\]"),
        (with_pixel(float("nan")), GOOD, "train: expected finite pixels .* got 1 of 3 .*first is row 1.* nan to nan"),
        (GOOD, with_pixel(float("inf")), "test: expected finite pixels .* row 1, whose pixels go from 0.5 to inf"),
        (with_pixel(1.5), GOOD, r"train: expected finite pixels in \[0, 1\].* from 0.5 to 1.5"),
        (with_pixel(-0.25), GOOD, "row 1, whose pixels go from -0.25 to 0.5"),
        (GOOD, torch.zeros(3, 1, 2, 3), r"of one shape \[C, H, W\], got \[1, 2, 2\] and \[1, 2, 3\]"),
    ],
)
def test_image_data_refuses(train, test, message):
    with pytest.raises(DatasetError, match=f"Data set 'mine'.*{message}"):
        ImageData("mine", train, test)


def test_image_data_takes_the_whole_range_and_is_frozen():
    images = ImageData("mine", with_pixel(0.0), with_pixel(1.0))
    assert images == images and images != ImageData("mine", GOOD, GOOD)
    with pytest.raises(AttributeError):
        images.name = "yours"


def test_data_set_problems_are_value_errors():
    assert issubclass(DatasetError, ValueError)
