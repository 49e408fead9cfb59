"""Can new slices tell whose slices a model learnt? Two models, each of one half of the patients.

    python -m benchmarks.few_patients --data DIR --patients 28 --out a
    python -m benchmarks.few_patients --data DIR --patients 28 --rest --out b
    python train.py --data a --preset best --out a/Results; ...   # and priors, for a and for b
    python generate.py ... --n 256 --out a/generated              # and for b
    # once more for a, with --seed 1, to a/again
    python -m benchmarks.twin_halves a b --generated a/generated b/generated a/again

The attack: a patient was learnt by the model to whose new slices his own are nearer, by the mean
over his slices of the highest correlation with any new slice. Prints the AUC over the patients of
both halves, 0.5 for a guess, with a 95 % interval over patients; and the control, the same between
the two models of half a, which know the same patients: what of the AUC is the seeds' doing.
"""

from pathlib import Path

import numpy as np

from benchmarks.utility import generated_slices
from dataset import DataConfig, SliceDataset, open_study, read_slice
from support import metrics, runtime

DRAWS = 2000  # of patients, for the interval


def nearness(train: SliceDataset, generated: Path) -> dict[int, float]:
    """Of every patient: the mean of his slices' highest correlation with a generated slice."""
    new = np.stack([read_slice(str(path))[0] for path in generated_slices(generated)])
    own = train.images(np.arange(len(train)))[:, 0].numpy()
    found = metrics.nearest(metrics.thumbnails(own), metrics.thumbnails(new)).similarity
    patients = np.array([name.patient for name in train.names])
    return {patient: float(found[patients == patient].mean()) for patient in np.unique(patients)}


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member scores higher than another patient; ties count half."""
    above = members[:, None] - others
    return float((above > 0).mean() + (above == 0).mean() / 2)


def attack(halves: list[SliceDataset], own: Path, other: Path) -> dict:
    """How well `own` against `other` generated slices tells the first half from the second."""
    first, second = (
        np.array([near[p] - far[p] for p in near])
        for near, far in ((nearness(half, own), nearness(half, other)) for half in halves)
    )
    rng = np.random.default_rng(0)
    drawn = [
        auc(rng.choice(first, len(first)), rng.choice(second, len(second))) for _ in range(DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {
        "auc": auc(first, second),
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
    a, b, again = args.generated
    height, width = read_slice(str(generated_slices(a)[0]))[0].shape
    halves = [
        open_study(DataConfig(data=str(half), height=height, width=width))["train"]
        for half in args.halves
    ]
    result = {"halves": attack(halves, a, b), "control": attack(halves, a, again)}
    for name, row in result.items():
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        print(f"{name:<10} AUC {row['auc']:.3f} {interval} of {row['patients']} patients")
    runtime.write_json(args.out, result | {"provenance": runtime.provenance()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
