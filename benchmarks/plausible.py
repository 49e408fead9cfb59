"""Plausible slices by set: studies that mix, say, hearts and abdomens are never pooled.

    python -m benchmarks.plausible Results/generated --data DIR --checkpoint Results/vqvae2_best.pth --below 100

Real validation slices, their reconstructions, real test slices and the slices that generate.py
wrote, each beside the real training slices of its own set. A real slice belongs to a set by its
patient's number, a generated one by the organs that the U-Net (anatomy.py) sees most of in it.
"both sets" counts slices in which the U-Net sees organs of both, such as half a heart in an
abdomen; slices without an organ are counted and belong to no set. Prints and writes to --out the
shares of plausible slices, with standard errors over slices.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.per_set import study_sets
from benchmarks.utility import read_generated
from dataset import NO_MASK, DataConfig, SliceDataset
from modules import load_model
from new_slices import organs
from new_slices.code_maps import decode
from new_slices.sample_report import MOST_REAL, plain
from predict import open_splits
from support import runtime


class Measured(NamedTuple):
    """Slices as the U-Net sees them: their `organs.measure` (n, O, 7), positions (n,) and set names
    (n,).
    """

    figures: np.ndarray
    positions: np.ndarray
    sets: np.ndarray


def sets_of(split: SliceDataset, below: int) -> np.ndarray:
    """The name of every slice's set."""
    named = study_sets(np.array([name.patient for name in split.names]), below)
    return np.select(list(named.values()), list(named), default="")


def organs_of(train: SliceDataset, sets: np.ndarray) -> dict[str, np.ndarray]:
    """(O,) bool by set: which organs its training masks show."""
    shown = {}
    for name in np.unique(sets):
        masks = train.masks(np.flatnonzero((sets == name) & train.has_mask)).numpy()
        shown[str(name)] = np.bincount(masks[masks != NO_MASK], minlength=len(train.labels))[1:] > 0
    return shown


def by_organs(figures: np.ndarray, organs: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """The set (n,) whose organs fill most of each slice, "" where there is no organ; and how many
    show both sets'.
    """
    area = np.nan_to_num(figures[:, :, 0])  # (n, O)
    filled = np.stack([area[:, own].sum(1) for own in organs.values()], 1)  # (n, sets)
    names = np.where(filled.max(1) > 0, np.array(list(organs))[filled.argmax(1)], "")
    return names, int(((filled > 0).sum(1) > 1).sum())


def shares(row: Measured, real: dict[str, Measured], organs: dict[str, np.ndarray]) -> dict:
    """How many slices show no organ and organs of both sets, and the share of each set's that are
    plausible.
    """
    found, both = by_organs(row.figures, organs)
    result = {"n": len(found), "no organ": int((found == "").sum()), "both sets": both}
    for name, others in real.items():
        shown = (row.sets == name) & (
            found != ""
        )  # without an organ there is no place or shape to judge
        together, fine = organs.plausible(
            row.figures[shown], row.positions[shown], others.figures, others.positions
        )
        n = int(shown.sum())
        share = float((together & fine.all(1)).mean()) if n else math.nan
        error = math.sqrt(share * (1 - share) / n) if n else math.nan
        result[name] = {"n": n, "plausible": share, "standard_error": error}
    return result


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("generated", type=Path, help="folder that generate.py wrote")
    parser.add_argument("--data", default="", help="study folder")
    parser.add_argument("--checkpoint", default="Results/vqvae2_best.pth", help="the autoencoder")
    parser.add_argument(
        "--below", type=int, required=True, help="patients below are one set, the rest another"
    )
    parser.add_argument(
        "--cache", default="", help="decoded slices; empty is ~/.cache/vqvae2-slices"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="benchmarks/results/plausible.json", help="file to write")
    args = parser.parse_args()
    device = runtime.pick_device(args.device)
    trained = load_model(args.checkpoint)
    splits = open_splits(trained, DataConfig(data=args.data, cache=args.cache))
    train, labels = splits["train"], len(splits["train"].labels)
    model = trained.model.to(device)
    net = organs.segmenter_of(train, Path(args.checkpoint).parent / "segmenter.pth", device)
    images, _ = read_generated(args.generated, train.labels)
    positions = json.loads((args.generated / "manifest.json").read_text())["positions"][
        : len(images)
    ]

    def figures_of(images: np.ndarray) -> np.ndarray:
        return organs.measure(organs.segment(net, images), labels)

    def measured(
        split: SliceDataset, chosen: np.ndarray, sets: np.ndarray, reconstruct: bool = False
    ) -> Measured:
        found = []
        for part in np.array_split(chosen, -(-len(chosen) // 64)):
            x = split.images(part)
            if reconstruct:
                with torch.inference_mode():
                    x = torch.from_numpy(decode(model, *model.encode(x.to(device)))[0])[:, None]
            found.append(figures_of(x[:, 0].numpy()))
        return Measured(np.concatenate(found), split.positions[chosen], sets[chosen])

    rng, sets = (
        np.random.default_rng(0),
        {name: sets_of(split, args.below) for name, split in splits.items()},
    )
    shows = organs_of(train, sets["train"])
    real = {
        name: measured(
            train, rng.permutation(np.flatnonzero(sets["train"] == name))[:MOST_REAL], sets["train"]
        )
        for name in shows
    }
    everything = {name: np.arange(len(split)) for name, split in splits.items()}
    rows = {
        "real validation slices": measured(
            splits["validate"], everything["validate"], sets["validate"]
        ),
        "real test slices": measured(splits["test"], everything["test"], sets["test"]),
        "reconstructions": measured(
            splits["validate"], everything["validate"], sets["validate"], True
        ),
    }
    figures = figures_of(images[:, 0].numpy())
    rows["generated"] = Measured(figures, np.array(positions, float), by_organs(figures, shows)[0])
    result = {name: shares(row, real, shows) for name, row in rows.items()}
    print(
        f"{'':<26}{'n':>6}{'no organ':>10}{'both sets':>11}"
        + "".join(f"{name:>26}" for name in organs)
    )
    for row, scores in result.items():
        cells = (scores[name] for name in organs)
        text = (f"{c['plausible']:.3f} +- {c['standard_error']:.3f} (n {c['n']})" for c in cells)
        print(
            f"{row:<26}{scores['n']:>6}{scores['no organ']:>10}{scores['both sets']:>11}"
            + "".join(f"{t:>26}" for t in text)
        )
    data = {"study": train.study.resolve().name, "fingerprint": train.fingerprint}
    runtime.write_json(
        args.out, {"rows": plain(result), "data": data, "provenance": runtime.provenance()}
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
