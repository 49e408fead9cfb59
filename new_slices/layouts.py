"""Layouts: which organ lies where, at the resolution of the bottom codes; and new ones, between two
patients'.

A layout is a mask with one class index for each bottom code. The top prior is told it (prior.py),
and so learns how a slice with these organs looks. A new slice starts with a new layout: the masks
of two patients who are much alike, with their signed distances averaged (shape-based interpolation,
Raya & Udupa 1990), moved and stretched a little. Its organs are new, between those of two patients;
the rest of the slice is the priors' own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import affine_transform, distance_transform_edt
from torch import Tensor

from dataset import NO_MASK
from new_slices.organs import nearest_positions

NEARBY = 0.1  # the share of the training slices, nearest in position, that a layout starts from
ALIKE = 8  # slices of other patients, the most alike, of which one is its partner
DOUBT = 0.03  # the chance of a class where the layout shows it nowhere near
SHARES = (0.4, 0.6)  # of the first in the two: never one patient's organs alone
# An average of two patients varies less than patients do, so it is moved and stretched along each
# axis
SHIFT, STRETCH = 0.5, 0.015  # standard deviations: cells, a share


def middles(masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """Masks (B, H, W) -> the value in the middle of each cell, (B, *shape)."""
    rows, columns = masks.shape[1] // shape[0], masks.shape[2] // shape[1]
    return masks[:, rows // 2 :: rows, columns // 2 :: columns]


def layouts_of(masks: Tensor, shape: tuple[int, int], labels: int) -> Tensor:
    """Masks (B, H, W) uint8 -> layouts (B, *shape) int32: the class in the middle of each cell.

    `labels`, one more than the last class, stands for an unknown one.
    """
    found = middles(masks, shape)
    return torch.where(found == NO_MASK, labels, found.int())


def likely(layouts: Tensor, labels: int, height: int, width: int) -> Tensor:
    """How likely a layout makes every class at every pixel, as a log, (B, h, w) int64 -> (B,
    labels, height, width).

    Between the middles of cells it changes linearly, as what a prior made of the layout may lie
    somewhat aside.
    """
    shown = F.one_hot(layouts, labels).permute(0, 3, 1, 2).float()
    return (
        F.interpolate(shown, (height, width), mode="bilinear", align_corners=False) + DOUBT
    ).log()


def signed_distances(layout: np.ndarray, labels: int) -> np.ndarray:
    """How deep inside each class every cell lies, in cells; negative outside. (h, w) -> (labels, h,
    w).

    A class that is nowhere lies as far away as the layout is long, one that is everywhere as deep.
    """
    distances = np.empty((labels, *layout.shape))
    for label, distance in enumerate(distances):
        inside = layout == label
        if inside.all() or not inside.any():
            distance[:] = sum(layout.shape) * (1 if inside.all() else -1)
        else:
            distance[:] = distance_transform_edt(inside) - distance_transform_edt(~inside)
    return distances


def blend(a: np.ndarray, b: np.ndarray, share: float, labels: int) -> np.ndarray:
    """Signed distances (labels, h, w) at `share`, in [0, 1], of the way from b to a, layouts of the
    same classes.
    """
    return share * signed_distances(a, labels) + (1 - share) * signed_distances(b, labels)


def moved(distances: np.ndarray, shift: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """Signed distances (labels, h, w), stretched about the middle by `stretch` (2,), then moved by
    `shift` (2,).
    """
    middle = (np.array(distances.shape[1:]) - 1) / 2
    offset = middle - (middle + shift) / stretch
    return np.stack(
        [affine_transform(each, 1 / stretch, offset, order=1, mode="nearest") for each in distances]
    )


class Drawn(NamedTuple):
    """New layouts (n, h, w) int64; the two training slices (n, 2) each lies between; the share (n,)
    of the first.
    """

    layouts: np.ndarray
    parents: np.ndarray
    shares: np.ndarray


def draw(
    layouts: np.ndarray,
    positions: np.ndarray,
    patients: np.ndarray,
    labels: int,
    at: Sequence[float],
    seeds: Sequence[int],
) -> Drawn:
    """New layouts at the positions `at` (n,), in [0, 1] or NaN for any, each with random numbers of
    its own seed.

    The first parent is a random one of the nearest tenth in position. The second is one of the
    eight slices of other patients that show the same organs and overlap it most; where there is
    none, the layout is the first one's own, but moved and stretched like the others.

    Args:
        layouts (N, h, w), positions (N,), patients (N,): of the training slices; those without a
            mask are not used.
    """
    usable = np.flatnonzero((layouts < labels).all((1, 2)))
    layouts, positions, patients = layouts[usable], positions[usable], patients[usable]
    shown = np.stack([(layouts == label).any((1, 2)) for label in range(labels)], 1)  # (N, labels)
    sizes = np.count_nonzero(layouts, axis=(1, 2))  # cells of all organs together
    nearby = max(ALIKE, round(NEARBY * len(layouts)))
    found, parents, shares = [], [], []
    for position, seed in zip(at, seeds, strict=True):
        rng = np.random.default_rng(seed)
        order = nearest_positions(position, positions)
        first = rng.choice(order if np.isnan(position) else order[:nearby])
        others = np.flatnonzero((shown == shown[first]).all(1) & (patients != patients[first]))
        second, share = first, 1.0
        if len(others):
            overlap = ((layouts[others] == layouts[first]) & (layouts[first] > 0)).sum((1, 2))
            both = np.maximum(sizes[first] + sizes[others], 1)
            alike = others[np.argsort(-overlap / both, kind="stable")]
            second, share = rng.choice(alike[:ALIKE]), rng.uniform(*SHARES)
        distances = blend(layouts[first], layouts[second], share, labels)
        found.append(
            moved(distances, rng.normal(0, SHIFT, 2), 1 + rng.normal(0, STRETCH, 2)).argmax(0)
        )
        parents.append(usable[[first, second]])
        shares.append(share)
    return Drawn(np.stack(found), np.stack(parents), np.array(shares))
