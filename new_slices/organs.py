"""Masks in, anatomy out: which organs a slice shows, how large and where they are, and whether they
are whole.

A small U-Net, `train_segmenter`, learns the masks of real training slices and then reads any slice,
new ones too. `measure` turns masks into figures of each organ, and `plausible` compares them with
those of real training slices.
Masks hold class indices: 0 is the background, the others are called organs here; 255 means that
nothing is known.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import wasserstein_distance
from skimage.measure import label, regionprops
from torch import Tensor, nn
from tqdm import tqdm

from dataset import NO_MASK, Mirror
from support import runtime

SMALLEST_PIECE = (
    8  # pixels: smaller pieces and holes are noise of the segmentation and are not counted
)
NEAREST = 128  # real training slices, nearest in position, that a slice is compared with
RAREST = 0.01  # the share of those that must show the same organs
TAILS = (0.01, 0.99)  # between these quantiles of theirs lies every figure of a plausible slice
FIGURES = ("area", "row", "column", "pieces", "holes", "solidity", "asymmetry")


# ---- the segmenter -------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """A small U-Net (Ronneberger et al. 2015, arXiv 1505.04597): slices -> logits of each label at
    each pixel.

    It costs about as much as the autoencoder: blocks of 4x4 pixels become channels at the input and
        pixels again
    at the output, so no layer works on whole resolution.
    """

    BLOCK = 4  # pixels, side of a block
    COARSEST = 16  # pixels: both sides of a slice are padded to multiples of it

    def __init__(self, labels: int, channels: int = 32):
        super().__init__()
        self.labels, self.channels, C = labels, channels, channels

        def convolutions(inputs: int, outputs: int, n: int = 2) -> nn.Sequential:
            layers = []
            for i in range(n):
                layers += [
                    nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
            return nn.Sequential(*layers)

        self.fine = nn.Sequential(nn.PixelUnshuffle(self.BLOCK), convolutions(self.BLOCK**2, C))
        self.middle = nn.Sequential(nn.MaxPool2d(2), convolutions(C, 2 * C))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), convolutions(2 * C, 3 * C))
        self.up_middle, self.to_middle = nn.Conv2d(3 * C, 2 * C, 1), convolutions(2 * C, 2 * C, n=1)
        self.up_fine, self.to_fine = nn.Conv2d(2 * C, C, 1), convolutions(C, C, n=1)
        self.head = nn.Sequential(
            nn.Conv2d(C, labels * self.BLOCK**2, 1), nn.PixelShuffle(self.BLOCK)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, H, W), z-scored -> logits (B, L, H, W)."""
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % self.COARSEST, 0, -H % self.COARSEST), mode="replicate")
        fine = self.fine(x)  # (B, C, H/4, W/4)
        middle = self.middle(fine)  # (B, 2C, H/8, W/8)
        coarse = self.coarse(middle)  # (B, 3C, H/16, W/16)
        middle = self.to_middle(middle + F.interpolate(self.up_middle(coarse), scale_factor=2))
        fine = self.to_fine(fine + F.interpolate(self.up_fine(middle), scale_factor=2))
        return self.head(fine).float()[:, :, :H, :W]


def mask_losses(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, and 1 - Dice averaged over the labels but the background, over the slices with
    a mask.

    logits (B, L, H, W); masks (B, H, W) uint8 classes below L, 255 all over a slice without one.
    Dice is the soft one of Milletari et al. 2016 (arXiv 1606.04797), over all the batch's pixels; 1
    is added above and below, so that a label which is nowhere and is drawn nowhere costs nothing.
    """
    known = (masks != NO_MASK).unsqueeze(1)  # (B, 1, H, W)
    target = masks.long().masked_fill(~known[:, 0], 0)
    log_p = logits.log_softmax(1)
    pixels = known.sum().clamp_min(1)
    cross_entropy = -(log_p.gather(1, target.unsqueeze(1)) * known).sum() / pixels
    p = log_p.exp() * known
    truth = torch.zeros_like(p).scatter_(1, target.unsqueeze(1), 1) * known
    both, either = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    dice = (2 * both[1:] + 1) / (either[1:] + 1)
    return {"mask_cross_entropy": cross_entropy, "mask_dice": 1 - dice.mean()}


def train_segmenter(
    pairs: Callable[[np.ndarray], tuple[Tensor, Tensor]],
    count: int,
    labels: int,
    mirror: Mirror,
    steps: int = 3000,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Segmenter:
    """A segmenter, in `eval()`, that has learnt the masks of `count` slices.

    Args:
        pairs: from indices (B,) below `count` to z-scored slices (B, 1, H, W) and their masks (B,
            H, W) uint8.
        labels: how many there are, the background among them.
        mirror: of these slices.
        steps, batch_size: how long to train, and the slices of a step; 300 steps take half a minute
            on two cores.

    Every slice is mirrored with probability 0.5, and gets a random gain, offset and noise.
    """
    with torch.random.fork_rng(devices=[]):  # whoever calls draws what it would have drawn
        torch.manual_seed(seed)
        net = Segmenter(labels).to(device)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 1e-2, total_steps=steps + 1, pct_start=0.2
    )
    order = np.concatenate([rng.permutation(count) for _ in range(1 + steps * batch_size // count)])
    for step in tqdm(range(steps), desc="segmenter", unit=" steps", disable=None):
        images, masks = pairs(order[step * batch_size : (step + 1) * batch_size])
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images, masks = mirror.images(images, mirrored), mirror.masks(masks, mirrored)
        gain, offset = 0.2 * torch.randn(2, len(images), 1, 1, 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        images = (
            images * (1 + gain)
            + offset
            + 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator) * noise
        )
        loss = sum(mask_losses(net(images.to(device)), masks.to(device)).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def likeliest(logits: Tensor) -> Tensor:
    """Logits (B, L, H, W) -> the likeliest class of every pixel, (B, H, W) uint8."""
    return logits.max(1)[1].to(torch.uint8)  # argmax takes five times as long on a CPU


@torch.inference_mode()
def segment(net: Segmenter, images: np.ndarray) -> np.ndarray:
    """z-scored slices (N, H, W) -> masks (N, H, W) uint8."""
    device = next(net.parameters()).device
    parts = torch.as_tensor(images[:, None]).split(16)
    return np.concatenate([likeliest(net(part.to(device))).cpu().numpy() for part in parts])


def segmenter_of(train, file: Path | str, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter of a training split that has masks: read from `file` if it is there, else
    trained and kept.

    One that was trained on other slices is trained again.
    """
    data = {"fingerprint": train.fingerprint, "labels": list(train.labels)}
    data["partners"] = [list(pair) for pair in train.mirror.partners]
    try:
        saved = runtime.load_checkpoint(file, "segmenter")
        if saved["data"] == data:
            with runtime.reading(file):
                net = Segmenter(**saved["model_config"])
                net.load_state_dict(saved["model"])
            return net.to(device).eval()
    except (FileNotFoundError, runtime.UserError):
        pass  # not there, or of another version
    masked = np.flatnonzero(train.has_mask)

    def pairs(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return train.images(masked[indices]), train.masks(masked[indices])

    # The phantom's organs are learnt in 300 steps; on real hearts and abdomens 1200 are still too
    # few.
    steps = 300 if train.synthetic else 3000
    net = train_segmenter(pairs, len(masked), len(train.labels), train.mirror, steps, device=device)
    config = {"labels": net.labels, "channels": net.channels}
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    saved = {
        "kind": "segmenter",
        "model_config": config,
        "model": weights,
        "data": data,
        "epoch": 0,
    }
    runtime.save_checkpoint(file, saved)
    return net


# ---- figures of organs ---------------------------------------------------------------------------


def measure(masks: np.ndarray, labels: int) -> np.ndarray:
    """What masks (N, H, W) of `labels` classes show: (N, labels - 1, 7) float64, NaN for an organ
    that is not there.

    The last axis is `FIGURES`: area in pixels; row and column of the centre; how many connected
    pieces and how many holes; solidity, the area over that of the convex hull; asymmetry, the share
    of the organ that its own left-right mirror image (axis H, in its bounding box) does not cover.
    Pieces and holes of fewer than 8 pixels do not count.
    """

    def figures_of(mask: np.ndarray) -> np.ndarray:
        figures = np.full((labels - 1, len(FIGURES)), np.nan)
        for region in regionprops(np.where(mask == NO_MASK, 0, mask)):
            pieces = label(region.image, connectivity=2)
            small = np.bincount(pieces.ravel())[1:] < SMALLEST_PIECE
            if small.all():
                continue
            kept = region.image & ~np.isin(pieces, 1 + np.flatnonzero(small))
            (organ,) = regionprops(kept.astype(np.uint8))
            image = organ.image
            gaps = np.bincount(
                label(np.pad(~image, 1, constant_values=True), connectivity=1).ravel()
            )[2:]
            figures[region.label - 1] = (
                organ.area,
                region.bbox[0] + organ.centroid[0],
                region.bbox[1] + organ.centroid[1],
                np.count_nonzero(~small),
                np.count_nonzero(gaps >= SMALLEST_PIECE),
                organ.solidity,
                1 - np.count_nonzero(image & image[::-1]) / organ.area,
            )
        return figures

    with runtime.thread_pool() as pool:
        return np.stack(list(pool.map(figures_of, masks)))


def nearest_positions(position: float, positions: np.ndarray) -> np.ndarray:
    """The indices of positions (N,), the nearest first; those that are unknown (NaN) come last."""
    distance = np.abs(positions - position)
    return np.argsort(distance, kind="stable")


def plausible(
    figures: np.ndarray, positions: np.ndarray, real: np.ndarray, real_positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether slices look like real ones near their positions, by the `measure` of both.

    A slice is compared with the 128 real slices whose positions are nearest, with all of them where
    its own is unknown. At least 1 % of these must show just the organs that it shows. Each figure
    of an organ must lie within the central 98 % of the 128 nearest real slices that have the organ;
    of fewer than 100, between their extremes.

    Args:
        figures (n, O, F), positions (n,); real (N, O, F), real_positions (N,).

    Returns:
        (n,) bool: these organs occur together; (n, O) bool: all of an organ's figures are
        plausible, or it is not there. A slice is plausible where all of them are True.
    """
    shown, real_shown = ~np.isnan(figures[..., 0]), ~np.isnan(real[..., 0])
    together, organs = np.ones(len(figures), bool), np.ones(shown.shape, bool)
    for i, position in enumerate(positions):
        order = nearest_positions(position, real_positions)
        most = len(order) if np.isnan(position) else NEAREST
        alike = (real_shown[order[:most]] == shown[i]).all(1)
        together[i] = alike.mean() >= RAREST
        for organ in np.flatnonzero(shown[i]):
            others = real[order[real_shown[order, organ]][:most], organ]
            if len(others):
                low, high = np.quantile(others, TAILS, axis=0, method="inverted_cdf")
                organs[i, organ] = ((low <= figures[i, organ]) & (figures[i, organ] <= high)).all()
            else:
                organs[i, organ] = False
    return together, organs


def figure_distances(figures: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """Wasserstein-1 distances of each organ's figures in two sets, `measure`'s (n, O, F) and (N, O,
    F): (O,) each.

    "area" as a share of the real mean area; "centre" in pixels, of rows and columns together (their
    root sum of squares). NaN where a set never shows the organ.
    """
    found = {name: np.full(figures.shape[1], np.nan) for name in ("area", "centre")}
    for organ in range(figures.shape[1]):
        a, b = (x[~np.isnan(x[:, organ, 0]), organ] for x in (figures, real))
        if len(a) and len(b):
            area, row, column = (wasserstein_distance(a[:, i], b[:, i]) for i in range(3))
            found["area"][organ] = area / b[:, 0].mean()
            found["centre"][organ] = np.hypot(row, column)
    return found


def dice_by_patient(
    found: np.ndarray, truth: np.ndarray, patients: Sequence, labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """The Dice score of each organ in all slices of a patient taken together, 2 |A and B| / (|A| +
    |B|).

    Masks (N, H, W), of which pixels of 255 in `truth` are left out; patients (N,).

    Returns:
        The patients (P,), sorted, and their scores (P, labels - 1); NaN where neither mask shows
        the organ.
    """
    names, whose = np.unique(patients, return_inverse=True)
    shared, sizes = np.zeros((2, len(names), labels))
    for a, b, patient in zip(found, truth, whose, strict=True):
        a, b = a[b != NO_MASK], b[b != NO_MASK]
        shared[patient] += np.bincount(a[a == b], minlength=labels)[:labels]
        sizes[patient] += np.bincount(a, minlength=labels)[:labels] + np.bincount(
            b, minlength=labels
        )
    with np.errstate(invalid="ignore"):
        return names, (2 * shared / sizes)[:, 1:]
