"""The whole story in order: a study, the autoencoder, its scores, its priors and new slices.

    python driver.py                             # no data: makes a synthetic study first
    python driver.py --data keras_slices_data    # a real study, with the report's settings
    python driver.py --data keras_slices_data --preset best
    python driver.py --prior-slices 0            # reconstruction only

It takes the flags of train.py, except --resume and --weights. Flags of the training hold for the
autoencoder; --seed, --device and --bf16 hold for the priors too. Afterwards, open
Results/index.html: everything is on that page.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import generate
import predict
import train
import train_prior
from dataset import find_study
from support import phantom, results_page, runtime
from support.runtime import check_number, option

PHANTOM = Path("phantom_slices_data")  # made where there is no study
DOCUMENTED = Path(__file__).parent / "Results" / "phantom"  # the results of the run without flags
# Priors that have seen fewer slices are unsure of much, and their less likely codes are mostly
# wrong. So new slices are then made of likelier codes.
FEW_SLICES = 10_000
CAUTIOUS = {"top_temperature": 0.2, "top_spread": 4.0, "bottom_temperature": 0.2}
# What is compared with the documented run, to three digits. A processor that rounds otherwise
# trains other weights: between two of them, scores of reconstructions had these standard
# deviations. It also draws other new slices, whose scores have standard errors of their own.
SCORES = {
    ("ssim_report", "mean"): 0.0005,
    ("psnr", "mean"): 0.04,
    ("dice", "decoded", "mean", "mean"): 0.004,
}
SCORES_OF_SAMPLES = ("plausible", "kernel_distance")


@dataclass(frozen=True)
class DriverConfig:
    """What follows the autoencoder."""

    nifti: bool = option(False, "write the reconstructions as NIfTI too")
    n: int = option(64, "slices to sample")
    prior_slices: int = option(-1, "slices that the priors see; 0: no priors; -1: the preset's")

    def __post_init__(self) -> None:
        check_number("n", self.n, least=1)
        check_number("prior_slices", self.prior_slices, least=-1)


def scores_of(folder: Path) -> dict[str, tuple[float | None, float]]:
    """{score: (value, what chance changes it by)} of the run in `folder`; None for no value."""
    metrics = results_page.read_json(folder / "metrics.json", "provenance")
    report = results_page.read_json(folder / "generated" / "report.json", "manifest", "provenance")
    scores = {".".join(key): (results_page.at(metrics, *key), by) for key, by in SCORES.items()}
    for key in SCORES_OF_SAMPLES:
        kinds = ("rows", "errors")
        value, error = (results_page.at(report, "realism", of, "samples", key) for of in kinds)
        scores[f"samples.{key}"] = value, error or 0.0
    return scores


def compare_with_documented(out: Path, expected: dict) -> None:
    """Say whether the run in `out` has the scores of the documented one, or by how much not."""
    differences = []
    for name, (ours, error) in scores_of(out).items():
        theirs, its_error = expected[name]
        if None not in (ours, theirs) and f"{ours:.3g}" != f"{theirs:.3g}":
            chance = abs(ours - theirs) < 2 * math.hypot(error, its_error)
            difference = f"{name} {ours:.4f} instead of {theirs:.4f}"
            differences.append(difference + " (chance)" * chance)
    print(f"compared with Results/phantom: {'; '.join(differences) or 'as documented'}")


def main() -> None:
    configs = train.StartConfig, DriverConfig, *train.CONFIGS.values()
    everyday, without = (*train.EVERYDAY, "n", "prior_slices"), ("resume", "weights")
    parser = runtime.parser(__doc__, *configs, everyday=everyday, without=without)
    given = vars(parser.parse_args())
    config = runtime.fill(DriverConfig, given)
    synthetic = find_study(given.get("data", "")) is None
    preset = given.get("preset") or ("quick" if synthetic else "report")
    first = train.make_settings(given | {"preset": preset})

    # A mistake in what only the second half needs is found before the first half has run.
    priors = {name: getattr(first.train, name) for name in ("out", "device", "seed", "bf16")}
    priors["preset"] = "quick" if preset == "quick" else "best"
    if config.prior_slices > 0:
        priors["slices"] = config.prior_slices
    second = train_prior.make_settings(priors)
    sampling = CAUTIOUS if second.train.slices < FEW_SLICES else {}
    generated = generate.GenerateConfig(n=config.n, seed=first.train.seed, **sampling)

    data, out, documented = first.data, Path(first.train.out), scores_of(DOCUMENTED)
    if synthetic:
        print("no study here and no --data: making a synthetic one")
        data = replace(data, data=str(phantom.write_phantom(PHANTOM)))
    best = train.train_autoencoder(replace(first, data=data))
    shared = {"checkpoint": str(best), "device": first.train.device}
    predict.predict(predict.PredictConfig(out=str(out), nifti=config.nifti, **shared), data)
    if config.prior_slices:
        print("\nnow the priors over its codes, for new slices")
        codes = replace(second.codes, checkpoint=str(best))
        prior = train_prior.train_prior(replace(second, data=data, codes=codes))
        new = str(out / "generated")
        generate.generate(replace(generated, prior=str(prior), out=new, **shared), data)
    if synthetic and not given.keys() - {"out", "cache", "device"}:
        compare_with_documented(out, documented)
    print(f"open {out / results_page.NAME}")


if __name__ == "__main__":
    runtime.run_cli(main)
