"""Sets of images: the files in which they are published, and their batches."""

import dataclasses
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from rows import ANY_RUN

import images


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, compress=gzip.compress, suffix=".gz"):
    rng = np.random.default_rng(0)
    written = {}
    folder.mkdir()
    for prefix, n in (("train", 200), ("t10k", 50)):
        pixels, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(compress(idx(pixels)))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx(labels)))
        written[prefix] = pixels, labels
    return written


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
def test_idx_files(tmp_path, compress, suffix):
    written = write_mnist(tmp_path / "mnist", compress, suffix)
    data = images.load("mnist", tmp_path)
    assert data.test.images.shape == (50, 28, 28, 1)
    np.testing.assert_array_equal(data.test.images[..., 0], written["t10k"][0])
    np.testing.assert_array_equal(data.test.labels, written["t10k"][1])
    # Training and validation images are the training file's, each once, in a tenth the classes' proportions.
    both = np.concatenate([data.train.images, data.validation.images])
    assert len(data.validation.labels) == 20
    assert (np.bincount(data.validation.labels) == 2).all()
    assert {image.tobytes() for image in both} == {image.tobytes() for image in written["train"][0]}


def test_cifar_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        planes, labels = rng.integers(0, 256, (20, 3, 32, 32), np.uint8), (np.arange(20) % 10).astype(np.uint8)
        (folder / name).write_bytes(b"".join(bytes([y]) + x.tobytes() for x, y in zip(planes, labels, strict=True)))
    data = images.load("cifar-10", tmp_path)
    assert data.train.images.shape == (90, 32, 32, 3)
    assert data.validation.images.shape == (10, 32, 32, 3)
    for colour in range(3):
        np.testing.assert_array_equal(data.test.images[..., colour], planes[:, colour])
    np.testing.assert_array_equal(data.test.labels, labels)


def corrupt(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "train-images-idx3-ubyte",
            lambda b: b[:-1],
            r"156,799 bytes of data; its header says \(200, 28, 28\)",
        ),
        ("train-images-idx3-ubyte", lambda b: b + b"x", "156,801 bytes of data"),
        ("train-images-idx3-ubyte", lambda b: b[:9], "not an idx file"),
        (
            "t10k-labels-idx1-ubyte",
            lambda _: b"<html>",
            "not an idx file of unsigned bytes; its first bytes are '3c",
        ),
        ("t10k-labels-idx1-ubyte", lambda _: b"", "not an idx file"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.zeros(49, np.uint8)), r"images of shape \(50, 28, 28\) and labels"),
    ],
)
def test_malformed_idx_files(tmp_path, file, change, message):
    write_mnist(tmp_path / "mnist", bytes, "")
    corrupt(tmp_path / "mnist" / file, change)
    with pytest.raises(ValueError, match=message):
        images.load("mnist", tmp_path)


@pytest.mark.parametrize(
    "change", [lambda b: b[: len(b) // 2], lambda b: b"not gzip" + b, lambda b: b[:50] + b"x" + b[51:]]
)
def test_malformed_gzip_files(tmp_path, change):
    write_mnist(tmp_path / "mnist")
    corrupt(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", change)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: not a whole gzip file"):
        images.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes; expected a multiple of 3,073"),
        (bytes(3072), "3,072 bytes; expected a multiple of 3,073"),
        (bytes([10]) + bytes(3072), "label 10 of image 0; expected 0 to 9"),
    ],
)
def test_malformed_cifar_files(tmp_path, content, message):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        images.load("cifar-10", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", r"train-images-idx3-ubyte\[.gz\] is missing: put the files of mnist from https.* into .*mnist, or"),
        (
            "cifar-10",
            r"data_batch_1.bin is missing: put the files of cifar-10 from https.* into .*cifar-10-batches-",
        ),
    ],
)
def test_missing_files(tmp_path, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        images.load(name, tmp_path)


def test_unknown_data():
    with pytest.raises(ValueError, match=r"no data set 'imagenet'; there are digits, .*mnist"):
        images.load("imagenet", Path())


def test_every_epoch_sees_every_example_once():
    split = images.Split(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10))
    run = dataclasses.replace(ANY_RUN, batch_size=4, examples=20)
    seen = np.concatenate([batch.labels for batch in images.batches(run, split)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    again = np.concatenate([batch.labels for batch in images.batches(run, split)])
    np.testing.assert_array_equal(seen, again)
    other = np.concatenate([b.labels for b in images.batches(dataclasses.replace(run, seed=1), split)])
    assert list(seen) != list(other)


def test_augmented_images_are_shifted_and_mirrored():
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    split = images.Split(np.stack([image] * 4), np.arange(4))
    run = dataclasses.replace(ANY_RUN, augment=True, batch_size=4, examples=400)
    seen = [x for batch in images.batches(run, split) for x in batch.images]
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[i : i + 8, j : j + 8].tobytes(): False for i in range(9) for j in range(9)}
    windows |= {padded[i : i + 8, j : j + 8][:, ::-1].tobytes(): True for i in range(9) for j in range(9)}
    mirrored = [windows[x.tobytes()] for x in seen]
    assert 0.4 < np.mean(mirrored) < 0.6
    assert len({x.tobytes() for x in seen}) > 100
