"""Plausible slices by set: studies that mix, say, hearts and abdomens are never pooled.

    python -m benchmarks.plausible Results/generated --data DIR --below 100

Validation slices, their reconstructions, test slices and the slices that generate.py wrote, each
beside the training slices of its own set. A slice of the study belongs to a set by its patient's
number, a generated one by the organs that the U-Net (new_slices/organs.py) sees most of in it.
"both sets" counts slices in which the U-Net sees organs of both, such as half a heart in an
abdomen; slices without an organ are counted and belong to no set. Prints and writes to --out the
shares of plausible slices, with standard errors over slices.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.per_set import study_sets
from benchmarks.utility import read_generated
from dataset import NO_MASK, DataConfig, SliceDataset, open_trained_study
from modules import load_model
from new_slices import organs
from new_slices.code_maps import decode
from new_slices.sample_report import MOST_REAL, plain
from support import runtime


class Measured(NamedTuple):
    """Slices as the U-Net sees them: `organs.measure` (n, O, 8), positions (n,), set names (n,)."""

    values: np.ndarray
    positions: np.ndarray
    sets: np.ndarray


def sets_of(split: SliceDataset, below: int) -> np.ndarray:
    """The name of every slice's set."""
    named = study_sets(split.patients, below)
    return np.select(list(named.values()), list(named), default="")


def organs_of(train: SliceDataset, sets: np.ndarray) -> dict[str, np.ndarray]:
    """(O,) bool by set: which organs its training masks show."""
    shown = {}
    for name in np.unique(sets):
        masks = train.masks(np.flatnonzero((sets == name) & train.has_mask)).numpy()
        shown[str(name)] = np.bincount(masks[masks != NO_MASK], minlength=len(train.labels))[1:] > 0
    return shown


def by_organs(values: np.ndarray, shows: dict[str, np.ndarray]) -> tuple[np.ndarray, int]:
    """The set, (n,), whose organs fill most of each slice, "" where there is none; and how many
    slices show organs of both sets. `shows` is what `organs_of` returns.
    """
    area = np.nan_to_num(values[:, :, 0])  # (n, O)
    filled = np.stack([area[:, own].sum(1) for own in shows.values()], 1)  # (n, sets)
    names = np.where(filled.max(1) > 0, np.array(list(shows))[filled.argmax(1)], "")
    return names, int(((filled > 0).sum(1) > 1).sum())


def shares(row: Measured, trained: dict[str, Measured], shows: dict[str, np.ndarray]) -> dict:
    """How many slices show no organ, and both sets' organs; by set the share that is plausible."""
    sets, both = by_organs(row.values, shows)
    result = {"n": len(sets), "no organ": int((sets == "").sum()), "both sets": both}
    for name, others in trained.items():
        # Without an organ there is no place or shape to judge.
        shown = (row.sets == name) & (sets != "")
        together, fine = organs.plausible(
            row.values[shown], row.positions[shown], others.values, others.positions
        )
        good, n = together & fine.all(1), int(shown.sum())
        share = float(good.mean()) if n else math.nan
        error = math.sqrt(share * (1 - share) / max(n, 1))
        result[name] = {"n": n, "plausible": share, "standard_error": error}
    return result


def show(result: dict[str, dict], sets: Iterable[str]) -> None:
    print(f"{'':<26}{'n':>6}{'no organ':>10}{'both sets':>11}" + "".join(f"{s:>26}" for s in sets))
    for row, scores in result.items():
        cells = (scores[name] for name in sets)
        texts = (f"{c['plausible']:.3f} +- {c['standard_error']:.3f} (n {c['n']})" for c in cells)
        counts = f"{scores['n']:>6}{scores['no organ']:>10}{scores['both sets']:>11}"
        print(f"{row:<26}{counts}" + "".join(f"{text:>26}" for text in texts))


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("generated", type=Path, help="folder that generate.py wrote")
    parser.add_argument("--data", default="", help="study folder")
    parser.add_argument("--checkpoint", default="Results/vqvae2_best.pth", help="the autoencoder")
    parser.add_argument("--below", type=int, required=True, help="patients below are the first set")
    parser.add_argument("--cache", default="", help="of decoded slices; empty: ~/.cache")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="benchmarks/results/plausible.json", help="file to write")
    args = parser.parse_args()
    device, trained = runtime.pick_device(args.device), load_model(args.checkpoint)
    config = DataConfig(data=args.data, cache=args.cache)
    splits = open_trained_study(trained.study, config, args.checkpoint)
    train, model = splits["train"], trained.model.to(device)
    net = organs.segmenter_of(train, Path(args.checkpoint).parent, device=device)
    sets = {name: sets_of(split, args.below) for name, split in splits.items()}
    images, _ = read_generated(args.generated, train.labels)
    positions = json.loads((args.generated / "manifest.json").read_text())["positions"]

    def measure(x: Tensor) -> np.ndarray:
        return organs.measure(organs.segment(net, x[:, 0].numpy()), len(train.labels))

    def reconstruct(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.from_numpy(decode(model, *model.encode(x.to(device)))[0])[:, None]

    def measured(name: str, chosen: np.ndarray, change: Callable = lambda x: x) -> Measured:
        split = splits[name]
        parts = runtime.batches(chosen)
        values = np.concatenate([measure(change(split.images(part))) for part in parts])
        return Measured(values, split.positions[chosen], sets[name][chosen])

    rng, shows = np.random.default_rng(0), organs_of(train, sets["train"])
    beside = {
        name: measured("train", rng.permutation(np.flatnonzero(sets["train"] == name))[:MOST_REAL])
        for name in shows
    }
    every = {name: np.arange(len(split)) for name, split in splits.items()}
    rows = {
        "validation slices": measured("validate", every["validate"]),
        "test slices": measured("test", every["test"]),
        "reconstructions": measured("validate", every["validate"], reconstruct),
    }
    values = measure(images)
    of_set, _ = by_organs(values, shows)
    rows["generated"] = Measured(values, np.array(positions[: len(images)], float), of_set)
    result = {name: shares(row, beside, shows) for name, row in rows.items()}
    show(result, shows)
    data = {"study": train.study.resolve().name, "fingerprint": train.fingerprint}
    result = {"rows": plain(result), "data": data, "provenance": runtime.provenance()}
    runtime.write_json(args.out, result)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
