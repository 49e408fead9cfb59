"""Rate against distortion on a test split: trained models beside JPEG, JPEG 2000, WebP and AVIF.

    python -m benchmarks.rate_distortion Results/vqvae2_best.pth --prior Results/prior_best.pth
    python -m benchmarks.rate_distortion low.pth middle.pth high.pth --below 100 --sets abdomen heart

A model's bits are counted in up to three ways: nominal (log2 K for each code), by the entropy of
its code histogram over the slices, and by the bound on -log2 p of those codes under its prior, if
one is given. Patients numbered below
--below are one set and the others the second, as in per_set.py; a study with only one of them is
one set.

Writes rate_distortion.json and rate_distortion.png to --out.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

import predict
from benchmarks import image_codecs
from benchmarks.per_set import study_sets
from dataset import DataConfig, SliceDataset, in_parallel
from generate import GenerateConfig, load_models
from modules import VQVAE2, load_model
from new_slices import sample_report
from new_slices.code_maps import LEVELS
from new_slices.prior import Prior
from support import figures, runtime

SCORES = {"ssim_report": "SSIM report", "ssim_standard": "SSIM standard", "psnr": "PSNR dB"}


class Contender(NamedTuple):
    """A model, its prior if there is one, the scores of every slice, and its maps: codes (N, h, w)
    and masks.
    """

    model: VQVAE2
    prior: Prior | None
    scores: list[dict[str, float]]
    maps: dict[str, np.ndarray]


def named_sets(patients: np.ndarray, below: int, names: list[str]) -> dict[str, np.ndarray]:
    """The sets of per_set.py, under `names` if given; a study of one set is "all"."""
    sets = study_sets(patients, below)
    if len(sets) == 1:
        return {"all": np.ones(len(patients), bool)}
    return sets if names[0] is None else dict(zip(names, sets.values(), strict=True))


def labels(checkpoints: list[str]) -> list[str]:
    """Short names of the models: folder and file where that tells them apart, else the path as
    given.
    """
    short = ["/".join(Path(path).with_suffix("").parts[-2:]) for path in checkpoints]
    return short if len(set(short)) == len(short) else checkpoints


def pair_up(checkpoints: list[str], priors: list[str]) -> dict[str, str]:
    """checkpoint -> its prior. A prior that belongs to none goes to the first, where `load_models`
    refuses it.
    """
    digests = {runtime.sha256(path): path for path in checkpoints if Path(path).is_file()}
    pairs = {}
    for prior in priors:
        learnt = runtime.load_checkpoint(prior, "prior")["autoencoder_sha256"]
        pairs[digests.get(learnt, checkpoints[0])] = prior
    return pairs


def score(path: str, prior: str | None, test: SliceDataset, args) -> Contender:
    if prior:
        *_, model, priors = load_models(
            GenerateConfig(checkpoint=path, prior=prior, device=args.device)
        )
    else:
        model, priors = load_model(path).model, None
        model.to(runtime.pick_device(args.device))
    print(f"{path}{f' with {prior}' if prior else ''}")
    return Contender(model, priors, *predict.score_split(model, test, args.batch_size, None))


def in_set(contender: Contender, test: SliceDataset, chosen: np.ndarray) -> dict:
    """Score a model on the slices `chosen` (N,) bool: intervals, patients, rates and codes used."""
    patients = [f"{test.names[i].patient:03d}" for i in np.flatnonzero(chosen)]
    scores = [scores for scores, wanted in zip(contender.scores, chosen, strict=True) if wanted]
    codes = {level: contender.maps[level][chosen] for level in LEVELS}
    found = predict.rates(contender.model, codes, *test.pixels.shape[1:])
    found = predict.summarise(scores, patients) | found
    if contender.prior:
        pixels = test.pixels[0].size
        rate = sample_report.likelihood(
            contender.prior, list(codes.values()), test.positions[chosen], pixels
        )
        found["bits_per_pixel"]["prior"] = rate["bits_per_pixel"]
    return found


def sweep(test: SliceDataset, codecs: dict[str, image_codecs.Codec]) -> list[image_codecs.Points]:
    """Send every slice through every codec at every quality, in file order."""

    def one(index: int) -> image_codecs.Points:
        return image_codecs.sweep_slice(test.images([index])[0, 0].numpy(), codecs)

    return list(in_parallel(one, range(len(test)), "image codecs", "slice"))


def rate_panel(curves: image_codecs.Curves, models: dict[str, dict]) -> tuple[dict, dict]:
    """One panel of figures.rate_distortion: the codecs' curves and the models' points, by name."""
    lines = {
        codec: image_codecs.curve_points(curve, "ssim_report") for codec, curve in curves.items()
    }
    points = {}
    for name, found in models.items():
        ssim = found["ssim_report"]["mean"]
        rates = found["bits_per_pixel"].items()
        points[name] = {kind.replace("_", " "): (bits, ssim) for kind, bits in rates}
    return lines, points


def print_set(title: str, board: dict, curves: image_codecs.Curves, rates: list[float]) -> None:
    print(
        f"\n{title}: {board['n']} slices of {board['people']} people; SSIM of the report's protocol / PSNR in dB"
    )
    print(
        f"{'bits per pixel':<34}" + "".join(f"{rate:>16.4g}" for rate in rates) + f"{'headers':>10}"
    )
    for codec, curve in curves.items():
        cells = (
            [image_codecs.score_at(curve, score, rate) for score in ("ssim_report", "psnr")]
            for rate in rates
        )
        shown = ("-" if ssim is None else f"{ssim:.4f} / {psnr:.2f}" for ssim, psnr in cells)
        size = board["codecs"][codec]["overhead_bits_per_pixel"]
        print(f"{codec:<34}" + "".join(f"{cell:>16}" for cell in shown) + f"{size:>10.3f}")
    print(f"{'model':<34}" + "".join(f"{name:>16}" for name in SCORES.values()))
    for name, model in board["models"].items():
        print(f"{name:<34}" + "".join(f"{model[score]['mean']:>#16.4g}" for score in SCORES))
    print(
        f"{'for the same SSIM, report':<34}{'bits per pixel':>16}"
        + "".join(f"{c:>16}" for c in curves)
    )
    for name, model in board["models"].items():
        for kind, bits in model["bits_per_pixel"].items():
            needs = (
                codec["bits_per_pixel_for"]["ssim_report"] for codec in model["codecs"].values()
            )
            cells = (
                "-" if need is None else f"{need:.3f} ({need / bits - 1:+.0%})" for need in needs
            )
            print(
                f"{f'{name}, {kind}':<34}{bits:>16.3f}" + "".join(f"{cell:>16}" for cell in cells)
            )


def parse_flags():
    parser = runtime.parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument(
        "--prior", nargs="+", default=[], metavar="FILE", help="priors of the checkpoints"
    )
    parser.add_argument("--data", default="", help="study folder; empty is the first checkpoint's")
    parser.add_argument(
        "--below", type=int, default=100, help="patients below are one set, the rest another"
    )
    parser.add_argument(
        "--sets", nargs=2, default=[None, None], metavar="NAME", help="what to call them"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.2, 0.4, 0.5625, 0.703])
    parser.add_argument(
        "--avif-speed", type=int, default=2, help="0 is best and slowest, 6 is Pillow's own"
    )
    parser.add_argument("--out", default="benchmarks/results", help="folder to write to")
    parser.add_argument("--batch-size", type=int, default=32, help="slices at a time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--cache", default="", help="decoded slices; empty is ~/.cache/vqvae2-slices"
    )
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse_flags()
    image_codecs.check()
    out, pairs = runtime.writable_folder(args.out), pair_up(args.checkpoints, args.prior)
    models, test = {}, None
    for path, name in zip(args.checkpoints, labels(args.checkpoints), strict=True):
        data = DataConfig(data=args.data or (str(test.study) if test else ""), cache=args.cache)
        own = predict.open_splits(load_model(path), data)["test"]
        if test and own.pixels.shape != test.pixels.shape:
            parser.error(
                f"{path}: trained at another size than {args.checkpoints[0]}; expected one size"
            )
        test, models[name] = own, score(path, pairs.get(path), own, args)
    codecs, size = image_codecs.with_avif_speed(args.avif_speed), test.pixels.shape[1:]
    points, patients = sweep(test, codecs), np.array([name.patient for name in test.names])

    result, panels = {"sets": {}}, {}
    for title, chosen in named_sets(patients, args.below, args.sets).items():
        curves = image_codecs.mean_curves([points[i] for i in np.flatnonzero(chosen)])
        board = {"n": int(chosen.sum()), "people": len(set(patients[chosen])), "models": {}}
        board["codecs"] = image_codecs.scoreboard(curves, *size, codecs)
        for name, contender in models.items():
            found = in_set(contender, test, chosen)
            means = {score: found[score]["mean"] for score in SCORES}
            beside = image_codecs.compare(curves, found["bits_per_pixel"], means)
            board["models"][name] = found | {"codecs": beside}
        print_set(title, board, curves, args.rates)
        result["sets"][title] = board
        panels[f"{title} (n = {board['n']})"] = rate_panel(curves, board["models"])
    print(
        f"\nAVIF at speed {args.avif_speed}; headers: that part of a codec's bits per pixel, of the whole file"
    )
    result |= {
        "data": {"study": test.study.resolve().name, "fingerprint": test.fingerprint},
        "checkpoints": {path: runtime.sha256(path) for path in (*args.checkpoints, *args.prior)},
        "pillow": PIL.__version__,
        "provenance": runtime.provenance(),
    }
    runtime.write_json(out / "rate_distortion.json", predict.rounded(result))
    figures.rate_distortion(out / "rate_distortion.png", panels, predict.SYNTHETIC * test.synthetic)
    print(f"wrote {out}/: rate_distortion.json, rate_distortion.png")


if __name__ == "__main__":
    runtime.run_cli(main)
