"""The whole story in order: a study, the autoencoder and its scores, the priors over its codes and new slices.

    python driver.py                              # no data: makes a synthetic study first; about 5 minutes
    python driver.py --data keras_slices_data     # a real study: the report's settings, then 30 minutes of priors
    python driver.py --data keras_slices_data --preset best
    python driver.py --prior-minutes 0            # reconstruction only

Takes the flags of train.py for the autoencoder, --nifti of predict.py and --n of generate.py. Open
Results/index.html afterwards: everything is on that page.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import generate
import page
import phantom
import predict
import runtime
import train
from dataset import DataConfig, find_study
from modules import VQVAE2Config
from prior import PriorConfig
from runtime import UserError

PHANTOM = Path("phantom_slices_data")  # made where there is no study


def main() -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data", default="")
    first.add_argument("--preset")
    first.add_argument("--resume")
    known = first.parse_known_args()[0]
    no_study = find_study(known.data) is None
    synthetic = no_study
    if known.resume:
        resumed = runtime.load_checkpoint(known.resume, "vqvae2", "prior")
        if resumed["kind"] == "prior":
            raise UserError(f"--resume {known.resume}: priors. Fix: train.py --resume, then generate.py.")
        synthetic = resumed["data"]["synthetic"]
    preset = known.preset or ("quick" if synthetic else "report")
    of_prior = train.PRESETS["prior"]["quick" if preset == "quick" else "best"]
    second = {name: value for name, value in of_prior.items() if hasattr(train.TrainConfig, name)}

    parser = train.flags(__doc__)
    parser.set_defaults(**{name: value for name, value in of_prior.items() if name not in second})
    parser.add_argument("--nifti", action="store_true", help="write the reconstructions as NIfTI too")
    parser.add_argument("--n", type=int, default=64, help="slices to sample (default: %(default)s)")
    parser.add_argument(
        "--prior-minutes", type=float, help="of the priors' training; 0: no priors, no samples"
    )
    args, checkpoint = train.parse(parser, preset)
    configs = (DataConfig, VQVAE2Config, train.LossConfig, train.CodesConfig, PriorConfig, train.TrainConfig)
    data, model, loss, codes, prior, config = (runtime.from_flags(c, args) for c in configs)
    if args.prior_minutes is not None:
        if not args.prior_minutes >= 0:
            raise UserError(f"--prior-minutes is {args.prior_minutes}; expected 0 or more")
        second["minutes"] = args.prior_minutes
    same = {name: getattr(config, name) for name in ("out", "device", "seed", "bf16")}
    second = train.TrainConfig(**same, **second)
    generated = generate.GenerateConfig(n=args.n, seed=config.seed)  # checked before anything is trained
    if no_study and not data.data:  # nor one that a checkpoint names
        print("no study here and no --data: making a synthetic one")
        data = replace(data, data=str(phantom.write_phantom(PHANTOM)))

    best = train.train_autoencoder(data, model, loss, config, checkpoint)
    shared = {name: getattr(data, name) for name in ("data", "cache", "allow_patient_overlap")}
    shared |= {"checkpoint": str(best), "device": config.device}
    predict.predict(predict.PredictConfig(out=config.out, nifti=args.nifti, **shared))
    if second.minutes:
        print("\nnow the priors over its codes, for new slices")
        priors = train.train_prior(data, replace(codes, checkpoint=str(best)), prior, second)
        new = Path(config.out) / "generated"
        generate.generate(replace(generated, prior=str(priors), out=str(new), **shared))
    print(f"open {Path(config.out) / page.NAME}")


if __name__ == "__main__":
    runtime.run_cli(main)
