"""Pictures are read back: exact pixels if promised, else size, content, no text cut off."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from benchmarks import rate_distortion
from support import figures, nifti

RNG = np.random.default_rng(0)
SLICE = RNG.normal(size=(256, 128)).astype(np.float32)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves, after matplotlib has laid them out."""
    kept = []

    class Canvas(FigureCanvasAgg):
        def print_png(self, *args, **options):
            kept.append(self.figure)
            return super().print_png(*args, **options)

    monkeypatch.setattr(figures, "FigureCanvasAgg", Canvas)
    return kept


def texts(figure):
    return {text.get_text() for text in figure.findobj(Text) if text.get_visible()}


def assert_nothing_cut(figure):
    """All that is drawn lies inside the picture: matplotlib would cut it off without a word."""
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, (box, width, height)


def test_save_slice_is_pixel_for_pixel(tmp_path):
    image = np.array([[-1.0, 0.0, 1.0], [3.0, -9.0, 9.0]], np.float32)
    figures.save_slice(tmp_path / "a.png", image, -1, 3)
    with Image.open(tmp_path / "a.png") as read:
        assert read.mode == "L" and read.size == (3, 2)
        np.testing.assert_array_equal(np.asarray(read), [[0, 64, 128], [255, 0, 255]])
    figures.save_slice(tmp_path / "flat.png", np.zeros((4, 4)), 0, 0)  # a slice of one value
    figures.save_slice(tmp_path / "b.png", SLICE, SLICE.min(), SLICE.max())
    with Image.open(tmp_path / "b.png") as read:
        assert read.size == (128, 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "flat.png"]


@pytest.mark.parametrize("epochs", [1, 200])
def test_loss_plot_shows_both_curves(tmp_path, drawn, epochs):
    train, validation = np.linspace(2, 1, epochs), np.linspace(3, 1, epochs)
    figures.loss_plot(tmp_path / "loss.png", list(train), list(validation))
    curves = {line.get_label(): line.get_xydata() for line in drawn[0].axes[0].lines}
    np.testing.assert_array_equal(curves["train"], np.stack([np.arange(1, epochs + 1), train], 1))
    np.testing.assert_array_equal(curves["validation"][:, 1], validation)
    assert_nothing_cut(drawn[0])


@pytest.mark.parametrize("shape", [(256, 128), (64, 64)])
def test_comparison_sheet_has_one_scale_for_all_differences(tmp_path, drawn, shape):
    """A tenth of the range looks the same in a slice of range 4 and in one of range 400."""
    small = np.tile(np.linspace(-2, 2, shape[1]), (shape[0], 1))
    rows = [
        (f"{i}: patient 040, week 0, slice {i}\nSSIM 0.9", x, x + 0.1 * np.ptp(x))
        for i, x in enumerate([small, 100 * small, small])
    ]
    figures.comparison_sheet(tmp_path / "c.png", rows, "synthetic phantom, not MRI")
    panels = [axes.images[0] for axes in drawn[0].axes if axes.images]
    differences = [image for image in panels if image.get_cmap().name == "inferno"]
    np.testing.assert_allclose([image.get_array() for image in differences], 0.1, rtol=1e-6)
    assert differences[0].get_clim() == differences[1].get_clim()
    assert panels[3].get_clim() == panels[4].get_clim() == (-200, 200)  # of the original, for both
    titles = [text.get_window_extent() for text in drawn[0].texts]
    assert not any(one.overlaps(other) for one, other in combinations(titles, 2))
    said = {rows[0][0], "synthetic phantom, not MRI", "original", "reconstruction"}
    assert said <= texts(drawn[0])
    assert drawn[0].axes[0].get_title() == "original"  # above it
    assert_nothing_cut(drawn[0])


def test_pictures_of_wide_slices_fit_into_files(tmp_path, drawn):
    """A WebP file, as on the results page, holds 16,383 pixels a side."""
    wide = np.tile(np.arange(320.0), (16, 1))
    figures.comparison_sheet(tmp_path / "c.png", [("", wide, wide)] * 3)
    groups = {name: [("", wide, None)] * 8 for name in ("held-out", "new")}
    figures.slice_grid(tmp_path / "g.png", groups, 8, (0, 320))
    assert all(120 * max(figure.get_size_inches()) < 16_383 for figure in drawn)


@pytest.mark.parametrize("letters", ["PL", "IR"])
def test_edges_are_named_as_the_affine_tells(tmp_path, drawn, letters):
    """The affine of rows that run to the first letter and columns to the second names the edges."""
    axes = np.array([["LRPAIS".index(letter) for letter in letters]]) // 2
    affine = np.zeros((1, 4, 4))
    affine[0, axes[0], [0, 1]] = [1 if letter in "RAS" else -1 for letter in letters]
    assert nifti.directions(affine) == [letters]
    panels = {"a": [("", SLICE, None)] * 2}
    figures.slice_grid(tmp_path / "g.png", panels, 2, (0, 1), letters=letters)
    each = [letters, "SS"]  # a slice has the edges of its own file
    figures.comparison_sheet(tmp_path / "c.png", [("", SLICE, SLICE)] * 2, letters=each)
    assert {text.get_text() for text in drawn[1].axes[3].texts} == {"S", "I"}
    for figure in drawn:
        names = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
        places = {name: place for place, name in names.items() if name in ("R", *"LAPSI")}
        (x, bottom), (right, y) = (places[letter] for letter in letters)
        (x2, top), (left, y2) = (places[figures.OPPOSITE[letter]] for letter in letters)
        assert len(places) == 4 and bottom > y > top and left < x < right and (x, y) == (x2, y2)
        assert bottom - top < 256 and right - left < 128  # on the slice
        assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # the first row on top
        assert_nothing_cut(figure)


def test_outlines_have_a_legend_of_the_values_in_the_study_s_masks(tmp_path, drawn):
    mask = np.zeros(SLICE.shape, np.uint8)
    mask[20:60, 20:60], mask[90:150, 30:90], mask[:9, :9] = 1, 3, figures.UNKNOWN
    rows, values = [("", SLICE, SLICE)], (0, 7, 9, 500)
    pair = mask, np.where(mask == 1, 0, mask)  # the study's, and what the codes tell
    figures.comparison_sheet(tmp_path / "c.png", rows, masks=[pair], label_values=values)
    groups = {"a": [("", SLICE, mask)], "b": [("", SLICE, None)]}
    figures.slice_grid(tmp_path / "g.png", groups, 1, (0, 1), label_values=values)
    for figure in drawn:
        outlines = {tuple(lines.get_edgecolor()[0]) for lines in figure.axes[0].collections}
        heading, *entries = figure.legends[0].get_lines()
        assert heading.get_color() == "none"  # a word beside the lines, and no line
        assert {to_rgba(line.get_color()) for line in entries} == outlines and len(outlines) == 2
        said = [text.get_text() for text in figure.legends[0].get_texts()]
        assert said == ["labels:", "7", "500"]
        assert_nothing_cut(figure)
    assert len(drawn[0].axes[1].collections) == 1  # on the reconstruction
    figures.slice_grid(tmp_path / "plain.png", {"b": groups["b"]}, 1, (0, 1))
    assert not drawn[2].legends


def test_ssim_histogram_counts_every_slice(tmp_path, drawn):
    scores, note = RNG.normal(0.9, 0.02, 38), "synthetic phantom, not MRI"
    figures.ssim_histogram(tmp_path / "h.png", scores, note)
    assert sum(bar.get_height() for bar in drawn[0].axes[0].patches) == 38
    assert f"SSIM of the test slices (n = 38)\n{note}" in texts(drawn[0])
    assert_nothing_cut(drawn[0])
    figures.ssim_histogram(tmp_path / "one.png", np.array([0.5]))  # of equal values: one bar
    assert [bar.get_height() for bar in drawn[1].axes[0].patches if bar.get_height()] == [1]


@pytest.mark.parametrize("models", [1, 3])
def test_rate_distortion_draws_every_curve_and_point(tmp_path, drawn, models):
    bits = np.array([0.1, 0.4, 0.8, 2.0])
    codecs = {"JPEG": (bits, 1 - 0.1 / bits), "AVIF": (bits, 1 - 0.05 / bits)}
    points = {}
    for i in range(models):
        nominal, prior = (0.7 - 0.2 * i, 0.95), (0.5 - 0.2 * i, 0.95)
        points[f"runs/model_{i}"] = {"nominal": nominal, "prior": prior}
    panels = {"abdomen (n = 4)": (codecs, points), "heart (n = 9)": (codecs, points)}
    scores = {"SSIM": panels, "PSNR, dB": panels}
    rate_distortion.draw(tmp_path / "r.png", scores, "synthetic phantom, not MRI")
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["SSIM"] * 2 + ["PSNR, dB"] * 2
    for axes in drawn[0].axes:
        lines = [(line.get_label(), line.get_xydata()) for line in axes.lines]
        (curve,) = (xy for label, xy in lines if label == "AVIF")
        np.testing.assert_array_equal(curve, np.stack(codecs["AVIF"], 1))
        priors = np.concatenate([xy for label, xy in lines if label == "prior"])
        np.testing.assert_array_equal(priors, [of["prior"] for of in points.values()])
        for xy in (of[kind] for of in points.values() for kind in of):
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            assert left < xy[0] < right and low < xy[1] < high
    said = {"JPEG", "AVIF", "nominal", "prior", "synthetic phantom, not MRI"}
    assert {*said, *points, *panels} <= texts(drawn[0])
    # Headings, and each entry once.
    assert len(drawn[0].legends[0].get_texts()) == 3 + 2 + 2 + models
    for axes in drawn[0].axes:  # a model's line and points have its colour, and no codec's
        lines = {line.get_label(): line.get_color() for line in axes.lines}
        colours = [lines[name] for name in points]
        assert len({*colours, lines["JPEG"], lines["AVIF"]}) == models + 2
        nominal = [line for line in axes.lines if line.get_label() == "nominal"]
        assert [line.get_color() for line in nominal] == colours
    assert_nothing_cut(drawn[0])
