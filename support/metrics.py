"""Arrays in, numbers out: how close a reconstruction is to its slice, and what its codes cost.

The protocol of every score of predict.py and reconstruct.py:

    pixels    A reconstruction is brought back to the pixels of the slice's own file and scored
              there. Padding of the model's grid counts nowhere; detail that was lost by resizing
              counts as error. Both are z-scored by the ORIGINAL's mean and standard deviation.
    SSIM      Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
              Similarity". One number says little, so there are two:
      report    scikit-image's defaults (7x7 uniform window), data_range = max - min of the
                original.
      standard  the paper's Gaussian window (11x11, sigma 1.5), population covariance, data_range 1,
                on slices scaled to [0, 1] by the ORIGINAL's minimum and maximum. The reconstruction
                is scaled by the same two numbers and not by its own, which would hide errors of
                brightness and contrast; it is not clamped.
    PSNR      dB; the peak is max - min of the original; at most 100, for an exact copy.
    MAE       the mean absolute error, in standard deviations of the original.
    body      SSIM and PSNR over the original's foreground by intensity, holes filled: `body_mask`.
    one value A slice of one value has no range and no deviation; both are taken as 1, here and in
              training, so that every score stays finite and a reconstruction that is as flat
              scores best. Such slices count like any other.
    means     over all slices of the split, or all planes of the file; with the 95 % percentile
              bootstrap interval over patients, 10,000 draws, seed 0.
    bits      per pixel of the slices' own files. Nominal: log2 K bits for every code. Code entropy:
              the entropy of each level's histogram of codes over the split, without context, the
              histogram itself not counted; perplexity is 2 to the power of it.
    Dice      2 |A and B| / (|A| + |B|) over all slices of a patient together, by organ, in the
              model's grid without its padding; then means over the patients who have the organ, in
              the one mask or the other.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import betabinom, binomtest
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.metrics import structural_similarity
from skimage.segmentation import clear_border
from torch import Tensor

from support.runtime import UserError

SMALLEST = 11  # pixels of a side, of the Gaussian window
# Slices at a time: so few stay in the processor's cache, which is several times faster.
BATCH = 8
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2
# SSIM's window along one axis, sigma 1.5.
GAUSSIAN = torch.softmax(-(torch.arange(-5.0, 6) ** 2) / (2 * 1.5**2), 0).tolist()
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BEST_PSNR = 100.0  # dB: given to an exact copy, whose PSNR is infinite, and to anything above


def value_range(original: np.ndarray) -> float:
    """Maximum minus minimum of a slice; 1 for a slice of one value."""
    span = np.ptp(original)
    return float(span + (span == 0))


def ssim_report(original: np.ndarray, reconstruction: np.ndarray) -> tuple[float, np.ndarray]:
    """SSIM as the report measured it, and its map without the 3 pixels along each edge."""
    pair = original.astype(np.float64), reconstruction.astype(np.float64)
    mean, ssim_map = structural_similarity(*pair, data_range=value_range(original), full=True)
    return float(mean), ssim_map[3:-3, 3:-3]


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of the `report` protocol, differentiable: originals x and y (B, 1, H, W) -> (B,)."""
    bessel = 49 / 48  # scikit-image's sample covariance
    span = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))).view(-1, 1, 1, 1)
    span = span + (span == 0)  # as `value_range`
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
    # On a CPU avg_pool2d takes five times as long as these sums of 2, 4 and 7 neighbours.
    for dim in (2, 3):
        n = x.shape[dim] - 6
        two = x.narrow(dim, 0, n + 5) + x.narrow(dim, 1, n + 5)
        four = two.narrow(dim, 0, n) + two.narrow(dim, 2, n)
        x = four + two.narrow(dim, 4, n) + x.narrow(dim, 6, n)
    return x / 49


def ssim_standard(original: np.ndarray, reconstruction: np.ndarray) -> tuple[float, np.ndarray]:
    """SSIM of Wang et al. 2004, and its map without the 5 pixels along each edge."""
    low, span = float(original.min()), value_range(original)
    pair = ((image.astype(np.float64) - low) / span for image in (original, reconstruction))
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    mean, ssim_map = structural_similarity(*pair, data_range=1, full=True, **window)
    return float(mean), ssim_map[5:-5, 5:-5]


def psnr(
    original: np.ndarray, reconstruction: np.ndarray, where: np.ndarray | bool = True
) -> float:
    """PSNR in dB over the pixels `where`; the peak is max - min of the whole original."""
    errors = np.subtract(original, reconstruction, dtype=np.float64)
    mse = np.mean(errors**2, where=where) / value_range(original) ** 2
    return float(min(BEST_PSNR, -10 * np.log10(max(mse, 1e-30))))


def body_mask(original: np.ndarray) -> np.ndarray:
    """(H, W) bool, True in the body: foreground by intensity, its large pieces, their holes filled.

    The threshold is half of Otsu's (1979) on square roots of the slice, smoothed: Otsu's own parts
    bright organs from dark ones, and shaded muscle falls out. A slice of one value is all body.
    """
    smooth = gaussian(np.sqrt(original - original.min()), sigma=1.5, mode="nearest")
    if np.ptp(smooth) == 0:
        return np.ones(original.shape, bool)
    pieces = label(smooth > 0.5 * threshold_otsu(smooth))
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0  # the background
    mask = (sizes >= 0.05 * sizes.max())[pieces] & (pieces > 0)
    # Background that does not touch an edge of the slice is a hole of the body.
    return mask | clear_border(~mask)


def score_slice(original: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
    """Every score of one slice by the protocol above; `_body` is over `body_mask(original)` alone.

    Both are (H, W) in one unit. UserError for two shapes, a slice too small for the Gaussian
    window, or values that are NaN or infinite.
    """
    one, other = original.shape, reconstruction.shape
    if one != other or original.ndim != 2 or min(one) < SMALLEST:
        shapes = f"slices of shapes {one} and {other}"
        raise UserError(f"{shapes}; expected one shape (H, W), each side at least {SMALLEST}")
    if not (np.isfinite(original).all() and np.isfinite(reconstruction).all()):
        raise UserError("a slice holds NaN or infinite values; expected finite ones")
    mean, std = original.mean(dtype=np.float64), original.std(dtype=np.float64)
    std = std if np.ptp(original) else 1.0
    original, reconstruction = ((image - mean) / std for image in (original, reconstruction))
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
        "mae": float(np.abs(original - reconstruction).mean()),
    }


def _mean_inside(ssim_map: np.ndarray, body: np.ndarray) -> float:
    """The mean of an SSIM map over the body; over all of it where the body lies in its margins."""
    margin = (len(body) - len(ssim_map)) // 2
    inside = body[margin:-margin, margin:-margin]
    return float(ssim_map[inside].mean() if inside.any() else ssim_map.mean())


def bootstrap_interval(
    values: Sequence[float], patients: Sequence[int], seed: int = 0, draws: int = 10_000
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile bootstrap interval of the mean over slices, by drawing patients, not slices.

    Slices of one patient are near-copies of each other, so a draw is as many patients as there are,
    with replacement, each with all of their slices; its statistic is the mean over those slices.
    With one patient there is nothing to resample and no interval: (None, None). With few it is
    coarse: among three patients it reaches from the worst patient's mean to the best one's.
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
    """Entropy in bits of codes used `counts` (K,) times: log2 K if evenly, 0 for a single code."""
    p = counts[counts > 0] / counts.sum()
    return float(np.sum(p * np.log2(1 / p)))


# ---- sets of slices: how alike, how varied, and how much of them is copied ----


def kernel_distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """KID of features (N, F) and (M, F), at least 4 of each, and its standard error.

    KID is the unbiased estimate of the squared maximum mean discrepancy under the kernel
    (x . y / F + 1)^3 (Binkowski et al. 2018, "Demystifying MMD GANs", section 4). Unlike the
    Fréchet distance it does not depend on N: for two sets of one distribution it is 0 on average,
    so it may be a little below. The error is the standard deviation over random halves of both
    sets: the delete-d jackknife of Shao & Wu 1989 for d = N / 2, where its factor is 1. Between
    sets of one distribution it is too large, up to 1.7 times.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    pairs = (a, a), (b, b), (a, b)
    within_a, within_b, between = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in pairs)

    def estimate(i: np.ndarray, j: np.ndarray) -> float:
        kernels = within_a[np.ix_(i, i)], within_b[np.ix_(j, j)]
        # A slice beside itself would make the estimate too large, so the diagonal is left out.
        own = ((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in kernels)
        return float(sum(own) - 2 * between[np.ix_(i, j)].mean())

    rng, sizes = np.random.default_rng(0), between.shape
    drawn = [estimate(*(rng.permutation(n)[: n // 2] for n in sizes)) for _ in range(100)]
    return estimate(*map(np.arange, sizes)), float(np.std(drawn, ddof=1))


def halves(slices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first rows of slices (N, H, W) and the last ones: means of 8 x 8 cells of each, (N, 64).

    The slices are z-scored first.
    """
    x = np.asarray(slices, np.float64)
    x = (x - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 1e-6)
    cells = F.adaptive_avg_pool2d(torch.as_tensor(x), (16, 8)).flatten(1).numpy()
    return cells[:, :64], cells[:, 64:]


def coherence(
    train: tuple[np.ndarray, np.ndarray], slices: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    """How well one half of a slice tells which other half is its own, and the standard error.

    A ridge regression (Hoerl & Kennard 1970), learnt on `train`, predicts the second half from the
    first. Returns the mean share of the other slices (at least one) whose second half correlates
    less with the prediction than the slice's own does: 1 if halves always belong together, 1/2 if
    they have nothing to do with each other. Both arguments are `halves`. Slices are compared with
    those of their own set alone, so the texture that all of them share does not count.
    """
    centres = [half.mean(0) for half in train]
    scales = [half.std(0) + 0.05 for half in train]

    def scaled(pair: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
        return [(half - c) / s for half, c, s in zip(pair, centres, scales, strict=True)]

    (known, wanted), (first, second) = scaled(train), scaled(slices)
    cells = known.shape[1]
    weights = np.linalg.solve(known.T @ known + cells * np.eye(cells), known.T @ wanted)
    first, second = (
        x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-9) for x in (first @ weights, second)
    )
    likeness = first @ second.T  # correlations
    own, others = np.diag(likeness)[:, None], len(likeness) - 1
    shares = ((1 + np.sign(own - likeness)).sum(1) - 1) / (2 * others)  # without itself
    return float(shares.mean()), float(shares.std() / math.sqrt(len(shares)))


def _blur(x: Tensor) -> Tensor:
    """Gaussian means, (..., H, W) -> (..., H - 10, W - 10), by shifted sums along each axis."""
    for axis in (-2, -1):
        views = [x.narrow(axis, i, x.shape[axis] - len(GAUSSIAN) + 1) for i in range(len(GAUSSIAN))]
        x = views[0] * GAUSSIAN[0]
        for view, weight in zip(views[1:], GAUSSIAN[1:], strict=True):
            x.add_(view, alpha=weight)
    return x


def ms_ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> np.ndarray:
    """Multi-scale SSIM of pairs of slices, x and y (B, H, W): (B,) float64 in [0, 1]; equal: 1.

    Wang, Simoncelli & Bovik 2003, "Multi-Scale Structural Similarity for Image Quality Assessment",
    equation 7. It takes those of the paper's 5 scales at which a slice is as large as the window of
    11 pixels (4 for 256x128); their weights are scaled to add up to 1. A scale's mean below 0
    counts as 0. Give all sets that are compared one data_range in z units, such as the median
    max - min of held-out slices.
    """
    x, y = (torch.as_tensor(np.array(image, np.float32)) for image in (x, y))
    weights = SCALE_WEIGHTS[: 1 + int(math.log2(min(x.shape[1:]) / len(GAUSSIAN)))]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = torch.ones(len(x), dtype=torch.float64)
    for scale, weight in enumerate(weights, start=1):
        mx, my, squares, xy = _blur(torch.stack([x, y, x * x + y * y, x * y]))
        means = mx * mx + my * my
        similarity = (2 * (xy - mx * my) + c2) / (squares - means + c2)
        if scale == len(weights):
            similarity = similarity * (2 * mx * my + c1) / (means + c1)
        score *= similarity.double().mean((1, 2)).clamp_min(0) ** (weight / sum(weights))
        x, y = F.avg_pool2d(torch.stack([x, y]), 2)
    return score.numpy()


def mean_pairwise_ms_ssim(
    slices: np.ndarray, data_range: float, pairs: int = 512, seed: int = 0
) -> tuple[float, float]:
    """Mean `ms_ssim` of random pairs of different slices (N, H, W), and its standard error.

    A low mean says that slices vary (noise does, too!), 1 that one slice is there N times. One seed
    and N give the same pairs, so two sets of slices at the same positions, in the same order, are
    compared like with like.
    """
    rng = np.random.default_rng(seed)
    first = rng.integers(len(slices), size=pairs)
    second = (first + rng.integers(1, len(slices), size=pairs)) % len(slices)
    parts = np.array_split(np.stack([first, second]), -(-pairs // BATCH), axis=1)
    scores = np.concatenate([ms_ssim(slices[i], slices[j], data_range) for i, j in parts])
    return float(scores.mean()), float(scores.std(ddof=1) / math.sqrt(pairs))


def thumbnails(slices: np.ndarray) -> np.ndarray:
    """Slices (N, H, W) for `correlations`: means of 2x2 pixels, float32 of mean 0 and norm 1.

    A slice of one value becomes zeros, which correlate with nothing. 32 KB for 256x128.
    """
    parts = []
    for start in range(0, len(slices), BATCH):
        batch = np.array(slices[start : start + BATCH], np.float64)
        x = F.avg_pool2d(torch.as_tensor(batch), 2)
        x = x - x.mean((1, 2), keepdim=True)
        norm = torch.linalg.matrix_norm(x, keepdim=True)
        parts.append(torch.where(norm > 1e-6, x / norm, 0).float().numpy())
    return np.concatenate(parts)


def correlations(queries: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Of each query with each training slice, (N, M); thumbnails of both."""
    return queries.reshape(len(queries), -1) @ train.reshape(len(train), -1).T


def code_bits(train: np.ndarray, K: int) -> np.ndarray:
    """What each code says of a slice, by its place, in bits: (places, K) float32, above 0.

    -log2 of the share of training slices that have it there. Codes (M, ...) int in [0, K).
    """
    flat = train.reshape(len(train), -1)
    counts = np.stack([np.bincount(place, minlength=K) for place in flat.T])
    return np.log2((len(flat) + 1) / (counts + 0.5)).astype(np.float32)


def contrast(slices: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Slices (N, H, W) -> the standard deviation of the pixels of each of the cells, and of the
    eight around it, (N, *shape) float32, at least 0.
    """
    side, parts = slices.shape[1] // shape[0], []
    for start in range(0, len(slices), BATCH):
        x = torch.as_tensor(slices[start : start + BATCH])[:, None].double()
        x = F.pad(x, (side,) * 4, mode="replicate")
        mean, squares = (F.avg_pool2d(each, 3 * side, side)[:, 0] for each in (x, x * x))
        parts.append((squares - mean**2).clamp_min(0).sqrt().float().numpy())
    return np.concatenate(parts)


def code_agreement(queries: np.ndarray, train: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of each query that each training slice has in common with it, (N, M).

    Codes (N, places) and (M, places), int below 65536; what each code of a query counts,
    (N, places) float32, at least 0.
    """
    few, many = (x.astype(np.uint16, copy=False) for x in (queries, train))
    similarity = np.empty((len(few), len(many)))
    for i, (codes, worth) in enumerate(zip(few, weights, strict=True)):
        total = max(worth.sum(), 1e-9)
        # The codes of 128 training slices stay in the processor's cache.
        for start in range(0, len(many), 128):
            equal = many[start : start + 128] == codes
            similarity[i, start : start + 128] = equal.astype(np.float32) @ worth / total
    return similarity


def audit(
    samples: np.ndarray, honest: np.ndarray, copies: np.ndarray, **others: np.ndarray
) -> dict[str, float | dict]:
    """How near samples are to the training slices, beside honest novelty and beside known copies.

    Each is (N,), the similarity of the nearest, N at least 1: of generated slices, of slices of
    patients outside the training split, and of positive controls, such as altered training slices;
    `others` are counted like them. A slice is flagged if it is more similar than all but n // 100
    of the n honest slices. So at most 1 % of these are flagged, and none if they are fewer than
    100: the audit is then coarse, and more copies pass.

    Returns `threshold`; `expected`, the share of new honest slices above it; `margin`, the share
    that 19 in 20 sets of N new ones keep to (beta-binomial: the threshold is an estimate too); of
    each set n, flagged (how many), share, its 95 % interval low to high (Clopper & Pearson 1934),
    and percentiles. All take slices as independent; those of one patient are not, so the truth is
    wider.
    """
    n, allowed = len(honest), len(honest) // 100
    threshold = float(np.sort(honest)[n - 1 - allowed])
    margin = betabinom.ppf(0.95, len(samples), allowed + 1, n - allowed) / len(samples)
    result = {"threshold": threshold, "expected": (allowed + 1) / (n + 1), "margin": float(margin)}
    sets = {"samples": samples, "honest": honest, "copies": copies, **others}
    for name, similarity in sets.items():
        n, flagged = len(similarity), int(np.sum(similarity > threshold))
        low, high = (float(end) for end in binomtest(flagged, n).proportion_ci())
        percentiles = {str(p): float(np.percentile(similarity, p)) for p in PERCENTILES}
        scores = {"n": n, "flagged": flagged, "share": flagged / n, "low": low, "high": high}
        result[name] = {**scores, "percentiles": percentiles}
    return result
