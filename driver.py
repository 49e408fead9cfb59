"""The whole story in order: a study, the autoencoder and its scores, the priors over its codes and
new slices.

    python driver.py                              # no data: makes a synthetic study first; 5 minutes
    python driver.py --data keras_slices_data     # a real study: the report's settings, then 30 minutes of priors
    python driver.py --data keras_slices_data --preset best
    python driver.py --prior-minutes 0            # reconstruction only

Takes the flags of train.py; those of training are the autoencoder's. Also --nifti of predict.py and
--n of generate.py. Open Results/index.html afterwards: everything is on that page.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import generate
import predict
import train
from dataset import StudyInfo, find_study
from support import phantom, results_page, runtime
from support.runtime import UserError, option

PHANTOM = Path("phantom_slices_data")  # made where there is no study
# Priors that trained for less than this are unsure of much, and their less likely codes are mostly
# wrong.
FEW_MINUTES = 10
CAUTIOUS = {"top_temperature": 0.4, "top_spread": 4.0, "bottom_temperature": 0.2}
CAUTIOUS |= {"top_passes": 8, "bottom_passes": 4, "guidance": 0.5}
OF_THE_PRIORS = train.flags_of("prior") - train.flags_of("autoencoder")


@dataclass(frozen=True)
class DriverConfig:
    """What follows the autoencoder."""

    nifti: bool = option(False, "write the reconstructions as NIfTI too")
    n: int = option(64, "slices to sample")
    prior_minutes: float = option(
        -1.0, "minutes of the priors' training; 0: no priors and no samples"
    )


def make_settings(given: dict) -> tuple[train.Settings, train.Settings, DriverConfig]:
    """The settings of stage one, of stage two and of the rest, for the flags `given`."""
    given = dict(given)
    own = {name: given.pop(name) for name in vars(DriverConfig()) if name in given}
    priors = {name: given.pop(name) for name in OF_THE_PRIORS if name in given}
    synthetic = find_study(given.get("data", "")) is None
    if resume := given.get("resume"):
        resumed = runtime.load_checkpoint(resume, "vqvae2", "prior")
        if resumed["kind"] == "prior":
            raise UserError(f"--resume {resume}: priors. Fix: train.py --resume, then generate.py.")
        synthetic = StudyInfo.from_checkpoint(resumed, resume).synthetic
    preset = given.get("preset") or ("quick" if synthetic else "report")
    first = train.make_settings(given, preset)
    priors |= {"stage": "prior", "preset": "quick" if preset == "quick" else "best"}
    priors |= {name: getattr(first.train, name) for name in ("out", "device", "seed", "bf16")}
    if "prior_minutes" in own:
        if not own["prior_minutes"] >= 0:
            raise UserError(f"--prior-minutes is {own['prior_minutes']}; expected 0 or more")
        priors["minutes"] = own["prior_minutes"]
    second = train.make_settings(priors)
    return first, second, DriverConfig(**own | {"prior_minutes": second.train.minutes})


def main() -> None:
    parser = train.flags(__doc__, DriverConfig, without=("stage", "checkpoint"))
    given, help_wanted = runtime.given_flags(parser)
    first, second, config = make_settings(given)
    if help_wanted:
        runtime.print_help(parser, *first.configs(), second.codes, second.prior, config)
    sampling = CAUTIOUS if second.train.minutes < FEW_MINUTES else {}
    generated = generate.GenerateConfig(
        n=config.n, seed=first.train.seed, **sampling
    )  # checked before training
    data = first.data
    if find_study(data.data) is None:
        print("no study here and no --data: making a synthetic one")
        data = replace(data, data=str(phantom.write_phantom(PHANTOM)))

    best = train.train_autoencoder(replace(first, data=data))
    shared = {"checkpoint": str(best), "device": first.train.device}
    out = Path(first.train.out)
    predict.predict(predict.PredictConfig(out=str(out), nifti=config.nifti, **shared), data)
    if config.prior_minutes:
        print("\nnow the priors over its codes, for new slices")
        codes = replace(second.codes, checkpoint=str(best))
        priors = train.train_prior(replace(second, data=data, codes=codes))
        new = out / "generated"
        generate.generate(replace(generated, prior=str(priors), out=str(new), **shared), data)
    print(f"open {out / results_page.NAME}")


if __name__ == "__main__":
    runtime.run_cli(main)
