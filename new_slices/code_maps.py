"""Encode a study once and cache its code maps, with the layouts of its slices; decode new ones.

The priors learn from few patients, so they see variants of every training slice: as it is,
mirrored, and then shifted, turned, stretched, bent and shaded (`Variants`). Each is altered as a
picture and then coded. The priors are told how (`Variants.numbers`), though of bending and shading
only that there is some. In sampling they are asked for unaltered slices.
"""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dataset import SPLITS, Mirror, SliceDataset
from modules import VQVAE2
from new_slices.layouts import Composer, depths_of, layouts_of, likely, smoothed, tissue_borders
from new_slices.organs import likeliest
from support import runtime

LEVELS = ("top", "bottom")
# What describes a variant: mirrored, altered, two of shift, turn, two of stretch (rows, columns).
NUMBERS = 7
MOST_VARIANTS = 1000  # of a slice
SHIFT, TURN, STRETCH = 8.0, 0.06, 0.08  # the most of each: pixels, radians, share
BEND = 2.0  # pixels, standard deviation of the elastic displacement
SHADE = 0.15  # standard deviation of the log of the shading
FIELD = (5, 4)  # random numbers between which a field that bends or shades is interpolated


class Samples(NamedTuple):
    """New slices."""

    images: np.ndarray  # (n, H, W) float32, z-scored
    top: np.ndarray  # (n, h, w) int64 in [0, K)
    bottom: np.ndarray  # (n, 2h, 2w) int64 in [0, K)
    masks: np.ndarray | None  # (n, H, W) uint8 as `SliceDataset.masks`; None without masks


@torch.inference_mode()
def decode(
    model: VQVAE2, top: Tensor, bottom: Tensor, layouts: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes -> z-scored slices (N, H, W) float32 and their masks (N, H, W) uint8 classes, or None.

    Where the slices were sampled given layouts (N, h, w), a mask is the likeliest given codes and
    layout. One slice at a time: rounding depends on the size of a batch.
    """
    device = next(model.parameters()).device
    images, masks = [], []
    for i, pair in enumerate(zip(top.to(device).split(1), bottom.to(device).split(1), strict=True)):
        image, logits = model.decode_with_masks(*pair)
        images.append(image[:, 0].cpu().numpy())
        if logits is not None:
            if layouts is not None:
                logits = logits + likely(layouts[i : i + 1].to(device), *logits.shape[1:])
            masks.append(likeliest(logits).cpu().numpy())
    return np.concatenate(images), np.concatenate(masks) if masks else None


class Variants:
    """How each of `slices` training slices is altered in each of `count` variants, at random.

    Variant 0 is the slice as it is, 1 its mirror image, and the others are random.
    """

    def __init__(self, count: int, slices: int, mirror: Mirror) -> None:
        self.mirror = mirror
        generator = torch.Generator().manual_seed(0)
        # (count, slices, NUMBERS) float32 in [-1, 1], 0 for variant 0: for the priors.
        self.numbers = torch.rand(count, slices, NUMBERS, generator=generator) * 2 - 1
        self.numbers[:, :, 0] = (self.numbers[:, :, 0] > 0).float()
        self.numbers[:, :, 1] = 1
        self.numbers[:2] = 0
        self.numbers[1:2, :, 0] = 1
        # Three fields a slice: it is bent along rows by the first, along columns by the second,
        # and shaded by the third.
        self.fields = torch.randn(count, slices, 3, *FIELD, generator=generator)

    def images(self, x: Tensor, variant: int, indices: Tensor) -> Tensor:
        """Slices x (B, 1, H, W), those of `indices` (B,), as their `variant`, z-scored again."""
        x = self.mirror.images(x, self.mirrored(x, variant, indices))
        if variant < 2:
            return x
        x = self.moved(x - x.amin((2, 3), keepdim=True), variant, indices, "bilinear")
        x = x * (SHADE * self.smooth(x, self.fields[variant, indices, 2:])).exp()
        std, mean = torch.std_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) / std.clamp_min(1e-6)

    def masks(self, masks: Tensor, variant: int, indices: Tensor) -> Tensor:
        """Their masks (B, H, W) uint8, altered alike; left and right labels are exchanged."""
        masks = self.mirror.masks(masks, self.mirrored(masks, variant, indices))
        if variant < 2:
            return masks
        return self.moved(masks[:, None].float(), variant, indices, "nearest")[:, 0].to(torch.uint8)

    def mirrored(self, x: Tensor, variant: int, indices: Tensor) -> Tensor:
        """(B,) bool, where x lies: which of these slices the variant mirrors."""
        return self.numbers[variant, indices, 0].to(x.device) > 0

    @staticmethod
    def smooth(x: Tensor, fields: Tensor) -> Tensor:
        """Random fields (B, n, *FIELD), interpolated to the size of x (..., H, W): (B, n, H, W)."""
        return F.interpolate(fields.to(x.device), x.shape[2:], mode="bicubic", align_corners=True)

    def moved(self, x: Tensor, variant: int, indices: Tensor, mode: str) -> Tensor:
        """x (B, 1, H, W) shifted, turned, stretched and bent."""
        numbers = self.numbers[variant, indices].to(x.device)
        bend_r, bend_c = (BEND * self.smooth(x, self.fields[variant, indices, :2])).unbind(1)
        height, width = x.shape[2:]
        # Each pixel looks for its value where the alteration has moved it from, in pixels from
        # the centre of the slice.
        rows = torch.arange(height, device=x.device)[:, None] - (height - 1) / 2
        columns = torch.arange(width, device=x.device) - (width - 1) / 2
        shift_r, shift_c, turn, stretch_r, stretch_c = numbers[:, 2:].T[:, :, None, None]
        sine, cosine = (TURN * turn).sin(), (TURN * turn).cos()
        source_r = (cosine * rows - sine * columns) * (1 + STRETCH * stretch_r) + SHIFT * shift_r
        source_c = (sine * rows + cosine * columns) * (1 + STRETCH * stretch_c) + SHIFT * shift_c
        bent = (source_c + bend_c) * 2 / width, (source_r + bend_r) * 2 / height
        return F.grid_sample(
            x, torch.stack(bent, -1), mode, padding_mode="border", align_corners=False
        )


def labels_on_layouts(model: VQVAE2, train: SliceDataset) -> int:
    """How many labels the layouts of a training split show: its own, if the autoencoder knows them.

    0 for none.
    """
    return len(train.labels) if len(train.labels) == model.config.labels else 0


@torch.inference_mode()
def extract_codes(
    model: VQVAE2, splits: dict[str, SliceDataset], variants: int, sha256: str, *files: Path
) -> dict[str, np.ndarray]:
    """The code maps and layouts of every slice: `variants` of each of the train split's.

    They are read from the first of the `files` that was made of these splits with this autoencoder
    (`sha256` is that of its checkpoint). If there is none, they are made and written to the last.

    Returns:
        "train_top" (variants, N, h, w), "train_bottom" and "train_layout" (variants, N, 2h, 2w),
        "validate_top" (1, N, h, w), ... uint16. Layouts show organs if the autoencoder knows them.
        For new layouts, of unaltered slices "train_tissue" (N, 2h, 2w) float32, the smoothed
        intensities, and "train_depths" (N, labels, 2h, 2w) int8, the signed distances of organs;
        and "borders", the intensity where one region ends and the next begins (layouts.py).
    """
    train = splits["train"]
    mirror = train.mirror.axis, train.mirror.partners  # of the variants
    made_of = "7", sha256, variants, mirror, *(splits[name].fingerprint for name in SPLITS)
    key = " ".join(map(str, made_of))
    for file in files:
        with suppress(*runtime.NOT_WHOLE), np.load(file) as saved:
            if str(saved["key"]) == key:
                return {name: saved[name] for name in saved.files if name != "key"}
    counts = {name: variants if name == "train" else 1 for name in SPLITS}
    total = sum(counts[name] * len(splits[name]) for name in SPLITS)
    device = next(model.parameters()).device
    labels = labels_on_layouts(model, train)
    shapes = dict(zip(LEVELS, model.config.code_shapes(*train.pixels.shape[1:]), strict=True))
    cells = shapes["layout"] = shapes["bottom"]
    maps = {"borders": tissue_borders(train, cells)}
    maps["train_tissue"] = np.empty((len(train), *cells), np.float32)
    maps["train_depths"] = np.zeros((len(train), max(labels, 1), *cells), np.int8)
    bar = tqdm(total=total, desc="codes", unit=" slices", disable=None)
    for name, split in splits.items():
        altered = Variants(counts[name], len(split), train.mirror)
        for kind, shape in shapes.items():
            maps[f"{name}_{kind}"] = np.empty((counts[name], len(split), *shape), np.uint16)
        for indices in torch.arange(len(split)).split(16 if device.type == "cpu" else 64):
            x = split.images(indices).to(device)
            masks = split.masks(indices) if labels else None
            for variant in range(counts[name]):
                seen = altered.images(x, variant, indices)
                tissue = smoothed(seen, cells)
                drawn = altered.masks(masks, variant, indices) if labels else None
                layouts = layouts_of(tissue, drawn, maps["borders"], labels)
                maps[f"{name}_layout"][variant, indices] = layouts
                for level, codes in zip(LEVELS, model.encode(seen), strict=True):
                    maps[f"{name}_{level}"][variant, indices] = codes.cpu().numpy()
                if name == "train" and variant == 0:
                    maps["train_tissue"][indices] = tissue
                    if labels:
                        maps["train_depths"][indices] = depths_of(drawn, labels, cells)
                bar.update(len(indices))
    bar.close()
    with runtime.atomic_path(files[-1]) as part:
        np.savez(part, key=key, **maps)
    return maps


def composer_of(train: SliceDataset, maps: dict[str, np.ndarray], labels: int) -> Composer:
    """What composes layouts of a training split's slices, whose maps `extract_codes` gave."""
    known = maps["train_layout"][0], maps["train_tissue"], maps["train_depths"]
    codes = [maps[f"train_{level}"][0] for level in LEVELS]
    return Composer(*known, train.positions, train.patients, maps["borders"], labels, codes)
