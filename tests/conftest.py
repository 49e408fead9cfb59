"""What several test files share: small studies, and scripts run as a user runs them."""

import io
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from support import nifti, runtime

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--fast-bf16",
        choices=("yes", "no"),
        help="take this CPU for one that is fast in bfloat16, or for one that is not",
    )


def pytest_configure(config) -> None:
    """With --fast-bf16, here and in every process that a test starts (sitecustomize.py)."""
    if answer := config.getoption("--fast-bf16"):
        os.environ["FAST_BF16"] = answer
        folder = str(Path(__file__).parent / "forced")
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        runpy.run_path(f"{folder}/sitecustomize.py")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """No test reads or fills the user's own cache of decoded slices."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    """A study of 64x32 slices: 14 of two patients to train, 5 to validate, 6 of two to test."""
    folder = tmp_path_factory.mktemp("study") / "keras_slices_data"
    patients = {"train": {4: 7, 5: 7}, "validate": {36: 5}, "test": {40: 4, 41: 2}}
    for split, counts in patients.items():
        for patient, count in counts.items():
            for number in range(count):
                rng = np.random.default_rng([patient, number])
                rows, columns = np.mgrid[:64, :32]
                disc = np.hypot(rows - 32 - patient % 5, columns - 16) < 10 + number
                pixels = 100 * (2 + disc + 0.1 * rng.normal(size=disc.shape))
                pixels = (pixels * (np.abs(rows - 32) < 28)).astype(np.float32)
                name = f"case_{patient:03d}_week_0_slice_{number}.nii.gz"
                nifti.write(folder / f"keras_slices_{split}" / name, pixels, np.eye(4))
    return folder


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write the mask of the slice at `path`, where a study has it."""
    folder = path.parent.with_name(path.parent.name.replace("slices_", "slices_seg_"))
    nifti.write(folder / path.name.replace("case", "seg"), mask.astype(np.uint8), np.eye(4))


@pytest.fixture(scope="session")
def masked_study(study, tmp_path_factory) -> Path:
    """The same with masks: label 7 is the disc. Validation and one training slice have none."""
    folder = tmp_path_factory.mktemp("masked") / "keras_slices_data"
    shutil.copytree(study, folder)
    for path in sorted(folder.glob("keras_slices_t*/*.nii.gz")):
        if path.name != "case_005_week_0_slice_6.nii.gz":
            write_mask(path, 7 * (nifti.read(path).raw > 250))
    return folder


@pytest.fixture(scope="session")
def organs_study(study, tmp_path_factory) -> Path:
    """The study with two organs, 5 and 9; one test slice has no mask."""
    folder = tmp_path_factory.mktemp("organs") / "keras_slices_data"
    shutil.copytree(study, folder)
    rows, columns = np.mgrid[:64, :32]
    for path in folder.glob("keras_slices_*/case_*.nii.gz"):
        if path.name != "case_040_week_0_slice_1.nii.gz":
            number = int(path.name.removesuffix(".nii.gz").split("_")[-1])
            mask = np.where(np.hypot(rows - 32, columns - 16) < 8 + number, 5, 0)
            mask[:8, :8] = 9
            write_mask(path, mask)
    return folder


def start(script: str, *args, **options) -> subprocess.Popen:
    """A script of the repository in a process of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(script: str, *args, **options) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script."""
    process = start(script, *args, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def command(script, *words) -> tuple[int, str, str]:
    """What `run` gives, of a script that runs in this process: it need not import PyTorch anew."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [f"{script.__name__}.py", *map(str, words)]
    with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            runtime.run_cli(script.main)
        except SystemExit as end:
            code = end.code
        finally:
            torch.set_flush_denormal(False)
    return code, out.getvalue(), err.getvalue()
