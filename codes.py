"""The code maps of a study's slices under one autoencoder: made once, then kept in a file for both their users."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runtime
from dataset import SPLITS, SliceDataset
from modules import VQVAE2

LEVELS = ("top", "bottom")


@torch.inference_mode()
def extract_codes(
    model: VQVAE2, splits: dict[str, SliceDataset], sha256: str, *files: Path
) -> dict[str, np.ndarray]:
    """The code maps of every slice of every split, and of its mirror image.

    Read from the first of the `files` that was made with this autoencoder, whose checkpoint has the SHA-256
    `sha256`, of these splits; else made, and written to the last.

    Returns:
        "train_top" (2, N, H/8, W/8), "train_bottom" (2, N, H/4, W/4), ... uint16; first axis: as it is, mirrored.
    """
    key = " ".join([sha256, *(splits[name].fingerprint for name in SPLITS)])
    for file in files:
        try:
            with np.load(file) as kept:
                if str(kept["key"]) == key:
                    return {name: kept[name] for name in kept.files if name != "key"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not there, not ours, or not whole
    maps: dict[str, list] = {f"{name}_{level}": [] for name in SPLITS for level in LEVELS}
    device = next(model.parameters()).device
    bar = tqdm(total=sum(map(len, splits.values())), desc="codes", unit=" slices", disable=None)
    for name, split in splits.items():
        for indices in torch.arange(len(split)).split(16):
            x = split.images(indices).to(device)
            both = [model.encode(side) for side in (x, x.flip(2))]
            for level, sides in zip(LEVELS, zip(*both, strict=True), strict=True):
                maps[f"{name}_{level}"].append(torch.stack(sides).cpu().numpy().astype(np.uint16))
            bar.update(len(indices))
    bar.close()
    maps = {name: np.concatenate(parts, 1) for name, parts in maps.items()}
    with runtime.atomic_path(files[-1]) as part:
        np.savez(part, key=key, **maps)
    return maps
