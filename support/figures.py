"""Arrays in, pictures out: the only file that uses matplotlib.

No pyplot, so that importing this file sets no backend and leaves no figure open: each function
draws on a `Figure` of its own and writes it whole or not at all. Slices (H, W) are shown as stored,
the first row on top.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# A notebook's backend may be missing in this Python, and matplotlib would then fail to import. We
# use none.
os.environ.pop("MPLBACKEND", None)

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from support.runtime import atomic_path

DPI = 120
PANEL = 3.0  # inches, the height of a slice in a sheet
MOST_COLOURS = 20  # a histogram of more patients has one colour
NO_MASK = 255  # in a mask: nothing is known of this pixel


def new_figure(width: float, height: float) -> Figure:
    """A figure of width x height inches, whose parts matplotlib keeps from overlapping."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(part)


def _show(axes, image: np.ndarray, title: str = "", **options):
    """Draw a slice or a code map with square pixels, no ticks and no smoothing."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)
    return axes.imshow(image, interpolation="nearest", **{"cmap": "gray", **options})


def draw_contours(axes, mask: np.ndarray) -> None:
    """Outline each class above 0 of a mask (H, W), in a colour of its own, on a slice that is shown
    on `axes`.
    """
    for k in np.unique(mask[(mask > 0) & (mask != NO_MASK)]):
        axes.contour(
            mask == k, [0.5], colors=[mpl.colormaps["tab10"](int(k - 1) % 10)], linewidths=0.7
        )


def save_slice(path: Path | str, image: np.ndarray, low: float, high: float) -> None:
    """Write a slice (H, W) as a grey PNG of W x H pixels; `low` becomes black and `high` white.

    Values outside that range saturate. Give both slices of a pair the original's minimum and
    maximum.
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
    axes.set(
        xlabel="epoch", ylabel="loss, mean over the split", title="Training and validation loss"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def comparison_sheet(
    path: Path | str,
    rows: Sequence[tuple[str, np.ndarray, np.ndarray]],
    note: str = "",
    masks: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> None:
    """Draw original | reconstruction | absolute difference of slices side by side, with one colour
    bar.

    Each pair is shown on its original's grey range. The difference is a share of that range, so all
    slices share one colour scale, which ends at the 99.9th percentile of all differences.

    Args:
        rows: title, original (H, W) and reconstruction (H, W) of each slice.
        note: a line above it all.
        masks: of each slice, those (H, W) whose outlines are drawn on the original and on the
            reconstruction.
    """
    differences = [np.abs(x - y) / (np.ptp(x) or 1) for _, x, y in rows]
    span = {"cmap": "inferno", "vmin": 0, "vmax": max(np.percentile(differences, 99.9), 1e-6)}
    height, width = rows[0][1].shape
    panel, gap, group_gap, bottom = (
        PANEL * width / height,
        0.06,
        0.3,
        0.15,
    )  # all lengths here are inches
    size = (
        len(rows) * (3 * (panel + gap) + group_gap) + 0.9,
        bottom + PANEL + 0.75 + 0.3 * bool(note),
    )
    figure = Figure(figsize=size, dpi=DPI)

    def place(left: float, wide: float):
        return figure.add_axes((left / size[0], bottom / size[1], wide / size[0], PANEL / size[1]))

    left = group_gap / 2
    for i, ((title, original, reconstruction), difference) in enumerate(
        zip(rows, differences, strict=True)
    ):
        grey = {"vmin": original.min(), "vmax": original.max()}
        panels = (
            ("original", original, grey),
            ("reconstruction", reconstruction, grey),
            ("|difference|", difference, span),
        )
        middle = (left + 1.5 * panel + gap) / size[0]
        figure.text(
            middle, (bottom + PANEL + 0.3) / size[1], title, fontsize=9, ha="center", va="bottom"
        )
        for j, (name, image, options) in enumerate(panels):
            axes = place(left, panel)
            shown = _show(axes, image, name, **options)
            if masks and j < 2:
                draw_contours(axes, masks[i][j])
            left += panel + gap
        left += group_gap
    percent = FuncFormatter(lambda share, _: f"{100 * share:.3g} %")
    bar = figure.colorbar(
        shown, cax=place(left - group_gap + 0.04, 0.12), extend="max", format=percent
    )
    bar.set_label("of the original's range", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.text(0.5, 1 - 0.08 / size[1], note, fontsize=10, ha="center", va="top")
    save(figure, path)


def code_maps(
    path: Path | str, original: np.ndarray, top: np.ndarray, bottom: np.ndarray, title: str = ""
) -> None:
    """Draw a slice (H, W) beside its code maps (h, w), int in [0, K), all of one height.

    Codes have no order: colours only tell them apart.
    """
    height, width = original.shape
    figure = new_figure(3 * PANEL * width / height + 2.6, PANEL + 0.9)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, 3)
    _show(axes[0], original, f"original {height}x{width}")
    for panel, name, codes in ((axes[1], "top", top), (axes[2], "bottom", bottom)):
        used = len(np.unique(codes))
        image = _show(
            panel, codes, f"{name} {codes.shape[0]}x{codes.shape[1]}: {used} codes", cmap="turbo"
        )
        figure.colorbar(image, ax=panel, label="code").ax.tick_params(labelsize=7)
    save(figure, path)


def ssim_histogram(path: Path | str, values: Mapping[str, Sequence[float]], note: str = "") -> None:
    """Draw the histogram of SSIM over slices, stacked by patient; `values` has each patient's
    slices.
    """
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    everything = np.concatenate([np.asarray(scores, float) for scores in values.values()])
    edges = np.histogram_bin_edges(everything, bins=30)
    if len(values) <= MOST_COLOURS:
        labels = [f"{patient} (n = {len(scores)})" for patient, scores in values.items()]
        colours = mpl.colormaps["tab10" if len(values) <= 10 else "tab20"].colors[: len(values)]
        axes.hist(list(values.values()), edges, stacked=True, label=labels, color=colours)
    else:
        axes.hist(everything, edges, label=f"{len(values)} patients")
    mean = everything.mean()
    axes.axvline(mean, color="black", linestyle="--", label=f"mean {mean:.4f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"SSIM of the test slices (n = {len(everything)})" + (f"\n{note}" if note else "")
    axes.set(xlabel="SSIM, the report's protocol", ylabel="slices", title=title)
    figure.legend(loc="outside right upper", fontsize=8, title="patient")
    save(figure, path)


def slice_grid(
    path: Path | str,
    groups: Mapping[str, Sequence[tuple[str, np.ndarray, np.ndarray | None]]],
    columns: int,
    span: tuple[float, float],
    note: str = "",
    panel: float = 1.6,
) -> None:
    """Draw groups of slices side by side, each in rows of `columns`, `panel` inches high.

    A slice is its label, the image (H, W) and its mask (H, W), whose outlines are drawn, or None.
    All share one grey
    scale: span[0] is black, span[1] white.
    """
    height, width = next(iter(groups.values()))[0][1].shape
    top, side = (
        round(0.13 * height),
        max(2, width // 32),
    )  # free pixels above a slice for its label, and beside it
    rows = max(-(-len(slices) // columns) for slices in groups.values())
    tall, wide = rows * (height + top), columns * (width + side)
    scale, head = panel / height, 0.3 + 0.25 * bool(note)  # inches a pixel, inches above the slices
    size = (len(groups) * (wide * scale + 0.3), tall * scale + head + 0.1)
    figure = Figure(figsize=size, dpi=DPI)
    for number, (title, slices) in enumerate(groups.items()):
        sheet, masks = np.full((tall, wide), np.nan), np.zeros((tall, wide), np.uint8)
        left = 0.15 + number * (wide * scale + 0.3)
        place = (left / size[0], 0.1 / size[1], wide * scale / size[0], tall * scale / size[1])
        axes = figure.add_axes(
            place, frameon=False
        )  # one for all: an axes for each slice would take seconds
        for i, (label, image, mask) in enumerate(slices):
            y, x = i // columns * (height + top) + top, i % columns * (width + side) + side // 2
            sheet[y : y + height, x : x + width] = image
            if mask is not None:
                masks[y : y + height, x : x + width] = mask
            axes.text(x + width / 2, y - top / 4, label, fontsize=6.5, ha="center", va="bottom")
        _show(axes, sheet, vmin=span[0], vmax=span[1])
        draw_contours(axes, masks)
        middle = (left + wide * scale / 2) / size[0]
        figure.text(
            middle, 1 - (head - 0.15) / size[1], title, fontsize=10, ha="center", va="center"
        )
    figure.text(0.5, 1 - 0.14 / size[1], note, fontsize=9, ha="center", va="center")
    save(figure, path)


def similarity_histograms(
    path: Path | str,
    sets: Mapping[str, Mapping[str, np.ndarray]],
    thresholds: Mapping[str, float],
    note: str = "",
) -> None:
    """Draw how similar the slices of each set are to their nearest training slice, a panel for each
    measure.

    Args:
        sets: measure -> name of a set -> similarity of each of its slices (n,).
        thresholds: measure -> the similarity above which a slice is flagged.
    """
    figure = new_figure(5 * len(sets), 4)
    figure.suptitle(note, fontsize=10)
    every_axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (measure, similarities) in zip(every_axes, sets.items(), strict=True):
        edges = np.histogram_bin_edges(np.concatenate(list(similarities.values())), 40)
        for name, values in similarities.items():
            shares = np.full(len(values), 1 / len(values))
            axes.hist(
                values,
                edges,
                weights=shares,
                histtype="step",
                lw=1.5,
                label=f"{name} (n = {len(values)})",
            )
        axes.axvline(
            thresholds[measure], color="black", linestyle="--", label="flagged to the right"
        )
        axes.set(xlabel=f"{measure} with the nearest training slice", ylabel="share of the set")
        axes.legend(fontsize=7)
    save(figure, path)


def realism_chart(
    path: Path | str, rows: Mapping[str, Mapping[str, float | None]], note: str = ""
) -> None:
    """Draw, for each measure, its value in each row; the rows' "n" is written beside their
    names.
    """
    names = [f"{name} (n = {values['n']})" for name, values in rows.items()]
    measures = list(dict.fromkeys(key for values in rows.values() for key in values if key != "n"))
    if not measures:
        return
    figure = new_figure(3 + 2.4 * len(measures), 0.9 + 0.3 * len(rows))
    figure.suptitle(note, fontsize=10)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        values = [row.get(measure) for row in rows.values()]
        bars = axes.barh(names, [value or 0 for value in values], color="C0")
        axes.bar_label(
            bars, ["" if value is None else f"{value:.3g}" for value in values], fontsize=7
        )
        axes.set_title(measure.replace("_", " "), fontsize=9)
        axes.margins(x=0.2)
    panels[0].invert_yaxis()
    save(figure, path)
