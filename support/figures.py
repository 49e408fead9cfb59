"""Arrays in, pictures out: the only file of the product that uses matplotlib.

No pyplot, which would choose a backend and keep figures open: each function draws on a `Figure` of
its own and writes it whole or not at all. Slices (H, W) are shown as stored, the first row on top.
What slices are drawn with, where it is known:

    letters        where rows and columns run in the patient, as `nifti.directions` says it: in a
                   slice of "RS" the bottom edge is the patient's right and the right edge the head
    label_values   the value that each class has in the study's masks, for a legend of the outlines
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# A notebook hands the name of its backend down to the scripts that it starts. matplotlib would not
# even be imported where that backend is missing, and we use none. `run_cli` would be too late for
# this, as commands import matplotlib before they begin.
os.environ.pop("MPLBACKEND", None)

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from support.metrics import value_range
from support.runtime import atomic_path

DPI = 120
PANEL = 3.0  # inches, the height of a slice in a sheet
UNKNOWN = 255  # in a mask: nothing is known of this pixel
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


def new_figure(width: float, height: float) -> Figure:
    """A figure of width x height inches, whose parts matplotlib keeps from overlapping."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(part)


# ---- what is drawn on a slice ----


def _show(axes, image: np.ndarray, title: str = "", **options):
    """Draw a slice or a code map with square pixels, no ticks and no smoothing."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)
    return axes.imshow(image, interpolation="nearest", **{"cmap": "gray", **options})


def _classes(mask: np.ndarray) -> list[int]:
    """The classes of a mask that have an outline: all but the background and what is not known."""
    return [int(k) for k in np.unique(mask) if k not in (0, UNKNOWN)]


def _colour(k: int) -> tuple:
    return mpl.colormaps["tab10"]((k - 1) % 10)


def draw_contours(axes, mask: np.ndarray) -> None:
    """Outline each class of a mask (H, W) in its colour, on a slice that is shown on `axes`."""
    for k in _classes(mask):
        axes.contour(mask == k, [0.5], colors=[_colour(k)], linewidths=0.7)


def draw_legend(figure: Figure, masks: Sequence[np.ndarray], label_values: Sequence[int]) -> None:
    """Say along the bottom which label of the study's masks has which colour, if there are any."""
    classes = sorted({k for mask in masks for k in _classes(mask)})
    names = [str(label_values[k] if len(label_values) else k) for k in classes]
    handles = [Line2D([], [], color=_colour(k)) for k in classes]
    if classes:
        heading = Line2D([], [], color="none")
        spacing = {"handlelength": 1.2, "handletextpad": 0.5, "columnspacing": 1.2}
        style = {"loc": "lower left", "ncols": 1 + len(names), "fontsize": 8, "frameon": False}
        figure.legend([heading, *handles], ["labels:", *names], **spacing, **style)


def draw_letters(axes, letters: str, left: float, top: float, height: int, width: int) -> None:
    """Name the edges of a slice of height x width whose corner lies at (left, top) of `axes`."""
    inwards, middle = 0.03 * height, (left + width / 2, top + height / 2)
    for axis, letter in enumerate(letters):  # nothing where they are not known
        for name, sign in ((OPPOSITE[letter], -1), (letter, 1)):
            x, y = middle
            x += sign * (width / 2 - inwards) * (axis == 1)
            y += sign * (height / 2 - inwards) * (axis == 0)
            axes.text(x, y, name, fontsize=6.5, color="yellow", ha="center", va="center")


def panel_height(most: float, height: int, width: int) -> float:
    """Inches: `most`, or less for wide slices, whose pictures would outgrow what files can hold."""
    return most * min(1, 2 * height / width)


# ---- pictures ----


def save_slice(path: Path | str, image: np.ndarray, low: float, high: float) -> None:
    """Write a slice (H, W) as a grey PNG of W x H pixels; `low` becomes black and `high` white.

    Values outside that range saturate. Give both slices of a pair the original's two ends.
    """
    grey = np.clip((np.asarray(image, np.float64) - low) / ((high - low) or 1), 0, 1)
    with atomic_path(path) as part:
        Image.fromarray(np.round(255 * grey).astype(np.uint8)).save(part, format="png")


def loss_plot(path: Path | str, train_losses: Sequence[float], val_losses: Sequence[float]) -> None:
    """Plot the mean loss of each epoch, train and validation."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for losses, name, marker in ((train_losses, "train", "o"), (val_losses, "validation", "s")):
        axes.plot(range(1, len(losses) + 1), losses, marker=marker, markersize=4, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel="loss, mean over the split")
    axes.set_title("Training and validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def comparison_sheet(
    path: Path | str,
    rows: Sequence[tuple[str, np.ndarray, np.ndarray]],
    note: str = "",
    masks: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    letters: Sequence[str] = (),
    label_values: Sequence[int] = (),
) -> None:
    """Draw original | reconstruction | absolute difference of slices side by side.

    Each pair is shown on its original's grey range. The difference is a share of that range, so all
    slices share one colour scale, which ends at the 99.9th percentile of all differences.

    Args:
        rows: title, original (H, W) and reconstruction (H, W) of each slice.
        note: a line above it all.
        masks: of each slice those (H, W) to outline on its original and on its reconstruction.
        letters, label_values: see the top of this file; the letters are those of each slice.
    """
    differences = [np.abs(x - y) / value_range(x) for _, x, y in rows]
    span = {"cmap": "inferno", "vmin": 0, "vmax": max(np.percentile(differences, 99.9), 1e-6)}
    height, width = rows[0][1].shape
    # Inches: the three pictures of each slice, and the scale beside the last ones.
    high = panel_height(PANEL, height, width)
    widths = [3 * (high * width / height + 0.12)] * len(rows)
    widths[-1] += 0.85
    figure = new_figure(sum(widths), high + 0.9 + 0.25 * bool(note) + 0.25 * bool(masks))
    figure.suptitle(note, fontsize=10)
    parts = figure.subfigures(1, len(rows), squeeze=False, width_ratios=widths)[0]
    for i, (part, (title, original, reconstruction)) in enumerate(zip(parts, rows, strict=True)):
        part.suptitle(title, fontsize=9)
        *pair, last = part.subplots(1, 3)
        grey = {"vmin": original.min(), "vmax": original.max()}
        slices = {"original": original, "reconstruction": reconstruction}
        for j, (axes, (name, image)) in enumerate(zip(pair, slices.items(), strict=True)):
            _show(axes, image, name, **grey)
            if masks:
                draw_contours(axes, masks[i][j])
            draw_letters(axes, letters[i] if letters else "", 0, 0, height, width)
        shown = _show(last, differences[i], "|difference|", **span)
    bar = parts[-1].colorbar(shown, ax=last, extend="max", format=PercentFormatter(1), pad=0.03)
    bar.set_label("of the original's range", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    draw_legend(figure, [mask for pair in masks for mask in pair], label_values)
    save(figure, path)


def ssim_histogram(path: Path | str, values: np.ndarray, note: str = "") -> None:
    """Draw the histogram of SSIM over slices (N,)."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    axes.hist(values, bins=30)
    axes.axvline(values.mean(), color="black", linestyle="--", label=f"mean {values.mean():.4f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"SSIM of the test slices (n = {len(values)})\n{note}".strip()
    axes.set(xlabel="SSIM, the report's protocol", ylabel="slices", title=title)
    axes.legend()
    save(figure, path)


def slice_grid(
    path: Path | str,
    groups: Mapping[str, Sequence[tuple[str, np.ndarray, np.ndarray | None]]],
    columns: int,
    span: tuple[float, float],
    note: str = "",
    panel: float = 1.6,
    letters: str = "",
    label_values: Sequence[int] = (),
) -> None:
    """Draw groups of slices side by side, each in rows of `columns`, `panel` inches high at most.

    A slice is its title, the image (H, W) and its mask (H, W), whose outlines are drawn, or None.
    All share one grey scale: span[0] is black, span[1] white. The letters, see the top of this
    file, are those of all slices, and stand on the first of each group.
    """
    height, width = next(iter(groups.values()))[0][1].shape
    # Free pixels above a slice, for its title, and beside it.
    top, side = round(0.13 * height), max(2, width // 32)
    rows = max(-(-len(slices) // columns) for slices in groups.values())
    tall, wide = rows * (height + top), columns * (width + side)
    # Inches: a pixel, above the slices, below them, and the whole picture.
    outlined = any(mask is not None for slices in groups.values() for *_, mask in slices)
    scale = panel_height(panel, height, width) / height
    head, foot = 0.3 + 0.25 * bool(note), 0.1 + 0.2 * outlined
    size = len(groups) * (wide * scale + 0.3), tall * scale + head + foot
    figure, drawn = Figure(figsize=size, dpi=DPI), []
    for number, (title, slices) in enumerate(groups.items()):
        sheet, masks = np.full((tall, wide), np.nan), np.zeros((tall, wide), np.uint8)
        left = 0.15 + number * (wide * scale + 0.3)
        place = (left / size[0], foot / size[1], wide * scale / size[0], tall * scale / size[1])
        # One axes for all slices of a group: an axes for each of them would take seconds.
        axes = figure.add_axes(place, frameon=False)
        for i, (name, image, mask) in enumerate(slices):
            y, x = i // columns * (height + top) + top, i % columns * (width + side) + side // 2
            sheet[y : y + height, x : x + width] = image
            if mask is not None:
                masks[y : y + height, x : x + width] = mask
            axes.text(x + width / 2, y - top / 4, name, fontsize=6.5, ha="center", va="bottom")
            draw_letters(axes, letters * (i == 0), x, y, height, width)
        _show(axes, sheet, vmin=span[0], vmax=span[1])
        draw_contours(axes, masks)
        drawn.append(masks)
        middle = (left + wide * scale / 2) / size[0], 1 - (head - 0.15) / size[1]
        figure.text(*middle, title, fontsize=10, ha="center", va="center")
    figure.text(0.5, 1 - 0.14 / size[1], note, fontsize=9, ha="center", va="center")
    draw_legend(figure, drawn, label_values)
    save(figure, path)
