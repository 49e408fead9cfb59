"""A synthetic male pelvis: coronal T2-like slices with masks, so that all runs without any data.

Shapes are functions of millimetres in a reference man: x from the midline to either side, y from
anterior to posterior, z from foot to head, the origin between the femoral heads. A patient
stretches, turns and bends these coordinates, a week moves him and fills bladder and rectum, a slice
is a plane through them. driver.py makes a study of them where there is none.
"""

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from support import nifti
from support.runtime import UserError, in_parallel, write_text

SHAPE = 256, 128  # pixels of a slice, left to right and foot to head
PLANES = 60  # from anterior to posterior
SPACING = 1.6  # mm, of pixels and of planes
# From (pixel, pixel, plane) to RAS+.
AFFINE = np.array([[SPACING, 0, 0, 0], [0, 0, -SPACING, 0], [0, SPACING, 0, 0], [0, 0, 0, 1]])
# The patients' numbers are HipMRI's. A larger phantom goes on with FREE, whichever the split.
NUMBERS, FREE = {"train": range(4, 36), "validate": range(36, 40), "test": range(40, 43)}, 43
VERSION = 2  # increase when the same config gives other pictures
# Of the real and the imaginary channel each, where the signal of subcutaneous fat is about 1.
NOISE = 0.017
# The tissues; 0 is air. Masks count the last two as body.
BODY, BONE, BLADDER, RECTUM, PROSTATE, MUSCLE, FAT = range(1, 8)
FAR = np.float32(99)  # mm: a shape that does not come near the plane
NOT_A_PATIENT = "synthetic phantom, not a patient"  # in the header of every file
ABOUT = """SYNTHETIC DATA. Every image in this folder was computed by phantom.py from random
numbers. It shows no patient, and no number measured on it says anything about real MR images. Made
with:
"""
# Tapered capsules, one row for both sides: end (x, y, z), end (x, y, z), their radii (mm), weight
# of y in the distance (0: the same in every plane), shear (mm of x a mm of y).
MUSCLES = (
    (114, 15, 32, 146, 15, 125, 20, 26, 0.3, -0.25),  # gluteus medius and minimus
    (90, 0, 44, 108, 0, 125, 11, 17, 0.0, -0.45),  # iliacus
    (88, -42, -30, 36, 5, 125, 16, 24, 0.7, 0),  # psoas
    (53, 5, 30, 45, 5, -50, 12, 12, 0.15, 0),  # obturator internus
    (42, -15, -50, 100, 5, -36, 13, 10, 0.6, 0),  # obturator externus
    (60, 25, -62, 122, 22, -46, 13, 11, 0.8, 0),  # quadratus femoris
    (36, -50, -38, 105, -15, -84, 13, 14, 0.7, 0),  # pectineus
    (30, -28, -66, 62, -15, -140, 15, 30, 0.5, 0),  # adductor longus and brevis
    (50, 18, -84, 92, 5, -150, 18, 36, 0.5, 0),  # adductor magnus
    (146, -8, -42, 138, -10, -140, 12, 28, 0.5, 0),  # vastus lateralis
    (112, -42, 42, 108, -44, -140, 12, 24, 0.7, 0),  # rectus femoris
    (138, -48, 60, 150, -40, -70, 10, 12, 0.6, 0),  # tensor fasciae latae
    (64, 48, -74, 92, 45, -140, 14, 26, 0.8, 0),  # hamstrings
    (98, 74, 64, 134, 46, -66, 56, 35, 1.0, 0),  # gluteus maximus
    (28, 55, 48, 118, 22, 18, 15, 8, 1.0, 0),  # piriformis
    (46, 14, -10, 12, 14, -54, 3, 4, 0.3, 0),  # levator ani
)
PELVIS = (
    (96, 0, 38, 126, 0, 112, 8, 5.5, 0.0, -0.45),  # iliac wing
    (88, 18, 2, 62, 34, -66, 13, 12, 0.9, 0),  # ischium
    (80, -18, 6, 14, -54, -34, 11, 9, 0.9, 0),  # superior ramus of the pubis
    (12, -50, -40, 52, 22, -74, 8, 9, 0.9, 0),  # inferior ramus
    (0, 66, 108, 0, 62, 6, 50, 14, 0.9, 0),  # sacrum
    (0, 40, 118, 0, 48, 86, 25, 23, 0.9, 0),  # its promontory
)
FEMUR = (
    (90, 0, 0, 90, 0, 0.1, 25, 25, 1.0, 0),  # head
    (90, 0, 0, 126, 8, -22, 14, 15, 1.0, 0),  # neck
    (134, 14, -6, 130, 8, -36, 11, 14, 0.9, 0),  # greater trochanter
    (125, 6, -36, 110, -4, -140, 15, 12, 0.7, 0),  # shaft
)
RECTUM_TUBE = ((0, 26, -36, 0, 40, 0, 16, 19, 1.0, 0), (0, 40, 0, 6, 44, 40, 19, 14, 1.0, 0))
ANAL_CANAL = (0, 20, -92, 0, 27, -42, 9, 10, 1.0, 0)
ILIAC_VESSELS = (34, 8, 110, 58, -42, 0, 5, 4.5, 0.9, 0)
BETWEEN_THIGHS = (0, 0, -93, 0, 0, -160, 1, 20, 0.0, 0)


@dataclass(frozen=True)
class PhantomConfig:
    """How large a phantom study is. Patients are numbered from 4, 36 and 40, then from 43."""

    train_patients: int = 200
    validate_patients: int = 24
    test_patients: int = 24
    weeks: int = 1  # volumes of each patient
    slices: int = 5  # of a volume, at most 60: the ends of its planes, the rest at random
    seed: int = 0  # another one gives other patients


class Waves:
    """A smooth random function of space, about normal(0, 1): plane waves `short` to `long` mm."""

    def __init__(
        self, rng: np.random.Generator, man: "Man", short: float, long: float, stretch_z: float = 1
    ):
        k = rng.normal(size=(40, 3))
        k *= 2 * np.pi / np.linalg.norm(k, axis=1, keepdims=True)
        k /= np.exp(rng.uniform(np.log(short), np.log(long), (40, 1))) * (1, 1, stretch_z)
        along_x, self.along_y = k[:, :1] * man.x, k[:, 1:2]
        self.along_z = k[:, 2:] * man.z + rng.uniform(0, 2 * np.pi, (40, 1))
        x_part = np.concatenate([np.cos(along_x), -np.sin(along_x)]).T.astype(np.float32) / 20**0.5
        # In blocks too small for BLAS to start threads, which would get in the way of ours.
        self.x_part = x_part.reshape(16, -1, x_part.shape[1])

    def __call__(self, y: float) -> np.ndarray:
        """The plane at `y` mm -> (256, 128) float32; cos(a + b) makes it one matrix product."""
        angle = (self.along_z + self.along_y * y).astype(np.float32)
        z_part = np.concatenate([np.cos(angle), np.sin(angle)])
        return (self.x_part @ z_part).reshape(SHAPE)  # (16, 16, 80) @ (80, 128)


def capsule(p, row) -> np.ndarray:
    """Distance in mm, negative inside, of points p = (x, y, z), (256, 128) each, from a capsule."""
    ax, ay, az, bx, by, bz, ra, rb, wy, shear = row
    if wy * max(min(ay, by) - p[1].max(), p[1].min() - max(ay, by)) > max(ra, rb) + 8:
        return FAR
    ux, uy, uz = bx - ax, (by - ay) * wy, bz - az
    dx, dy, dz = p[0] - ax - shear * p[1], (p[1] - ay) * wy, p[2] - az
    h = np.clip((dx * ux + dy * uy + dz * uz) / (ux * ux + uy * uy + uz * uz), 0, 1)
    from_axis = np.sqrt((dx - h * ux) ** 2 + (dy - h * uy) ** 2 + (dz - h * uz) ** 2)
    return from_axis - (ra + (rb - ra) * h)


def ellipsoid(p, centre, radii) -> np.ndarray:
    """As `capsule`, to first order."""
    q = [(u - float(c)) / float(r) for u, c, r in zip(p, centre, radii, strict=True)]
    far = np.sqrt(sum(u * u for u in q))
    slope = np.sqrt(sum((u / float(r)) ** 2 for u, r in zip(q, radii, strict=True)))
    return (far - 1) * far / np.maximum(slope, 1e-6)


def join(shape: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    """Distance from the union of shapes, the creases between them filled as by 6 mm of putty."""
    for part in parts:
        shape = np.minimum(shape, part) - np.maximum(6 - np.abs(shape - part), 0) ** 2 / 24
    return shape


def paint(canvas: np.ndarray, distance: np.ndarray, signal) -> None:
    """Lay tissue over what is there, in place; an edge takes part of both (partial volume)."""
    canvas += np.clip(0.5 - distance / (1.2 * SPACING), 0, 1) * (signal - canvas)


class Man:
    """One patient in one week; `cut(number)` is his slice in plane `number` of [0, 60)."""

    def __init__(self, seed: int, patient: int, week: int):
        # Slices draw from [seed, patient, week, number]. Numbers that no slice has keep these two
        # streams apart.
        who = np.random.default_rng([seed, patient, 0, PLANES + 1])
        now = np.random.default_rng([seed, patient, week, PLANES])
        self.key = [seed, patient, week]
        offset = who.normal(0, (5, 5, 7)) + now.normal(0, (1.2, 1.2, 1.5))
        self.x, self.y, self.z = (
            (np.arange(n) - (n - 1) / 2) * SPACING - o
            for n, o in zip((SHAPE[0], PLANES, SHAPE[1]), offset, strict=True)
        )
        self.scale = who.uniform(0.93, 1.03, 3).tolist()
        self.roll, self.yaw = (who.normal(0, (0.02, 0.03)) + now.normal(0, (0.004, 0.008))).tolist()
        self.fat = float(who.uniform(12, 32))  # mm
        self.bends = [Waves(who, self, 110, 260) for _ in range(3)]
        self.shift = Waves(now, self, 60, 160)
        self.septa, self.fibre = Waves(who, self, 14, 40), Waves(who, self, 4, 9, 6)
        self.mottle, self.loops = Waves(who, self, 6, 20), Waves(who, self, 50, 80)
        self.content = Waves(now, self, 18, 60)
        self.muscles = (who.normal(0.2, 0.025, len(MUSCLES)) + who.uniform(0, 0.06)).tolist()
        self.marrow = (who.uniform(0.5, 0.66) * np.array([1, 1.15])).tolist()  # pelvis, femur
        self.bladder = np.exp(who.normal(0, 0.14) + now.normal(0, 0.07)) * np.array([37, 34, 25])
        self.gland = who.uniform(0.85, 1.2) * np.array([25, 18, 20])
        self.filling = float(who.normal(0, 1.5) + now.normal(0, 2))  # of the rectum, mm
        self.organs = who.normal(0, (4, 3, 4)) + now.normal(0, (1, 1.5, 1.5))
        ends = [(side * 200, -10, z) for side in (-1, 1) for z in (-70, 60)]
        faces = [(side * 75, y, z) for side in (-1, 1) for y in (-135, 140) for z in (-70, 60)]
        self.coils = [*zip(ends + faces, 0.9 * np.exp(who.normal(0, 0.25, 12)), strict=True)]
        self.unit = float(np.exp(who.normal(5.6, 0.45) + now.normal(0, 0.1)))  # scanner units
        self.noise = float(NOISE * self.unit * who.uniform(0.85, 1.15))

    def cut(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(256, 128) each: float32 clean; float32 noisy, in whole numbers; uint8 tissues."""
        y = float(self.y[number])
        signal, tissues = self.anatomy(y)
        clean = self.unit * signal * self.shading(y)
        rng = np.random.default_rng([*self.key, number])
        real, imaginary = self.noise * rng.standard_normal((2, *SHAPE), dtype=np.float32)
        # A scanner gives magnitudes, whose noise is Rician.
        return clean, np.round(np.hypot(clean + real, imaginary)), tissues

    def shading(self, y: float) -> np.ndarray:
        """Sensitivity of twelve receive coils around the body, (256, 128): bright near the skin."""
        total = np.full(SHAPE, 0.25, np.float32)
        for (cx, cy, cz), gain in self.coils:
            squares = np.add.outer((self.x - cx) ** 2, (self.z - cz) ** 2 + (y - cy) ** 2)
            near = 1 + squares.astype(np.float32) / 75**2
            total += float(gain) / (near * np.sqrt(near))
        return total

    def anatomy(self, y: float) -> tuple[np.ndarray, np.ndarray]:
        """(256, 128) each at `y` mm: signal, float32, of fat about 1; tissues, uint8 in [0, 7]."""
        x, z = self.x[:, None].astype(np.float32), self.z[None].astype(np.float32)
        shift, mottle, content = self.shift(y), self.mottle(y), self.content(y)
        q = [(x + self.roll * z) / self.scale[0], (y + self.yaw * x) / self.scale[1]]
        q.append((z - self.roll * x) / self.scale[2])
        q = [u + 3.5 * bend(y) + 0.5 * shift for u, bend in zip(q, self.bends, strict=True)]
        p = [np.abs(q[0]), *q[1:]]  # folded: what is written once stands on both sides
        canvas, tissues = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
        septa = np.exp(-((self.septa(y) / 0.15) ** 2))
        self.paint_body(canvas, tissues, p, mottle, septa, self.fibre(y))
        gut = ellipsoid(q, (0, -15, 108), (84, 66, 68))
        loops = np.maximum(gut, (0.25 - np.abs(self.loops(y))) * 12)
        paint(canvas, loops, 0.24)
        paint(canvas, loops + 3, 0.46 + 0.2 * np.tanh(2 * content) + 0.04 * mottle)
        paint(canvas, capsule(p, ILIAC_VESSELS), 0.08)
        self.paint_bones(canvas, tissues, p, mottle)
        self.paint_organs(canvas, tissues, q, mottle, shift, content)
        return canvas, tissues

    def paint_body(self, canvas, tissues, p, mottle, septa, fibre) -> None:
        hips = np.exp(-(((p[2] + 25) / 55) ** 2))
        squares = ((p[1] - 8) / (100 + self.fat / 2)) ** 2
        roundness = np.sqrt(np.sqrt(1 - squares * squares))  # from front to back
        side = p[0] - (148 + self.fat + 9 * hips) * roundness
        gap = capsule(p, BETWEEN_THIGHS)
        skin = np.maximum(side, -gap)
        fascia = np.maximum(side + self.fat * (1 + 0.3 * hips), 6 - gap)
        paint(canvas, skin, 0.35)
        paint(canvas, skin + 2.2, 1 + 0.03 * mottle - 0.08 * septa)
        # Fat between and behind the muscles is less bright.
        canvas -= 0.28 * np.clip(-fascia / 12, 0, 1)
        tissues[skin < 0] = BODY
        tissues[(skin < -2.2) & (fascia > 0)] = FAT
        for row, signal in zip(MUSCLES, self.muscles, strict=True):
            muscle = capsule(p, row)
            if muscle is not FAR:
                muscle = np.maximum(muscle, fascia)
                paint(canvas, muscle - 1.2, 0.5)  # the plane of fat between two muscles
                paint(canvas, muscle, signal * (1 + 0.16 * fibre) + 0.08 * np.maximum(fibre - 1, 0))
                tissues[muscle < 0] = MUSCLE

    def paint_bones(self, canvas, tissues, p, mottle) -> None:
        head = capsule(p, FEMUR[0])
        rim = 0.75 * (p[0] - 90) - 0.66 * p[2] - 5
        socket = np.maximum(ellipsoid(p, (91, 3, 6), (33, 34, 33)), rim)
        pelvis = join(socket, *(capsule(p, row) for row in PELVIS))
        femur = join(head, *(capsule(p, row) for row in FEMUR[1:]))
        for bone, joint, marrow in ((pelvis, FAR, self.marrow[0]), (femur, head, self.marrow[1])):
            paint(canvas, joint - 3, 0.3)  # cartilage
            paint(canvas, bone, 0.06)  # cortex
            paint(canvas, bone + 2.4, marrow * (1 + 0.08 * mottle))
            tissues[bone < 0] = BONE

    def paint_organs(self, canvas, tissues, q, mottle, shift, content) -> None:
        x, y, z = self.organs
        gland = ellipsoid(q, (x / 2, y - 8, z - 34), self.gland) + shift
        inner = ellipsoid(q, (x / 2, y - 12, z - 32), self.gland * (0.68, 0.7, 0.72)) + 2 * shift
        # The bladder sits on the prostate and fills upwards.
        height = z - 34 + self.gland[2] + 0.75 * self.bladder[2]
        bladder = ellipsoid(q, (x, y - 26, height), self.bladder) + 2.5 * shift
        empty = np.minimum(capsule(q, RECTUM_TUBE[0]), capsule(q, RECTUM_TUBE[1]))
        rectum = np.minimum(empty - self.filling + 1.5 * shift, capsule(q, ANAL_CANAL))
        # In it there is stool, or gas, which is black.
        stool = (0.36 + 0.08 * content + 0.03 * mottle) * np.clip(5 - 5 * content, 0.08, 1)
        for organ, label, wall, signal in (
            (bladder, BLADDER, 2.8, 0.92 + 0.01 * mottle),
            (gland, PROSTATE, 1.8, 0.58 + 0.05 * mottle),
            (inner, PROSTATE, 1.0, 0.38 + 0.05 * mottle),
            (rectum, RECTUM, 4.0, stool),
        ):
            paint(canvas, organ, 0.24)
            paint(canvas, organ + wall, signal)
            tissues[organ < 0] = label


def planes(config: PhantomConfig, patient: int, week: int) -> list[int]:
    """Which planes of [0, 60) a volume's slices are: the ends, and one of each stretch between.

    The same planes in every patient would leave the priors blind to all that lies between them.
    """
    # This stream of random numbers is no slice's.
    rng = np.random.default_rng([config.seed, patient, week, PLANES + 2])
    ends = np.linspace(1, PLANES - 1, config.slices - 1).round().astype(int)
    return [0, *rng.integers(ends[:-1], ends[1:]).tolist(), PLANES - 1][: config.slices]


def names_of(config: PhantomConfig) -> dict[tuple[int, int], tuple[str, str]]:
    """(patient, week) -> the names of its images and of its masks, with %d for the slice."""
    cases, free = {}, itertools.count(FREE)
    for split, own in NUMBERS.items():
        numbers = itertools.chain(own, free)
        for patient in itertools.islice(numbers, getattr(config, f"{split}_patients")):
            for week in range(config.weeks):
                name = f"{patient:03d}_week_{week}_slice_%d.nii.gz"
                names = f"keras_slices_{split}/case_{name}", f"keras_slices_seg_{split}/seg_{name}"
                cases[patient, week] = names
    return cases


def write_phantom(out: Path | str, config: PhantomConfig = PhantomConfig()) -> Path:
    """Write what the folder `out` lacks of the study of `config`; return `out`.

    It holds keras_slices_{split} (float32), keras_slices_seg_{split} (uint8 masks) and
    SYNTHETIC.txt. UserError where `out` is another phantom, or none: it is left alone.
    """
    out, cases = Path(out), names_of(config)
    marker, about = out / "SYNTHETIC.txt", json.dumps({"version": VERSION, **asdict(config)})
    about = f"{ABOUT}{about}\n"
    if out.exists() and not (marker.is_file() and marker.read_text() == about):
        raise UserError(f"{out}: not this phantom, by its SYNTHETIC.txt. Fix: rename or delete it.")
    write_text(marker, about)
    numbers = {case: planes(config, *case) for case in cases}

    def is_there(case: tuple[int, int]) -> bool:
        return all((out / (n % i)).is_file() for n in cases[case] for i in numbers[case])

    def write(case: tuple[int, int]) -> None:
        man = Man(config.seed, *case)
        for number in numbers[case]:
            _, pixels, tissues = man.cut(number)
            mask = np.where(tissues > PROSTATE, BODY, tissues).astype(np.uint8)
            for name, array in zip(cases[case], (pixels, mask), strict=True):
                nifti.write(out / (name % number), array, AFFINE, NOT_A_PATIENT)

    missing = list(itertools.filterfalse(is_there, cases))
    for _ in in_parallel(write, missing, "phantom", "volume"):
        pass
    made = f"{len(cases)} volumes, {len(missing)} of them new, seed {config.seed}"
    print(f"{out}: a synthetic phantom of {made}")
    return out
