"""A trained model on any files: slices, volumes and folders of them. It needs no study.

    python reconstruct.py SCAN.nii.gz --out reconstructed              # a volume, plane by plane
    python reconstruct.py FOLDER SLICE.png --out reconstructed         # all in a folder; a picture
    python reconstruct.py SCAN.nii.gz --save SCAN.vq2   # also a file of its codes, under the priors
    python reconstruct.py SCAN.vq2 --out reconstructed  # the same reconstruction, from that file

A reconstruction has its file's name, shape, affines and units; integers without a scale stay
integers, all others become float32. If the model has learnt masks, the mask decoded from the codes
lies beside it, seg_NAME.nii.gz. scans.json has the scores of metrics.py and the bits of every file.
With --save some codes are others, which cost fewer bits, and the reconstruction is of these.
"""

import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nibabel import Nifti1Header
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.io import imread
from torch import Tensor
from tqdm import tqdm

from dataset import (
    RECONSTRUCTION,
    Placement,
    StudyInfo,
    find_nifti,
    is_reconstruction,
    raise_bad,
    say_passed_over,
    way_in,
    z_score,
)
from modules import Trained, load_model
from new_slices.code_files import SUFFIX, Coded, Coder, name_of
from new_slices.organs import likeliest
from slice_volumes import is_mask
from support import metrics, nifti, runtime
from support.runtime import UserError, check_number, option

SCORES = {"ssim_report": "SSIM report", "ssim_standard": "SSIM standard", "psnr": "PSNR dB"}


@dataclass(frozen=True)
class ReconstructConfig:
    """Which model, and what it does with files of your own."""

    checkpoint: str = option("Results/vqvae2_best.pth", "the model, as train.py wrote it")
    out: str = option("", "folder to write to; empty is reconstructed/ beside the checkpoint")
    plane: str = option(
        "",
        "plane to cut volumes along, by their affine; empty: that of the training slices",
        choices=tuple(nifti.PLANES),
    )
    save: str = option("", "write a scan's codes to this .vq2 file, or those of all to this folder")
    prior: str = option("", "priors, for .vq2 files; empty: prior_best.pth beside the checkpoint")
    batch_size: int = option(32, "planes at a time")
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_number("batch_size", self.batch_size, least=1)

    def save_as(self, name: str) -> Path:
        """Where the codes of the file `name` are saved."""
        one_file = self.save.lower().endswith(SUFFIX)
        return Path(self.save if one_file else f"{self.save}/{name}{SUFFIX}")


# ---- files as stacks of planes ----


def ends_of(study: StudyInfo, plane: str) -> str:
    """Where rows, columns and planes of a scan have to run, as "RSA": as in the training slices.

    A model that learnt axial slices then gets axial planes, the right way up. `plane` names another
    plane than theirs; where nothing tells one, it is HipMRI's coronal one.
    """
    if not study.plane or plane not in ("", study.plane):
        return nifti.PLANES[plane or "coronal"]
    return study.directions + nifti.PLANES[study.plane][2]


class Scan:
    """One image as a stack of planes for the model of a study, and the way back."""

    def __init__(self, image: nifti.Image, study: StudyInfo, plane: str = "") -> None:
        """UserError for an image that cannot be used."""
        self.notes: list[str] = []  # what to say of how the file was read and written
        self.image = image
        if self.image.disputed:
            self.notes.append(f"have {nifti.DISPUTED} (the sform was taken: look at the sides)")
        values = nifti.finite(self.image.values())
        # A slice is a volume of one plane, and what has more axes than three is several volumes.
        volumes = values.reshape(*(*values.shape, 1, 1)[:3], -1)
        self.turning = self._turning(volumes, study, plane)
        turned = apply_orientation(volumes, self.turning)  # (rows, columns, planes, volumes)
        self.turned = turned.shape
        # (N, rows, columns) float32, in the file's units.
        self.planes = turned.transpose(3, 2, 0, 1).reshape(-1, *turned.shape[:2])
        affine = nifti.turn_affine(self.image.affine, volumes.shape, self.turning)
        told = nifti.plane_of(nifti.directions(affine[None])[0])
        self.plane = told if self.image.oriented else ""  # by the file's affine

    def _turning(self, volumes: np.ndarray, study: StudyInfo, plane: str) -> np.ndarray:
        """How volumes (X, Y, Z, T) are turned so that their planes lie in the first two axes."""
        ends, affine, depth = ends_of(study, plane), self.image.affine, volumes.shape[2]
        known = study.plane or plane
        if not self.image.oriented or (depth == 1 and not known):  # it is taken as it is stored
            ends, affine = "RAS", np.eye(4)
        if not self.image.oriented:
            how = "cut along their last axis" if depth > 1 else "taken as they are stored"
            if depth == 1 and study.directions:
                ways = " and ".join(study.directions)
                how += f", as if rows and columns ran towards {ways}, as in training slices"
            self.notes.append(f"have no orientation: {how}")
        # A slice, a film of one slice or a volume of a few thick ones has few pixels along one
        # axis. Where the planes that are wanted contain that axis, it is cut across it instead.
        turnings = [nifti.turning(affine, each) for each in (ends, *nifti.PLANES.values())]
        least = metrics.SMALLEST
        fits = [t for t in turnings if min(apply_orientation(volumes, t).shape[:2]) >= least]
        if not fits:
            found = f"an array of shape {self.image.shape}"
            raise UserError(f"{found}; expected at least {least} pixels a side")
        return fits[0]

    def write(self, path: Path, planes: np.ndarray) -> None:
        """Write what became of the planes (N, rows, columns): the file's shape, type and header."""
        pixels = self.back(planes)
        if self.image.raw.dtype.kind in "iu" and not self.image.scaled:
            limits = np.iinfo(self.image.raw.dtype)
            most = np.nextafter(float(limits.max) + 1, 0)  # float64 rounds that of int64 up
            pixels = np.clip(np.round(pixels.astype(np.float64)), limits.min, most)
            pixels = pixels.astype(self.image.raw.dtype.newbyteorder("="))
        if path.suffix.lower() == ".png":
            about = PngInfo()
            about.add_text("Description", RECONSTRUCTION)
            with runtime.atomic_path(path) as part:
                Image.fromarray(pixels).save(part, "PNG", pnginfo=about)
            return
        nifti.write(path, pixels, None, RECONSTRUCTION, like=self.image.header)

    def back(self, planes: np.ndarray) -> np.ndarray:
        """What `__init__` did to the file's array, undone."""
        rows, columns, count, volumes = self.turned
        turned = planes.reshape(volumes, count, rows, columns).transpose(2, 3, 1, 0)
        back = ornt_transform(axcodes2ornt("RAS"), self.turning)
        return apply_orientation(turned, back).reshape(self.image.shape)


def read_png(path: str) -> nifti.Image:
    """A grey picture of 8 or 16 bits as if it were a NIfTI file; UserError for any other."""
    try:
        pixels = imread(path)
    except Exception as error:  # the readers behind skimage.io have a dozen for a damaged file
        raise UserError(f"not a whole PNG ({error})") from error
    if pixels.ndim != 2 or pixels.dtype.kind != "u":
        found = f"{pixels.dtype} of shape {pixels.shape}"
        raise UserError(f"a picture of {found}; expected a grey one. Fix: save it as a grey PNG")
    header = Nifti1Header()
    header.set_data_dtype(pixels.dtype)
    header.set_data_shape(pixels.shape)
    return nifti.Image(pixels, header, (1, 0), np.eye(4), oriented=False, broken=False)


def mask_name(name: str) -> str:
    """What the decoded mask of a reconstruction called `name` is called."""
    file = os.path.basename(name).removeprefix("case_")
    file += "" if nifti.is_nifti(file) else ".nii.gz"  # seg_p.png.nii.gz is a picture's
    return str(Path(name).with_name(f"seg_{file}"))


def find_files(inputs: list[str], out: Path, masks: bool = False) -> dict[str, str]:
    """The path of every file to reconstruct, by its name in the folder `out`.

    FileNotFoundError for an input that is not there, or a folder without any. UserError where two
    files, or with `masks` their decoded masks, would have one name; and where a reconstruction or a
    decoded mask would replace its own file, or one that is none of ours.
    """
    found = defaultdict(list)
    passed = {"masks": [], "earlier reconstructions": [], "other files": []}
    for source in inputs:
        if not os.path.exists(source):
            raise FileNotFoundError(f"{source}: no such file or folder. Fix: check its path.")
        if os.path.isfile(source):  # named by the user, so taken whatever it is called
            found[name_of(source, os.path.basename(source))].append(source)
            continue
        others = []
        paths = [entry.path for entry in find_nifti(source, others)] + others
        for path in sorted(paths):
            name = os.path.relpath(path, source)
            if not name.lower().endswith((*nifti.SUFFIXES, ".png", SUFFIX)):
                passed["other files"].append(path)
            elif is_mask(name):
                passed["masks"].append(path)
            elif is_reconstruction(Path(path)):
                passed["earlier reconstructions"].append(path)
            else:
                found[name_of(path, name)].append(path)
    if not found:
        hint = way_in(passed["other files"])
        raise FileNotFoundError(f"{', '.join(inputs)}: no NIfTI files or PNG pictures.{hint}")
    for kind, paths in passed.items():
        say_passed_over(paths, kind)
    written = {name: list(paths) for name, paths in found.items()}
    for name, paths in found.items() if masks else ():
        written.setdefault(mask_name(name), []).extend(paths)
    for name, (path, *more) in written.items():
        if more:
            both = f"{path} and {more[0]} would both be written as {name}"
            raise UserError(f"{both}. Fix: run them one at a time, each with its own --out.")
        target = out / name
        own = target.exists() and os.path.samefile(target, path)
        if own or (target.exists() and not is_reconstruction(target)):
            whose = "the file itself" if own else "which this program did not write"
            fault = f"{path}: its result would replace {target}, {whose}"
            raise UserError(f"{fault}. Fix: another --out.")
    return {name: paths[0] for name, paths in found.items()}


# ---- the model's part ----


class Made(NamedTuple):
    """What a model makes of N planes."""

    planes: np.ndarray  # (N, rows, columns) float32, in the units of the planes
    labels: np.ndarray | None  # (N, rows, columns), as the codes tell them, if the model has masks
    top: np.ndarray  # (N, h, w) uint16
    bottom: np.ndarray  # (N, 2h, 2w) uint16


def reconstruct_planes(trained: Trained, planes: np.ndarray, batch_size: int) -> Made:
    """Planes (N, rows, columns), in any units, as the model gives them back."""
    coded = encode_planes(trained, nifti.finite(planes), batch_size)
    return decode_planes(trained, coded, planes.shape[1:], batch_size)


def as_slices(planes: np.ndarray, study: StudyInfo) -> tuple[Tensor, np.ndarray]:
    """Planes (N, rows, columns) -> z-scored slices (N, 1, H, W); means and deviations (N, 2)."""
    placement = Placement.make(planes.shape[1:], (study.height, study.width), study.fit)
    grids = [placement.place(plane, fill=plane.min()) for plane in planes]
    scale = np.array([z_score(grid)[:2] for grid in grids])
    means, stds = scale.T[:, :, None, None]
    return torch.from_numpy((np.stack(grids) - means) / stds).float().unsqueeze(1), scale


@torch.inference_mode()
def encode_planes(trained: Trained, planes: np.ndarray, batch_size: int) -> Coded:
    """The codes of planes (N, rows, columns), which are placed as training slices; their scales."""
    model = trained.model
    device = next(model.parameters()).device
    scales, top, bottom = [], [], []
    for first in range(0, len(planes), batch_size):
        x, scale = as_slices(planes[first : first + batch_size], trained.study)
        for maps, codes in zip((top, bottom), model.encode(x.to(device)), strict=True):
            maps += list(codes.cpu().numpy().astype(np.uint16))
        scales.append(scale)
    return Coded(np.stack(top), np.stack(bottom), np.concatenate(scales))


@torch.inference_mode()
def decode_planes(trained: Trained, coded: Coded, shape: tuple[int, int], batch_size: int) -> Made:
    """The planes of these codes, each of `shape`.

    The same codes give the same pixels on one machine, if the batches have one size.
    """
    model, study = trained.model, trained.study
    device = next(model.parameters()).device
    placement = Placement.make(shape, (study.height, study.width), study.fit)
    values = np.array(study.labels, np.min_scalar_type(max(study.labels, default=0)))
    restored, labels = [], []
    for first in range(0, len(coded.top), batch_size):
        batch = [part[first : first + batch_size] for part in coded]
        codes = [torch.from_numpy(maps.astype(np.int64)).to(device) for maps in batch[:2]]
        means, stds = batch[2].T[:, :, None, None]
        images, mask_logits = model.decode_with_masks(*codes)
        images = images[:, 0].cpu().numpy() * stds + means
        restored += [placement.restore(image.astype(np.float32)) for image in images]
        if mask_logits is not None:
            masks = values[likeliest(mask_logits).cpu().numpy()]
            labels += [placement.restore(mask, nearest=True) for mask in masks]
    found = np.stack(labels) if labels else None
    return Made(np.stack(restored), found, coded.top, coded.bottom)


def reconstruct_file(
    trained: Trained, path: str, name: str, config: ReconstructConfig, coder: Coder | None
) -> dict:
    """Write what becomes of a file as `name` to config.out, and its mask; its row of the table.

    Scores are means over the file's planes; a file of codes has none. UserError for a file that
    cannot be used.
    """
    study, data, originals = trained.study, b"", []
    if path.lower().endswith(SUFFIX):
        data = Path(path).read_bytes()
        image, plane, coded = coder.unpack(data)
        scan = Scan(image, study, plane)
    else:
        read = read_png if path.lower().endswith(".png") else nifti.read
        scan = Scan(read(path), study, config.plane)
        originals = scan.planes
        coded = encode_planes(trained, originals, config.batch_size)
        if config.save:
            about = scan.image.header, config.plane, coded, path.lower().endswith(".png")
            data, coded = coder.pack(*about, lambda n: as_slices(originals[n : n + 1], study)[0])
            with runtime.atomic_path(config.save_as(name)) as part:
                part.write_bytes(data)
    if scan.plane and study.plane and scan.plane != study.plane:
        scan.notes.append(f"are {scan.plane}, and the model has learnt {study.plane} slices")
    made = decode_planes(trained, coded, scan.planes.shape[1:], config.batch_size)
    with runtime.thread_pool() as pool:
        scores = list(pool.map(metrics.score_slice, originals, made.planes))
    target = Path(config.out, name)
    scan.write(target, made.planes)
    mask = Path(config.out, mask_name(name))
    if made.labels is None:
        if is_reconstruction(mask):  # by another model
            mask.unlink()
    else:
        labels = scan.back(made.labels)
        header = scan.image.header.copy()
        header["cal_min"] = header["cal_max"] = 0  # the window of the scan would show masks black
        nifti.write(mask, labels, None, RECONSTRUCTION, like=header)
    row = {"shape": list(scan.image.shape), "plane": scan.plane, "planes": len(scan.planes)}
    for key in (scores or [{}])[0]:
        row[key] = round(np.mean([score[key] for score in scores]), 6)
    pixels = study.height * study.width * len(scan.planes)
    nominal = trained.model.config.bits_per_pixel(study.height, study.width) * pixels
    bits = 8 * len(data) or nominal  # on disk, where there is a file of codes
    row |= {"bits": round(bits), "bits_per_pixel": round(bits / scan.planes.size, 6)}
    return row | {"notes": scan.notes}


# ---- the run as a whole ----


def reconstruct(inputs: list[str], config: ReconstructConfig = ReconstructConfig()) -> dict:
    """Reconstruct every file, print a table and return what scans.json holds.

    FileNotFoundError for no checkpoint or no files; UserError for a checkpoint that cannot be used
    and, at the end, for such files.
    """
    trained = load_model(config.checkpoint)
    trained.model.to(runtime.pick_device(config.device))
    out = Path(config.out or Path(config.checkpoint).parent / "reconstructed")
    files = find_files(inputs, out, masks=bool(trained.model.config.labels))
    config = replace(config, out=str(out))
    if len(files) > 1 and config.save_as("a") == config.save_as("b"):
        raise UserError(f"--save {config.save}: one file for {len(files)}. Fix: name a folder.")
    coder = None
    codes = [path for path in files.values() if path.lower().endswith(SUFFIX)]
    if config.save and codes:
        fault = f"{codes[0]}: a file of codes, and --save is for scans"
        raise UserError(f"{fault}. Fix: leave out --save, or the files of codes.")
    if config.save or codes:
        prior = config.prior or Path(config.checkpoint).parent / "prior_best.pth"
        coder = Coder(trained, prior, config.device)
    runtime.writable_folder(out)
    if config.save:
        runtime.writable_folder(config.save_as("any").parent, "--save")
    (out / "scans.json").unlink(missing_ok=True)  # that of an earlier run tells nothing of this one
    rows, bad = {}, {}
    for name, path in tqdm(files.items(), desc="reconstructing", unit="file", disable=None):
        try:
            rows[name] = reconstruct_file(trained, path, name, config, coder)
        except (UserError, OSError) as error:
            bad[path] = str(error)
    result = {
        "files": rows,
        "plane": config.plane or trained.study.plane or "coronal",
        "checkpoint": {"file": Path(config.checkpoint).name, "sha256": trained.sha256},
        "provenance": runtime.provenance(),
    }
    if rows:
        runtime.write_json(out / "scans.json", result)
        print_table(rows)
        volumes = Counter(row["plane"] for row in rows.values() if row["planes"] > 1)
        for plane, count in volumes.items():
            print(f"{count} volumes were cut in {plane or 'stored'} planes and put together again")
        for note, count in Counter(note for row in rows.values() for note in row["notes"]).items():
            print(f"{count} files {note}")
        print(f"wrote {out}/: {len(rows)} files, scans.json")
    if bad:
        raise_bad(" ".join(inputs), bad, len(files))
    return result


def print_table(rows: dict[str, dict]) -> None:
    """A line for each file, and their mean."""

    def cell(value: float) -> str:  # a file of codes has no scores
        return f"{'–':>15}" if math.isnan(value) else f"{value:>#15.4g}"

    columns = {**SCORES, "bits_per_pixel": "bits/pixel"}
    print(f"{'file':<40}{'planes':>7}" + "".join(f"{title:>15}" for title in columns.values()))
    planes = [row["planes"] for row in rows.values()]
    cells = [[row.get(key, math.nan) for key in columns] for row in rows.values()]
    lines = [*zip(rows, planes, cells, strict=True)]
    if len(rows) > 1:
        lines.append(("mean of the files", sum(planes), np.mean(cells, axis=0)))
    for name, count, values in lines:
        print(f"{name[-39:]:<40}{count:>7}" + "".join(map(cell, values)))


def main() -> None:
    flags = runtime.parser(__doc__, ReconstructConfig)
    flags.usage = "%(prog)s FILE_OR_FOLDER ... [flags]"
    flags.add_argument(
        "inputs", nargs="+", help="slices, volumes, PNG pictures, .vq2 files or folders of them"
    )
    args = flags.parse_args()
    reconstruct(args.inputs, runtime.fill(ReconstructConfig, vars(args)))


if __name__ == "__main__":
    runtime.run_cli(main)
