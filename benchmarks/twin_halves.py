"""Can new slices tell whose slices a model learnt? Two models, each of one half of the patients.

    python -m benchmarks.few_patients --data DIR --patients 28 --out a
    python -m benchmarks.few_patients --data DIR --patients 28 --rest --out b
    python train.py --data a --preset best --out a/Results; ...   # and priors, for a and for b
    python generate.py ... --n 256 --out a/generated              # and for b
    # once more for a, with --seed 1, to a/again
    python -m benchmarks.twin_halves a b --generated a/generated b/generated a/again

The attack guesses which of two models learnt a patient: the one whose new slices are nearer to the
patient's own slices. Nearness is the mean over these of the highest correlation with any new slice.
Prints the AUC over the patients of both halves (0.5 is a guess) with a 95 % interval over patients.
The control compares the two models of half a, which know the same patients: it shows how much of
the AUC comes from the seeds.
"""

from pathlib import Path

import numpy as np

from benchmarks.features import auc, read_slices
from benchmarks.utility import interval
from dataset import DataConfig, SliceDataset, open_study
from support import metrics, runtime

DRAWS = 2000  # of patients, for the interval


def nearness(train: SliceDataset, generated: list[np.ndarray]) -> np.ndarray:
    """(sets, patients): the mean of a patient's slices' highest correlation with slices of a set.

    `generated` are the sets, (n, H, W) each.
    """
    own = metrics.thumbnails(train.images(np.arange(len(train)))[:, 0].numpy())
    found = np.stack([metrics.correlations(own, metrics.thumbnails(x)).max(1) for x in generated])
    people = np.unique(train.patients)
    return np.stack([found[:, train.patients == each].mean(1) for each in people], 1)


def attack(near: list[np.ndarray], other: int) -> dict:
    """How well the first set of slices against the `other` tells the first half from the second.

    `near` is the `nearness` of either half.
    """
    first, second = (half[0] - half[other] for half in near)
    rng = np.random.default_rng(0)
    drawn = [
        auc(high=rng.choice(first, len(first)), low=rng.choice(second, len(second)))
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {
        "auc": auc(second, first),
        "low": low,
        "high": high,
        "patients": len(first) + len(second),
    }


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("halves", type=Path, nargs=2, help="the study of each half's patients")
    parser.add_argument("--generated", type=Path, nargs=3, help="of a, of b, of a's other seed")
    parser.add_argument(
        "--out", default="benchmarks/results/twin_halves.json", help="file to write"
    )
    args = parser.parse_args()
    generated = [read_slices(folder) for folder in args.generated]
    height, width = generated[0].shape[1:]
    near = [
        nearness(open_study(DataConfig(str(half), height=height, width=width))["train"], generated)
        for half in args.halves
    ]
    result = {"halves": attack(near, 1), "control": attack(near, 2)}
    for name, row in result.items():
        print(f"{name:<10} AUC {row['auc']:.3f}{interval(row)} of {row['patients']} patients")
    runtime.write_json(args.out, result | {"provenance": runtime.provenance()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
