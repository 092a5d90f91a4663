"""Data sets of the experiments, read from their standard files and drawn into three sets of tensors.

| data set | files |
|---|---|
| digits | part of scikit-learn |
| MNIST | ROOT/mnist/train-images-idx3-ubyte[.gz] and the three others |
| CIFAR-100 | ROOT/cifar-100-binary/train.bin, test.bin |
| CIFAR-100N | ROOT/cifar-100n/noisy_fine.npy |
| TinyImageNet | ROOT/tiny-imagenet-200/ |

Nothing is downloaded.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fmn_ref as fmn

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Data = tuple[Tensor, Tensor]


class Source(NamedTuple):
    """A data set: images (n, channels, height, width) uint8 and their labels.

    `human` holds labels that people gave to the training images, where there are such labels.
    """

    train: tuple[Images, Labels]
    test: tuple[Images, Labels]
    n_classes: int
    human: Labels | None = None


class Split(NamedTuple):
    """Three disjoint sets; only the labels of `train` are noisy."""

    train: Data
    select: Data
    test: Data
    n_classes: int
    share_wrong: float


def digits(root: Path) -> Source:
    """Read 1 797 grey images of 8 x 8 pixels. All sets are drawn from the same images (`split` with `pooled`)."""
    from sklearn.datasets import load_digits

    content = load_digits()
    x, y = (content.images[:, None] * 255 / 16).round().astype(np.uint8), content.target.astype(np.int64)
    return Source((x, y), (x, y), 10)


def mnist(root: Path) -> Source:
    """Read grey images of 28 x 28 pixels: 60 000 and 10 000."""
    return Source(_idx_pair(root / "mnist", "train"), _idx_pair(root / "mnist", "t10k"), 10)


def cifar100(root: Path) -> Source:
    """Read colour images of 32 x 32 pixels, 50 000 and 10 000, with fine labels, and CIFAR-100N if its file exists."""
    pairs = []
    for name in ("train", "test"):
        path = root / "cifar-100-binary" / f"{name}.bin"
        raw = np.fromfile(path, np.uint8)
        if raw.size == 0 or raw.size % 3074:
            raise ValueError(f"{path}: expected records of 3074 bytes, got {raw.size} bytes")
        rows = raw.reshape(-1, 3074)
        pairs.append((rows[:, 2:].reshape(-1, 3, 32, 32), rows[:, 1].astype(np.int64)))
    path = root / "cifar-100n" / "noisy_fine.npy"
    human = np.load(path, allow_pickle=False).astype(np.int64) if path.exists() else None
    return Source(pairs[0], pairs[1], 100, human)


def tinyimagenet(root: Path) -> Source:
    """Read colour images of 64 x 64 pixels and 200 classes: 100 000 and 10 000."""
    folder = root / "tiny-imagenet-200"
    classes = {name: i for i, name in enumerate((folder / "wnids.txt").read_text().split())}
    train = [(path, classes[path.parent.parent.name]) for path in sorted(folder.glob("train/*/images/*.JPEG"))]
    lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    test = [(folder / "val" / "images" / name, classes[label]) for name, label, *_ in map(str.split, lines)]
    return Source(_jpegs(train), _jpegs(test), len(classes))


def _jpegs(samples: list[tuple[Path, int]]) -> tuple[Images, Labels]:
    from PIL import Image

    images = np.empty((len(samples), 3, 64, 64), np.uint8)
    for i, (path, _) in enumerate(samples):
        with Image.open(path) as image:
            images[i] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    return images, np.array([label for _, label in samples], np.int64)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar100": cifar100,
    "tinyimagenet": tinyimagenet,
}


def of_classes(source: Source, classes: range) -> Source:
    """Keep the samples of some classes, with the labels that they have. People's labels may be others: none stay."""

    def keep(images: Images, labels: Labels) -> tuple[Images, Labels]:
        kept = np.isin(labels, classes)
        return images[kept], labels[kept]

    return Source(keep(*source.train), keep(*source.test), len(classes))


def split(
    source: Source,
    noise: str,
    seed: int,
    n_train: int | None,
    n_select: int,
    n_test: int,
    *,
    pooled: bool = False,
    classes: range | None = None,
) -> Split:
    """Draw disjoint training, selection and test sets, and add noise to the training labels.

    Images are scaled by the training images' mean and standard deviation of each channel.

    Parameters
    ----------
    source : Source
    noise : str
        "clean", "human", or "sym" or "asym" with a percentage, as in "sym20".
    seed : int
    n_train : int or None
        None: all training images.
    n_select, n_test : int
        Drawn from the test images.
    pooled : bool, default False
        Training and test images of the source are the same: draw all three sets from them.
    classes : range, optional
        Classes that take part, wrong labels included; default: all.
    """
    first = 0
    if classes is not None:
        source, first = of_classes(source, classes), classes.start
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(source.train[1]))
    rows = order if n_train is None else order[:n_train]
    held = order[len(rows) :] if pooled else rng.permutation(len(source.test[1]))
    if n_select + n_test > len(held):
        raise ValueError(f"expected at most {len(held)} samples to select and score on, got {n_select + n_test}")
    select, test = held[:n_select], held[n_select : n_select + n_test]
    x, y = source.train[0][rows], source.train[1][rows]
    human = None if source.human is None else source.human[rows]
    noisy = first + wrong_labels(y - first, noise, source.n_classes, seed, human)
    mean = x.mean((0, 2, 3), dtype=np.float64)[:, None, None] / 255
    std = x.std((0, 2, 3), dtype=np.float64)[:, None, None] / 255

    def scaled(images: Images, labels: Labels) -> Data:
        return torch.from_numpy(((images / 255 - mean) / std).astype(np.float32)), torch.from_numpy(labels)

    held_out = [scaled(source.test[0][r], source.test[1][r]) for r in (select, test)]
    return Split(scaled(x, noisy), held_out[0], held_out[1], source.n_classes, float((noisy != y).mean()))


def wrong_labels(y: Labels, noise: str, n_classes: int, seed: int, human: Labels | None) -> Labels:
    """Add the noise that `noise` names to labels."""
    if noise == "clean":
        return y
    if noise == "human":
        if human is None:
            raise ValueError("human: needs ROOT/cifar-100n/noisy_fine.npy")
        return human
    for kind, make in (("asym", fmn.asymmetric_noise), ("sym", fmn.symmetric_noise)):
        if noise.startswith(kind) and noise[len(kind) :].isdigit():
            return make(y, int(noise[len(kind) :]) / 100, n_classes, seed)
    raise ValueError(f"noise: expected 'clean', 'human', or 'sym' or 'asym' with a percentage, got {noise!r}")


def _idx_pair(folder: Path, name: str) -> tuple[Images, Labels]:
    images, labels = _idx(folder / f"{name}-images-idx3-ubyte", 3), _idx(folder / f"{name}-labels-idx1-ubyte", 1)
    return images[:, None], labels.astype(np.int64)


def _idx(path: Path, n_axes: int) -> Images:
    """Read an IDX file of bytes, compressed or not."""
    zipped = path.with_name(path.name + ".gz")
    raw = gzip.decompress(zipped.read_bytes()) if zipped.exists() else path.read_bytes()
    shape = np.frombuffer(raw, ">u4", n_axes, 4)
    if raw[:4] != bytes([0, 0, 8, n_axes]) or len(raw) != 4 + 4 * n_axes + shape.prod():
        raise ValueError(f"{path}: not an IDX file of bytes with {n_axes} axes, or cut short")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_axes).reshape(shape)
