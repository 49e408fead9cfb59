"""Sample new slices and their masks from the trained priors, and account for what they are worth.

    python generate.py                           # 64 slices from the checkpoints in Results/
    python generate.py --n 512 --position 0.5    # in the middle of volumes, where prostates lie
    python generate.py --layout MY_MASKS         # to fit your own masks: a NIfTI slice or a folder
    python generate.py --layouts-only            # new masks alone, in seconds
    python generate.py --nnunet Dataset501_New   # for nnU-Net too: nnUNet_raw=Results/generated

Writes to Results/generated/ (or --out): grid.png (the first samples, unselected, beside test slices
at the same positions), overview.png (test slice | reconstruction | sample), NNNN.png,
keras_slices_synthetic/case_*.nii.gz with their masks keras_slices_seg_synthetic/seg_*.nii.gz,
layouts.png and manifest.json; then report.json, see new_slices/sample_report.py, nearest.png (the
samples that are most like a training slice, each beside it) and index.html. Not for diagnosis.

With --layout, slices show organs where your masks do, with tissue composed around them; a mask gets
the position of the training slice that is most like it. --nnunet writes no splits: no two new
slices share a patient, so nnU-Net's random folds are right; but test a network on real slices.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import dataset
from dataset import DataConfig, Placement, SliceDataset, StudyInfo
from modules import VQVAE2, Trained, load_model
from new_slices.code_maps import Samples, composer_of, decode, extract_codes, labels_on_layouts
from new_slices.layouts import REGIONS, Composer, middles
from new_slices.organs import likeliest, segmenter_of
from new_slices.prior import (
    BOTTOM_SAMPLING,
    REBUILT_GUIDANCE,
    TOP_SAMPLING,
    Prior,
    Sampling,
    load_prior,
)
from new_slices.sample_report import Inputs, appraise, near, plain, print_report
from support import figures, nifti, results_page, runtime
from support.runtime import UserError, check_number, check_seed, option

SHOWN = 32  # samples in grid.png
NEED_MASKS = ("layout", "layouts_only", "nnunet")  # flags
NNUNET = re.compile(r"Dataset\d{3}_[\w-]+")  # what nnU-Net calls a data set
PAIRS = 8  # of the nearest pairs, of samples and of test slices
SEED_STEP = 1_000_003  # between the samples of one --seed and of the next
DESCRIPTION = "synthetic, sampled from VQ-VAE-2 priors, not a patient"
# Folders of a split, as in a study.
NIFTI, MASK_FOLDER = "keras_slices_synthetic", "keras_slices_seg_synthetic"
OURS = (
    *("[0-9]" * n + ".png" for n in (4, 5, 6)),
    *("grid.png", "overview.png", "layouts.png", "nearest.png", "report.json"),
    f"{NIFTI}/case_*.nii.gz",
    f"{MASK_FOLDER}/seg_*.nii.gz",
    "manifest.json",  # the last to be deleted, as it says that the others are ours
)


@dataclass(frozen=True)
class GenerateConfig:
    """What to sample, from which models, and where to write it."""

    n: int = option(64, "slices to sample")
    position: float = option(math.nan, "place in the volume, 0 to 1; nan: those of test slices")
    top_temperature: float = option(
        TOP_SAMPLING.temperature,
        "divides the logits of top codes, which place organs; 0: likeliest",
    )
    bottom_temperature: float = option(
        BOTTOM_SAMPLING.temperature, "the same of the bottom codes, which add detail and texture"
    )
    top_passes: int = option(TOP_SAMPLING.passes, "passes over the top map; each shows more codes")
    bottom_passes: int = option(BOTTOM_SAMPLING.passes, "passes of the bottom prior")
    top_spread: float = option(
        TOP_SAMPLING.spread, "randomness in which top codes are fixed first; 0: the surest"
    )
    bottom_spread: float = option(BOTTOM_SAMPLING.spread, "the same of the bottom codes")
    guidance: float = option(
        math.nan,
        "0: a layout changes top codes' logits as learnt; 1: twice as much; nan: as suits priors",
    )
    layout: str = option(
        "", "masks of your own, a NIfTI slice or a folder of them, taken in turn: organs lie there"
    )
    layouts_only: bool = option(False, "write new masks and layouts.png, and sample no slices")
    nnunet: str = option(
        "", "write slices and masks for nnU-Net v2 too, into this folder of --out: Dataset501_Name"
    )
    seed: int = option(0, "seed of the samples")
    checkpoint: str = option("Results/vqvae2_best.pth", "the autoencoder, as train.py wrote it")
    prior: str = option("Results/prior_best.pth", "its priors, as train_prior.py wrote them")
    out: str = option("Results/generated", "folder to write to")
    batch_size: int = option(0, "slices at a time, on each thread; 0: 4 on a CPU, 256 on a GPU")
    device: str = option("auto", "where the models run", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_number("n", self.n, least=1)
        check_number("batch_size", self.batch_size, least=0)
        check_seed(self.seed)
        if self.nnunet and not NNUNET.fullmatch(self.nnunet):
            raise UserError(f"--nnunet is {self.nnunet}; expected a name such as Dataset501_Heart")
        if self.nnunet and self.layouts_only:
            raise UserError("--nnunet and --layouts-only: nnU-Net needs slices. Fix: one of them.")
        check_number("position", np.nan_to_num(self.position), least=0, most=1)
        check_number("guidance", np.nan_to_num(self.guidance), least=0)
        for name, value in vars(self).items():
            if name.endswith("_passes"):
                check_number(name, value, least=1, most=10_000)
            elif name.endswith(("_temperature", "_spread")):
                check_number(name, value, least=0)

    def sampling(self) -> tuple[Sampling, Sampling]:
        """How the top level is sampled, and the bottom level."""
        return (
            Sampling(self.top_passes, self.top_temperature, self.top_spread, self.guidance),
            Sampling(self.bottom_passes, self.bottom_temperature, self.bottom_spread),
        )


# ---- the models, the study, the samples ----


def load_models(config: GenerateConfig) -> tuple[StudyInfo, dict, Trained, Prior]:
    """The study and the codes that the priors learnt, as `load_prior`, and both models."""
    trained = load_model(config.checkpoint)
    study, codes, prior = load_prior(config.prior, trained)
    device = runtime.pick_device(config.device)
    trained.model.to(device)
    return study, codes, trained, prior.to(device)


def check_study(
    config: GenerateConfig, labels: int, prior: Prior, splits: dict[str, SliceDataset]
) -> None:
    """UserError for a study whose layouts have other labels than those that the priors learnt, and
    for a flag that needs positions or masks, where there are none."""
    train, learnt = splits["train"], prior.config.labels
    if labels != learnt:
        found = f"{train.study}: its layouts have {labels} labels; {config.prior} learnt {learnt}"
        raise UserError(f"{found}. Fix: --data, a study with the same masks, or train_prior.py.")
    unknown = all(np.isnan(split.positions).all() for split in splits.values())
    if unknown and not math.isnan(config.position):
        names = f"the names of the slices of {train.study} tell no positions"
        raise UserError(f"--position is {config.position}, but {names}. Fix: leave it out.")
    asked = [name for name in NEED_MASKS if getattr(config, name)]
    if asked and not learnt:
        found = f"{runtime.flag(asked[0])}: {config.prior} learnt no organs"
        raise UserError(f"{found}. Fix: leave the flag out, or train on a study with masks.")


# ---- masks of the user's own ----


def read_mask(path: str, study: StudyInfo, cells: tuple[int, int]) -> np.ndarray:
    """A mask in the model's grid, (H, W) uint8 classes; UserError for one that cannot be used.

    It is turned by its affine to lie as most training slices do, then placed as they were. One
    whose organs are too small for the `cells` of a layout (h, w) cannot be used.
    """
    image = dataset.read_slice(path)
    labels = dataset.read_labels(image)[..., None]
    told = image.oriented and study.plane  # without directions it is taken as it is stored
    ends = study.directions + nifti.PLANES[study.plane][2] if told else ""
    if told:
        labels = nibabel.apply_orientation(labels, nifti.turning(image.affine, ends))
    if labels.shape[2] > 1:
        raise UserError(
            f"it lies in another plane than the training slices, which are {study.plane}"
        )
    if unknown := sorted(set(np.unique(labels).tolist()).difference(study.labels)):
        known = ", ".join(map(str, study.labels))
        raise UserError(f"labels {', '.join(map(str, unknown))}; the model knows {known}")
    classes = np.searchsorted(study.labels, labels[..., 0]).astype(np.uint8)
    size = study.height, study.width
    placed = Placement.make(classes.shape, size, study.fit).place(classes, nearest=True)
    if lost := set(np.unique(classes)) - {0, *np.unique(middles(placed[None], cells))}:
        small = ", ".join(str(study.labels[k]) for k in sorted(lost))
        cell = "x".join(str(side // count) for side, count in zip(size, cells, strict=True))
        raise UserError(f"organs (labels {small}) smaller than a cell of a layout, {cell} pixels")
    return placed


def read_masks(source: str, study: StudyInfo, cells: tuple[int, int], n: int) -> np.ndarray:
    """The masks in a file or folder by name, over and over: (n, H, W); see `read_mask`."""
    folder = os.path.isdir(source)
    paths = [entry.path for entry in dataset.find_nifti(source, [])] if folder else [source]
    masks, bad = [], {}
    for path in paths:
        try:
            masks.append(read_mask(path, study, cells))
        except (UserError, OSError) as error:
            bad[path] = str(error)
    if bad or not masks:
        dataset.raise_bad(source, bad or {source: "it holds no NIfTI files"}, max(1, len(paths)))
    print(f"{source}: {len(masks)} masks for {n} slices")
    return np.stack(masks)[np.arange(n) % len(masks)]


# ---- layouts and samples ----


def seeds_of(config: GenerateConfig) -> list[int]:
    return [config.seed * SEED_STEP + i for i in range(config.n)]


def sample(
    config: GenerateConfig,
    model: VQVAE2,
    prior: Prior,
    positions: np.ndarray,
    layouts: np.ndarray,
    keep: Callable,
) -> Samples:
    """Sample slices at positions (n,); `keep(first, samples)` is called with every batch."""
    (top, bottom), seeds = config.sampling(), seeds_of(config)
    on_cpu = next(model.parameters()).device.type == "cpu"
    size, threads = config.batch_size or (4 if on_cpu else 256), torch.get_num_threads()
    passes = config.n * (top.passes + bottom.passes)
    bar = tqdm(total=passes, desc="sampling", unit=" passes", disable=None)

    def sample_batch(first: int) -> Samples:
        batch = slice(first, first + size)

        def progress() -> None:
            bar.update(len(seeds[batch]))
            if stopped:
                raise KeyboardInterrupt

        given, own = torch.from_numpy(layouts[batch]), (positions[batch], seeds[batch])
        codes = prior.sample(*own, top, bottom, progress=progress, layouts=given)
        images, masks = decode(model, *codes, given if prior.config.labels else None)
        return Samples(images, *(level.cpu().numpy() for level in codes), masks)

    firsts, parts = range(0, config.n, size), []
    # In each thread PyTorch uses no other, so that results do not depend on their number.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with runtime.stop_signals() as stopped, bar, pool:
        # On a CPU two batches, each on its own thread, take less time than one after the other on
        # two threads. A GPU takes one at a time.
        batches = pool.map(sample_batch, firsts) if on_cpu else map(sample_batch, firsts)
        try:
            for first, samples in zip(firsts, batches, strict=True):
                keep(first, samples)
                parts.append(samples)
        finally:
            pool.shutdown(cancel_futures=True)  # or a failure would wait for all that is left
    columns = zip(*parts, strict=True)
    return Samples(*(None if each[0] is None else np.concatenate(each) for each in columns))


def clear(out: Path, nnunet: str, layout: str) -> None:
    """Delete an earlier run's files, so that none of them passes for one of this run.

    Data sets for nnU-Net of other names stay. UserError, and nothing is deleted, if the files may
    be somebody else's (no manifest of ours lies beside them, or the folder for nnU-Net holds
    another data set), or if the masks of --layout are among them.
    """
    data_set = (f"{nnunet}/dataset.json", f"{nnunet}/*Tr/synthetic_*.nii.gz") if nnunet else ()
    earlier = [path for pattern in (*OURS, *data_set) for path in out.glob(pattern)]
    about = [*out.glob("manifest.json"), *(out.glob(f"{nnunet}/dataset.json") if nnunet else ())]
    theirs = [path for path in about if DESCRIPTION not in path.read_text(errors="replace")]
    if wrong := theirs if about else earlier:
        raise UserError(f"{wrong[0]}: not written by generate.py. Fix: another --out.")
    asked = Path(layout).resolve()
    if layout and any(old.resolve().is_relative_to(asked) for old in earlier):
        raise UserError(f"{layout}: new slices would replace these masks. Fix: another --out.")
    for old in earlier:
        old.unlink()


class Album:
    """What a run leaves in its folder: every finished slice, and the manifest."""

    def __init__(
        self,
        config: GenerateConfig,
        splits: dict[str, SliceDataset],
        positions: np.ndarray,
        labels: tuple[int, ...],
        trained: Trained,
    ):
        self.out, self.positions = Path(config.out), positions
        self.seed, self.nnunet = config.seed, config.nnunet
        train, test = splits["train"], splits["test"]
        shown = test.images(np.linspace(0, len(test) - 1, min(64, len(test))).astype(int)).numpy()
        # What is black in the pictures, and white.
        self.span = tuple(np.median(end((1, 2, 3))) for end in (shown.min, shown.max))
        synthetic = train.synthetic or trained.study.synthetic
        self.note = "priors trained on a synthetic phantom, not MRI" if synthetic else ""
        self.mean, self.std = float(np.median(train.mean)), float(np.median(train.std))
        # They lie as most slices do that the model learnt from. A slice that lies so and was not
        # resized gives its affine; where there is none, only the voxel sizes are known.
        whole = (train.shapes == train.pixels.shape[1:]).all(1)
        alike = np.array(train.letters(range(len(train)))) == trained.study.directions
        like = int((2 * alike + whole).argmax())
        self.affine = train.placement(like).affine(train.affines[like])
        self.oriented = bool(train.oriented[like] and alike[like])
        # The edges of pictures have names where all slices lie alike.
        letters = {trained.study.directions, *test.letters(range(len(test)))}
        self.look = {"span": self.span, "note": self.note, "label_values": labels}
        self.look["letters"] = letters.pop() if len(letters) == 1 else ""
        self.labels = np.array(labels, np.min_scalar_type(max(labels, default=0)))
        self.manifest = {
            "note": f"{DESCRIPTION}. Not for diagnosis.",
            "asked": config.n,
            "done": 0,
            "seed": config.seed,
            "settings": plain(dataclasses.asdict(config)),
            "positions": [None if math.isnan(p) else round(float(p), 4) for p in positions],
            "nifti": f"z-scores rescaled by the median mean {self.mean:.6g} and standard deviation "
            f"{self.std:.6g} of the training slices; each slice is its own case, its slice number "
            "the position on a scale of 0 to 59",
            "autoencoder": {"file": Path(config.checkpoint).name, "sha256": trained.sha256},
            "prior": {"file": Path(config.prior).name, "sha256": runtime.sha256(config.prior)},
            "data": {"study": train.study.resolve().name, "synthetic": synthetic},
            "provenance": runtime.provenance(),
        }
        self.write_manifest()

    def write_manifest(self) -> None:
        runtime.write_json(self.out / "manifest.json", self.manifest)

    def keep(self, first: int, samples: Samples) -> None:
        for i, image in enumerate(samples.images, first):
            figures.save_slice(self.out / f"{i:04d}.png", image, *self.span)
            pixels = (image.astype(np.float64) * self.std + self.mean).astype(np.float32)
            self.write(f"{NIFTI}/case", i, pixels)
        self.keep_masks(first, () if samples.masks is None else samples.masks)
        self.manifest["done"] = first + len(samples.images)
        self.write_manifest()
        if self.nnunet:
            self.keep_for_nnunet(first, samples)

    def keep_masks(self, first: int, masks: Sequence[np.ndarray]) -> None:
        for i, mask in enumerate(masks, first):
            self.write(f"{MASK_FOLDER}/seg", i, self.labels[mask])

    def keep_for_nnunet(self, first: int, samples: Samples) -> None:
        """Images, masks and dataset.json as nnU-Net v2 wants them in its folder nnUNet_raw.

        A slice is a volume of one plane: SimpleITK, its reader, refuses coronal 2-D files. nnU-Net
        cuts planes across the axis of the largest voxels, so the plane is as thick as its reader
        takes that of 2-D files to be.
        """
        across = np.cross(*self.affine[:3, :2].T)
        affine = self.affine.copy()
        size = np.linalg.norm(self.affine[:3, :2], axis=0).max()
        affine[:3, 2] = 999 * size * across / np.linalg.norm(across)
        for i, (image, mask) in enumerate(zip(samples.images, samples.masks, strict=True), first):
            name = f"synthetic_{self.seed * SEED_STEP + i:06d}"
            pixels = (image * self.std + self.mean).astype(np.float32)
            for file, plane in ((f"imagesTr/{name}_0000", pixels), (f"labelsTr/{name}", mask)):
                path = self.out / self.nnunet / f"{file}.nii.gz"
                nifti.write(path, plane[..., None], affine, DESCRIPTION, oriented=self.oriented)
        labels = {f"label_{label}": k for k, label in enumerate(self.labels.tolist()) if k}
        about = {"channel_names": {"0": "MR"}, "labels": {"background": 0} | labels}
        about |= {"numTraining": self.manifest["done"], "file_ending": ".nii.gz"}
        about["description"] = DESCRIPTION
        runtime.write_json(self.out / self.nnunet / "dataset.json", about)

    def write(self, kind: str, i: int, pixels: np.ndarray) -> None:
        """Write slice i, or its mask, as NIfTI."""
        number = round(59 * np.nan_to_num(self.positions[i]))
        # The patient counts on from the seed: slices of two runs may lie in one folder.
        name = f"{kind}_{900 + self.seed * SEED_STEP + i:03d}_week_0_slice_{number}.nii.gz"
        nifti.write(self.out / name, pixels, self.affine, DESCRIPTION, oriented=self.oriented)


# ---- pictures, and the run as a whole ----


def label(split: SliceDataset, index: int) -> str:
    """What a slice of the study is called under its picture."""
    patient, week, number = split.names[index]
    return f"{patient:03d} w{week} s{number}"


def with_masks(labels: list[str], images: np.ndarray, masks: np.ndarray | None) -> list[tuple]:
    """What `figures.slice_grid` draws: of each label a slice, and its mask if there are any."""
    return list(zip(labels, images, repeat(None) if masks is None else masks, strict=False))


def real_slices(split: SliceDataset, indices: np.ndarray, labels: list[str]) -> list[tuple]:
    masks = split.masks(indices).numpy() if split.labels else None
    return with_masks(labels, split.images(indices)[:, 0].numpy(), masks)


def write_grid(album: Album, test: SliceDataset, samples: Samples, twins: np.ndarray) -> None:
    """The first samples, all of them, beside held-out slices at the same positions."""
    shown = range(min(SHOWN, len(twins)))
    at = ["" if math.isnan(album.positions[i]) else f"at {album.positions[i]:.2f}" for i in shown]
    names = [label(test, twins[i]) for i in shown]
    groups = {
        "held-out slices": real_slices(test, twins[: len(shown)], names),
        "generated, random and unselected": with_masks(at, samples.images, samples.masks),
    }
    figures.slice_grid(album.out / "grid.png", groups, min(8, len(shown)), **album.look)


def masks_of(shapes: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Signed distances (labels, h, w) of background and organs, of n slices -> masks (n, *size)."""
    how = {"size": size, "mode": "bilinear", "align_corners": False}
    parts = (torch.from_numpy(np.stack(shapes[i : i + 16])) for i in range(0, len(shapes), 16))
    return np.concatenate([likeliest(F.interpolate(part, **how)).numpy() for part in parts])


def write_layouts(album: Album, layouts: np.ndarray, masks: np.ndarray, labels: int) -> None:
    """Draw the first layouts (n, h, w), with masks (n, H, W): air black, organs grey, tissue by its
    class.
    """
    layouts, masks = layouts[:SHOWN], masks[:SHOWN]
    organ = (layouts > 0) & (layouts < labels)
    tissue = np.where(organ, REGIONS / 2, np.maximum(layouts - max(labels, 1) + 1, 0))
    pixels = np.ones(np.floor_divide(masks.shape[1:], layouts.shape[1:]))
    shown = [("", np.kron(each, pixels), mask) for each, mask in zip(tissue, masks, strict=True)]
    look = album.look | {"span": (0, REGIONS)}
    figures.slice_grid(album.out / "layouts.png", {"new layouts": shown}, 8, **look)


def write_pictures(album: Album, inputs: Inputs, report: dict, drawn: dict) -> None:
    train, test, samples = inputs.splits["train"], inputs.splits["test"], inputs.samples
    honest, shown = drawn["honest"], inputs.twins[: min(4, len(inputs.twins))]
    n, blank = len(shown), [""] * len(shown)
    groups = {
        "held-out": real_slices(test, shown, blank),
        "reconstruction": with_masks(blank, *inputs.decode(*inputs.codes_of("test", shown))),
        "generated": with_masks(blank, samples.images, samples.masks),
    }
    figures.slice_grid(album.out / "overview.png", groups, n, **album.look, panel=2.5)

    def pairs(which: str, images: Callable, names: Callable) -> list[tuple]:
        best, shown = drawn["nearest"]["picture"][which], []
        for i in np.argsort(-best.similarity)[:PAIRS]:
            index, variant = torch.tensor([best.index[i]]), int(best.variant[i])
            nearest = inputs.variants.images(train.images(index), variant, index)[0, 0].numpy()
            altered = ("", " mirrored")[variant] if variant < 2 else " altered"
            title = f"{best.similarity[i]:.3f}{altered}"
            shown += [(names(i), images(i), None), (title, nearest, None)]
        return shown

    def held_out(i: int) -> np.ndarray:
        return test.images([honest[i]])[0, 0].numpy()

    new = pairs("samples", lambda i: samples.images[i], lambda i: f"{i:04d}")
    old = pairs("honest", held_out, lambda i: label(test, honest[i]))
    groups = {
        f"generated | nearest training slice (n = {report['n']})": new,
        f"held-out | nearest training slice (n = {len(honest)})": old,
    }
    figures.slice_grid(album.out / "nearest.png", groups, 8, **album.look)


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


def plan(
    config: GenerateConfig, composer: Composer, own: np.ndarray | None, test: SliceDataset
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[np.ndarray]]:
    """The test slice beside each sample, its position, its layout (n, h, w) and the signed
    distances of its organs.

    A mask of the user's `own` (n, H, W) gets the position of the training slice whose organs are
    most like its own, unless a position is asked for.
    """
    (twins, positions), drawn = choose_twins(config, test), None
    if own is not None:
        drawn = middles(torch.from_numpy(own), composer.organs.shape[1:]).numpy().astype(int)
        if math.isnan(config.position):
            masks = tqdm(drawn, desc="masks", disable=None)
            positions = composer.positions[[composer.most_alike(each)[0] for each in masks]]
            rng = np.random.default_rng(config.seed)
            twins = np.array([rng.choice(near(test, each)) for each in positions])
    return twins, positions, *composer.draw(positions, seeds_of(config), drawn)


def generate(config: GenerateConfig, data: DataConfig = DataConfig()) -> dict:
    """Sample, write everything to the out folder, and return what report.json holds.

    `data` names the study and the cache; without a name it is the study of the priors. Raises as
    `load_models` and `check_study` do; KeyboardInterrupt after Ctrl-C or SIGTERM: what is finished
    stays, and the manifest says how many.
    """
    study, codes, trained, prior = load_models(config)
    if math.isnan(config.guidance):
        guidance = REBUILT_GUIDANCE if codes["rebuilt"] else TOP_SAMPLING.guidance
        config = dataclasses.replace(config, guidance=guidance)
    model = trained.model
    splits = dataset.open_trained_study(study, data, config.prior)
    dataset.check_labels(splits["train"], trained.study, config.checkpoint)
    labels = labels_on_layouts(model, splits["train"])
    check_study(config, labels, prior, splits)
    out, train, test = runtime.writable_folder(config.out), splits["train"], splits["test"]
    cells = prior.bottom.shape
    own = read_masks(config.layout, study, cells, config.n) if config.layout else None
    clear(out, config.nnunet, config.layout)
    # The slices that were there are gone from the page, even if this run is stopped.
    results_page.write(out)
    # The code maps that the priors were trained on, where they are at hand.
    files = (folder / "codes.npz" for folder in (Path(config.prior).parent, out))
    maps = extract_codes(model, splits, codes["copies"], trained.sha256, *files)
    composer = composer_of(train, maps, labels)
    twins, positions, layouts, shapes = plan(config, composer, own, test)
    shown = trained.study.labels or train.labels
    album = Album(config, splits, positions, shown, trained)
    masks = masks_of(shapes[: None if config.layouts_only else SHOWN], train.pixels.shape[1:])
    write_layouts(album, layouts, masks, labels)
    if config.layouts_only:
        album.keep_masks(0, masks)
        album.manifest["done"] = config.n
        album.write_manifest()
        print(f"wrote {out}/: {config.n} masks in {MASK_FOLDER}/, layouts.png and manifest.json")
        return {}
    try:
        samples = sample(config, model, prior, positions, layouts, album.keep)
    except KeyboardInterrupt:
        done = album.manifest["done"]
        print(f"stopped: {done} of {config.n} slices are in {out}/, without grid and report")
        raise
    write_grid(album, test, samples, twins)
    segmenter = None
    if train.has_mask.any():
        folders, device = (Path(config.checkpoint).parent, out), runtime.pick_device(config.device)
        segmenter = segmenter_of(train, *folders, device=device)
    asked = {"position": config.position, "seed": config.seed, "layouts": layouts}
    compared = {"positions": positions, "twins": twins, "segmenter": segmenter, **asked}
    report = account(album, Inputs(model, prior, splits, maps, samples, **compared))
    masks = f", masks in {MASK_FOLDER}/" if samples.masks is not None else ""
    print(f"wrote {out}/: {config.n} slices as NNNN.png and in {NIFTI}/{masks}, grid.png,")
    print("  overview.png, layouts.png, nearest.png, manifest.json and report.json;")
    print(f"  all of it is in {results_page.write(out)}")
    return report


def main() -> None:
    configs = GenerateConfig, DataConfig
    given = vars(runtime.parser(__doc__, *configs, without=dataset.SIZE).parse_args())
    generate(*(runtime.fill(config, given) for config in configs))


if __name__ == "__main__":
    runtime.run_cli(main)
