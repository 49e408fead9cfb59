"""A study of a few patients: what someone has who is not given the rest.

    python -m benchmarks.few_patients --data keras_slices_data --patients 4 --seed 0 --out few
    python -m benchmarks.few_patients --data keras_slices_data --patients 4 --below 100 --out few

Copies the train slices of --patients random patients out of those that have masks (with --rest: of
all other patients), and all slices of the other splits. --below and --least limit all three splits
to patients numbered below the one, and from the other on.
"""

import shutil
from pathlib import Path

import numpy as np

from benchmarks.utility import few_patients
from dataset import DataConfig, open_study
from support import runtime


def main() -> None:
    parser = runtime.parser(__doc__)
    parser.add_argument("--data", required=True, help="study folder, in the layout of README")
    parser.add_argument("--patients", type=int, default=4, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--rest", action="store_true", help="the others instead")
    parser.add_argument("--below", type=int, default=2**31, help="only patients numbered below")
    parser.add_argument("--least", type=int, default=0, help="only patients numbered from this on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    for name, split in open_study(DataConfig(data=args.data)).items():
        patients = split.patients
        chosen = (patients >= args.least) & (patients < args.below)
        if name == "train":
            masked = np.flatnonzero(chosen & split.has_mask)
            few = few_patients(split, masked, args.patients, args.seed)
            chosen &= np.isin(patients, patients[few]) != args.rest
        for folder, start in (("keras_slices_", "case_"), ("keras_slices_seg_", "seg_")):
            to = args.out / f"{folder}{name}"
            to.mkdir(parents=True, exist_ok=True)
            for path in np.array(split.paths)[chosen]:
                source = split.study / to.name / path.name.replace("case_", start, 1)
                if source.is_file():
                    shutil.copyfile(source, to / source.name)
        people = len(np.unique(patients[chosen]))
        print(f"wrote {args.out}: {name}, {chosen.sum()} slices of {people} patients")


if __name__ == "__main__":
    runtime.run_cli(main)
