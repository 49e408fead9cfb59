"""Arrays in, numbers out: how close a reconstruction is to its slice, and what its codes cost.

Slices here are z-scored (H, W) arrays, the original first. SSIM (Wang et al. 2004, "Image Quality Assessment:
From Error Visibility to Structural Similarity") follows two protocols, because one number says little:

    report    scikit-image's defaults (7x7 uniform window), data_range = max - min of the original z-scored
              slice.
    standard  the paper's Gaussian window (11x11, sigma 1.5), data_range 1, on slices scaled to [0, 1] by the
              ORIGINAL's minimum and maximum. The reconstruction is scaled by the same two numbers and not by
              its own, which would hide errors of brightness and contrast; it is not clamped.

A slice of one value has no range; it is taken as 1 (the unit of the z-score), so that every score stays
finite and a reconstruction that is as flat scores best.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.metrics import structural_similarity
from skimage.segmentation import clear_border
from torch import Tensor

SMALLEST = 11  # pixels of a side, of the Gaussian window
BEST_PSNR = 100.0  # dB: given to an exact copy, whose PSNR is infinite, and to anything above


def value_range(original: np.ndarray) -> float:
    """Maximum minus minimum of a slice; 1 for a slice of one value."""
    return float(np.ptp(original)) or 1.0


def ssim_report(original: np.ndarray, reconstruction: np.ndarray) -> tuple[float, np.ndarray]:
    """SSIM as the report called it, and its map without the 3 outer pixels, whose windows leave the slice."""
    pair = original.astype(np.float64), reconstruction.astype(np.float64)
    mean, ssim_map = structural_similarity(*pair, data_range=value_range(original), full=True)
    return float(mean), ssim_map[3:-3, 3:-3]


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of the `report` protocol for batches, differentiable: x, y (B, 1, H, W) -> (B,).

    The data range of each slice is max - min of `x`, the original.
    """
    bessel = 49 / 48  # scikit-image's sample covariance
    span = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).clamp_min(1e-6).view(-1, 1, 1, 1)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mx = window_means(x)  # apart from the rest, which has a gradient
    my, squares, xy = window_means(torch.cat([y, x * x + y * y, x * y], 1)).split(1, 1)
    mx_my, means = mx * my, mx * mx + my * my
    similarity = (2 * mx_my + c1) * (2 * bessel * (xy - mx_my) + c2)
    similarity = similarity / ((means + c1) * (bessel * (squares - means) + c2))
    return similarity.mean((1, 2, 3))


def window_means(x: Tensor) -> Tensor:
    """Means of all 7x7 windows, (B, C, H, W) -> (B, C, H - 6, W - 6)."""
    if x.device.type != "cpu":
        return F.avg_pool2d(F.avg_pool2d(x, (7, 1), 1), (1, 7), 1)
    # avg_pool2d takes five times as long on a CPU as these sums of 2, 4 and 7 neighbours
    for dim in (2, 3):
        n = x.shape[dim] - 6
        two = x.narrow(dim, 0, n + 5) + x.narrow(dim, 1, n + 5)
        four = two.narrow(dim, 0, n) + two.narrow(dim, 2, n)
        x = four + two.narrow(dim, 4, n) + x.narrow(dim, 6, n)
    return x / 49


def ssim_standard(original: np.ndarray, reconstruction: np.ndarray) -> tuple[float, np.ndarray]:
    """SSIM of Wang et al. 2004, and its map without the 5 outer pixels, whose windows leave the slice."""
    low, span = float(original.min()), value_range(original)
    pair = ((image.astype(np.float64) - low) / span for image in (original, reconstruction))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    mean, ssim_map = structural_similarity(*pair, data_range=1, full=True, **window)
    return float(mean), ssim_map[5:-5, 5:-5]


def psnr(original: np.ndarray, reconstruction: np.ndarray, where: np.ndarray | bool = True) -> float:
    """Peak signal-to-noise ratio in dB over the pixels `where`; the peak is max - min of all the original."""
    errors = np.subtract(original, reconstruction, dtype=np.float64)
    mse = np.mean(errors**2, where=where) / value_range(original) ** 2
    return float(min(BEST_PSNR, -10 * np.log10(max(mse, 1e-30))))


def mae(original: np.ndarray, reconstruction: np.ndarray) -> float:
    """Mean absolute error in z units: 1 is one standard deviation of the slice."""
    return float(np.mean(np.abs(np.subtract(original, reconstruction, dtype=np.float64))))


def body_mask(original: np.ndarray) -> np.ndarray:
    """(H, W) bool, True in the body: foreground by intensity, its large pieces, their holes filled.

    The threshold is half of Otsu's (1979) on square roots of the slice, smoothed: Otsu's own parts bright
    organs from dark ones, and shaded muscle falls out. A slice of one value is all body.
    """
    smooth = gaussian(np.sqrt(original - original.min()), sigma=1.5, mode="nearest")
    if np.ptp(smooth) == 0:
        return np.ones(original.shape, bool)
    pieces = label(smooth > 0.5 * threshold_otsu(smooth))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0  # the background
    mask = (sizes >= 0.05 * sizes.max())[pieces] & (pieces > 0)
    return mask | clear_border(~mask)  # background that no edge of the slice touches is a hole


def score_slice(original: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
    """Every score of one slice; `_body` is over `body_mask(original)` alone.

    Args:
        original, reconstruction: (H, W) z-scored slices, at least 11 pixels a side.

    Raises:
        ValueError: two shapes, a slice too small for the Gaussian window, or values that are NaN or infinite.
    """
    if original.shape != reconstruction.shape or original.ndim != 2 or min(original.shape) < SMALLEST:
        raise ValueError(
            f"slices of shapes {original.shape} and {reconstruction.shape}; expected one shape (H, W), "
            f"each side at least {SMALLEST}"
        )
    if not (np.isfinite(original).all() and np.isfinite(reconstruction).all()):
        raise ValueError("a slice holds NaN or infinite values; expected finite ones")
    body = body_mask(original)
    report, report_map = ssim_report(original, reconstruction)
    standard, standard_map = ssim_standard(original, reconstruction)
    return {
        "ssim_report": report,
        "ssim_standard": standard,
        "ssim_report_body": _mean_inside(report_map, body),
        "ssim_standard_body": _mean_inside(standard_map, body),
        "psnr": psnr(original, reconstruction),
        "psnr_body": psnr(original, reconstruction, body),
        "mae": mae(original, reconstruction),
    }


def _mean_inside(ssim_map: np.ndarray, body: np.ndarray) -> float:
    """The mean of an SSIM map over the body, or over all of it where no body is inside its margins."""
    margin = (len(body) - len(ssim_map)) // 2
    inside = body[margin:-margin, margin:-margin]
    return float(ssim_map[inside].mean() if inside.any() else ssim_map.mean())


def bootstrap_interval(
    values: Sequence[float], patients: Sequence[int], seed: int = 0, draws: int = 10_000
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile bootstrap interval of the mean over slices, resampling patients and not slices.

    Slices of one patient are near-copies of each other, so a draw is as many patients as there are, with
    replacement, each with all of their slices; its statistic is the mean over those slices. With one patient
    there is nothing to resample and no interval: (None, None). With few it is coarse: among three patients
    it reaches from the worst patient's mean to the best one's.

    Args:
        values, patients: (N,) the score of each slice, and whose slice it is.
    """
    _, whose = np.unique(patients, return_inverse=True)
    counts, sums = np.bincount(whose), np.bincount(whose, weights=values)
    if len(counts) < 2:
        return None, None
    drawn = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def code_entropy(counts: np.ndarray) -> float:
    """Shannon entropy in bits of codes used (K,) `counts` times: log2 K when evenly used, 0 for one code."""
    p = counts[counts > 0] / counts.sum()
    return float(np.sum(p * np.log2(1 / p)))


def bits_per_pixel(codes: Sequence[int], bits: Sequence[float], pixels: int) -> float:
    """The rate of a slice of `pixels`: over the levels, how many codes times how many bits a code takes."""
    return sum(n * each for n, each in zip(codes, bits, strict=True)) / pixels
