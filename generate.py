"""Sample new slices and their masks from the trained priors, and account for what they are worth.

    python generate.py                           # 64 slices from the checkpoints in Results/
    python generate.py --n 512 --position 0.5    # where the prostate tends to lie
    # Less varied, if the priors trained for only minutes:
    python generate.py --top-temperature 0.2 --bottom-temperature 0.2

Writes to Results/generated/ (or --out): grid.png (the first samples, unselected, beside test slices
at the same positions), overview.png (test slice | reconstruction | sample), NNNN.png,
keras_slices_synthetic/case_*.nii.gz with their masks keras_slices_seg_synthetic/seg_*.nii.gz, and
manifest.json; then report.json and its pictures: likelihood, anatomy, variety and copying, each
beside what held-out slices and worthless ones score. Not for diagnosis.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import SIZE, DataConfig, SliceDataset, StudyInfo, open_trained_study
from modules import VQVAE2, load_model
from new_slices.code_maps import NUMBERS, Samples, Variants, decode, extract_codes
from new_slices.layouts import Composer
from new_slices.organs import segmenter_of
from new_slices.prior import BOTTOM_SAMPLING, TOP_SAMPLING, Prior, PriorConfig, Sampling
from new_slices.sample_report import Inputs, appraise, near, print_report
from support import figures, nifti, results_page, runtime
from support.runtime import UserError, check_number, check_seed, option

SHOWN = 32  # samples in grid.png
PAIRS = 8  # of the nearest pairs, of samples and of test slices
SEED_STEP = 1_000_003  # between the samples of one --seed and of the next
DESCRIPTION = "synthetic, sampled from VQ-VAE-2 priors, not a patient"
# Folders of a split, as in a study.
NIFTI, MASKS = "keras_slices_synthetic", "keras_slices_seg_synthetic"
OURS = (
    "[0-9]" * 4 + ".png",
    f"{NIFTI}/case_*.nii.gz",
    f"{MASKS}/seg_*.nii.gz",
    "grid.png",
    "overview.png",
)
OURS += ("report.json", "realism.png", "anatomy.png", "copying.png", "nearest.png")


@dataclass(frozen=True)
class GenerateConfig:
    """What to sample, from which models, and where to write it."""

    n: int = option(64, "slices to sample")
    position: float = option(
        math.nan, "where in its volume each lies, 0 to 1; nan: as test slices do"
    )
    top_temperature: float = option(
        TOP_SAMPLING.temperature,
        "divides the logits of the top codes, which place organs; 0: the likeliest code always",
    )
    bottom_temperature: float = option(
        BOTTOM_SAMPLING.temperature, "the same of the bottom codes, which add detail and texture"
    )
    top_passes: int = option(
        TOP_SAMPLING.passes, "passes of the top prior over its map; each shows more codes"
    )
    bottom_passes: int = option(BOTTOM_SAMPLING.passes, "passes of the bottom prior")
    top_spread: float = option(
        TOP_SAMPLING.spread, "chance in which top codes a pass shows; 0 shows the most certain ones"
    )
    bottom_spread: float = option(BOTTOM_SAMPLING.spread, "the same of the bottom codes")
    guidance: float = option(
        TOP_SAMPLING.guidance,
        "0: a layout changes the top codes' logits as learnt; 1: twice as much, and so on",
    )
    seed: int = option(0, "seed of the samples")
    checkpoint: str = option("Results/vqvae2_best.pth", "the autoencoder, as train.py wrote it")
    prior: str = option(
        "Results/prior_best.pth", "the priors over its codes, as train_prior.py wrote them"
    )
    out: str = option("Results/generated", "folder to write to")
    batch_size: int = option(
        0, "slices at a time, which changes samples by rounding alone; 0: 4 on a CPU, 256 on a GPU"
    )
    device: str = option("auto", "where the models run", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_number("n", self.n, least=1)
        check_number("batch_size", self.batch_size, least=0)
        check_seed(self.seed)
        if not math.isnan(self.position):
            check_number("position", self.position, least=0, most=1)
        self.sampling()

    def sampling(self) -> tuple[Sampling, Sampling]:
        """How the top level is sampled, and the bottom level."""
        return (
            Sampling(self.top_passes, self.top_temperature, self.top_spread, self.guidance),
            Sampling(self.bottom_passes, self.bottom_temperature, self.bottom_spread),
        )


# ---- the models, the study, the samples ----


def load_models(config: GenerateConfig) -> tuple[StudyInfo, int, VQVAE2, Prior]:
    """The study and the number of variants that the priors were trained on, the autoencoder and its
    priors.

    UserError for models that are not a pair.
    """
    trained = load_model(config.checkpoint)
    saved = runtime.load_checkpoint(config.prior, "prior")
    study = StudyInfo.from_checkpoint(saved, config.prior)
    digest, expected = trained.sha256, saved["autoencoder_sha256"]
    if digest != expected:
        raise UserError(
            f"{config.prior}: priors of the autoencoder with SHA-256 {expected[:12]}...; "
            f"{config.checkpoint} has {digest[:12]}... "
            "Fix: the pair that was trained together, or train_prior.py --checkpoint FILE."
        )
    device = runtime.pick_device(config.device)
    model = trained.model.to(device)
    with runtime.reading(config.prior, saved["revision"]):
        learnt = runtime.fill(PriorConfig, saved["model_config"])
        shape, variants = tuple(saved["top_shape"]), saved["codes_config"]["copies"]
        prior = Prior(learnt, shape, NUMBERS)
        prior.load_state_dict(saved["model"])
    return study, variants, model, prior.to(device).eval()


def open_splits(
    config: GenerateConfig, data: DataConfig, trained: StudyInfo
) -> dict[str, SliceDataset]:
    """The study at the models' size; `trained` is the record in the priors' checkpoint."""
    splits = open_trained_study(trained, data, config.prior)
    if any(split.fingerprint != trained.fingerprints[name] for name, split in splits.items()):
        study = splits["train"].study
        print(f"note: {study}: its slices are not those that the models were trained on")
    if all(np.isnan(split.positions).all() for split in splits.values()):
        if not math.isnan(config.position):
            raise UserError(
                f"--position is {config.position}, but the names of the slices of "
                f"{splits['train'].study} tell no positions, so the priors know none. "
                "Fix: leave out --position."
            )
        print("the names of the slices tell no positions: sampling without them")
    return splits


def seeds_of(config: GenerateConfig) -> list[int]:
    return [config.seed * SEED_STEP + i for i in range(config.n)]


def draw_layouts(
    config: GenerateConfig, prior: Prior, train: SliceDataset, maps: dict, positions: np.ndarray
) -> np.ndarray | None:
    """A layout for every sample, at its position: (n, h, w) int64. None where the study has no
    masks such as the priors learnt.
    """
    labels = prior.config.labels
    if labels and labels != len(train.labels):
        print(f"{train.study}: it has no masks such as the priors learnt: sampling without layouts")
        return None
    patients = np.array([name.patient for name in train.names])
    known = maps["train_layout"][0].astype(np.int64), maps["train_tissue"]
    composer = Composer(*known, train.positions, patients, maps["levels"], labels)
    return composer.draw(positions, seeds_of(config))


def sample(
    config: GenerateConfig,
    model: VQVAE2,
    prior: Prior,
    positions: np.ndarray,
    layouts: np.ndarray | None,
    keep: Callable,
) -> Samples:
    """Sample slices at positions (n,); `keep(first, samples)` is called with every batch that is
    done.

    KeyboardInterrupt after Ctrl-C or SIGTERM: when the running pass ends, or when `keep` has
    returned.
    """
    (top, bottom), seeds = config.sampling(), seeds_of(config)
    form = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
    bar = tqdm(total=config.n, desc="sampling", unit=" slices", bar_format=form, disable=None)
    parts = []
    size = config.batch_size or (4 if next(model.parameters()).device.type == "cpu" else 256)
    with runtime.stop_signals() as stopped, bar:

        def progress() -> None:
            bar.update(len(batch) / (top.passes + bottom.passes))
            if stopped:
                raise KeyboardInterrupt

        for first in range(0, config.n, size):
            batch = range(first, min(first + size, config.n))
            given = None if layouts is None else torch.from_numpy(layouts[batch])
            codes = prior.sample(
                positions[batch],
                seeds[batch.start : batch.stop],
                top,
                bottom,
                progress=progress,
                layouts=given,
            )
            images, masks = decode(model, *codes, given if prior.config.labels else None)
            samples = Samples(images, *(level.cpu().numpy() for level in codes), masks)
            keep(first, samples)
            parts.append(samples)
            if stopped:
                raise KeyboardInterrupt
    return Samples(
        *(None if each[0] is None else np.concatenate(each) for each in zip(*parts, strict=True))
    )


class Album:
    """What a run leaves in its folder: pictures and NIfTI of every finished slice, and the
    manifest.
    """

    def __init__(
        self,
        config: GenerateConfig,
        splits: dict[str, SliceDataset],
        positions: np.ndarray,
        labels: tuple[int, ...],
    ):
        self.out, self.positions = Path(config.out), positions
        train, test = splits["train"], splits["test"]
        shown = test.images(np.linspace(0, len(test) - 1, min(64, len(test))).astype(int)).numpy()
        # black and white
        self.span = tuple(np.median(end((1, 2, 3))) for end in (shown.min, shown.max))
        self.note = "priors trained on a synthetic phantom, not MRI" if train.synthetic else ""
        self.mean, self.std = float(np.median(train.mean)), float(np.median(train.std))
        like = int((train.shapes == train.pixels.shape[1:]).all(1).argmax())  # one not resized
        self.affine = train.grid_affine(like)
        # The edges of pictures have names where all slices lie alike.
        letters = {*train.letters([like]), *test.letters(range(len(test)))}
        self.look = {"span": self.span, "note": self.note, "label_values": labels}
        self.look["letters"] = letters.pop() if len(letters) == 1 else ""
        self.labels = np.array(labels, np.min_scalar_type(max(labels, default=0)))
        earlier = self.out / "manifest.json"
        if earlier.is_file():  # no file of an earlier run may pass for one of ours
            if DESCRIPTION not in earlier.read_text(errors="replace"):
                raise UserError(
                    f"{earlier}: not that of generated slices. Fix: --out, another folder."
                )
            for old in (path for pattern in OURS for path in self.out.glob(pattern)):
                old.unlink()
        settings = dataclasses.asdict(config)
        settings["position"] = None if math.isnan(config.position) else config.position
        self.manifest = {
            "note": f"{DESCRIPTION}. Not for diagnosis.",
            "asked": config.n,
            "done": 0,
            "seed": config.seed,
            "seeds": f"of slice i: {config.seed} * {SEED_STEP} + i",
            "settings": settings,
            "positions": [None if math.isnan(p) else round(float(p), 4) for p in positions],
            "nifti": f"z-scores rescaled by the median mean {self.mean:.6g} and standard deviation "
            f"{self.std:.6g} of the training slices; each slice is its own case, its slice number "
            "the position on a scale of 0 to 59",
            "autoencoder": {
                "file": Path(config.checkpoint).name,
                "sha256": runtime.sha256(config.checkpoint),
            },
            "prior": {"file": Path(config.prior).name, "sha256": runtime.sha256(config.prior)},
            "data": {"study": train.study.resolve().name, "synthetic": train.synthetic},
            "provenance": runtime.provenance(),
        }
        self.write_manifest()

    def write_manifest(self) -> None:
        runtime.write_json(self.out / "manifest.json", self.manifest)

    def keep(self, first: int, samples: Samples) -> None:
        for i, image in enumerate(samples.images, first):
            figures.save_slice(self.out / f"{i:04d}.png", image, *self.span)
            number = round(59 * np.nan_to_num(self.positions[i]))
            # The patient counts on from the seed: slices of two runs may lie in one folder.
            patient = 900 + self.manifest["seed"] * SEED_STEP + i
            name = f"{patient:03d}_week_0_slice_{number}.nii.gz"
            pixels = (image.astype(np.float64) * self.std + self.mean).astype(np.float32)
            nifti.write(self.out / NIFTI / f"case_{name}", pixels, self.affine, DESCRIPTION)
            if samples.masks is not None:
                mask = self.labels[samples.masks[i - first]]
                nifti.write(self.out / MASKS / f"seg_{name}", mask, self.affine, DESCRIPTION)
        self.manifest["done"] = first + len(samples.images)
        self.write_manifest()


# ---- pictures, and the run as a whole ----


def label(split: SliceDataset, index: int) -> str:
    """What a slice of the study is called under its picture."""
    patient, week, number = split.names[index]
    return f"{patient:03d} w{week} s{number}"


def with_masks(labels: list[str], images: np.ndarray, masks: np.ndarray | None) -> list[tuple]:
    """What `figures.slice_grid` draws of slices (n, H, W) and their masks, if there are any."""
    return list(zip(labels, images, [None] * len(images) if masks is None else masks, strict=True))


def real_slices(split: SliceDataset, indices: np.ndarray, labels: list[str]) -> list[tuple]:
    masks = split.masks(indices).numpy() if split.labels else None
    return with_masks(labels, split.images(indices)[:, 0].numpy(), masks)


def write_grid(album: Album, test: SliceDataset, samples: Samples, twins: np.ndarray) -> None:
    """The first samples, all of them, beside held-out slices at the same positions."""
    shown = range(min(SHOWN, len(twins)))
    at = ["" if math.isnan(album.positions[i]) else f"at {album.positions[i]:.2f}" for i in shown]
    masks = None if samples.masks is None else samples.masks[: len(shown)]
    groups = {
        "held-out slices": real_slices(
            test, twins[: len(shown)], [label(test, twins[i]) for i in shown]
        ),
        "generated, random and unselected": with_masks(at, samples.images[: len(shown)], masks),
    }
    figures.slice_grid(album.out / "grid.png", groups, min(8, len(shown)), **album.look)


def write_pictures(album: Album, inputs: Inputs, report: dict, drawn: dict) -> None:
    train, test, samples = inputs.splits["train"], inputs.splits["test"], inputs.samples
    honest, shown = drawn["honest"], inputs.twins[: min(4, len(inputs.twins))]
    n, blank = len(shown), [""] * len(shown)
    groups = {
        "held-out": real_slices(test, shown, blank),
        "reconstruction": with_masks(blank, *inputs.decode(*inputs.codes_of("test", shown))),
        "generated": with_masks(
            blank, samples.images[:n], None if samples.masks is None else samples.masks[:n]
        ),
    }
    figures.slice_grid(album.out / "overview.png", groups, n, **album.look, panel=2.5)

    variants = Variants(len(inputs.codes["train_top"]), len(train), train.mirror)

    def pairs(which: str, images: Callable, names: Callable) -> list[tuple]:
        best, shown = drawn["nearest"]["correlation"][which], []
        for i in np.argsort(-best.similarity)[:PAIRS]:
            index, variant = torch.tensor([best.index[i]]), int(best.variant[i])
            nearest = variants.images(train.images(index), variant, index)[0, 0].numpy()
            altered = ("", " mirrored")[variant] if variant < 2 else " altered"
            title = f"{best.similarity[i]:.3f}{altered}"
            shown += [(names(i), images(i), None), (title, nearest, None)]
        return shown

    groups = {
        f"generated | nearest training slice (n = {report['n']})": pairs(
            "samples", lambda i: samples.images[i], lambda i: f"{i:04d}"
        ),
        f"held-out | nearest training slice (n = {len(honest)})": pairs(
            "honest",
            lambda i: test.images([honest[i]])[0, 0].numpy(),
            lambda i: label(test, honest[i]),
        ),
    }
    figures.slice_grid(album.out / "nearest.png", groups, 8, **album.look)
    sets = {
        measure: {name: best.similarity for name, best in found.items()}
        for measure, found in drawn["nearest"].items()
    }
    thresholds = {measure: report["copying"][measure]["threshold"] for measure in sets}
    figures.similarity_histograms(album.out / "copying.png", sets, thresholds, album.note)
    if report["realism"]:
        figures.realism_chart(album.out / "realism.png", report["realism"]["rows"], album.note)


def account(album: Album, inputs: Inputs) -> dict:
    """What the samples are worth, computed, written, drawn and printed."""
    report, drawn = appraise(inputs)
    runtime.write_json(album.out / "report.json", report | {"manifest": album.manifest})
    write_pictures(album, inputs, report, drawn)
    print_report(report)
    return report


def choose_twins(config: GenerateConfig, test: SliceDataset) -> tuple[np.ndarray, np.ndarray]:
    """The test slice (n,) that stands beside each sample, and the position (n,) of each sample.

    Test slices in a random order, over and over: what sample i stands beside does not depend on n.
    """
    pool, rng = near(test, config.position), np.random.default_rng(config.seed)
    rounds = math.ceil(config.n / len(pool))
    twins = np.concatenate([rng.permutation(pool) for _ in range(rounds)])[: config.n]
    if math.isnan(config.position):
        return twins, test.positions[twins].astype(np.float64)
    return twins, np.full(config.n, config.position)


def generate(config: GenerateConfig, data: DataConfig = DataConfig()) -> dict:
    """Sample, write everything to the out folder, and return what report.json holds.

    `data` names the study and the cache; without a name it is the study of the priors. The size of
    the slices is the models' own.

    Raises:
        FileNotFoundError: no checkpoint, or no study.
        ValueError: models that are not a pair, or that cannot be used; a position where names tell
            none.
        OSError: a folder that cannot be written.
        KeyboardInterrupt: after Ctrl-C or SIGTERM; what is finished stays, and the manifest says
            how many.
    """
    study, variants, model, prior = load_models(config)
    splits = open_splits(config, data, study)
    out, test = runtime.writable_folder(config.out), splits["test"]
    twins, positions = choose_twins(config, test)
    album = Album(config, splits, positions, study.labels)
    # The slices that were there are gone from the page, even if this run is stopped.
    results_page.write(out)
    # The code maps that the priors were trained on, where they are at hand.
    files = (folder / "codes.npz" for folder in (Path(config.prior).parent, out))
    maps = extract_codes(model, splits, variants, album.manifest["autoencoder"]["sha256"], *files)
    layouts = draw_layouts(config, prior, splits["train"], maps, positions)
    try:
        samples = sample(config, model, prior, positions, layouts, album.keep)
    except KeyboardInterrupt:
        done = album.manifest["done"]
        print(f"stopped: {done} of {config.n} slices are in {out}/, without grid and report")
        raise
    write_grid(album, test, samples, twins)
    segmenter = None
    if splits["train"].has_mask.any():
        folders, device = (Path(config.checkpoint).parent, out), runtime.pick_device(config.device)
        segmenter = segmenter_of(splits["train"], *folders, device=device)
    asked = {"position": config.position, "seed": config.seed}
    compared = {"positions": positions, "twins": twins, "segmenter": segmenter, **asked}
    report = account(album, Inputs(model, prior, splits, maps, samples, **compared))
    masks = f", masks in {MASKS}/" if samples.masks is not None else ""
    print(f"wrote {out}/: {config.n} slices as NNNN.png and in {NIFTI}/{masks}, grid.png,")
    print("  overview.png, manifest.json, report.json, realism.png, copying.png and nearest.png;")
    print(f"  all of it is in {results_page.write(out)}")
    return report


def main() -> None:
    args = runtime.parser(__doc__, GenerateConfig, DataConfig, without=SIZE).parse_args()
    generate(*(runtime.from_flags(each, args) for each in (GenerateConfig, DataConfig)))


if __name__ == "__main__":
    runtime.run_cli(main)
