"""Score a trained VQ-VAE-2 on the whole test split of a study, and show what it does to the slices.

    python predict.py                # Results/vqvae2_best.pth, on the study it was trained on
    python predict.py --checkpoint FILE --data DIR --out DIR
    python predict.py --nifti        # the reconstructions as NIfTI too, in scanner units
    python predict.py --no-unet      # masks without the U-Net that they are compared with

Writes to the checkpoint's folder (or --out): metrics.json (means, patients, intervals, bits per
pixel, codes used, masks by organ), test_scores.csv (every slice), comparison.png (best, median and
worst slice), ssim_histogram.png, index.html (all of it on one page); with --nifti
also reconstructions/.
support/metrics.py states how every score is computed.
"""

import csv
import io
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dataset
from dataset import NO_MASK, DataConfig, SliceDataset
from modules import VQVAE2, load_model
from new_slices import organs
from new_slices.code_maps import LEVELS, Samples
from new_slices.organs import Segmenter
from support import figures, metrics, nifti, results_page, runtime
from support.results_page import MASK_SOURCES, SCORES
from support.runtime import UserError, check_number, option

SYNTHETIC = "synthetic phantom, not MRI"  # a picture's note


@dataclass(frozen=True)
class PredictConfig:
    """What to score, and where to write. The size of the slices is the checkpoint's."""

    checkpoint: str = option("Results/vqvae2_best.pth", "the model, as train.py wrote it")
    out: str = option("", "folder to write to; empty is the checkpoint's")
    nifti: bool = option(False, "write the reconstructions as NIfTI, in their originals' units")
    unet: bool = option(True, "train a U-Net, once, to compare its masks with: up to 10 minutes")
    batch_size: int = option(32, "slices at a time")
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_number("batch_size", self.batch_size, least=1)


# ---- a model and its test split ----


@torch.inference_mode()
def reconstruct_slices(model: VQVAE2, test: SliceDataset, indices: Sequence[int]) -> Samples:
    """What the model makes of test slices; masks are all 0 for a model without."""
    x = test.images(indices)
    output = model(x.to(next(model.parameters()).device))
    masks = torch.zeros_like(x[:, 0], dtype=torch.uint8)
    if output.mask_logits is not None:
        masks = organs.likeliest(output.mask_logits)
    codes = (getattr(output, level).codes for level in LEVELS)
    tensors = output.reconstruction[:, 0], *codes, masks
    return Samples(*(tensor.cpu().numpy() for tensor in tensors))


# ---- scores ----


def score_split(
    model: VQVAE2, test: SliceDataset, batch_size: int, folder: Path | None
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """The scores of every slice, in file order, and the maps of all: "top", "bottom", "masks".

    NIfTI files go into `folder`, if there is one.
    """

    def finish(index: int, reconstruction: np.ndarray) -> dict[str, float]:
        """Score a slice in the pixels of its own file, as reconstruct.py scores that file."""
        path = test.paths[index]
        try:
            original = nifti.finite(dataset.read_slice(str(path)).values())
            made = dataset.restore(test, index, reconstruction)
            score = metrics.score_slice(original, made)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if folder:
            target = folder / path.relative_to(test.study / f"keras_slices_{test.split}")
            dataset.save_reconstruction(test, index, made, target)
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
            for score in pool.map(finish, indices, found.images):
                scores.append(score)
                bar.update()
    return scores, {name: np.concatenate(batches) for name, batches in maps.items()}


def check_reconstructions(folder: Path, test: SliceDataset) -> None:
    """UserError where a file in `folder` that is none of ours has the name of a reconstruction."""
    for path in test.paths:
        target = folder / path.relative_to(test.study / f"keras_slices_{test.split}")
        if target.exists() and not dataset.is_reconstruction(target):
            raise UserError(f"{target}: not a reconstruction. Fix: another --out.")


def replace_reconstructions(folder: Path, made: Path) -> None:
    """Delete an earlier run's reconstructions in `folder`, then move the files of `made` there."""
    for old in folder.rglob("*.nii*"):
        if dataset.is_reconstruction(old):
            old.unlink()
    for new in made.rglob("*.nii*"):
        target = folder / new.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        new.replace(target)


def summary(values: np.ndarray, patients: np.ndarray) -> dict:
    """The mean of values (N,), its 95 % interval over patients (N,), and each patient's mean."""
    low, high = metrics.bootstrap_interval(values, patients)
    means = {str(name): float(values[patients == name].mean()) for name in np.unique(patients)}
    return {"mean": float(values.mean()), "low": low, "high": high, "per_patient": means}


def summarise(scores: list[dict[str, float]], patients: list[str]) -> dict[str, dict]:
    """The `summary` of each score of N slices."""
    values = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    return {name: summary(each, np.array(patients)) for name, each in values.items()}


def rates(model: VQVAE2, codes: dict[str, np.ndarray], pixels: int) -> dict[str, dict]:
    """The bits that code maps (N, h, w) take for each of `pixels`, and how codebooks are used."""
    K = model.config.K
    counts = {level: np.bincount(codes[level].ravel(), minlength=K) for level in LEVELS}
    entropy = {level: metrics.code_entropy(counts[level]) for level in LEVELS}
    lengths = [codes[level].size for level in LEVELS]
    nominal = sum(lengths) * math.log2(K) / pixels
    by_entropy = np.dot(lengths, list(entropy.values())) / pixels
    return {
        "bits_per_pixel": {"nominal": nominal, "code_entropy": float(by_entropy)},
        "codes_used": {level: int(np.count_nonzero(counts[level])) for level in LEVELS},
        "perplexity": {level: 2 ** entropy[level] for level in LEVELS},
    }


def own_pixels(split: SliceDataset, indices: Sequence[int]) -> np.ndarray:
    """(n, H, W) bool: where the model's grid shows these slices, not the padding around them."""
    inside = np.zeros((len(indices), *split.pixels.shape[1:]), bool)
    for shown, index in zip(inside, indices, strict=True):
        shown[split.placement(index).own] = True
    return inside


def score_masks(decoded: np.ndarray, test: SliceDataset, net: Segmenter | None) -> dict:
    """What metrics.json says of masks; `decoded` (N, H, W) by the model.

    "dice": by `MASK_SOURCES`, the `summary` of each organ over patients; "masks": the verdicts on
    the decoded masks, see `organs.judge_masks`; "not_learnt": a line on them, or "".
    """
    chosen = np.flatnonzero(test.has_mask)
    inside = own_pixels(test, chosen)
    truth = np.where(inside, test.masks(chosen).numpy(), NO_MASK)
    whose = [f"{patient:03d}" for patient in test.patients[chosen]]
    drawn, tables = {"decoded": decoded[chosen]}, {}
    if net:
        parts = runtime.batches(chosen)
        images = (test.images(part)[:, 0].numpy() for part in parts)
        drawn["unet"] = np.concatenate([organs.segment(net, part) for part in images])
    for name, masks in drawn.items():
        patients, dice = organs.dice_by_patient(masks, truth, whose, len(test.labels))
        absent = ~np.isin(np.arange(1, len(test.labels)), truth)  # no test mask shows such an organ
        dice[:, absent] = np.nan
        columns = {"mean": organs.mean_of_known(dice)}
        columns |= {f"label_{label}": dice[:, i] for i, label in enumerate(test.labels[1:])}
        tables[name] = {}
        for organ, values in columns.items():
            known = ~np.isnan(values)
            if known.any():
                tables[name][organ] = summary(values[known], patients[known])
    shown = np.where(inside, drawn["decoded"], 0)
    verdicts = organs.judge_masks(shown, truth, truth, test.labels)
    return {"dice": tables, "masks": verdicts, "not_learnt": organs.not_learnt(verdicts)}


# ---- what is written ----


def write_scores(path: Path, test: SliceDataset, scores: list[dict[str, float]]) -> None:
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["file", "patient", "week", "slice", *scores[0]])
    for source, name, score in zip(test.paths, test.names, scores, strict=True):
        table.writerow([source.name, *name, *(f"{value:.6f}" for value in score.values())])
    runtime.write_text(path, lines.getvalue())


def write_pictures(
    out: Path, model: VQVAE2, test: SliceDataset, ssim: np.ndarray, with_masks: bool
) -> None:
    """The pictures of the module's docstring; best, median and worst are by the report's SSIM.

    `with_masks` adds the contours of the study's masks and of those decoded from the codes.
    """
    note = SYNTHETIC * test.synthetic
    order = np.argsort(ssim)
    picked = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    indices = list(picked.values())
    found = reconstruct_slices(model, test, indices)
    titles = []
    for title, i in picked.items():
        where = "patient {:03d}, week {}, slice {}".format(*test.names[i])
        titles.append(f"{title}: {where}\nSSIM {ssim[i]:.4f}")
    rows = list(zip(titles, test.images(indices)[:, 0].numpy(), found.images, strict=True))
    masks = list(zip(test.masks(indices).numpy(), found.masks, strict=True)) if with_masks else ()
    sheet, letters = out / "comparison.png", test.letters(indices)
    figures.comparison_sheet(sheet, rows, note, masks, letters, test.labels)
    figures.ssim_histogram(out / "ssim_histogram.png", ssim, note)


def print_scores(result: dict) -> None:
    """The table of the terminal: all slices, and the interval; then rates and codes."""

    def line(label: str, key: str) -> None:
        print(f"{label:<12}" + "".join(f"{result[name][key]:>#16.4g}" for name in SCORES))

    print(f"{'':<12}" + "".join(f"{title:>16}" for title in SCORES.values()))
    line("mean", "mean")
    if result["ssim_report"]["low"] is None:
        print("no interval: it needs at least two patients")
    else:
        line("95 % from", "low")
        line("95 % to", "high")
    rate, used, perplexity = map(result.get, ("bits_per_pixel", "codes_used", "perplexity"))
    kinds = f"{rate['nominal']:.3f} nominal, {rate['code_entropy']:.3f} by code entropy"
    padding = f"; {result['padding']:.0%} of the model's grid is padding, which no score counts"
    print(f"bits per pixel: {kinds}{padding if result['padding'] else ''}")
    levels = (f"{level} {used[level]} (perplexity {perplexity[level]:.1f})" for level in LEVELS)
    print(f"codes used: {', '.join(levels)}")


def print_masks(dice: dict, not_learnt: str) -> None:
    """The table of masks: a column for each organ that some patient has."""
    columns = dict.fromkeys(organ for table in dice.values() for organ in table)
    width = max([12, *(len(organ) + 1 for organ in columns)])
    print(f"\n{'':<48}" + "".join(f"{organ:>{width}}" for organ in columns))
    for name, table in dice.items():
        means = (table[organ]["mean"] if organ in table else math.nan for organ in columns)
        cells = "".join(f"{mean:>{width}.3g}" for mean in means)
        print(f"{f'Dice, {MASK_SOURCES[name]}':<48}{cells}")
    if not_learnt:
        print(f"warning: {not_learnt}")


def predict(config: PredictConfig, data: DataConfig = DataConfig()) -> dict:
    """Score the test split, write everything to the out folder, and return what metrics.json holds.

    `data` names the study and the cache; without a name it is the study that the model was trained
    on. The size of the slices is the model's own.
    """
    trained, device = load_model(config.checkpoint), runtime.pick_device(config.device)
    model, beside = trained.model.to(device), Path(config.checkpoint).parent
    out = runtime.writable_folder(config.out or beside)
    splits = dataset.open_trained_study(trained.study, data, config.checkpoint)
    train, test = splits["train"], splits["test"]
    patients = [f"{name.patient:03d}" for name in test.names]

    if config.nifti:
        check_reconstructions(out / "reconstructions", test)
    # It is written last: while it is there, everything else in the folder is of its run.
    earlier = out / "metrics.json"
    last = results_page.read_json(earlier, "provenance")
    parts = ("checkpoint", "sha256"), ("data", "fingerprint")
    made_of = [results_page.at(last, *part) for part in parts]
    if earlier.is_file():
        earlier.unlink()
        results_page.write(out)  # without its scores
    # The NIfTI files come into place together: a run that fails takes none of an earlier one's.
    with tempfile.TemporaryDirectory(prefix=runtime.TEMPORARY, dir=out) as made:
        folder = Path(made) if config.nifti else None
        scores, maps = score_split(model, test, config.batch_size, folder)
        if folder or made_of not in ([None, None], [trained.sha256, test.fingerprint]):
            replace_reconstructions(out / "reconstructions", Path(made))
    pixels = int(test.shapes.prod(1).sum())
    result = {"n": len(test), "patients": dict(Counter(patients))}
    result |= summarise(scores, patients) | rates(model, maps, pixels)
    result["padding"] = 1 - float(own_pixels(test, range(len(test))).mean())
    both_have_masks = bool(model.config.labels and test.has_mask.any())
    if with_masks := both_have_masks and test.labels == trained.study.labels:
        net = None
        if config.unet and train.has_mask.any():
            net = organs.segmenter_of(train, beside, out, device=device)
        result |= score_masks(maps["masks"], test, net)
    elif both_have_masks:
        ours, theirs = (", ".join(map(str, of.labels)) for of in (test, trained.study))
        print(f"note: masks are not scored: the study has the labels {ours}, the model {theirs}")
    study = {"study": test.study.resolve().name, "split": test.split}
    study |= {"fingerprint": test.fingerprint, "synthetic": test.synthetic}
    file = {"file": Path(config.checkpoint).name, "sha256": trained.sha256, "epoch": trained.epoch}
    result |= {"data": study, "checkpoint": file, "provenance": runtime.provenance()}
    write_scores(out / "test_scores.csv", test, scores)
    ssim = np.array([score["ssim_report"] for score in scores])
    write_pictures(out, model, test, ssim, with_masks)
    runtime.write_json(out / "metrics.json", result)

    what = "SYNTHETIC test slices (a phantom, not MRI)" if test.synthetic else "test slices"
    print(f"{config.checkpoint} (epoch {trained.epoch}) on {len(test)} {what} of {test.study}")
    print_scores(result)
    if with_masks:
        print_masks(result["dice"], result["not_learnt"])
    page = results_page.write(out)
    also = f", {len(test)} NIfTI files in reconstructions/" if config.nifti else ""
    print(f"wrote {out}/: metrics.json, test_scores.csv, pictures{also}; see {page.name}")
    return result


def main() -> None:
    configs = PredictConfig, DataConfig
    given = vars(runtime.parser(__doc__, *configs, without=dataset.SIZE).parse_args())
    predict(*(runtime.fill(config, given) for config in configs))


if __name__ == "__main__":
    runtime.run_cli(main)
