"""Sets of small images, read from the files in which they are published, and their batches.

* ``digits``: 1,797 digits of 8x8 pixels, part of scikit-learn; nothing to download.
* ``digits-1024``: the same with more of them for validation, split as ``digits.py`` does.
* ``mnist``, ``fashion-mnist``: ``DATA_DIR/<name>/{train,t10k}-{images-idx3,labels-idx1}-ubyte``, gzipped or not.
* ``cifar-10``: ``DATA_DIR/cifar-10-batches-bin/{data_batch_1,...,data_batch_5,test_batch}.bin``, the binary version.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import programs
from programs import UserError
from runs import Run

SOURCES = {
    "digits": "scikit-learn",
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist",
    "cifar-10": "https://www.cs.toronto.edu/~kriz/cifar.html (binary version)",
    "digits-1024": "scikit-learn",
}
VALIDATION_FRACTION = 0.1  # of the training images: they choose learning rates and options
VALIDATION_SIZES = {"digits-1024": 323}  # where it is another part
CIFAR_SHAPE = (3, 32, 32)  # as stored: one plane a colour


class Split(NamedTuple):
    """Images of 0 to 255, ``[n, height, width, channels]`` uint8, and their classes, ``[n]`` int32."""

    images: np.ndarray
    labels: np.ndarray


class ImageData(NamedTuple):
    """One set of images, cut in three."""

    train: Split
    validation: Split
    test: Split


def load(name: str, data_dir: Path) -> ImageData:
    """Reads a set of images.

    A tenth of the published training images, drawn by a fixed seed with the proportions of the classes, is kept for
    validation.

    Args:
      name: one of ``SOURCES``.
      data_dir: the folder that holds the files, as the module's description has them.

    Returns:
      The images for training, validation and test.

    Raises:
      FileNotFoundError: if a file is missing; names it and where to get it.
      UserError: if the name is unknown, or a file is not what its format says.
    """
    match name:
        case "digits" | "digits-1024":
            pixels, labels = load_digits(return_X_y=True)
            images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
            train, test = _split(Split(images, labels.astype(np.int32)), 0.25)
        case "mnist" | "fashion-mnist":
            train, test = (_idx_split(data_dir / name, prefix, name) for prefix in ("train", "t10k"))
        case "cifar-10":
            folder = data_dir / "cifar-10-batches-bin"
            batches = [_read_cifar(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
            train = Split(*map(np.concatenate, zip(*batches, strict=True)))
            test = _read_cifar(folder / "test_batch.bin")
        case _:
            raise UserError(programs.unknown("data set", name, list(SOURCES)))
    return ImageData(*_split(train, VALIDATION_SIZES.get(name, VALIDATION_FRACTION)), test)


def _split(split: Split, size: float) -> tuple[Split, Split]:
    rest, part = train_test_split(np.arange(len(split.labels)), test_size=size, stratify=split.labels, random_state=0)
    return Split(split.images[rest], split.labels[rest]), Split(split.images[part], split.labels[part])


def _idx_split(folder: Path, prefix: str, name: str) -> Split:
    images = read_idx(_find_idx(folder / f"{prefix}-images-idx3-ubyte", name))
    labels = read_idx(_find_idx(folder / f"{prefix}-labels-idx1-ubyte", name))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UserError(
            f"{folder}: {prefix} images of shape {images.shape} and labels of shape {labels.shape}; expected "
            "[n, height, width] and [n]"
        )
    return Split(images[..., None], labels.astype(np.int32))


def _find_idx(path: Path, name: str) -> Path:
    gzipped = path.with_name(f"{path.name}.gz")
    if not path.is_file() and not gzipped.is_file():
        raise FileNotFoundError(missing(f"{path}[.gz]", name, path.parent))
    return path if path.is_file() else gzipped


def missing(path: str, name: str, folder: Path) -> str:
    """Returns what to do about a file that is missing."""
    return (
        f"{path} is missing: put the files of {name} from {SOURCES[name]} into {folder}, or name with --data-dir the "
        f"folder that has {folder.name}/ (--quick and the digits need no files)"
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The format: two zero bytes, the code of the type (8: unsigned byte), the number of axes, every axis' size as a
    big-endian 32-bit integer, then the data.

    Raises:
      UserError: if the file is not such a file, or shorter or longer than its header says.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file ({error})") from error
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise UserError(f"{path}: not an idx file of unsigned bytes; its first bytes are {content[:4].hex(' ')!r}")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if len(data) != math.prod(shape):
        raise UserError(f"{path}: {len(data):,} bytes of data; its header says {shape}, {math.prod(shape):,} bytes")
    return data.reshape(shape)


def _read_cifar(path: Path) -> Split:
    if not path.is_file():
        raise FileNotFoundError(missing(str(path), "cifar-10", path.parent))
    content, record = np.fromfile(path, np.uint8), 1 + math.prod(CIFAR_SHAPE)
    if len(content) == 0 or len(content) % record:
        raise UserError(f"{path}: {len(content):,} bytes; expected a multiple of {record:,}, the bytes of an image")
    records = content.reshape(-1, record)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise UserError(f"{path}: label {labels.max()} of image {labels.argmax()}; expected 0 to 9")
    return Split(records[:, 1:].reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1), labels)


class Examples:
    """A split as a source of single examples, for the library that shuffles and batches them."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: Any) -> Split:
        return Split(self.split.images[index], self.split.labels[index])


def shift_and_flip(example: Split, rng: np.random.Generator) -> Split:
    """Moves an image by up to 4 pixels either way, black coming in, and mirrors every second one."""
    height, width, _ = example.images.shape
    top, left = rng.integers(0, 9, size=2)
    shifted = np.pad(example.images, ((4, 4), (4, 4), (0, 0)))[top : top + height, left : left + width]
    return Split(shifted[:, ::-1] if rng.random() < 0.5 else shifted, example.labels)


def batches(run: Run, split: Split) -> Iterator[Split]:
    """Yields the batches of a run: every epoch in a new order, the last batch of one reaching into the next."""
    dataset = grain.MapDataset.source(Examples(split)).seed(run.seed).shuffle().repeat()
    if run.augment:
        dataset = dataset.random_map(shift_and_flip)
    dataset = dataset.batch(run.batch_size)
    return (dataset[step] for step in range(run.examples // run.batch_size))
