"""Masks in, anatomy out: which organs a slice shows, how large and where, and whether whole.

A small U-Net, `train_segmenter`, learns the masks of real training slices and then reads any slice,
new ones too. `measure` takes measurements of each organ in a mask; `plausible` compares them with
those of real training slices, and `judge_masks` says which organs a network that draws masks has
not learnt. Masks hold class indices: 0 is the background, the others are called organs here; 255
means that nothing is known.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.measure import label, regionprops
from torch import Tensor, nn
from tqdm import tqdm

from dataset import NO_MASK, Mirror
from support import runtime

# In pixels: smaller pieces and holes are noise of a segmentation and are not counted.
SMALLEST_PIECE = 8
BATCH = 8  # slices of a training step
# So many real slices, nearest in position, are what a slice is compared with; or this share of all,
# if that is more: 128 slices can be of a few people who were scanned many times.
NEAREST, NEARBY = 128, 0.1
RAREST = 0.01  # the share of those that must show the same organs
TAILS = (0.01, 0.99)  # quantiles of real slices between which a plausible slice's measurements lie
MEASUREMENTS = ("area", "row", "column", "pieces", "holes", "solidity", "asymmetry", "roughness")
JUDGED = ("pieces", "holes", "roughness")  # of a mask, beside its Dice
LOWEST_DICE = 0.2  # below it an organ was not learnt
FAR = 1.5  # nor where a median is so many times outside what real masks have between `TAILS`
SEGMENTER_FILE = "segmenter.pth"  # where a trained U-Net is kept


# ---- the segmenter ----


class Segmenter(nn.Module):
    """A small U-Net (Ronneberger et al. 2015, arXiv 1505.04597): slices -> logits of each label.

    It costs about as much as the autoencoder: blocks of 4x4 pixels become channels at the input and
    pixels again at the output, so no layer works on whole resolution.
    """

    BLOCK = 4  # pixels, side of a block
    COARSEST = 16  # pixels: both sides of a slice are padded to multiples of it

    def __init__(self, labels: int, channels: int = 32):
        super().__init__()
        self.labels, self.channels, C = labels, channels, channels

        def convolutions(inputs: int, outputs: int, n: int = 2) -> nn.Sequential:
            layers = []
            for i in range(n):
                conv = nn.Conv2d(outputs if i else inputs, outputs, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        self.fine = nn.Sequential(nn.PixelUnshuffle(self.BLOCK), convolutions(self.BLOCK**2, C))
        self.middle = nn.Sequential(nn.MaxPool2d(2), convolutions(C, 2 * C))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), convolutions(2 * C, 3 * C))
        self.up_middle, self.to_middle = nn.Conv2d(3 * C, 2 * C, 1), convolutions(2 * C, 2 * C, n=1)
        self.up_fine, self.to_fine = nn.Conv2d(2 * C, C, 1), convolutions(C, C, n=1)
        to_blocks = nn.Conv2d(C, labels * self.BLOCK**2, 1)
        self.head = nn.Sequential(to_blocks, nn.PixelShuffle(self.BLOCK))

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
    """Cross-entropy, and 1 - the mean Dice of all labels but the background.

    logits (B, L, H, W); masks (B, H, W) uint8 classes below L, 255 where what is shown is unknown.
    Dice is the soft one of Milletari et al. 2016 (arXiv 1606.04797), over all the batch's pixels; 1
    is added above and below, so that a label which is nowhere and is drawn nowhere costs nothing.
    """
    known = (masks != NO_MASK).unsqueeze(1)  # (B, 1, H, W)
    target = masks.long().masked_fill(~known[:, 0], 0)
    log_p = logits.log_softmax(1)
    pixels = known.sum().clamp_min(1)
    cross_entropy = -(log_p.gather(1, target.unsqueeze(1)) * known).sum() / pixels
    p = log_p.exp() * known
    truth = torch.zeros_like(p).scatter_(1, target.unsqueeze(1), 1)
    both, either = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    dice = (2 * both[1:] + 1) / (either[1:] + 1)
    return {"mask_cross_entropy": cross_entropy, "mask_dice_loss": 1 - dice.mean()}


def train_segmenter(
    pairs: Callable[[np.ndarray], tuple[Tensor, Tensor]],
    count: int,
    labels: int,
    mirror: Mirror,
    steps: int = 3000,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Segmenter:
    """A segmenter, in `eval()`, that has learnt the masks of `count` slices.

    `pairs` makes of indices (B,) below `count` slices (B, 1, H, W) and masks (B, H, W) uint8 of so
    many `labels`, the background among them. Every slice is mirrored with probability 0.5, and gets
    a random gain, offset and noise.
    """
    with torch.random.fork_rng(devices=[]):  # whoever calls draws what it would have drawn
        torch.manual_seed(seed)
        net = Segmenter(labels).to(device)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimiser, 1e-2, total_steps=steps + 1, pct_start=0.2)
    order = np.concatenate([rng.permutation(count) for _ in range(1 + steps * BATCH // count)])
    for step in tqdm(range(steps), desc="U-Net", unit=" steps", disable=None):
        images, masks = pairs(order[step * BATCH : (step + 1) * BATCH])
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images, masks = mirror.images(images, mirrored), mirror.masks(masks, mirrored)
        gain, offset = 0.2 * torch.randn(2, len(images), 1, 1, 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        noise = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator) * noise
        images = images * (1 + gain) + offset + noise
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


def segmenter_of(train, *folders: Path, device: torch.device | str = "cpu") -> Segmenter:
    """The segmenter of a training split that has masks, which is trained once.

    It is read from one of the `folders`, if there is one of these slices, or else trained, and kept
    in the first of them that can be written.
    """
    data = {"fingerprint": train.fingerprint, "labels": list(train.labels)}
    data["partners"] = [list(pair) for pair in train.mirror.partners]
    for file in (folder / SEGMENTER_FILE for folder in folders):
        with suppress(FileNotFoundError, runtime.UserError):  # not there, or of another version
            saved = runtime.load_checkpoint(file, "segmenter")
            if saved["data"] == data:
                with runtime.reading(file):
                    net = Segmenter(**saved["model_config"])
                    net.load_state_dict(saved["model"])
                return net.to(device).eval()
    masked = np.flatnonzero(train.has_mask)

    def pairs(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return train.images(masked[indices]), train.masks(masked[indices])

    # The phantom's organs are learnt in 300 steps; on real hearts and abdomens 1200 are still too
    # few. A step on slices of 256x128 takes a tenth of a second on two cores.
    steps = 300 if train.synthetic else 3000
    minutes = steps / 600 * train.pixels[0].size / (256 * 128)
    length = f"{steps} steps, about {max(1, round(minutes))} min on two cores"
    print(f"training a U-Net on {len(masked)} slices with masks, to compare with: {length}")
    net = train_segmenter(pairs, len(masked), len(train.labels), train.mirror, steps, device=device)
    config = {"labels": net.labels, "channels": net.channels}
    weights = {name: value.cpu() for name, value in net.state_dict().items()}
    saved = {"kind": "segmenter", "model_config": config, "model": weights, "data": data}
    for folder in folders:  # a model's folder may be one that others may only read
        with suppress(OSError):
            runtime.save_checkpoint(folder / SEGMENTER_FILE, saved)
            return net
    print("the U-Net is not kept: none of the folders can be written")
    return net


# ---- measurements of organs ----


def measure(masks: np.ndarray, labels: int) -> np.ndarray:
    """What masks (N, H, W) of `labels` classes show, (N, labels - 1, 8); NaN for no such organ.

    The last axis is `MEASUREMENTS`: area in pixels; row and column of the centre; how many
    connected pieces and how many holes; solidity, the area over that of the convex hull; asymmetry,
    the share of the organ that its own mirror image (along axis H, in its bounding box) does not
    cover; roughness of the outline, its length squared over the area, 4 pi for a disc. Pieces and
    holes of fewer than 8 pixels do not count.
    """

    def measure_one(mask: np.ndarray) -> np.ndarray:
        measured = np.full((labels - 1, len(MEASUREMENTS)), np.nan)
        for region in regionprops(np.where(mask == NO_MASK, 0, mask)):
            pieces = label(region.image, connectivity=2)
            small = np.bincount(pieces.ravel())[1:] < SMALLEST_PIECE
            if small.all():
                continue
            kept = region.image & ~np.isin(pieces, 1 + np.flatnonzero(small))
            (organ,) = regionprops(kept.astype(np.uint8))
            image = organ.image
            outside = label(np.pad(~image, 1, constant_values=True), connectivity=1)
            gaps = np.bincount(outside.ravel())[2:]  # 1 is what lies around the organ
            measured[region.label - 1] = (
                organ.area,
                region.bbox[0] + organ.centroid[0],
                region.bbox[1] + organ.centroid[1],
                np.count_nonzero(~small),
                np.count_nonzero(gaps >= SMALLEST_PIECE),
                organ.solidity,
                1 - np.count_nonzero(image & image[::-1]) / organ.area,
                organ.perimeter**2 / organ.area,
            )
        return measured

    with runtime.thread_pool() as pool:
        return np.stack(list(pool.map(measure_one, masks)))


def judge_masks(
    masks: np.ndarray, reference: np.ndarray, real: np.ndarray, labels: Sequence[int]
) -> dict[str, dict]:
    """Masks judged as masks, organ by organ: a mean over organs hides one that is noise.

    Args:
        masks: (N, H, W) that a network has drawn.
        reference: (N, H, W) of the same slices: their real masks or, for new slices, the U-Net's.
        real: (M, H, W) real masks of any slices, whose shapes these should have.
        labels: the value of each class, the background's first.

    Returns {"label_7": {"dice", "pieces", "holes", "roughness", "faults"}}: Dice over all slices,
    None where no reference shows the organ; means {"masks", "real"} of measurements, None where no
    mask shows it; and `faults`, a list of sentences. An organ with faults was not learnt: its Dice
    is below 0.2, or the median of its pieces or roughness is far outside what real masks have.
    """
    _, dice = dice_by_patient(masks, reference, np.zeros(len(masks)), len(labels))
    measured = {"masks": measure(masks, len(labels)), "real": measure(real, len(labels))}
    verdicts = {}
    for organ, value in enumerate(labels[1:]):
        shown = {name: m[~np.isnan(m[:, organ, 0]), organ] for name, m in measured.items()}
        known = bool((reference == organ + 1).any())
        verdict = {"dice": float(dice[0, organ]) if known else None}
        low = known and verdict["dice"] < LOWEST_DICE
        faults = [f"Dice over all slices {verdict['dice']:.3f}"] if low else []
        for name in JUDGED:
            values = {each: m[:, MEASUREMENTS.index(name)] for each, m in shown.items()}
            verdict[name] = {k: float(v.mean()) if len(v) else None for k, v in values.items()}
            if name != "holes" and all(map(len, values.values())):
                low, high = np.quantile(values["real"], TAILS, method="inverted_cdf")
                median = np.quantile(values["masks"], 0.5, method="inverted_cdf")
                if not low / FAR <= median <= high * FAR:
                    faults.append(f"{name} {median:.3g}, in real masks {low:.3g} to {high:.3g}")
        verdicts[f"label_{value}"] = verdict | {"faults": faults}
    return verdicts


def not_learnt(verdicts: dict[str, dict]) -> str:
    """A line that names the organs with faults, by `judge_masks`; "" where all were learnt."""
    bad = {name: verdict["faults"] for name, verdict in verdicts.items() if verdict["faults"]}
    return ". ".join(f"{name} was not learnt ({'; '.join(faults)})" for name, faults in bad.items())


def nearest_positions(position: float, positions: np.ndarray) -> np.ndarray:
    """The indices of positions (N,), the nearest first; those that are unknown (NaN) come last."""
    distance = np.abs(positions - position)
    return np.argsort(distance, kind="stable")


def plausible(
    measured: np.ndarray, positions: Sequence[float], real: np.ndarray, real_positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Whether slices look like real ones near their positions, by measurements of both.

    A slice is compared with the 128 real slices whose positions are nearest, or with a tenth of all
    if that is more, and with all of them where its own is unknown. At least 1 % of these must show
    just the organs that it shows. Each measurement of an organ must lie between two quantiles,
    `TAILS`, of as many nearest real slices that have the organ: within the central 98 %; of fewer
    than 100, between their extremes.

    measured (n, O, F), positions (n,), real (N, O, F) and real_positions (N,) give (n,) bool:
    these organs occur together; (n, O) bool: all of an organ's measurements are plausible, or it is
    not there. A slice is plausible where all of them are True.
    """
    shown, real_shown = ~np.isnan(measured[..., 0]), ~np.isnan(real[..., 0])
    together, organs = np.ones(len(measured), bool), np.ones(shown.shape, bool)
    for i, position in enumerate(positions):
        order = nearest_positions(position, real_positions)
        most = len(order) if np.isnan(position) else max(NEAREST, round(NEARBY * len(order)))
        alike = (real_shown[order[:most]] == shown[i]).all(1)
        together[i] = alike.mean() >= RAREST
        for organ in np.flatnonzero(shown[i]):
            others = real[order[real_shown[order, organ]][:most], organ]
            if not len(others):  # no real slice shows this organ at all
                organs[i, organ] = False
                continue
            low, high = np.quantile(others, TAILS, axis=0, method="inverted_cdf")
            organs[i, organ] = ((low <= measured[i, organ]) & (measured[i, organ] <= high)).all()
    return together, organs


def dice_by_patient(
    found: np.ndarray, truth: np.ndarray, patients: Sequence, labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """The Dice of each organ, 2 |A and B| / (|A| + |B|), in all slices of a patient together.

    Masks (N, H, W), of which pixels of 255 in `truth` are left out; patients (N,). Returns the
    patients (P,), sorted, and their scores (P, labels - 1), NaN where neither mask shows the organ.
    """
    names, whose = np.unique(patients, return_inverse=True)
    shared, sizes = np.zeros((2, len(names), labels))
    for a, b, patient in zip(found, truth, whose, strict=True):
        a, b = a[b != NO_MASK], b[b != NO_MASK]
        shared[patient] += np.bincount(a[a == b], minlength=labels)[:labels]
        sizes[patient] += np.bincount(a, minlength=labels)[:labels]
        sizes[patient] += np.bincount(b, minlength=labels)
    with np.errstate(invalid="ignore"):
        return names, (2 * shared / sizes)[:, 1:]


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """The means of values (..., n) over what is not NaN in the last axis; NaN where all is."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(-1), np.nan)[()]  # a number of one row
