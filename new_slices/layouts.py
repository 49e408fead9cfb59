"""Layouts: what lies where in a slice, a class for each bottom code; new ones of eight patients.

A layout covers the whole slice, so that a study needs no masks to have layouts. Its classes are

    0                           air: the darkest tissue, where it reaches the slice's edge
    1 .. labels - 1             the organs of the study's masks, if there are any
    labels .. labels + 5        regions: the rest of the slice, sorted by its smoothed intensity

(from 1 on for a study without masks). The top prior is told a slice's layout (prior.py), and so
learns how such a slice looks.

Both kinds of classes are cut from smooth fields: an organ is where its signed distance is positive,
a region where the intensity lies between two levels. A new layout is cut from new fields. These are
made of similar slices of at most eight patients, which are first laid over one of them. The new
shapes are a mixture of theirs (an active appearance model of few slices: Cootes, Edwards & Taylor
2001), with the fine detail of one of them. A mixture of their intensities would be a blur, in which
thin walls and vessels melt. So the mixture is only a draft: each place gets the tissue of the slice
that is most like the draft there, as in texture synthesis (Kwatra et al. 2005). Its parts come from
different patients, and no patient's slice is like the whole. A layout that is composed in this way
is vaguer than that of a real slice. So the top prior learns from training slices' layouts whose
tissue is composed in this way, too: it learns to draw a whole picture from them.

What is composed of few patients can still come close to a slice of one of them. So a new layout is
drawn again if it is closer to a training slice than 95 in 100 training slices are to any slice of
another patient. It is drawn again if its anatomy is implausible: if its organs (in a study without
masks, its regions) do not occur together in the training slices near its position, or if one is
larger, smaller, farther aside, more or less spread or rougher than in 99 of 100 of these. And it is
drawn again if its organs are most like those of a patient whom it is composed of: whose masks went
into a new one should not be told by who is nearest (compare the plausible deniability of
Bindschaedler et al. 2017, arXiv 1708.07975).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise, product

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from scipy.ndimage import (
    binary_erosion,
    distance_transform_edt,
    gaussian_filter,
    gaussian_filter1d,
    label,
    zoom,
)
from scipy.special import softmax
from torch import Tensor
from tqdm import tqdm

from dataset import NO_MASK, SliceDataset
from new_slices.organs import NEARBY, nearest_positions, plausible
from support import runtime

REGIONS = 6  # classes of tissue outside organs, by intensity
SMOOTH = 1.0  # cells: standard deviation of the Gaussian that smooths intensities
MOST = 512  # training slices, or up to twice as many, that say which intensities the regions have
DOUBT = 0.03  # the chance of a class where the layout shows it nowhere near
PATIENTS = 8  # that a layout is composed of, or fewer
CORE = 4  # of these, that say what all should be like
REACH = 1.2  # how much farther than the seven nearest the others may be, as a squared distance
OF_ALL = 3  # of so many patients, one may go into a layout
FEWEST = 4  # patients: organs that fewer show together are not drawn
DEEPEST = 8.0  # cells: signed distances end here
DEPTHS = 15  # steps a cell, in which those of training slices are kept, as int8
SPREAD, SPREAD_OF_SHAPES = 1.2, 0.7  # of the weights, see `shares`
DETAIL = 2.0  # cells: what is finer is of one slice, see `mean_shape`
AROUND = 2.0  # cells: the standard deviation of the window in which slices are like a draft
CRISP = 4.0  # 0 gives every place the mean of all slices, infinity the tissue of one
WEIGHT = 2.0  # of an organ in what makes slices alike, beside intensities in standard deviations
PAINT = (0.5, 1.5)  # how much brighter than tissue, from 0 to 1, organs are to the optical flow
WINDOW, FARTHEST = 4.25, 6.0  # cells: deviation of its window; it finds nothing farther away
STEPS = 3  # of the optical flow
KNOTS = (3, 2)  # of the smooth random fields that the weights and the bending are
CLOSEST = 0.95  # share of the training slices, see `closest`
REFERENCES = 256  # of them, or up to twice as many, that say how close a new layout may come
ASIDE = [(row, column) for row in (0, -1, 1) for column in (0, -1, 1)]  # cells
# How often a layout has been drawn after each round, until a draw has no fault; those of a round
# run side by side. After the first 32 draws a layout that leads back is taken as it is. One that is
# too close or implausible is drawn of other slices, or kinds that few patients show would stay too
# close to these.
DRAWS = 0, 1, 2, 4, 8, 16, 32, 48
OF_ITS_KIND = 32
REBUILT = 4  # how often each training slice's layout is rebuilt, with tissue of others
BENT = 0.35  # the standard deviation of bends and moves, over that by which patients differ


def classes(labels: int) -> int:
    """How many classes the layouts of a study with so many labels have.

    This number itself fills the layout of a slice whose organs are unknown.
    """
    return max(labels, 1) + REGIONS


# ---- the layouts of slices -----------------------------------------------------------------------


def smoothed(images: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Slices (B, 1, H, W) -> (B, *shape): the mean intensity of each cell and those around it."""
    cells = F.adaptive_avg_pool2d(images, shape)[:, 0].cpu().numpy()
    return gaussian_filter(cells, (0, SMOOTH, SMOOTH), mode="nearest", truncate=3)


def tissue_borders(train: SliceDataset, shape: tuple[int, int]) -> np.ndarray:
    """The intensities (REGIONS - 1,), rising, that part one region from the next: z-scores.

    They lie midway between the means of a one-dimensional k-means of training slices' cells.
    """
    chosen = np.arange(len(train))[:: max(1, len(train) // MOST)]
    parts = (train.images(part) for part in runtime.batches(chosen))
    values = np.concatenate([smoothed(part, shape) for part in parts])
    values = values.reshape(-1, 1).astype(np.float64)
    start = np.linspace(*np.quantile(values, (0.01, 0.99)), REGIONS)[:, None]
    means = kmeans2(values, start, iter=50, minit="matrix")[0][:, 0]
    return (means[1:] + means[:-1]) / 2


def middles(masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Masks (B, H, W) -> the value in the middle of each cell, (B, *shape)."""
    rows, columns = masks.shape[1] // shape[0], masks.shape[2] // shape[1]
    return masks[:, rows // 2 :: rows, columns // 2 :: columns]


def compose(tissue: np.ndarray, organs: np.ndarray, borders: np.ndarray, labels: int) -> np.ndarray:
    """Smoothed intensities (h, w) and organs (h, w) in [0, labels) -> a layout (h, w) int64."""
    regions = np.searchsorted(borders, tissue)
    # Lungs and bowel gas are as dark as air, but they do not reach the edge of the slice.
    dark, _ = label(regions == 0)
    edge = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]])
    air = np.isin(dark, edge[edge > 0])
    return np.where(organs > 0, organs, np.where(air, 0, regions + max(labels, 1)))


def layouts_of(
    tissue: np.ndarray, masks: Tensor | None, borders: np.ndarray, labels: int
) -> np.ndarray:
    """Smoothed intensities (B, h, w) and masks (B, H, W) uint8, None without -> (B, h, w) int64.

    One more than the last class fills the layout of a slice without a mask in a study that has
    masks: which organs it shows is unknown.
    """
    shape, unknown = tissue.shape[1:], classes(labels)
    organs = np.zeros(tissue.shape, int) if masks is None else middles(masks, shape).long().numpy()
    found = [compose(*pair, borders, labels) for pair in zip(tissue, organs, strict=True)]
    return np.where(organs == NO_MASK, unknown, np.stack(found))


def likely(layouts: Tensor, labels: int, height: int, width: int) -> Tensor:
    """The log of how likely layouts (B, h, w) make each label, (B, labels, height, width).

    Regions are background. Between the middles of cells it changes linearly, as what a prior made
    of the layout may lie somewhat aside.
    """
    organs = torch.where(layouts < labels, layouts, 0)
    shown = F.one_hot(organs, labels).permute(0, 3, 1, 2).float()
    shown = F.interpolate(shown, (height, width), mode="bilinear", align_corners=False)
    return (shown + DOUBT).log()


def cells_of(layouts: np.ndarray, kind: int) -> np.ndarray:
    """Layouts (N, h, w) -> (N, h * w) float32: 1 in the cells of one class, else 0."""
    return (layouts == kind).reshape(len(layouts), -1).astype(np.float32)


def organ_dice(queries: np.ndarray, slices: np.ndarray, labels: int) -> np.ndarray:
    """Mean Dice (N, M) of the organs that either of layouts (N, h, w), (M, h, w) shows; else 0."""
    total = shown = np.zeros((len(queries), len(slices)))
    for organ in range(1, labels):
        a, b = cells_of(queries, organ), cells_of(slices, organ)
        sizes = a.sum(1)[:, None] + b.sum(1)
        total = total + 2 * (a @ b.T) / np.maximum(sizes, 1)
        shown = shown + (sizes > 0)
    return total / np.maximum(shown, 1)


def equal_cells(queries: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """The share of cells that layouts (N, h, w) and (M, h, w) have in common: (N, M)."""
    equal = np.zeros((len(queries), len(slices)), np.float32)
    for each in np.unique(queries):
        equal += cells_of(queries, each) @ cells_of(slices, each).T
    return equal / queries[0].size


def measure_classes(layouts: np.ndarray, count: int) -> np.ndarray:
    """Layouts (N, h, w) -> what each class below `count` but 0 looks like, (N, count - 1, 5).

    Its area; the row and the column of its centre; the mean squared distance from there, over the
    area; the squared length of its outline, over the area. In cells; NaN where it is not shown.
    """
    found = np.full((len(layouts), count - 1, 5), np.nan)
    for kind in range(1, count):
        inside = np.pad(layouts == kind, ((0, 0), (1, 1), (1, 1)))
        size = inside.sum((1, 2))
        area, means, spread = np.where(size, size, np.nan), [], 0
        for axis in (2, 1):  # how many cells lie in each row, and in each column
            counts = inside.sum(axis)
            at = np.arange(counts.shape[1]) - 1  # of the rim that was added
            means.append(counts @ at / area)
            spread = spread + counts @ at**2 / area - means[-1] ** 2
        outline = sum(np.diff(inside, axis=axis).sum((1, 2)) for axis in (1, 2))
        shape = area, *means, spread / area, outline**2 / area
        found[:, kind - 1] = np.stack(shape, 1)
    return found


def code_use(maps: np.ndarray) -> np.ndarray:
    """Codes (N, h, w) -> square roots of each slice's share of each code (N, K): Hellinger's."""
    K, flat = int(maps.max()) + 1, maps.reshape(len(maps), -1)
    counts = np.stack([np.bincount(each, minlength=K) for each in flat])
    return np.sqrt(counts / flat.shape[1])


def of_one_scale(features: np.ndarray) -> np.ndarray:
    """Features (N, F), divided by the root of their mean squared distance from their mean."""
    scale = np.sqrt(features.var(0).sum())
    return features / (scale if scale > 1e-9 else math.inf)  # what is the same in all tells nothing


# ---- new layouts ---------------------------------------------------------------------------------


def signed_distances(mask: np.ndarray, labels: int, shape: tuple[int, int]) -> np.ndarray:
    """How many cells deep inside each class the middle of every cell lies: (labels, h, w), -8 to 8.

    `mask` (H, W) has a whole number of pixels in each of the cells (h, w). The background is a
    class too: where walls are thin, an organ's own distance says little.
    """
    distances = np.full((max(labels, 1), *shape), -DEEPEST)
    parts = len(mask) // shape[0]
    for organ, distance in enumerate(distances):
        inside = mask == organ
        if inside.any():
            # To the pixels along its edge, which lies half a pixel farther out.
            edge = inside & ~binary_erosion(inside, border_value=1)
            apart = distance_transform_edt(~edge)
            deep = np.where(inside, 0.5 + apart, 0.5 - apart) / parts
            distance[:] = deep.reshape(shape[0], parts, shape[1], parts).mean((1, 3))
    return distances.clip(-DEEPEST, DEEPEST)


def depths_of(masks: Tensor, labels: int, shape: tuple[int, int]) -> np.ndarray:
    """Masks (B, H, W) uint8 -> signed distances in steps of 1 / DEPTHS, (B, labels, h, w) int8."""
    with runtime.thread_pool() as pool:
        found = list(pool.map(lambda mask: signed_distances(mask, labels, shape), masks.numpy()))
    return (DEPTHS * np.stack(found)).round().astype(np.int8)


def random_fields(rng: np.random.Generator, count: int, shape: tuple[int, int]) -> np.ndarray:
    """(count, *shape): smooth random fields of about unit standard deviation."""
    knots = rng.normal(size=(count, *KNOTS)).clip(-2, 2)
    factors = np.divide((count, *shape), knots.shape)
    return zoom(knots, factors, order=1, grid_mode=True, mode="nearest")


def centre(organs: np.ndarray) -> np.ndarray:
    """The middle of all organs (h, w) together, in cells: (2,); without any, of the layout."""
    places = np.argwhere(organs > 0)
    return places.mean(0) if len(places) else (np.array(organs.shape) - 1) / 2


def warped(fields: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Fields (..., h, w), read in each cell at that cell plus an offset `there`, (2, h, w)."""
    return each_warped(fields[None], there[None])[0]


def each_warped(fields: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Fields (n, ..., h, w), those of each of n read at its own offsets, (n, 2, h, w)."""
    h, w = fields.shape[-2:]
    # PyTorch counts from -1 to 1 between the middles of the first and the last cell, columns first.
    at = (np.indices((h, w)) + there) / np.array([h - 1, w - 1])[:, None, None] * 2 - 1
    at = torch.from_numpy(at[:, ::-1].transpose(0, 2, 3, 1).astype(fields.dtype))
    flat = torch.from_numpy(np.ascontiguousarray(fields).reshape(len(fields), -1, h, w))
    found = F.grid_sample(flat, at, padding_mode="border", align_corners=True)
    return found.numpy().reshape(fields.shape)


def optical_flow(frame: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far from each cell of a picture (h, w) others (n, h, w) show the same: (n, 2, h, w).

    Iterative Lucas-Kanade (Le Besnerais & Champagnat 2005) in a Gaussian window, as scikit-image's
    `optical_flow_ilk`, but of all pictures together, in a third of its time.
    """
    flow = np.zeros((len(others), 2, *frame.shape), np.float32)
    # The window as two matrices, in a fraction of the time of a filter.
    ones = (np.eye(side, dtype=np.float32) for side in frame.shape)
    down, across = (gaussian_filter1d(each, WINDOW, axis=0, mode="mirror") for each in ones)
    for _ in range(STEPS):
        seen = each_warped(others, flow)
        y, x = np.gradient(seen, axis=(1, 2))
        # The flow that least squares find best for y * down + x * right = error, in a window.
        error = y * flow[:, 0] + x * flow[:, 1] + frame - seen
        products = np.stack([y * y, x * y, x * x, y * error, x * error])
        yy, xy, xx, ye, xe = down @ products @ across.T
        determinant = yy * xx - xy * xy
        determinant[np.abs(determinant) < 1e-14] = np.inf  # nothing to see: no flow
        flow = np.stack([xx * ye - xy * xe, yy * xe - xy * ye], 1) / determinant[:, None]
    return flow


def inverse(there: np.ndarray) -> np.ndarray:
    """The displacement (2, h, w) that leads back, by fixed-point iteration (Chen et al. 2008)."""
    back = -there
    for _ in range(4):
        back = -warped(there, back)
    return back


def shares(random: np.ndarray, spread: float) -> np.ndarray:
    """Random numbers (n, ...) of unit standard deviation -> weights, whose sum over n is 1.

    With n independent slices and a spread of 1, weighted sums vary as much as the slices do.
    """
    n = len(random)
    return 1 / n + spread * (random - random.mean(0)) / max(n - 1, 1) ** 0.5


def mosaic(parts: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Tissue (h, w) mixed from slices `parts` (n, h, w) that lie over each other.

    A mixture of all of them, weighted by their `random` fields (n, h, w), is the draft. Each place
    gets the slice that is most like the draft there, or one that its random field favours.
    """
    draft = (shares(random, SPREAD) * parts).sum(0)
    apart = gaussian_filter((parts - draft) ** 2, (0, AROUND, AROUND))
    apart = (apart - apart.mean(0)) / (apart.std(0) + 1e-6)
    return (softmax(CRISP * (random - apart), 0) * parts).sum(0)


def mean_shape(
    distances: np.ndarray, laid: np.ndarray, source: np.ndarray, whose: int
) -> np.ndarray:
    """The mean of signed distances (n, labels, h, w) `laid` over one frame, seen from `source`.

    Returns signed distances (labels, h, w). A mean is smoother than all that it is of, so it gets
    the fine detail of the one at `whose`.
    """
    over = each_warped(distances, laid)
    mean = over.mean(0)
    if len(over) > 1:  # the mean of one slice has its detail
        mean += over[whose] - gaussian_filter(over[whose], (0, DETAIL, DETAIL))
    return warped(mean, source)


class Slices:
    """The training slices of a study, and which of them are alike.

    Args:
        layouts (N, h, w), tissue (N, h, w): of the training slices; those without a mask in a study
            with masks are not used.
        depths: signed distances of their organs, (N, labels, h, w), in steps of 1 / `DEPTHS`.
        positions (N,), patients (N,).
        codes: their code maps, (N, h, w) of each level.
    """

    def __init__(
        self, layouts, tissue, depths, positions, patients, borders, labels, codes=()
    ) -> None:
        known = (layouts < classes(labels)).all((1, 2))
        self.layouts, self.known = layouts, np.flatnonzero(known)
        self.organs = np.where(layouts < labels, layouts, 0)[known]
        self.tissue, self.positions = tissue[known].astype(np.float64), positions[known]
        # What has to look as in training slices: organs, or regions in a study without masks.
        self.kinds = labels or classes(labels)
        self.measured = measure_classes(layouts[known], self.kinds)
        self.depths = depths  # of all slices: a copy of the known ones would be large
        self.patients, self.borders, self.labels = patients[known], borders, labels
        shown = [(self.organs == organ).any((1, 2)) for organ in range(1, labels)]
        self.shown = np.stack([np.ones(len(self.organs), bool), *shown], 1)  # which organs
        few = slice(None), slice(1, None, 2), slice(1, None, 2)
        places = [self.tissue[few]]
        places += [WEIGHT * (self.organs[few] == organ) for organ in range(1, labels)]
        places = np.concatenate(places, 1).reshape(len(self.tissue), -1)
        # Slices are alike by what lies where, and by the codes they use, wherever: those tell
        # organs and sequences apart that are as bright in the same places.
        alike = [places, *(code_use(maps[known]) for maps in codes)]
        self.seen = np.concatenate([of_one_scale(each) for each in alike], 1).astype(np.float32)
        self.sizes = np.square(self.seen).sum(1)
        # What the optical flow sees: tissue from 0 to 1, and each organ brighter by its own step.
        ends = np.quantile(self.tissue, (0.001, 0.999))
        steps = np.append(0, np.linspace(*PAINT, max(labels - 1, 0)))
        self.painted = np.interp(self.tissue, ends, (0, 1)) + steps[self.organs]
        self.painted = self.painted.astype(np.float32)

    def near(self, position: float) -> np.ndarray:
        """The nearest tenth in position of all slices, all of them for NaN: indices."""
        order = nearest_positions(position, self.positions)
        return order if np.isnan(position) else order[: max(PATIENTS, round(NEARBY * len(order)))]

    def with_organs_of(self, slice_: int) -> np.ndarray:
        """Which slices show the same organs as a slice does: (N,)."""
        return (self.shown == self.shown[slice_]).all(1)

    def near_alike(self, position: float, slice_: int) -> np.ndarray:
        """The quarter, at least 8, that is most like a slice, of those in `near` with its organs.

        Indices. With any slice of `near` instead, kinds of slices that often have a fault would be
        rare: such that few patients show, or that often come too close.
        """
        order = nearest_positions(position, self.positions)
        same = order[self.with_organs_of(slice_)[order]]
        count = np.isin(same, self.near(position)).sum()
        same = same[: max(PATIENTS, count)]  # the nearest eight, where `near` has fewer
        return self.by_distance(same, self.seen[slice_])[: max(PATIENTS, count // 4)]

    def near_less_alike(self, position: float, slice_: int) -> np.ndarray:
        """The second quarter of `near` by how alike they are to a slice, of any organs: indices."""
        order = self.by_distance(self.near(position), self.seen[slice_])
        return order[len(order) // 4 : len(order) // 2]

    def most_alike(self, organs: np.ndarray, position: float = math.nan) -> np.ndarray:
        """All slices, those first whose organs are most like `organs` (h, w): indices.

        What counts is which organs there are, then their Dice, then the position.
        """
        shown = np.isin(np.arange(1, self.labels), organs)
        others = (self.shown[:, 1:] != shown).sum(1)
        dice = organ_dice(organs[None], self.organs, self.labels)[0]
        return np.lexsort((np.abs(self.positions - position), -dice, others))

    def family(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The first slice of `order`, and similar ones of up to 7 other patients: indices (n,).

        Only slices with the same organs are alike. A set of organs that less than four patients
        show is passed over, unless there is no other. An unusual slice is about as near to any
        other, so what counts is the mean of it and of the three nearest. A layout of the seven
        nearest leads back to them. So the seven are chosen by chance from all that are about as
        near. But no more than a third of all patients with these organs come into question, if that
        leaves enough, so that there are others whom the layout may be like.
        """
        family, enough = np.array([], int), min(FEWEST, len(np.unique(self.patients)))
        for anchor in order:
            alike = np.flatnonzero(self.with_organs_of(anchor))
            first = self.nearest(anchor, alike, self.seen[anchor])[: CORE - 1]
            middle = self.seen[[anchor, *first]].mean(0)
            others = self.nearest(anchor, alike, middle)
            apart = np.square(self.seen[others] - middle).sum(1)
            near = (apart <= REACH * apart[: PATIENTS - 1].max(initial=0)).sum()
            others = others[: max(FEWEST - 1, min(near, len(others) // OF_ALL))]
            if len(others) >= len(family):
                family = np.append(anchor, rng.permutation(others)[: PATIENTS - 1])
            if len(family) >= enough:
                break
        return family

    def nearest(self, anchor: int, alike: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Of each patient but the anchor's, the slice of `alike` that is most like `seen`, those
        first that are most alike: indices.
        """
        others = self.by_distance(alike[self.patients[alike] != self.patients[anchor]], seen)
        _, first = np.unique(self.patients[others], return_index=True)
        return others[np.sort(first)]

    def by_distance(self, slices: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """The indices `slices`, those first whose slices are most like `seen`."""
        # Squared distances, less what is one for all. Without BLAS, whose threads would get in the
        # way of those that draw layouts. A few slices at a time, as a copy of all takes long.
        apart = self.sizes[slices]
        for rows in runtime.batches(np.arange(len(slices))):
            apart[rows] -= 2 * np.einsum("ij,j", self.seen[slices[rows]], seen)
        return slices[np.argsort(apart, kind="stable")]


class Critic(Slices):
    """Says what is wrong with new layouts, beside the training slices."""

    def faults(
        self, made: np.ndarray, at: Sequence[float], families: Sequence[np.ndarray]
    ) -> np.ndarray:
        """How bad layouts (n, h, w) are that are made of the slices `families`: (n,).

        0: no fault. 1: it leads back to a patient, as its organs are most like those of one whose
        slice is in it, by mean Dice. 2 or 3: it is too close to a training slice, or implausible.
        """
        alike, nearest = self.nearest_of_others(made, np.full(len(made), -1))
        too_close = (alike > self.closest[:, None]).any(0)
        back = alike[1] > 0
        for i, family in enumerate(families):
            patients = np.unique(self.patients[self.with_organs_of(family[0])])
            # What is made of all patients with these organs has to be most like one of them.
            others = len(patients) > len(family)
            back[i] &= others and nearest[i] in self.patients[family]
        return 2 * (too_close | self.implausible(made, at)) + back

    @cached_property
    def closest(self) -> np.ndarray:
        """How alike a new layout and a training slice may be, (2,) as in `nearest_of_others`.

        In 95 of 100 training slices, the most similar one of another patient is less alike.
        """
        some = np.arange(len(self.known))[:: max(1, len(self.known) // REFERENCES)]
        alike, _ = self.nearest_of_others(self.layouts[self.known[some]], self.patients[some])
        # Slices without an organ are like no other by organs, and those of one patient like none.
        found = [each[each > 0] for each in alike]
        return np.array([np.quantile(each, CLOSEST) if len(each) else 1 for each in found])

    def implausible(self, made: np.ndarray, at: Sequence[float]) -> np.ndarray:
        """Which layouts (n, h, w) are not plausible beside the training slices near their positions
        `at` (n,), as organs.py judges masks, but by `measure_classes`: (n,). Without masks, regions
        stand for organs.
        """
        new = measure_classes(made, self.kinds)
        together, fine = plausible(new, at, self.measured, self.positions)
        return ~(together & fine.all(1))

    def nearest_of_others(
        self, made: np.ndarray, whose: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How alike layouts (n, h, w) of patients `whose` (n,) and the nearest slice of another
        patient are: (2, n). First by equal cells, also of slices a cell aside, then by the mean
        Dice of organs, 0 without masks. Also the patient who is nearest by Dice, (n,).
        """
        slices, found, nearest = self.layouts[self.known], [], []
        for rows in runtime.batches(np.arange(len(made)), 256):  # or memory might not do
            part, own = made[rows], whose[rows]
            # Every second row and column: in a quarter of the time.
            moved = [np.roll(part, aside, (1, 2))[:, ::2, ::2] for aside in ASIDE]
            equal = equal_cells(np.concatenate(moved), slices[:, ::2, ::2])
            equal = equal.reshape(len(ASIDE), len(part), -1).max(0)
            alike = np.stack([equal, organ_dice(part, slices, self.labels)])
            alike[:, own[:, None] == self.patients] = 0
            found.append(alike.max(2))
            nearest.append(self.patients[alike[1].argmax(1)])
        return np.concatenate(found, 1), np.concatenate(nearest)


class Composer(Critic):
    """Draws new layouts from the training slices of a study."""

    def draw(
        self, at: Sequence[float], seeds: Sequence[int], own: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, Sequence[np.ndarray]]:
        """New layouts (n, h, w) int64 at positions `at` (n,), NaN for any, each by its own seed.

        One with faults is drawn again, and the best of its draws is taken. Also n signed distances
        (labels, h, w) float32: the highest says which organ a cell shows.

        `own` (n, h, w) are organs of the user's own: tissue is then composed of the slices whose
        organs are most like them, whatever their position, and moved to where these lie. Where
        organs of the composed slices stick out, they become tissue of their intensity.
        """
        count, nothing = len(seeds), [None] * len(seeds)
        given = nothing if own is None else own
        made, faults = list(nothing), np.full(count, np.inf)  # the best draw of each, how bad it is
        first, left = nothing, np.arange(count)  # the slice that each began with; who is drawn
        bar = tqdm(total=count, desc="layouts", unit=" draws", disable=None)
        with bar, runtime.thread_pool() as pool:
            for before, after in pairwise(DRAWS):
                whose, again = zip(*product(left, range(before, after)), strict=True)
                bar.total = bar.n + len(whose)
                drawn, asked = [], [[each[i] for i in whose] for each in (at, seeds, given, first)]
                for each in pool.map(self.draw_one, *asked, again):
                    drawn.append(each)
                    bar.update()
                new, _, families = zip(*drawn, strict=True)
                if not before:
                    first = [family[0] for family in families]
                found = np.zeros(len(new))
                if own is None:  # the user's own stay as they are, whatever they are like
                    found = self.faults(np.stack(new), asked[0], families)
                for i, each, fault in zip(whose, drawn, found, strict=True):
                    if fault < faults[i]:
                        made[i], faults[i] = each, fault
                left = left[faults[left] > (1 if after >= OF_ITS_KIND else 0)]
                if not len(left):
                    break
        layouts, shapes, _ = zip(*made, strict=True)
        return np.stack(layouts), shapes

    def draw_one(
        self,
        position: float,
        seed: int,
        own: np.ndarray | None = None,
        first: int | None = None,
        again: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One layout (h, w), its signed distances (labels, h, w), the slices that it is made of.

        Drawn `again`, it starts from a slice that is like the one it started from at `first`, and
        after `OF_ITS_KIND` draws from one that is less so.
        """
        rng = np.random.default_rng((seed, again) if again else seed)
        if own is not None:
            order = self.most_alike(own, position)
        elif not again:
            order = rng.permutation(self.near(position))
        else:
            alike = self.near_alike if again < OF_ITS_KIND else self.near_less_alike
            order = rng.permutation(alike(position, first))
        family = self.family(order, rng)
        members, laid, parts = self.lay(family)
        cells, count, frame = self.tissue.shape[1:], len(members), family[0]
        # Tissue is of other slices in every place; a shape is of one mixture in all its parts, or
        # thin walls would break.
        tissue = mosaic(parts, random_fields(rng, count, cells))
        of_shape = shares(rng.normal(size=count).clip(-2, 2), SPREAD_OF_SHAPES)
        # All lie in the frame's place now. What is new lies where a mixture of theirs does, bent a
        # little, or where the organs that are given lie.
        bend = random_fields(rng, 2, cells) + rng.normal(size=(2, 1, 1))
        # As much as these patients differ, and at least a cell: those of one differ by nothing.
        bend *= BENT * max(1, np.std(laid, 0).mean())
        if own is None:
            place = np.tensordot(of_shape, laid, 1)
            source = inverse(place + bend)
            whose = rng.integers(count)
            shapes = self.depths[self.known[members]] / DEPTHS
            shape = mean_shape(shapes, laid, source, whose)
        else:
            source = bend + (centre(self.organs[frame]) - centre(own))[:, None, None]
            shape = signed_distances(own, self.labels, cells)
        layout = compose(warped(tissue, source), shape.argmax(0), self.borders, self.labels)
        return layout, shape.astype(np.float32), family

    def rebuild(self, index: int) -> np.ndarray:
        """Layouts (REBUILT, h, w) of training slice `index`: its organs, tissue as of new ones."""
        place = np.flatnonzero(self.known == index)
        if not len(place):  # which organs it shows is unknown
            return np.repeat(self.layouts[index][None], REBUILT, 0)
        rng = np.random.default_rng(index)
        parts = self.lay(self.family(place, rng))[2]
        fields = [random_fields(rng, len(parts), parts.shape[1:]) for _ in range(REBUILT)]
        made = [(mosaic(parts, each), self.organs[place[0]]) for each in fields]
        return np.stack([compose(*each, self.borders, self.labels) for each in made])

    def lay(self, family: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The members of a family, how they lie over the frame (n, 2, h, w), their tissue there.

        The first slice of the family is the frame over which the others are laid, cell by cell. If
        there are enough others it gives neither tissue nor shape: nothing should lead back to it.
        """
        members = family[1:] if len(family) >= FEWEST else family
        laid = self.displacements(family[0], members)
        return members, laid, each_warped(self.tissue[members], laid)

    def displacements(self, frame: int, members: np.ndarray) -> np.ndarray:
        """How far from each cell of the frame slices show the same: (n, 2, h, w), in cells.

        By the centres of their organs, and then by optical flow.
        """
        middle = centre(self.organs[frame])
        ahead = np.stack([centre(self.organs[member]) - middle for member in members])
        ahead = ahead[:, :, None, None]
        flow = optical_flow(self.painted[frame], each_warped(self.painted[members], ahead))
        # Where there is nothing to see, as in air, the flow is noise.
        flow = gaussian_filter(flow.clip(-FARTHEST, FARTHEST), (0, 0, 2, 2), mode="nearest")
        return ahead + flow
