"""What each choice of the recipe is worth: one thing changed at a time, on the validation split.

    python -m benchmarks.ablation --data keras_slices_data                         # every row
    python -m benchmarks.ablation --data keras_slices_data --only recipe --seed 1  # another seed
    python -m benchmarks.ablation --table                                          # what is known

The recipe is that of `--preset best` with the network of `quick`. Every run sees the same number of
slices (--epochs), so other work on the machine changes no score; the CPU time for a slice stands
beside the score. Rows are added to --out one at a time. Eleven rows of the file (ReLU, GroupNorm,
cosine codes, the rotation trick, other K by level, SSIM of three scales, a patch-GAN, weight
averaging, shifts, intensities) needed changed code that is gone: they can be shown, not rerun.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from support import runtime

WIDE = "--channels 96 --top-channels 192 --residual-channels 48"
VARIANTS = {
    "recipe": "",
    "AdamW": "--optimiser adam",
    "lr / 2": "--lr 7.5e-4",
    "lr x 2": "--lr 3e-3",
    "lr that does not fall": "--schedule constant",
    "steps of 2 slices, lr x 1.4": "--batch-size 2 --lr 2.1e-3",
    "steps of 4 slices, lr x 2": "--batch-size 4 --lr 3e-3",
    "steps of 16 slices, lr x 4": "--batch-size 16 --lr 6e-3",
    "MSE": "--mse 1 --l1 0 --ssim 0",
    "L1": "--l1 1 --ssim 0",
    "L1 + 0.5 (1 - SSIM)": "--l1 1 --ssim 0.5",
    "0.05 L1 + (1 - SSIM)": "--l1 0.05",
    "no flips": "--no-flip",
    "beta 0.05": "--beta 0.05",
    "beta 1": "--beta 1",
    "EMA decay 0.97": "--ema-decay 0.97",
    "EMA decay 0.999": "--ema-decay 0.999",
    "no revival": "--revive 0",
    "D 16": "--D 16",
    "half as wide": "--channels 32 --top-channels 64 --residual-channels 16",
    "1.5 x as wide": WIDE,
    "shape of --preset best": f"{WIDE} --decoder-blocks 4",
    "decoder as shallow as the encoder": "--decoder-blocks 1",
    "lambda 0.01": "--bit-weight 0.01",
}
KEY = ("name", "epochs", "seed")  # a new row replaces one with the same key


def measure(name: str, data: str, epochs: int, seed: int) -> dict:
    """Train one variant in a process of its own and return its row."""
    with tempfile.TemporaryDirectory() as out:
        flags = f"--preset quick --lr 1.5e-3 --epochs {epochs} --seed {seed}"
        command = [sys.executable, "train.py", "--data", data, "--out", out]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        if subprocess.run(command + f"{flags} {VARIANTS[name]}".split()).returncode:
            raise runtime.UserError(
                f"{name}: training failed, see above. The rows before it are kept."
            )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        first, *_, last = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    cpu = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    return {
        "name": name,
        "seed": seed,
        "flags": VARIANTS[name],
        "epochs": epochs,
        "ssim": 1 - last["validate"]["ssim"],
        "mse": last["validate"]["mse"],
        "codes": last["codes"]["validate"],
        "cpu_ms_per_slice": 1e3 * cpu / (last["step"] * first["train"]["batch_size"]),
        "run": {name: value for name, value in first["run"].items() if name != "argv"},
        "data": first["data"],
    }


def table(rows: list[dict]) -> None:
    """Print a line for each variant, best first: mean and sample standard deviation over seeds."""
    groups = {}
    for row in rows:
        comparable = row["epochs"], *row["data"]["fingerprints"].values(), row["run"]["torch"]
        groups.setdefault(comparable, {}).setdefault(row["name"], []).append(row)
    for (epochs, *_, torch), runs in groups.items():
        scores = {name: [row["ssim"] for row in seeds] for name, seeds in runs.items()}
        recipe = np.mean(scores.get("recipe", np.nan))
        head = f"{'seeds':>6}{'val. SSIM':>11}{'spread':>9}{'to recipe':>10}{'CPU ms a slice':>16}"
        print(f"{f'{epochs} epochs, torch {torch}':<36}{head}")
        for name in sorted(runs, key=lambda name: -np.mean(scores[name])):
            mean, n = np.mean(scores[name]), len(scores[name])
            spread = f"{np.std(scores[name], ddof=1):.4f}" if n > 1 else ""
            cost = np.mean([row["cpu_ms_per_slice"] for row in runs[name]])
            print(f"{name:<36}{n:>6}{mean:>11.4f}{spread:>9}{mean - recipe:>+10.4f}{cost:>16.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="study folder")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the train split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation.json"))
    parser.add_argument(
        "--table", action="store_true", help="print the rows of --out and measure nothing"
    )
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.is_file() else []
    if not args.table:
        if not args.data:
            raise runtime.UserError("no --data. Fix: name the folder of a study.")
        os.makedirs(args.out.parent, exist_ok=True)
        for i, name in enumerate(args.only, 1):
            print(f"{name} ({i} of {len(args.only)})")
            row = measure(name, args.data, args.epochs, args.seed)
            # Another process may have written its row meanwhile, so the file is read again.
            rows = json.loads(args.out.read_text()) if args.out.is_file() else []
            rows = [r for r in rows if any(r[key] != row[key] for key in KEY)] + [row]
            runtime.write_json(args.out, rows)
    table(rows)
    print(f"from {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
