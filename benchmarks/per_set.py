"""Mean scores of two sets that share a test split, from predict.py's test_scores.csv.

    python -m benchmarks.per_set Results/test_scores.csv --below 100

Patients numbered below --below are one set, the others the second. Intervals are 95 % bootstraps
over patients.
"""

import csv
from pathlib import Path

import numpy as np

from support import metrics, runtime

SCORES = ("ssim_report", "ssim_standard", "ssim_report_body", "psnr")


def study_sets(patients: np.ndarray, below: int) -> dict[str, np.ndarray]:
    """Which slices (N,) bool belong to each set, by their patients' numbers (N,); no empty set."""
    sets = {f"patients < {below}": patients < below, f"patients >= {below}": patients >= below}
    return {name: chosen for name, chosen in sets.items() if chosen.any()}


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--below", type=int, default=100)
    args = parser.parse_args()
    with open(args.scores, newline="") as file:
        rows = list(csv.DictReader(file))
    patients = np.array([int(row["patient"]) for row in rows])
    for name, chosen in study_sets(patients, args.below).items():
        cells = []
        for score in SCORES:
            values = np.array([float(row[score]) for row in rows])[chosen]
            low, high = metrics.bootstrap_interval(values, patients[chosen], 0, 10_000)
            interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
            cells.append(f"{score} {values.mean():.4f}{interval}")
        print(f"{name}: {chosen.sum()} slices of {len(set(patients[chosen]))}: {', '.join(cells)}")


if __name__ == "__main__":
    runtime.run_cli(main)
