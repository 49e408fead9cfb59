"""How far generated slices are from a study's, to a network that was trained on photographs.

    python -m benchmarks.features Results/generated --data phantom_slices_data

Features are EfficientNet-Lite0's last maps, averaged over the slice: 1280 numbers (weights learnt
on ImageNet come with the package). Sets of --n slices are compared with as many test slices:
validation slices (the floor, other patients), reconstructions of these with --checkpoint, and the
generated ones. For each:

    frechet     Fréchet distance; it falls with n, so compare at one n only
    kid         kernel distance (KID) and its standard error; 0 for two sets of one distribution
    auc         of a linear classifier that tells them from test slices of patients it has not seen;
                0.5 is chance

Writes --out, a JSON file.
"""

import math
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from benchmarks.utility import generated_slices
from dataset import DataConfig, open_study, read_slice
from modules import load_model
from new_slices.code_maps import decode
from new_slices.picture_features import picture_features
from support import metrics, runtime
from support.runtime import UserError

FOLDS = 5  # of the classifier
RIDGE = 1.0  # weight of its penalty, as a share of the mean squared length of the features


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, F) and (M, F).

    Heusel et al. 2017, equation 6. With C_a = A^T A and C_b = B^T B the root's trace is the sum of
    the singular values of A B^T: exact for N below F too. Samples of one distribution are further
    from 0 the larger F / N: compare at one N only.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    centred = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    # R of A = Q R will do for A: it has at most F rows, and Q changes no singular value.
    root_a, root_b = (np.linalg.qr(x, mode="r") for x in centred)
    traces = np.sum(root_a**2) + np.sum(root_b**2)
    cross = np.linalg.norm(root_a @ root_b.T, "nuc")
    return float(max(0.0, np.sum((a.mean(0) - b.mean(0)) ** 2) + traces - 2 * cross))


def linear_auc(real: np.ndarray, fake: np.ndarray, groups: np.ndarray) -> float:
    """Area under the ROC curve of a ridge classifier of real (N, F) against fake (M, F), held out.

    Real rows of one group (a patient), (N,), are in one fold: else the classifier would know the
    patient again.
    """
    rng = np.random.default_rng(0)
    _, whose = np.unique(groups, return_inverse=True)
    folds = np.concatenate(
        [rng.permutation(whose.max() + 1)[whose] % FOLDS, rng.permutation(len(fake)) % FOLDS]
    )
    x, y = np.concatenate([real, fake]), np.repeat([-1.0, 1.0], [len(real), len(fake)])
    x = (x - x.mean(0)) / x.std(0).clip(1e-9)
    scores = np.empty(len(x))
    for fold in range(FOLDS):
        train, held = folds != fold, folds == fold
        kernel = x[train] @ x[train].T / x.shape[1]
        weights = np.linalg.solve(kernel + RIDGE * np.eye(len(kernel)), y[train] - y[train].mean())
        scores[held] = x[held] @ x[train].T @ weights
    return auc(scores[: len(real)], scores[len(real) :])


def auc(low: np.ndarray, high: np.ndarray) -> float:
    """The chance that one of the scores `high` is above one of `low`; ties count half."""
    ranks = rankdata(np.concatenate([low, high]))[len(low) :]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high)))


def read_slices(folder: Path, n: int | None = None) -> np.ndarray:
    """The first n, or all, generated slices (n, H, W) of a folder that generate.py wrote."""
    paths = generated_slices(folder)
    if len(paths) < 2:
        raise UserError(
            f"{folder}: one slice; expected at least 2. Fix: generate.py --out {folder}"
        )
    return np.stack([read_slice(str(path)).values() for path in paths[:n]]).astype(np.float32)


def compare(real: np.ndarray, other: np.ndarray, groups: np.ndarray) -> dict:
    kid, error = metrics.kernel_distance(real, other)
    return {
        "n": len(other),
        "frechet": frechet_distance(real, other),
        "kid": kid,
        "kid_error": error,
        "auc": linear_auc(real, other, groups),
    }


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("generated", nargs="+", type=Path, help="folders that generate.py wrote")
    parser.add_argument("--data", default="", help="study folder")
    parser.add_argument(
        "--checkpoint", default="", help="autoencoder, for a row of reconstructions"
    )
    parser.add_argument("--n", type=int, default=96, help="slices of each set")
    parser.add_argument("--seed", type=int, default=0, help="which slices of the study")
    parser.add_argument("--out", default="benchmarks/results/features.json", help="file to write")
    args = parser.parse_args()
    generated = {str(folder): read_slices(folder, args.n) for folder in args.generated}
    height, width = next(iter(generated.values())).shape[1:]
    splits = open_study(DataConfig(data=args.data, height=height, width=width))
    rng = np.random.default_rng(args.seed)
    n = min(args.n, len(splits["validate"]), len(splits["test"]), *map(len, generated.values()))
    chosen = {
        name: np.sort(rng.permutation(len(splits[name]))[:n]) for name in ("validate", "test")
    }
    images = {name: splits[name].images(indices)[:, 0].numpy() for name, indices in chosen.items()}
    sets = {"validation slices": images["validate"]}
    if args.checkpoint:
        model = load_model(args.checkpoint).model
        with torch.inference_mode():
            codes = [model.encode(x[None, None]) for x in torch.from_numpy(images["validate"])]
        sets["reconstructions"] = decode(model, *map(torch.cat, zip(*codes, strict=True)))[0]
    sets |= {name: slices[:n] for name, slices in generated.items()}
    groups = splits["test"].patients[chosen["test"]]
    real = picture_features(images["test"])
    rows = {name: compare(real, picture_features(slices), groups) for name, slices in sets.items()}
    heads = "".join(f"{key:>11}" for key in next(iter(rows.values())))
    print(f"\n{f'against {n} test slices':<34}{heads}")
    for name, row in rows.items():
        print(f"{name:<34}" + "".join(f"{value:>11.4g}" for value in row.values()))
    data = {"study": splits["test"].study.resolve().name, "fingerprint": splits["test"].fingerprint}
    runtime.write_json(args.out, {"rows": rows, "data": data, "provenance": runtime.provenance()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
