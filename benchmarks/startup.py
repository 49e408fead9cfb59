"""How long a study takes to open: first, when every slice is decoded, and later, from the cache.

    python -m benchmarks.startup --data keras_slices_data --slices 12660

Makes a study of --slices slices (HipMRI's sliced set has 12,660) in a temporary folder, from links
to the files of --data. For comparison it times zlib alone on the same bytes in memory, on one core
and on all: a first start cannot be quicker. The files have been read before, so the disk is not
measured.
"""

import gzip
import itertools
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dataset import SPLITS, DataConfig, find_study, open_study
from support import runtime


def seconds(function, *args) -> float:
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def link(files: list[Path], study: Path, slices: int) -> list[Path]:
    """Make a study of `slices` slices, 60 for each patient, split 90/5/5; return its files."""
    made, patients = [], range(1, 2 + slices // 60)
    sources = itertools.cycle(files)
    for patient in patients:
        share = patient / len(patients)
        split = SPLITS[(share > 0.9) + (share > 0.95)]
        for number in range(min(60, slices - len(made))):
            name = f"case_{patient:03d}_week_0_slice_{number}.nii.gz"
            path = study / f"keras_slices_{split}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(next(sources).resolve())
            made.append(path)
    return made


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("--data", default="", help="study to link the files of")
    parser.add_argument("--slices", type=int, default=12_660)
    parser.add_argument("--out", default="benchmarks/results/startup.json")
    args = parser.parse_args()
    if (study := find_study(args.data)) is None:
        raise runtime.UserError("no study here. Fix: --data FOLDER.")
    files = sorted(study.glob("keras_slices_[tv]*/*.nii.gz"))
    with tempfile.TemporaryDirectory() as work:
        made = link(files, Path(work, "study"), args.slices)
        data = DataConfig(data=str(Path(work, "study")), cache=str(Path(work, "cache")))
        packed = [path.read_bytes() for path in made]
        row = {"slices": len(made), "mb_packed": round(sum(map(len, packed)) / 1e6)}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            row["gunzip_one_core_s"] = seconds(lambda: [gzip.decompress(each) for each in packed])
            row["gunzip_all_cores_s"] = seconds(lambda: list(pool.map(gzip.decompress, packed)))
        row["first_start_s"] = seconds(open_study, data)
        row["later_start_s"] = seconds(open_study, data)
    for name, value in row.items():
        print(f"{name:20} {value:.4g}")
    row = {name: round(value, 2) for name, value in row.items()}
    runtime.write_json(args.out, row | {"study": study.resolve().name} | runtime.provenance())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    runtime.run_cli(main)
