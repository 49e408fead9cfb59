"""The whole story in order: a study, training on it, and the scores of its test split.

    python driver.py                              # no data: makes a synthetic study first; about 3 minutes
    python driver.py --data keras_slices_data     # a real study, at the report's settings
    python driver.py --data keras_slices_data --preset best

Takes the flags of train.py, and --nifti of predict.py. Read Results/ afterwards.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import phantom
import predict
import runtime
import train
from dataset import DataConfig, find_study
from modules import VQVAE2Config

PHANTOM = Path("phantom_slices_data")  # made where there is no study


def main() -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="")
    no_study = find_study(first.parse_known_args()[0].data) is None

    parser = train.flags(__doc__)
    parser.add_argument("--nifti", action="store_true", help="write the reconstructions as NIfTI too")
    args, checkpoint = train.parse(parser, preset="quick" if no_study else "report")
    if args.stage != "autoencoder":
        raise ValueError(
            f"--stage {args.stage}: driver.py trains the autoencoder. Mend: train.py, generate.py."
        )
    configs = (DataConfig, VQVAE2Config, train.LossConfig, train.TrainConfig)
    data, model, loss, config = (runtime.from_flags(c, args) for c in configs)
    if no_study and not checkpoint:
        print("no study here and no --data: making a synthetic one")
        data = replace(data, data=str(phantom.write_phantom(PHANTOM)))

    best = train.train_autoencoder(data, model, loss, config, checkpoint)
    shared = {name: getattr(data, name) for name in ("data", "cache", "allow_patient_overlap")}
    predict.predict(
        predict.PredictConfig(
            checkpoint=str(best), out=config.out, device=config.device, nifti=args.nifti, **shared
        )
    )
    print(f"open {config.out}/comparison.png, {config.out}/loss_plot.png and {config.out}/metrics.json")


if __name__ == "__main__":
    runtime.run_cli(main)
