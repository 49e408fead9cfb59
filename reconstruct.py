"""A trained model on any files: slices, volumes, pictures and folders of them. It needs no study.

    python predict.py SCAN.nii.gz --out reconstructed          # a volume, plane by plane
    python predict.py FOLDER --out reconstructed --codes       # all files in it and below, with their codes
    python predict.py SLICE.png --out reconstructed

A reconstruction has its file's name, shape, affines and units; integer types stay, all others
become float32. A picture becomes a grey PNG of 8 or 16 bits. Also written: scans.json with SSIM,
PSNR and bits of every file, and with
--codes the file codes.npz: "top" (N, h, w) and "bottom" (N, 2h, 2w), uint16, of the plane "plane"
(N,) of the file "name" (N,).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dataset import RECONSTRUCTION, Placement, StudyInfo, find_nifti, raise_bad, way_in, z_score
from modules import VQVAE2, load_model
from slice_volumes import is_mask
from support import metrics, nifti, runtime
from support.runtime import UserError, option

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
SCORES = {"ssim_report": "SSIM report", "ssim_standard": "SSIM standard", "psnr": "PSNR dB"}


@dataclass(frozen=True)
class ScanConfig:
    """What a model does with files of your own."""

    plane: str = option(
        "coronal", "plane to cut volumes along, by their affine", choices=tuple(nifti.PLANES)
    )
    codes: bool = option(False, "write the code maps of all planes to codes.npz")


class Scan:
    """One file as a stack of planes, and the way back: `planes` (N, rows, columns) float32."""

    def __init__(self, path: str, plane: str) -> None:
        """Read a file; UserError for one that cannot be used."""
        self.path, self.note = path, ""
        if path.lower().endswith(PICTURES):
            self._read_picture()
        else:
            self._read_nifti(plane)
        if min(self.planes.shape[1:]) < 2:
            raise UserError(
                f"planes of shape {self.planes.shape[1:]}; expected at least 2 pixels a side"
            )

    def _read_picture(self) -> None:
        try:
            with Image.open(self.path) as picture:
                pages, grey = getattr(picture, "n_frames", 1), picture.mode == "L"
                deep = picture.mode in ("I", "F") or picture.mode.startswith("I;16")
                self.raw = np.asarray(picture if deep else picture.convert("L"))
        except (
            OSError,
            SyntaxError,
            ValueError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
        ) as error:
            raise UserError(f"not a whole picture ({error})") from error
        if pages > 1:
            raise UserError(f"{pages} pages; expected one. Fix: a file for each, or a NIfTI volume")
        if deep:
            with np.errstate(invalid="ignore"):
                shallow = self.raw.astype(np.uint16)
            if not np.array_equal(self.raw, shallow):
                raise UserError("pixels that 16 bits do not hold. Fix: a 16-bit PNG, or NIfTI")
            self.raw = shallow
        elif not grey:
            self.note = "pictures were turned grey"
        self.planes = self.raw[None].astype(np.float32)
        self.suffix = ".png"

    def _read_nifti(self, plane: str) -> None:
        self.image = nifti.read(self.path)
        self.raw, self.suffix = self.image.raw, ""
        values, self.turning = nifti.finite(self.image.values()), None
        if values.ndim < 2:
            raise UserError(f"an array of shape {values.shape}; expected a slice or a volume")
        if values.ndim == 2 or max(values.shape[2:]) == 1:
            self.planes = values.reshape(1, *values.shape[:2])
            return
        if self.image.oriented:
            self.turning = nifti.turning(self.image.affine, nifti.PLANES[plane])
        else:
            self.turning = nifti.UNTURNED
            self.note = "volumes have no orientation in their header: cut along their last axis"
        frames = values.reshape(*values.shape[:3], -1)  # more axes are more volumes
        turned = [nifti.turn(frames[..., t], self.turning) for t in range(frames.shape[3])]
        self.planes = np.concatenate([np.moveaxis(volume, 2, 0) for volume in turned])

    def write(self, path: str, planes: np.ndarray) -> bool:
        """Write what became of the planes, as the file was; returns whether its type had to become
        float32.
        """
        if self.suffix:
            pixels = _to_integers(planes[0], self.raw.dtype)
            with runtime.atomic_path(path) as part:
                Image.fromarray(pixels).save(part, format="png")
            return False
        shape = self.raw.shape
        if self.turning is not None:
            depth = nifti.turn(self.raw, self.turning).shape[2]
            frames = planes.reshape(-1, depth, *planes.shape[1:])
            back = [nifti.turn_back(np.moveaxis(frame, 0, 2), self.turning) for frame in frames]
            planes = np.stack(back, axis=-1)
        pixels = planes.reshape(shape)
        integers = self.raw.dtype.kind in "iub" and not self.image.scaled
        pixels = _to_integers(pixels, self.raw.dtype) if integers else pixels.astype(np.float32)
        nifti.write(path, pixels, None, RECONSTRUCTION, like=self.image.header)
        return pixels.dtype != self.raw.dtype


def _to_integers(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.clip(np.round(pixels.astype(np.float64)), limits.min, limits.max).astype(
        dtype.newbyteorder("=")
    )


def find_files(inputs: list[str], out: Path) -> dict[str, str]:
    """The path of every file to reconstruct by its name in the folder `out`, whose own files are
    left aside.

    FileNotFoundError for an input that is not there, or a folder without any; UserError for one
    name of two files.
    """
    found, others, masks = [], [], []
    for source in inputs:
        if os.path.isdir(source):
            below = []
            paths = [entry.path for entry in find_nifti(source, below)]
            paths += [path for path in below if path.lower().endswith(PICTURES)]
            paths = [path for path in paths if out.resolve() not in Path(path).resolve().parents]
            named = [(path, os.path.relpath(path, source)) for path in sorted(paths)]
            masks += [path for path, name in named if is_mask(name)]
            found += [(path, name) for path, name in named if not is_mask(name)]
            others += [path for path in below if not path.lower().endswith(PICTURES)]
        elif os.path.exists(source):
            if not source.lower().endswith((*nifti.SUFFIXES, *PICTURES)):
                hint = way_in([source])
                raise UserError(
                    f"{source}: expected .nii, .nii.gz or a picture such as .png.{hint}"
                )
            found.append((source, os.path.basename(source)))
        else:
            raise FileNotFoundError(f"{source}: no such file or folder. Fix: check its path.")
    if not found:
        raise FileNotFoundError(f"{', '.join(inputs)}: no NIfTI files or pictures.{way_in(others)}")
    for kind, paths in (("other files", others), ("masks", masks)):
        if paths:
            print(f"{len(paths)} {kind} were passed over, such as {paths[0]}")
    names: dict[str, str] = {}
    for path, name in found:
        name = os.path.splitext(name)[0] + ".png" if name.lower().endswith(PICTURES) else name
        if name in names:
            raise UserError(
                f"{path} and {names[name]} would both be written as {name}. Fix: one at a time, with an --out each."
            )
        names[name] = path
    return names


@torch.inference_mode()
def reconstruct_planes(
    model: VQVAE2, study: StudyInfo, planes: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Planes (N, rows, columns), in any units, as the model gives them back, in batches.

    Each plane is z-scored and fitted into the model's grid as the training slices were, and back.
    Yields reconstructions (B, rows, columns) float32, top codes (B, h, w) and bottom codes (B, 2h,
    2w), uint16. A constant plane stays as it is.
    """
    device = next(model.parameters()).device
    placement = Placement.make(planes.shape[1:], (study.height, study.width), study.fit)
    for first in range(0, len(planes), batch_size):
        batch = planes[first : first + batch_size]
        grids = np.stack([placement.place(plane, fill=plane.min()) for plane in batch])
        means, stds, constant = (
            np.array(column) for column in zip(*map(z_score, grids), strict=True)
        )
        x = torch.from_numpy((grids - means[:, None, None]) / stds[:, None, None]).float()
        output = model(x.unsqueeze(1).to(device))
        images = (
            output.reconstruction[:, 0].cpu().numpy() * stds[:, None, None] + means[:, None, None]
        )
        restored = [
            plane if flat else placement.restore(image.astype(np.float32))
            for plane, image, flat in zip(batch, images, constant, strict=True)
        ]
        top, bottom = (
            level.codes.cpu().numpy().astype(np.uint16) for level in (output.top, output.bottom)
        )
        yield np.stack(restored), top, bottom


def score_plane(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, float] | None:
    """The scores of a plane and its reconstruction in their own pixels; None for a constant or a
    tiny one.
    """
    original, reconstruction = pair
    mean, std, constant = z_score(original)
    if constant or min(original.shape) < metrics.SMALLEST:
        return None
    x, y = (original - mean) / std, (reconstruction - mean) / std
    return {
        "ssim_report": metrics.ssim_report(x, y)[0],
        "ssim_standard": metrics.ssim_standard(x, y)[0],
        "psnr": metrics.psnr(x, y),
    }


def reconstruct_files(
    checkpoint: str,
    inputs: list[str],
    out: str,
    config: ScanConfig,
    batch_size: int = 32,
    device: str = "auto",
) -> dict:
    """Reconstruct every file into `out`, print a table and return what scans.json holds.

    Raises:
        FileNotFoundError: no checkpoint, or no files.
        UserError: a checkpoint that cannot be used; at the end, files that cannot be.
        OSError: a folder that cannot be written.
    """
    trained = load_model(checkpoint)
    study, model = trained.study, trained.model.to(runtime.pick_device(device))
    folder = Path(out or Path(checkpoint).parent / "reconstructed")
    names = find_files(inputs, folder)
    runtime.writable_folder(folder)
    for name, path in names.items():
        if (folder / name).exists() and os.path.samefile(folder / name, path):
            raise UserError(
                f"{path}: its reconstruction would replace it. Fix: --out, another folder."
            )
    grid, results, notes, bad = study.height * study.width, [], {}, {}
    bits = model.config.bits_per_pixel(study.height, study.width) * grid  # of a plane
    kept = {"name": [], "plane": [], "top": [], "bottom": []}
    bar = tqdm(total=len(names), desc="reconstructing", unit="file", disable=None)
    with bar, runtime.thread_pool() as pool:
        for name, path in names.items():
            bar.update()
            try:
                scan = Scan(path, config.plane)
                batches = reconstruct_planes(model, study, scan.planes, batch_size)
                planes, top, bottom = map(np.concatenate, zip(*batches, strict=True))
                became_float = scan.write(str(folder / name), planes)
            except (UserError, OSError) as error:
                bad[path] = str(error)
                continue
            if config.codes:
                kept["name"] += [name] * len(planes)
                kept["plane"] += range(len(planes))
                kept["top"].append(top)
                kept["bottom"].append(bottom)
            found = list(filter(None, pool.map(score_plane, zip(scan.planes, planes, strict=True))))
            row = {
                "file": name,
                "shape": list(scan.raw.shape),
                "planes": len(planes),
                "scored": len(found),
            }
            row |= {
                key: round(float(np.mean([score[key] for score in found])), 6) if found else None
                for key in SCORES
            }
            row |= {
                "bits": round(bits * len(planes)),
                "bits_per_pixel": round(bits * len(planes) / planes.size, 6),
            }
            results.append(row)
            for note in filter(None, (scan.note, "files became float32" if became_float else "")):
                notes[note] = notes.get(note, 0) + 1
    result = {
        "files": results,
        "plane": config.plane,
        "scores": "means over the planes of a file, in its own pixels, constant planes left out; see metrics.py",
        "bits": "nominal, log2 K for every code",
        "checkpoint": {"file": Path(checkpoint).name, "sha256": trained.sha256},
        "provenance": runtime.provenance(),
    }
    if results:
        runtime.write_json(folder / "scans.json", result)
    if kept["name"]:
        arrays = {"name": kept["name"], "plane": np.array(kept["plane"], np.int32)}
        arrays |= {level: np.concatenate(kept[level]) for level in ("top", "bottom")}
        with runtime.atomic_path(folder / "codes.npz") as part:
            np.savez(part, **arrays)
    print_table(results)
    if any(row["planes"] > 1 for row in results):
        print(f"volumes were cut in {config.plane} planes (--plane) and put together again")
    for note, count in notes.items():
        print(f"{count} {note}")
    print(
        f"wrote {folder}/: {len(results)} files, scans.json{', codes.npz' if kept['name'] else ''}"
    )
    if bad:
        raise_bad(" ".join(inputs), bad, len(names))
    return result


def print_table(results: list[dict]) -> None:
    """A line for each of the first files, and their mean."""
    titles = [*SCORES.values(), "bits/pixel"]
    print(f"{'file':<40}{'planes':>7}" + "".join(f"{title:>15}" for title in titles))

    def line(label: str, planes: int, cells: list) -> None:
        shown = "".join(f"{'-' if cell is None else format(cell, '#.4g'):>15}" for cell in cells)
        print(f"{label[-39:]:<40}{planes:>7}{shown}")

    columns = [*SCORES, "bits_per_pixel"]
    for row in results[:40]:
        line(row["file"], row["planes"], [row[column] for column in columns])
    if len(results) > 40:
        print(f"... and {len(results) - 40} more, in scans.json")
    if len(results) > 1:
        found = [[row[column] for row in results if row[column] is not None] for column in columns]
        means = [float(np.mean(cells)) if cells else None for cells in found]
        line("mean of the files", sum(row["planes"] for row in results), means)
