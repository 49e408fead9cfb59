"""Code files (.vq2): a scan's codes, entropy-coded under the priors, and what brings the scan back.

What a file holds, little-endian:

    4 bytes  b"VQ2n" for a NIfTI file, b"VQ2p" for a picture
    8        BLAKE2b of all that follows
    6 + 6    how the SHA-256 of the autoencoder and of the priors begin
    4        BLAKE2b of the codes
    1 + 4    the plane that the scan was cut along; how many planes it has
    2 + n    the scan's NIfTI header, deflated
    8 each   mean and standard deviation of each plane
    rest     the codes, in whole words of 32 bits

Each plane's top map is coded, then its bottom map given the top, in a few groups of codes. A group
is coded given all earlier ones, which the decoder knows by then. A fixed order of codes costs no
more bits than an order by certainty (M2T, Mentzer et al. 2023, arXiv 2304.07313). Layouts and
positions are unknown. If several bottom codes are almost equally near, the coder takes the one that
costs the fewest bits in its place.

A decoder needs the coder's very probabilities: one that differs in its last bit garbles all that
follows. Sums round differently from one CPU, library and number of threads to the next, by some
1e-6 in float32. So the priors compute in float64 here, where that is some 1e-14, and logits are
rounded to a grid of 1/16. From there on whole numbers are the same everywhere. Two machines still
differ where a logit lies within rounding of the middle between two steps of the grid: in less than
one slice of ten million. The BLAKE2b of the codes tells, and the file is refused.
"""

import hashlib
import math
import re
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from constriction import stream
from nibabel import Nifti1Header
from torch import Tensor, nn
from tqdm import tqdm

from modules import Trained
from new_slices.code_maps import LEVELS
from new_slices.prior import load_prior
from support import nifti, runtime
from support.runtime import UserError

SUFFIX = ".vq2"
KINDS = {b"VQ2n": ".nii.gz", b"VQ2p": ".png"}
HEAD = struct.Struct("<4s8s")  # kind, sum of the rest
BODY = struct.Struct("<6s6s4sBIH")  # autoencoder, priors, sum of the codes, plane, planes, header
PLANES = ("", *nifti.PLANES)
GROUPS = {"top": 6, "bottom": 5}  # eight of each save 0.2 % of the bits and take half as long again
# What a bit of a bottom code is worth at least: lambda of VectorQuantiser.nearest (modules.py).
BIT_WEIGHT = 0.015
GRID = 16  # steps of a logit of 1
# The weight of a code whose logit lies so many steps below the largest; the last is 0.
WEIGHTS = np.round(2.0**20 * np.exp(-np.arange(15 * GRID) / GRID))
# The coder turns weights into shares of 2^24, and gives each code one share at least.
FAMILY = stream.model.Categorical(perfect=False)


class Coded(NamedTuple):
    """What a file keeps of N planes."""

    top: np.ndarray  # (N, h, w) uint16
    bottom: np.ndarray  # (N, 2h, 2w) uint16
    scale: np.ndarray  # (N, 2) float32, mean and standard deviation of each plane


class Coder:
    """Code files of one autoencoder under its priors; UserError for priors of another."""

    def __init__(self, trained: Trained, prior: Path | str, device: str = "cpu") -> None:
        *_, loaded = load_prior(prior, trained)
        self.model = trained.model
        self.prior = loaded.to(runtime.pick_device(device), torch.float64)
        self.models = {str(trained.path): trained.sha256, str(prior): runtime.sha256(prior)}
        convs = (part for part in self.prior.modules() if isinstance(part, nn.Conv2d))
        for conv in (conv for conv in convs if conv.groups > 1):
            conv.forward = partial(depthwise, conv)
        with torch.inference_mode():  # once for all files: it took up to a third of each one
            self.tables = [getattr(self.prior, name).table() for name in LEVELS]

    def pack(
        self,
        header: Nifti1Header,
        plane: str,
        coded: Coded,
        picture: bool = False,
        slice_of: Callable[[int], Tensor] | None = None,
    ) -> tuple[bytes, Coded]:
        """The file of a scan with this header, cut along `plane`, and the codes in it.

        These are `coded`; but if `slice_of` tells the z-scored slice (1, 1, H, W) of each plane,
        bottom codes are chosen anew, by their distance and by the bits that they cost here.
        """
        encoder, header = stream.queue.RangeEncoder(), header.copy()
        header["descrip"] = b""  # reconstructions have one of their own
        block = zlib.compress(header.binaryblock, 9, wbits=-15)

        @lru_cache(1)
        def unquantised(plane: int) -> Tensor:
            """What the bottom codes of a plane stand for, (2h*2w, D)."""
            top = torch.from_numpy(coded.top[plane : plane + 1].astype(np.int64))
            x = slice_of(plane).to(self.prior.top.rows.device)
            return self.model.unquantised_bottom(x, top.to(x.device))[0].flatten(1).T

        def put(name: str, plane: int, at: np.ndarray, weights: np.ndarray) -> np.ndarray:
            codes = getattr(coded, name)[plane][at].astype(np.int32)
            if name == "bottom" and slice_of:
                flat = unquantised(plane)[at.ravel()]
                shares = torch.from_numpy(weights / weights.sum(1, keepdims=True)).to(flat)
                quantiser, bits = self.model.quantiser_bottom, -shares.clamp_min(2.0**-24).log2()
                price = max(BIT_WEIGHT, quantiser.bit_weight) * bits
                codes = quantiser.nearest(flat, price).cpu().numpy().astype(np.int32)
            encoder.encode(codes, FAMILY, weights)
            return codes

        maps = self.visit(len(coded.top), put)
        models = [bytes.fromhex(sha256)[:6] for sha256 in self.models.values()]
        about = PLANES.index(plane), len(coded.top), len(block)
        body = BODY.pack(*models, blake(*maps, size=4), *about) + block
        words = encoder.get_compressed().astype("<u4")
        body += coded.scale.astype("<f4").tobytes() + words.tobytes()
        data = HEAD.pack(b"VQ2p" if picture else b"VQ2n", blake(body)) + body
        return data, Coded(*maps, coded.scale)

    def unpack(self, data: bytes) -> tuple[nifti.Image, str, Coded]:
        """What `pack` was given: an image without its pixels, the plane, the codes.

        UserError, which does not name the file, for all that is not exactly that.
        """
        kind, whole = HEAD.unpack(data[: HEAD.size].ljust(HEAD.size))
        body = data[HEAD.size :]
        check(kind in KINDS, "not a file of codes that reconstruct.py --save wrote")
        check(whole == blake(body), "damaged or cut short. Fix: another copy of it")
        *models, codes, plane, count, length = BODY.unpack(body[: BODY.size])
        for found, (file, sha256) in zip(models, self.models.items(), strict=True):
            check(
                sha256.startswith(found.hex()),
                f"written with a model whose SHA-256 begins with {found.hex()}; {file} has "
                f"{sha256[:12]}. Fix: name the two that wrote it with --checkpoint and --prior",
            )
        start = BODY.size + length
        image = nifti.without_pixels(zlib.decompress(body[BODY.size : start], wbits=-15))
        scale = np.frombuffer(body, "<f4", 2 * count, start).reshape(count, 2)
        words = np.frombuffer(body, "<u4", offset=start + scale.nbytes).astype(np.uint32)
        decoder, maps = stream.queue.RangeDecoder(words), []
        with suppress(AssertionError):  # the coder's, where no code has such a word
            maps = self.visit(count, lambda *_, weights: decoder.decode(FAMILY, weights))
        check(
            codes == blake(*maps, size=4),
            "whole, but here the priors' probabilities differ from those that it was written with. "
            "Fix: read it on that machine, or with the same versions of PyTorch and constriction",
        )
        return image, PLANES[plane], Coded(*maps, scale)

    @torch.inference_mode()
    def visit(self, count: int, code: Callable[..., np.ndarray]) -> list[np.ndarray]:
        """The maps of `count` planes, top (count, h, w) and bottom (count, 2h, 2w) uint16.

        `code(level, plane, at, weights=)` tells the codes (M,) of a map at (h, w) bool. weights
        (M, K) say how likely each code is there, given all that were told before.
        """
        device = self.prior.top.rows.device
        known = torch.full((1,), math.nan, device=device), self.prior.as_it_is(1)
        maps = [np.empty((count, *getattr(self.prior, name).shape), np.uint16) for name in LEVELS]
        for plane in tqdm(range(count), desc="coding", unit=" planes", disable=None, leave=False):
            condition = None  # of the top codes: their layout is unknown
            for name, table, found in zip(LEVELS, self.tables, maps, strict=True):
                level = getattr(self.prior, name)
                context = level.context(*known, condition)
                codes = torch.full((1, *level.shape), level.K, device=device)  # all are hidden
                for at in groups(level.shape, GROUPS[name]):
                    asked = torch.from_numpy(np.flatnonzero(at)).to(device)
                    told = code(name, plane, at, weights=weigh(level(codes, context, asked, table)))
                    codes.view(-1)[asked] = torch.from_numpy(told).to(codes)
                found[plane] = codes[0].cpu().numpy()
                condition = codes  # of the bottom codes
        return maps


def check(right: bool, wrong: str) -> None:
    """UserError with the message `wrong` unless `right`."""
    if not right:
        raise UserError(wrong)


def blake(*parts, size: int = 8) -> bytes:
    """The BLAKE2b of bytes and arrays, `size` bytes long."""
    return hashlib.blake2b(b"".join(map(bytes, parts)), digest_size=size).digest()


def weigh(logits: Tensor) -> np.ndarray:
    """logits (M, K) float64 -> whole numbers (M, K) in float64, in proportion to probabilities."""
    steps = (logits * GRID).round_()  # in place, as there are a million
    below = steps.sub_(steps.amax(1, keepdim=True)).neg_().clamp_max_(len(WEIGHTS) - 1)
    return WEIGHTS[below.int().cpu().numpy()]


@lru_cache
def groups(shape: tuple[int, int], count: int) -> list[np.ndarray]:
    """Where the codes of each of `count` groups lie in a map, (h, w) bool; the groups grow.

    They come in the order of a dither matrix (Bayer 1973), which compares the bits of row and
    column, the lowest first: what is known at any time lies evenly over the map.
    """
    (rows, columns), rank = np.indices(shape), 0
    for bit in range(max(shape).bit_length()):
        row, column = rows >> bit & 1, columns >> bit & 1
        rank = 4 * rank + 2 * (row ^ column) + column
    turn = rank.ravel().argsort().argsort().reshape(shape)  # 0 is the first to be coded
    ends = [round(rank.size * (i / count) ** 1.5) for i in range(count + 1)]
    return [(turn >= first) & (turn < end) for first, end in pairwise(ends)]


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """x (B, C, h, w) -> what `conv` makes of it, (B, C, h, w): a sum over shifted copies.

    PyTorch's own depthwise convolution takes ten times as long in float64 on a CPU.
    """
    height, width = x.shape[2:]
    pad, weights = conv.padding[0], conv.weight[:, 0].permute(1, 2, 0).contiguous()
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))  # channels are last
    total = conv.bias.expand(len(x), height, width, -1).clone()
    for row, column in np.ndindex(*weights.shape[:2]):
        shifted = padded[:, row : row + height, column : column + width]
        total.addcmul_(shifted, weights[row, column])
    return total.permute(0, 3, 1, 2)


def name_of(path: str, name: str) -> str:
    """What is written for a file is called `name`; for a file of codes, like its scan.

    A name without .nii, .nii.gz or .png at its end gets .nii.gz.
    """
    if not name.lower().endswith(SUFFIX):
        known = name.lower().endswith((*nifti.SUFFIXES, ".png"))
        return name if known else f"{name}.nii.gz"
    with open(path, "rb") as file:
        ending = KINDS.get(file.read(4), ".nii.gz")
    return re.sub(r"(\.nii|\.nii\.gz|\.png)?\.vq2$", "", name, flags=re.IGNORECASE) + ending
