"""Score a trained VQ-VAE-2 on the whole test split of a study, and show what it does to the slices.

    python predict.py                        # Results/vqvae2_best.pth, on the study it was trained on
    python predict.py --checkpoint FILE --data DIR --out DIR
    python predict.py --nifti                # the reconstructions as NIfTI too, in scanner units

Writes to the checkpoint's folder (or --out): metrics.json (means, patients, intervals, bits per
pixel, codes used), test_scores.csv (every slice), original_N.png and reconstruction_N.png,
comparison.png (best, median and worst slice), code_maps.png, ssim_histogram.png, index.html (all of
it on one page); with --nifti also reconstructions/.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset import (
    RECONSTRUCTION,
    SIZE,
    DataConfig,
    SliceDataset,
    open_trained_study,
    save_reconstruction,
)
from modules import VQVAE2, Trained, load_model
from new_slices import organs
from new_slices.code_maps import LEVELS
from support import figures, metrics, nifti, results_page, runtime
from support.runtime import UserError, option

PICTURES = 4  # originals and reconstructions written slice by slice
DRAWS, SEED = 10_000, 0  # of the bootstrap
SYNTHETIC = "synthetic phantom, not MRI"  # a picture's note
COLUMNS = {  # of the terminal's table
    "ssim_report": "SSIM report",
    "ssim_standard": "SSIM standard",
    "ssim_report_body": "report, body",
    "ssim_standard_body": "standard, body",
    "psnr": "PSNR dB",
    "mae": "MAE",
}
MASKS = {  # where a mask comes from
    "decoded": "decoded from the codes",
    "unet": "a U-Net of equal cost on the original slices",
    "most_frequent": "the most frequent label of each place",
}


@dataclass(frozen=True)
class PredictConfig:
    """What to score, and where to write. The size of the slices is the checkpoint's."""

    checkpoint: str = option("Results/vqvae2_best.pth", "the model, as train.py wrote it")
    out: str = option("", "folder to write to; empty is the checkpoint's")
    nifti: bool = option(
        False, "write the reconstructions as NIfTI, with their originals' affine and units"
    )
    batch_size: int = option(32, "slices at a time")
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; expected at least 1")


# ---- a model and its test split ------------------------------------------------------------------


def open_splits(trained: Trained, data: DataConfig) -> dict[str, SliceDataset]:
    """The study at the size the model was trained at; says where its test files are not the model's
    own.
    """
    splits = open_trained_study(trained.study, data, trained.path)
    test = splits["test"]
    if test.fingerprint != trained.study.fingerprints.get("test"):
        print(f"note: {test.study}: its test slices are not those of the study that was trained on")
    return splits


class Reconstructed(NamedTuple):
    """Slices of a split and what the model makes of them.

    Originals and images (B, H, W) float32, z-scored; codes top (B, H/8, W/8) and bottom (B, H/4,
    W/4), int32 in [0, K); masks (B, H, W) uint8 as the codes tell them, all 0 for a model without
    masks.
    """

    originals: np.ndarray
    images: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    masks: np.ndarray


@torch.inference_mode()
def reconstruct_slices(model: VQVAE2, test: SliceDataset, indices: Sequence[int]) -> Reconstructed:
    x = test.images(indices)
    output = model(x.to(next(model.parameters()).device))
    masks = torch.zeros_like(x[:, 0], dtype=torch.uint8)
    if output.mask_logits is not None:
        masks = organs.likeliest(output.mask_logits)
    codes = (getattr(output, level).codes.int() for level in LEVELS)
    tensors = x[:, 0], output.reconstruction[:, 0], *codes, masks
    return Reconstructed(*(tensor.cpu().numpy() for tensor in tensors))


# ---- scores --------------------------------------------------------------------------------------


def score_split(
    model: VQVAE2, test: SliceDataset, batch_size: int, folder: Path | None
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The scores of every slice, in file order, and its maps: "top", "bottom" and "masks"; NIfTI
    files into `folder`.

    Reconstructions of an earlier run in `folder` are deleted, and nothing else is.
    """
    written: set[Path] = set()

    def finish(index: int, original: np.ndarray, reconstruction: np.ndarray) -> dict[str, float]:
        try:
            score = metrics.score_slice(original, reconstruction)
        except ValueError as error:
            raise UserError(f"{test.paths[index]}: {error}") from error
        if folder:
            path = folder / test.paths[index].relative_to(test.study / f"keras_slices_{test.split}")
            save_reconstruction(test, index, reconstruction, path)
            written.add(path)
        return score

    scores, maps = [], {name: [] for name in (*LEVELS, "masks")}
    bar = tqdm(total=len(test), desc="scoring", unit="slice", disable=None)
    with bar, runtime.thread_pool() as pool:
        for start in range(0, len(test), batch_size):
            indices = range(start, min(start + batch_size, len(test)))
            found = reconstruct_slices(model, test, indices)
            for name, batches in maps.items():
                batches.append(getattr(found, name))
            # Threads are enough: NumPy and SciPy release the GIL while they compute.
            for score in pool.map(finish, indices, found.originals, found.images):
                scores.append(score)
                bar.update()
    for path in folder.rglob("*.nii*") if folder else ():
        if path not in written and is_reconstruction(path):
            path.unlink()
    return scores, {name: np.concatenate(batches) for name, batches in maps.items()}


def is_reconstruction(path: Path) -> bool:
    """Whether this product wrote the NIfTI file as a reconstruction."""
    try:
        return nifti.read(path).header["descrip"].item().decode(errors="replace") == RECONSTRUCTION
    except (UserError, OSError):
        return False


def summarise(scores: list[dict[str, float]], patients: list[str]) -> dict[str, dict]:
    """Each score's mean over the slices, its 95 % interval over patients, and the mean of each
    patient.
    """
    summary, patients = {}, np.array(patients)
    for name in scores[0]:
        values = np.array([score[name] for score in scores])
        low, high = metrics.bootstrap_interval(values, patients, SEED, DRAWS)
        per_patient = {
            str(number): values[patients == number].mean() for number in np.unique(patients)
        }
        summary[name] = {
            "mean": values.mean(),
            "low": low,
            "high": high,
            "per_patient": per_patient,
        }
    return summary


def rates(model: VQVAE2, codes: dict[str, np.ndarray], height: int, width: int) -> dict[str, dict]:
    """The bits that code maps (N, h, w) of slices of height x width pixels take, and each
    codebook's use.
    """
    counts = {
        level: np.bincount(codes[level].ravel(), minlength=model.config.K) for level in LEVELS
    }
    entropy = {level: metrics.code_entropy(counts[level]) for level in LEVELS}
    lengths = [codes[level][0].size for level in LEVELS]
    sent = metrics.bits_per_pixel(lengths, list(entropy.values()), height * width)
    return {
        "bits_per_pixel": {
            "nominal": model.config.bits_per_pixel(height, width),
            "code_entropy": sent,
        },
        "codes_used": {level: int(np.count_nonzero(counts[level])) for level in LEVELS},
        "perplexity": {level: 2 ** entropy[level] for level in LEVELS},
    }


def most_frequent_labels(split: SliceDataset) -> np.ndarray:
    """(H, W) uint8: the class that each place has most often in the masks of a split."""
    counts = np.zeros((len(split.labels), *split.pixels.shape[1:]), np.int64)
    for indices in np.array_split(np.flatnonzero(split.has_mask), -(-len(split) // 64)):
        masks = split.masks(indices).numpy()
        for k, count in enumerate(counts):
            count += (masks == k).sum(0)
    return counts.argmax(0).astype(np.uint8)


def score_masks(
    decoded: np.ndarray, splits: dict[str, SliceDataset], folders: list[Path], device: torch.device
) -> dict:
    """Dice of each organ, by `MASKS`: means over patients, intervals, patients; `decoded` (N, H, W)
    by the model.
    """
    test = splits["test"]
    chosen = np.flatnonzero(test.has_mask)
    net = organs.segmenter_of(splits["train"], *folders, device=device)
    parts = np.array_split(chosen, -(-len(chosen) // 64))
    found = {
        "decoded": decoded[chosen],
        "unet": np.concatenate(
            [organs.segment(net, test.images(part)[:, 0].numpy()) for part in parts]
        ),
        "most_frequent": np.repeat(most_frequent_labels(splits["train"])[None], len(chosen), 0),
    }
    truth, whose = test.masks(chosen).numpy(), [f"{test.names[i].patient:03d}" for i in chosen]
    result = {}
    for name, masks in found.items():
        patients, dice = organs.dice_by_patient(masks, truth, whose, len(test.labels))
        columns = {f"label_{label}": dice[:, i] for i, label in enumerate(test.labels[1:])}
        result[name] = {}
        for organ, values in {"mean": mean_of_known(dice), **columns}.items():
            known = ~np.isnan(values)
            if known.any():
                low, high = metrics.bootstrap_interval(values[known], patients[known], SEED, DRAWS)
                per_patient = dict(
                    zip(patients[known].tolist(), values[known].tolist(), strict=True)
                )
                mean = float(values[known].mean())
                result[name][organ] = {
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "per_patient": per_patient,
                }
    return result


def mean_of_known(dice: np.ndarray) -> np.ndarray:
    """The mean of each row (P, organs) over what is not NaN; NaN where all is."""
    known = ~np.isnan(dice)
    return np.where(known.any(1), np.nansum(dice, 1) / known.sum(1).clip(1), np.nan)


# ---- what is written -----------------------------------------------------------------------------


def rounded(value):
    """`value` with every float in it rounded to six decimals; the scores are not more precise than
    that.
    """
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(float(value), 6) if isinstance(value, float) else value


def write_scores(path: Path, test: SliceDataset, scores: list[dict[str, float]]) -> None:
    with runtime.atomic_path(path) as part, open(part, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "patient", "week", "slice", *scores[0]])
        for source, name, score in zip(test.paths, test.names, scores, strict=True):
            table.writerow([source.name, *name, *(f"{value:.6f}" for value in score.values())])


def write_pictures(
    out: Path,
    model: VQVAE2,
    test: SliceDataset,
    ssim: np.ndarray,
    patients: list[str],
    with_masks: bool,
) -> None:
    """The pictures of the module's docstring; best, median and worst are by the report's SSIM.

    `with_masks` adds the contours of the study's masks and of those that the codes tell.
    """
    note = SYNTHETIC * test.synthetic
    # one slice of each patient, then the rest in file order
    first = [patients.index(patient) for patient in dict.fromkeys(patients)]
    shown = sorted(range(len(test)), key=lambda i: (i not in first, i))[:PICTURES]
    found = reconstruct_slices(model, test, shown)
    for i, (original, reconstruction) in enumerate(zip(found.originals, found.images, strict=True)):
        span = original.min(), original.max()
        figures.save_slice(out / f"original_{i}.png", original, *span)
        figures.save_slice(out / f"reconstruction_{i}.png", reconstruction, *span)

    order = np.argsort(ssim)
    picked = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    indices = list(picked.values())
    found = reconstruct_slices(model, test, indices)
    titles = []
    for title, i in picked.items():
        name = test.names[i]
        titles.append(
            f"{title}: patient {patients[i]}, week {name.week}, slice {name.slice}\nSSIM {ssim[i]:.4f}"
        )
    rows = list(zip(titles, found.originals, found.images, strict=True))
    masks = list(zip(test.masks(indices).numpy(), found.masks, strict=True)) if with_masks else ()
    sheet, letters = out / "comparison.png", test.letters(indices)
    figures.comparison_sheet(sheet, rows, note, masks, letters, test.labels)
    title, median = (
        f"{titles[1]}\n{note}".strip(),
        (found.originals[1], found.top[1], found.bottom[1]),
    )
    figures.code_maps(out / "code_maps.png", *median, title, letters[1])
    by_patient = {
        patient: ssim[np.array(patients) == patient] for patient in dict.fromkeys(patients)
    }
    figures.ssim_histogram(out / "ssim_histogram.png", by_patient, note)


def print_scores(result: dict) -> None:
    """The table of the terminal: all slices, the interval, each patient; then rates and codes."""

    def line(label: str, n: int | str, key: str, inner: str = "") -> None:
        cells = (result[name][key][inner] if inner else result[name][key] for name in COLUMNS)
        print(f"{label:<12}{n:>6}" + "".join(f"{cell:>#16.4g}" for cell in cells))

    print(f"{'':<12}{'slices':>6}" + "".join(f"{title:>16}" for title in COLUMNS.values()))
    line("all", result["n"], "mean")
    if result["ssim_report"]["low"] is None:
        print("no interval: it is one over patients, and there is one patient")
    else:
        line("95 % from", "", "low")
        line("95 % to", "", "high")
    for patient, n in result["patients"].items():
        line(f"patient {patient}", n, "per_patient", patient)
    rate, used, perplexity = (
        result[name] for name in ("bits_per_pixel", "codes_used", "perplexity")
    )
    print(
        f"bits per pixel: {rate['nominal']:.3f} nominal, {rate['code_entropy']:.3f} by code entropy"
    )
    levels = (f"{level} {used[level]} (perplexity {perplexity[level]:.1f})" for level in LEVELS)
    print(f"codes used: {', '.join(levels)}")
    if dice := result.get("dice"):
        organs = list(dice["decoded"])
        print(f"\n{'Dice, mean over patients':<46}" + "".join(f"{organ:>10}" for organ in organs))
        for name, title in MASKS.items():
            cells = (dice[name].get(organ, {}).get("mean", math.nan) for organ in organs)
            print(f"  {title:<44}" + "".join(f"{cell:>10.3f}" for cell in cells))


def predict(config: PredictConfig, data: DataConfig = DataConfig()) -> dict:
    """Score the test split, write everything to the out folder, and return what metrics.json holds.

    `data` names the study and the cache; without a name it is the study that the model was trained
    on. The size of the slices is the model's own.

    Raises:
        FileNotFoundError: no checkpoint, or no study.
        UserError: a checkpoint or slices that cannot be used.
        OSError: a folder that cannot be written.
    """
    trained, device = load_model(config.checkpoint), runtime.pick_device(config.device)
    out = runtime.writable_folder(config.out or Path(config.checkpoint).parent)
    model = trained.model.to(device)
    splits = open_splits(trained, data)
    test = splits["test"]
    patients = [f"{name.patient:03d}" for name in test.names]
    folder = out / "reconstructions" if config.nifti else None

    (out / "metrics.json").unlink(
        missing_ok=True
    )  # written last: while it is there, all else is of its run
    scores, maps = score_split(model, test, config.batch_size, folder)
    known = model.config.labels and test.labels == trained.study.labels
    with_masks = bool(known and test.has_mask.any())
    kept = [Path(config.checkpoint).parent, out]
    dice = {"dice": score_masks(maps["masks"], splits, kept, device)} if with_masks else {}
    study = {
        "study": test.study.resolve().name,
        "split": test.split,
        "fingerprint": test.fingerprint,
    }
    model_file = {
        "file": Path(config.checkpoint).name,
        "sha256": trained.sha256,
        "epoch": trained.epoch,
    }
    result = rounded(
        {
            "n": len(test),
            "patients": {patient: patients.count(patient) for patient in dict.fromkeys(patients)},
            **summarise(scores, patients),
            **rates(model, maps, *test.pixels.shape[1:]),
            **dice,
            "data": {**study, "synthetic": test.synthetic},
            "checkpoint": model_file,
            "provenance": runtime.provenance(),
        }
    )
    write_scores(out / "test_scores.csv", test, scores)
    write_pictures(
        out, model, test, np.array([score["ssim_report"] for score in scores]), patients, with_masks
    )
    runtime.write_json(out / "metrics.json", result)

    what = "SYNTHETIC test slices (a phantom, not MRI)" if test.synthetic else "test slices"
    print(f"{config.checkpoint} (epoch {trained.epoch}) on {len(test)} {what} of {test.study}")
    print_scores(result)
    print(
        f"wrote {out}/: metrics.json, test_scores.csv, comparison.png, code_maps.png, ssim_histogram.png,"
    )
    shown = min(PICTURES, len(test))
    also = f", {len(test)} NIfTI files in reconstructions/" if folder else ""
    print(
        f"  original_N.png and reconstruction_N.png of {shown} slices{also}, and {results_page.write(out).name}"
    )
    return result


def main() -> None:
    args = runtime.parser(__doc__, PredictConfig, DataConfig, without=SIZE).parse_args()
    predict(*(runtime.from_flags(config, args) for config in (PredictConfig, DataConfig)))


if __name__ == "__main__":
    runtime.run_cli(main)
