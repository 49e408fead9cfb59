"""What generated slices are good for: a U-Net that learnt from them, tested on held-out patients.

    python -m benchmarks.utility Results/generated --data phantom_slices_data --steps 300
    python -m benchmarks.utility Results/generated --data DIR --patients 4 8 16 --below 100

One network and one recipe (new_slices/organs.py) learn from the study's slices; from the same
slices, shifted, turned, stretched, bent and shaded at random; from the generated slices alone; and
from altered and generated ones together, half of each batch. With --patients the first, the second
and the last are also of a few of the study's patients. Every network takes the same number of
steps. The generated folder must hold masks, as generate.py writes them for a study with masks.

Two questions need two studies. *Release*: what are samples worth to someone who may not see the
patients? The models learnt from all patients, and --patients are few of them. *Augment*: what do
they add for someone who has but a few? Then the models, too, learnt from these alone:

    python -m benchmarks.few_patients --data DIR --patients 4 --out few
    python train.py --data few --preset best; python train_prior.py; python generate.py --n 256
    python -m benchmarks.utility Results/generated --data few

Prints and writes to --out the mean Dice over organs and test patients, with 95 % intervals over
patients and seeds, each organ's and each seed's, and the gain by generated slices over altered
ones, paired by patient and seed. Fewer than 1,000 steps measure little but the seed. With
--below, patients numbered below that are one set and the rest another. Every network learns and is
tested within one set. A generated slice is used for a set that has all its organs, one without
organs for both.
"""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.per_set import study_sets
from dataset import NO_MASK, DataConfig, SliceDataset, open_study, parse_name, read_slice, z_score
from new_slices import organs
from new_slices.code_maps import Variants
from support import nifti, runtime
from support.runtime import UserError

WAYS = 100  # in which a slice is altered


class Pairs(NamedTuple):
    """Slices (N, 1, H, W) and masks (N, H, W), behind a function of indices (B,)."""

    take: Callable[[np.ndarray], tuple[Tensor, Tensor]]
    count: int


def pairs_of(split: SliceDataset, chosen: np.ndarray) -> Pairs:
    return Pairs(lambda i: (split.images(chosen[i]), split.masks(chosen[i])), len(chosen))


def generated_slices(folder: Path) -> list[Path]:
    """The slices that generate.py wrote, in the order of its manifest.json; UserError if none."""
    slices = sorted((folder / "keras_slices_synthetic").glob("case_*.nii.gz"), key=parse_name)
    if not slices:
        raise UserError(
            f"{folder}: no slices in keras_slices_synthetic/. Fix: generate.py --out {folder}"
        )
    return slices


def read_generated(folder: Path, labels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The slices (N, 1, H, W) that generate.py wrote to a folder, z-scored, and masks (N, H, W)."""
    images, masks = [], []
    for path in generated_slices(folder):
        mask_path = folder / "keras_slices_seg_synthetic" / path.name.replace("case_", "seg_", 1)
        if not mask_path.is_file():
            raise UserError(
                f"{mask_path}: no mask. Fix: generate.py with models of a study that has masks."
            )
        pixels = read_slice(str(path)).values().astype(np.float32)
        mean, std, _ = z_score(pixels)
        values = nifti.read(mask_path).raw
        if not np.isin(values, labels).all():
            raise UserError(
                f"{mask_path}: labels that the study does not have. Fix: --data, its own study."
            )
        images.append((pixels - mean) / std)
        masks.append(np.searchsorted(labels, values).astype(np.uint8))
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(masks))


def altered(split: SliceDataset, chosen: np.ndarray, variants: Variants) -> Pairs:
    """Plain augmentation: the slices `chosen`, each time altered in another of a hundred ways."""
    turn = count()

    def take(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        own = torch.from_numpy(chosen[indices])
        variant = 2 + next(turn) % WAYS  # Variants 0 and 1 are the slice and its mirror image.
        images = variants.images(split.images(own), variant, own)
        return images, variants.masks(split.masks(own), variant, own)

    return Pairs(take, len(chosen))


def mixture(study: Pairs, synthetic: Pairs) -> Pairs:
    """Half of each batch is of the study, half generated, however many there are of each."""

    def take(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        half = len(indices) // 2
        both = (
            study.take(indices[:half] % study.count),
            synthetic.take(indices[half:] % synthetic.count),
        )
        images, masks = zip(*both, strict=True)
        return torch.cat(images), torch.cat(masks)

    return Pairs(take, study.count * synthetic.count)


def score(net: organs.Segmenter, test: SliceDataset, chosen: np.ndarray) -> np.ndarray:
    """The Dice (P, organs) of the P patients of the test slices `chosen`."""
    masks = organs.segment(net, test.images(chosen)[:, 0].numpy())
    patients, truth = test.patients[chosen], test.masks(chosen).numpy()
    return organs.dice_by_patient(masks, truth, patients, len(test.labels))[1]


def mean_and_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Of values (seeds, P), NaN where unknown: their mean and the ends of its 95 % interval.

    A bootstrap draws seeds as well as patients: the same slices, learnt with another seed, can make
    more difference than other patients.
    """
    rng, known = np.random.default_rng(0), ~np.isnan(values)
    # How often each of 10,000 draws has each seed, and each patient.
    seeds, patients = (rng.multinomial(n, np.full(n, 1 / n), 10_000) for n in values.shape)
    sums = (seeds @ np.where(known, values, 0) * patients).sum(1)
    means = sums / (seeds @ known * patients).sum(1)
    return float(values[known].mean()), *map(float, np.nanpercentile(means, (2.5, 97.5)))


def summarise(runs: list[np.ndarray], labels: tuple[int, ...]) -> dict:
    """Of Dice (P, organs), an array a seed: the mean, its interval, and each organ's and seed's."""
    # (P, organs); NaN where a patient lacks an organ and a network sees none.
    dice = np.mean(runs, 0)
    mean, low, high = mean_and_interval(np.nanmean(runs, 2))
    organs = {
        f"label {label}": float(np.nanmean(dice[:, i]))
        for i, label in enumerate(labels[1:])
        if not np.isnan(dice[:, i]).all()
    }
    seeds = [float(np.nanmean(np.nanmean(run, 1))) for run in runs]
    return {"dice": mean, "low": low, "high": high, "organs": organs, "seeds": seeds}


def few_patients(split: SliceDataset, chosen: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Those of the slices `chosen` that belong to `count` random patients."""
    patients = split.patients[chosen]
    names = np.random.default_rng(seed).permutation(np.unique(patients))[:count]
    return chosen[np.isin(patients, names)]


def masked(split: SliceDataset, below: int | None) -> dict[str, np.ndarray]:
    """The slices (indices) with a mask of each set of a split."""
    if below is None:
        return {"all": np.flatnonzero(split.has_mask)}
    sets = study_sets(split.patients, below)
    return {name: np.flatnonzero(inside & split.has_mask) for name, inside in sets.items()}


def of_the_set(masks: Tensor, train: SliceDataset, chosen: np.ndarray) -> np.ndarray:
    """The generated slices (indices) that show no organs but those of the slices `chosen`."""
    own = np.unique(train.masks(chosen).numpy())
    shown = [np.unique(mask) for mask in masks.numpy()]
    return np.flatnonzero([np.isin(each, [0, *own[own != NO_MASK]]).all() for each in shown])


def compare(
    train: SliceDataset, test: SliceDataset, slices: dict[str, np.ndarray], synthetic: Pairs, args
) -> dict:
    """The rows of one set: what a network is worth that learnt from each kind of slices.

    `slices` are the indices of the set's slices with masks, of "train" and of "test".
    """
    device, labels = runtime.pick_device(args.device), train.labels
    variants = Variants(2 + WAYS, len(train), train.mirror)
    runs: dict[str, list[np.ndarray]] = {}
    for seed in range(args.seeds):
        kinds = {"generated alone": synthetic}
        few = {
            f"{n} patients": few_patients(train, slices["train"], n, seed) for n in args.patients
        }
        for name, chosen in ({"study": slices["train"]} | few).items():
            kinds[name] = pairs_of(train, chosen)
            kinds[f"{name}, altered"] = altered(train, chosen, variants)
            mixed = mixture(altered(train, chosen, variants), synthetic)
            kinds[f"{name}, altered, and generated"] = mixed
        for kind, pairs in kinds.items():
            net = organs.train_segmenter(
                pairs.take,
                pairs.count,
                len(labels),
                train.mirror,
                args.steps,
                device=device,
                seed=seed,
            )
            dice = score(net, test, slices["test"])
            runs.setdefault(kind, []).append(dice)
    rows = {kind: summarise(dice, labels) for kind, dice in runs.items()}
    for kind, dice in runs.items():
        if kind.endswith(", and generated"):
            rows[kind]["gain"] = gain(dice, runs[kind.removesuffix(", and generated")])
    return rows


def interval(row: dict) -> str:
    return f" [{row['low']:.3f}, {row['high']:.3f}]"


def gain(dice: list[np.ndarray], without: list[np.ndarray]) -> dict:
    """The mean difference of Dice (P, organs) of the same patients and seeds, with its interval."""
    differences = np.nanmean(np.stack(dice) - np.stack(without), 2)  # (seeds, P)
    return dict(zip(("mean", "low", "high"), mean_and_interval(differences), strict=True))


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("generated", type=Path, help="folder that generate.py wrote")
    parser.add_argument("--data", default="", help="study folder")
    parser.add_argument("--patients", type=int, nargs="*", default=[], help="few: how many")
    parser.add_argument("--below", type=int, help="patients below are one set, the rest another")
    parser.add_argument("--steps", type=int, default=3000, help="of each network")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", default="benchmarks/results/utility.json", help="file to write")
    args = parser.parse_args()
    height, width = read_slice(str(generated_slices(args.generated)[0])).shape
    splits = open_study(DataConfig(data=args.data, height=height, width=width))
    train, test = splits["train"], splits["test"]
    if not train.labels:
        raise UserError(
            f"{train.study}: a study without masks. Fix: --data, one with keras_slices_seg_train."
        )
    images, masks = read_generated(args.generated, train.labels)
    result = {"sets": {}, "generated": len(images), "steps": args.steps}
    for name, chosen in masked(train, args.below).items():
        tested = masked(test, args.below).get(name, np.array([], int))
        own = of_the_set(masks, train, chosen)
        if not len(tested) or not len(own):
            print(f"{name}: {len(tested)} test slices and {len(own)} generated ones; left out")
            continue
        synthetic = Pairs(lambda i, own=own: (images[own[i]], masks[own[i]]), len(own))
        rows = compare(train, test, {"train": chosen, "test": tested}, synthetic, args)
        people = len(np.unique(test.patients[tested]))
        result["sets"][name] = {"test_patients": people, "generated": len(own), "rows": rows}
        print(f"\n{name}: Dice on {len(tested)} slices of {people} people, {len(own)} generated")
        for kind, row in rows.items():
            by_organ = "  ".join(f"{organ} {value:.3f}" for organ, value in row["organs"].items())
            found = f"{row['dice']:.3f}{interval(row)}"
            if "gain" in row:
                found += f"  gain {row['gain']['mean']:+.3f}{interval(row['gain'])}"
            print(f"  {kind:<40}{found}  {by_organ}")
    result["data"] = {"study": train.study.resolve().name, "fingerprint": train.fingerprint}
    runtime.write_json(args.out, result | {"provenance": runtime.provenance()})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
