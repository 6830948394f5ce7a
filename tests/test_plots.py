# SPDX-License-Identifier: Apache-2.0
"""What the pictures hold is what the data say; they are drawn without warnings and without side effects."""

from __future__ import annotations

import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from escnn import group, gspaces
from escnn import nn as enn

from pyro_equiflow import equivariant_flow
from pyro_equiflow.ops.events import act
from pyro_equiflow.plots import plot_density, plot_equivariance_error, plot_rotations, plot_samples, plot_training
from pyro_equiflow.testing import equivariance_error, equivariance_errors

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _closed_figures_and_untouched_settings():
    before = dict(matplotlib.rcParams)
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # what is wrong with a figure shows when it is drawn; warnings are errors
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


def plane(symmetry: group.Group, *irrep: int) -> enn.FieldType:
    space = gspaces.no_base_space(symmetry)
    return enn.FieldType(space, [space.irrep(*irrep)])


def labelled(axes, label: str):
    """The one artist of a label."""
    (found,) = [artist for artist in axes.get_children() if artist.get_label() == label]
    return found


# ---- the plane -----------------------------------------------------------------------------------------------------


def test_orbit_of_finite_group_is_marked_where_the_group_moves_the_point() -> None:
    """Every distinct image of the point, and the point itself, once."""
    kind, point = plane(group.dihedral_group(4), 1, 1), torch.tensor([1.0, 0.5], dtype=torch.float64)
    axes = plot_samples(torch.zeros(1, 2), field_type=kind, point=point)
    marked = np.concatenate([labelled(axes, name).get_offsets() for name in ("point", "orbit")])
    moved = torch.stack([act(kind, g, point) for g in group.dihedral_group(4).elements]).numpy()
    assert marked.shape == (8, 2)
    assert np.abs(marked[:, None] - moved).sum(-1).min(0).max() < 1e-12


def test_stabilised_point_is_marked_once_an_image() -> None:
    """On the axis of a reflection the orbit has half as many points."""
    axes = plot_samples(torch.zeros(1, 2), field_type=plane(group.dihedral_group(4), 1, 1), point=(1.0, 0.0))
    assert len(labelled(axes, "orbit").get_offsets()) == 3


@pytest.mark.parametrize(
    "kind", [plane(group.so2_group(), 1), plane(group.so2_group(), 4), plane(group.o2_group(), 1, 2)]
)
def test_orbit_of_continuous_group_is_the_circle(kind: enn.FieldType) -> None:
    """Of the point's radius."""
    axes = plot_density(lambda x: -x.square().sum(-1), limits=(-2, 2), field_type=kind, point=(0.6, 0.8), resolution=9)
    assert np.allclose(np.linalg.norm(labelled(axes, "orbit").get_xydata(), axis=-1), 1)


def test_orbit_of_continuous_group_that_reflects_only_is_two_points() -> None:
    """O(2) acts on its sign representation by signs."""
    space = gspaces.no_base_space(group.o2_group())
    kind = enn.FieldType(space, [space.trivial_repr, space.irrep(1, 0)])
    axes = plot_samples(torch.zeros(1, 2), field_type=kind, point=(1.0, 2.0))
    assert np.allclose(labelled(axes, "orbit").get_offsets(), [[1, -2]])


def test_density_is_scored_at_the_points_of_the_grid() -> None:
    """In the point's dtype, over limits of each coordinate, up to a constant."""
    seen = []

    def score(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return 1e4 - x.square().sum(-1)

    point = torch.tensor([1.0, 0.0], dtype=torch.float64)
    kind = plane(group.cyclic_group(4), 1)
    axes = plot_density(score, limits=((-1, 1), (0, 3)), field_type=kind, point=point, resolution=101)
    grid = torch.cat(seen)
    assert grid.dtype == torch.float64
    assert grid.shape == (101**2, 2)
    assert grid.amin(0).tolist() == [-1, 0]
    assert grid.amax(0).tolist() == [1, 3]
    assert (axes.get_xlim(), axes.get_ylim()) == ((-1, 1), (0, 3))
    contours = next(artist for artist in axes.get_children() if hasattr(artist, "levels"))
    # The contour of a tenth step lies where exp(-r^2) has that value.
    vertices = contours.get_paths()[4].vertices
    inside = vertices[(np.abs(vertices[:, 0]) < 0.99) & (vertices[:, 1] > 0.01)]
    values = np.exp(-np.square(inside).sum(-1))
    assert len(inside) > 20
    assert np.minimum(np.abs(values - 0.4), np.abs(values - 0.5)).max() < 5e-3


def test_density_takes_a_distribution_and_values_that_are_not_numbers() -> None:
    """A density may vanish, or be undefined, somewhere."""
    plot_density(dist.Normal(torch.zeros(2), 1.0).to_event(1), limits=(-1, 1), resolution=9)
    plot_density(lambda x: x[:, 0].log(), limits=(-1, 1), resolution=9)


def test_samples_are_drawn_as_they_are() -> None:
    """Whatever their batch shape, one set or several."""
    first, second = torch.randn(3, 5, 2), torch.randn(4, 2)
    axes = plot_samples({"first": first, "second": second})
    drawn = [np.asarray(c.get_offsets()) for c in axes.collections if len(c.get_offsets())]
    assert np.allclose(drawn[0], first.reshape(-1, 2))
    assert np.allclose(drawn[1], second)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second"]


def test_panels_may_share_their_axes() -> None:
    """Side by side on one scale, with a legend on one of them."""
    _, (left, right) = plt.subplots(1, 2, sharex=True, sharey=True, layout="constrained")
    plot_samples({"draws": torch.randn(9, 2)}, ax=left)
    plot_density(lambda x: -x.square().sum(-1), limits=(-1, 1), resolution=9, ax=right)
    assert left.get_aspect() == right.get_aspect() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"point": (1.0, 0.0)}, "field_type: expected one beside point"),
        ({"field_type": plane(group.so2_group(), 1)}, "point: expected one beside field_type"),
        ({"field_type": plane(group.so2_group(), 0), "point": (1.0, 0.0)}, "field_type: expected one of size 2"),
        ({"field_type": plane(group.so2_group(), 1), "point": torch.ones(3, 2)}, r"point: expected shape \(2,\)"),
        ({"limits": (1, -1)}, "limits: expected"),
        ({"limits": 2.0}, "limits: expected"),
        ({"limits": ((0, 1), (0, 1), (0, 1))}, "limits: expected"),
        ({"resolution": 1}, "resolution: expected"),
    ],
)
def test_bad_arguments_of_the_plane_are_refused(arguments: dict, message: str) -> None:
    """With what was expected."""
    with pytest.raises(ValueError, match=message):
        plot_density(lambda x: x[:, 0], **{"limits": (-1, 1), "resolution": 5, **arguments})


@pytest.mark.parametrize("score", [lambda x: x, lambda x: x[:, 0] * torch.nan, lambda x: -torch.log(0 * x[:, 0])])
def test_bad_densities_are_refused(score) -> None:
    """Of another shape, never finite, infinite."""
    with pytest.raises(ValueError, match="log_prob: expected"):
        plot_density(score, limits=(-1, 1), resolution=5)


def test_samples_of_another_size_are_refused() -> None:
    """Three coordinates want a choice."""
    with pytest.raises(ValueError, match=r"samples: expected shape \(\*batch, 2\), found \(4, 3\)"):
        plot_samples(torch.zeros(4, 3))


# ---- group elements ------------------------------------------------------------------------------------------------


def test_stems_are_as_high_as_the_errors() -> None:
    """Of each map and element; errors of 0 lie at the edge, the line at the machine epsilon."""
    space = gspaces.no_base_space(group.dihedral_group(4))
    kind = enn.FieldType(space, 2 * [space.irrep(1, 1)])
    maps = {"flow": equivariant_flow(kind, num_transforms=1), "relu": torch.relu}
    x = torch.randn(20, 4)
    maps["flow"](x)
    axes = plot_equivariance_error(maps, x, field_type=kind)
    for label, function in maps.items():
        errors = np.array([error for _, error in equivariance_errors(function, x, kind)])
        heights = np.asarray(labelled(axes, label).get_offsets())[:, 1]
        assert np.array_equal(heights, errors[errors > 0])
    stems = [c for c in axes.collections if hasattr(c, "get_segments")]
    tops = np.array([segment[1, 1] for segment in stems[1].get_segments()])
    assert np.array_equal(tops, errors[errors > 0])
    assert set(labelled(axes, "machine epsilon, float32").get_ydata()) == {torch.finfo(torch.float32).eps}
    names = [text.get_text() for text in axes.get_xticklabels()]
    assert names == [f"{90 * k}°" for k in range(4)] + ["mirror 0°", "mirror 45°", "mirror 90°", "mirror 135°"]
    assert axes.get_yscale() == "log"


def test_many_elements_have_few_labels_and_unknown_ones_their_own_names() -> None:
    """Of O(2) and of SO(3)."""
    kind = plane(group.o2_group(), 1, 1)
    assert len(plot_equivariance_error(torch.tanh, torch.randn(3, 2), field_type=kind).get_xticks()) <= 13
    elements = list(group.so3_group().testing_elements())[:3]
    axes = plot_equivariance_error(
        torch.tanh, torch.randn(3, 3), field_type=plane(group.so3_group(), 1), elements=elements
    )
    assert axes.get_xticklabels()[0].get_text() == " ".join(str(elements[0]).split())


def test_errors_that_are_not_finite_are_refused() -> None:
    """A stem without height would go unseen; so would NaN in the largest error."""
    kind, x = plane(group.cyclic_group(4), 1), torch.tensor([[1.0, 2.0]])
    assert np.isnan(equivariance_error(lambda v: v.log(), x, kind))
    with pytest.raises(ValueError, match="function: expected finite images"):
        plot_equivariance_error(lambda v: v.log(), x, field_type=kind)


def test_pictures_are_turned_as_the_group_says() -> None:
    """One column an element, and a quarter turn is that of the array."""
    space = gspaces.rot2dOnR2(4)
    kind, x = enn.FieldType(space, [space.trivial_repr]), torch.rand(2, 1, 5, 5)
    axes = plot_rotations(x, kind)
    assert axes.shape == (2, 4)
    for turns in range(4):
        assert axes[0, turns].get_title() == f"{90 * turns}°"
        for row in range(2):
            shown = axes[row, turns].images[0].get_array()
            assert np.allclose(shown, x[row, 0].rot90(turns))


def test_pictures_of_a_function_stand_below_their_images() -> None:
    """Of vectors the lengths, of three invariant channels the colours, on one scale a row."""
    space = gspaces.flipRot2dOnR2(4)
    colours, vectors = enn.FieldType(space, 3 * [space.trivial_repr]), enn.FieldType(space, [space.irrep(1, 1)])
    x = torch.rand(2, 3, 4, 4)
    axes = plot_rotations(
        x, colours, function=lambda v: v[:, :2], out_type=vectors, elements=[space.fibergroup.identity]
    )
    assert axes.shape == (4, 1)
    for row in range(2):
        assert np.allclose(axes[2 * row, 0].images[0].get_array(), x[row].movedim(0, -1))
        picture = axes[2 * row + 1, 0].images[0]
        assert np.allclose(picture.get_array(), x[row, :2].norm(dim=0))
        assert np.allclose(picture.get_clim(), (picture.get_array().min(), picture.get_array().max()))


def test_no_elements_are_refused() -> None:
    """Nothing to draw."""
    space = gspaces.rot2dOnR2(4)
    kind, x = enn.FieldType(space, [space.trivial_repr]), torch.rand(1, 1, 4, 4)
    for draw in (
        lambda: plot_rotations(x, kind, elements=[]),
        lambda: plot_equivariance_error(abs, x, field_type=kind, elements=()),
    ):
        with pytest.raises(ValueError, match="elements: expected one group element at least"):
            draw()


def test_bad_images_are_refused() -> None:
    """One image without its batch, and what has no grid."""
    space = gspaces.rot2dOnR2(4)
    with pytest.raises(ValueError, match=r"images: expected shape \(n, C, H, W\)"):
        plot_rotations(torch.rand(1, 5, 5), enn.FieldType(space, [space.trivial_repr]))
    with pytest.raises(ValueError, match=r"images: expected shape \(n, C, H, W\)"):
        plot_rotations(torch.rand(3, 2), plane(group.cyclic_group(4), 1))


# ---- training ------------------------------------------------------------------------------------------------------


def test_curves_are_means_over_the_window_and_the_runs() -> None:
    """The band goes from the smallest to the largest run."""
    runs = torch.randn(3, 20, dtype=torch.float64)
    axes = plot_training({"runs": runs, "one": runs[0].tolist()}, smooth=5)
    smooth = runs.unfold(-1, 5, 1).mean(-1)
    first, second = axes.lines
    assert np.array_equal(first.get_xdata(), np.arange(5, 21))
    assert np.allclose(first.get_ydata(), smooth.mean(0))
    assert np.allclose(second.get_ydata(), smooth[0])
    assert first.get_linestyle() != second.get_linestyle()
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    at_ten = vertices[vertices[:, 0] == 10][:, 1]
    assert np.allclose([at_ten.min(), at_ten.max()], [smooth[:, 5].min(), smooth[:, 5].max()])


def test_one_curve_needs_no_label() -> None:
    """Losses as they come from ``svi.step`` or as tensors with gradients."""
    losses = [torch.tensor(float(k), requires_grad=True) for k in range(4)]
    axes = plot_training(losses, ax=plt.subplots()[1])
    assert axes.lines[0].get_ydata().tolist() == [0, 1, 2, 3]
    assert axes.get_legend() is None


@pytest.mark.parametrize(("curves", "smooth"), [([1.0, 2.0], 3), (torch.zeros(2, 3, 4), 1), ([1.0], 0), ([], 1)])
def test_bad_curves_are_refused(curves, smooth: int) -> None:
    """Too short, of another shape, no window."""
    with pytest.raises(ValueError, match="expected"):
        plot_training(curves, smooth=smooth)


# ---- the extra -----------------------------------------------------------------------------------------------------


def test_package_imports_without_matplotlib_and_plots_names_the_extra() -> None:
    """In a process of its own, where matplotlib cannot be found."""
    program = (
        "import sys; import pyro_equiflow; assert 'matplotlib' not in sys.modules; sys.modules['matplotlib'] = None\n"
        "try:\n    import pyro_equiflow.plots\nexcept ImportError as error:\n    print(error)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'pyro_equiflow[plots]'" in found.stdout
