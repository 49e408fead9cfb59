"""Rate against distortion on a test split: trained models beside JPEG, JPEG 2000, WebP and AVIF.

    python -m benchmarks.rate_distortion Results/vqvae2_best.pth --prior Results/prior_best.pth
    python -m benchmarks.rate_distortion low.pth high.pth --below 100 --sets abdomen heart

A model's bits are counted in up to five ways: nominal (log2 K for each code), by the entropy of
its code histogram over the slices, and, if a prior is given, by the bound on -log2 p of those codes
under it. With --files also by the size of the files that `reconstruct.py --save` writes, one a
slice and one a volume, and all else is of the codes in these files; then AVIF codes whole volumes
too. Patients numbered below --below are one set and the others the second, as in per_set.py; a
study with only one of them is one set.

Writes rate_distortion.json and rate_distortion.png to --out.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import PIL
import torch
from matplotlib.lines import Line2D
from tqdm import tqdm

import predict
from benchmarks import image_codecs
from benchmarks.per_set import study_sets
from dataset import DataConfig, SliceDataset, in_parallel, open_trained_study
from generate import GenerateConfig, load_models
from modules import VQVAE2, Trained, load_model
from new_slices.code_files import Coded, Coder
from new_slices.code_maps import LEVELS
from new_slices.prior import Prior
from reconstruct import ReconstructConfig, reconstruct_file
from support import figures, nifti, runtime

# The first six colours of matplotlib are the codecs', with AVIF of whole volumes.
MODEL_COLOURS = ("black", *(f"tab:{name}" for name in ("pink", "olive", "cyan", "gray")))
# By the way of counting bits.
MARKERS = {"nominal": "o", "code entropy": "s", "prior": "D", "slice file": "^", "volume file": "v"}
SCORES = {"ssim_report": "SSIM report", "ssim_standard": "SSIM standard", "psnr": "PSNR dB"}
DRAWN = {"ssim_report": "SSIM, the report's protocol", "psnr": "PSNR, dB"}


class Contender(NamedTuple):
    """A model, its prior if any, every slice's scores, its codes (N, h, w) by level, and with a
    coder the "bits" (N,) of its file.
    """

    model: VQVAE2
    prior: Prior | None
    coder: Coder | None
    scores: list[dict[str, float]]
    maps: dict[str, np.ndarray]


def named_sets(patients: np.ndarray, below: int, names: list[str]) -> dict[str, np.ndarray]:
    """The sets of per_set.py, under `names` if given; a study of one set is "all"."""
    sets = study_sets(patients, below)
    if len(sets) == 1:
        return {"all": np.ones(len(patients), bool)}
    return sets if names[0] is None else dict(zip(names, sets.values(), strict=True))


def labels(checkpoints: list[str]) -> list[str]:
    """Short names of the models: folder and file where these differ, else the path as given."""
    short = ["/".join(Path(path).with_suffix("").parts[-2:]) for path in checkpoints]
    return short if len(set(short)) == len(short) else checkpoints


def pair_up(checkpoints: list[str], priors: list[str]) -> dict[str, str]:
    """checkpoint -> its prior. One of none of them goes to the first: `load_models` refuses it."""
    digests = {runtime.sha256(path): path for path in checkpoints if Path(path).is_file()}
    pairs = {}
    for prior in priors:
        learnt = runtime.load_checkpoint(prior, "prior")["autoencoder_sha256"]
        pairs[digests.get(learnt, checkpoints[0])] = prior
    return pairs


def score(path: str, prior: str | None, test: SliceDataset, args) -> Contender:
    if prior:
        config = GenerateConfig(checkpoint=path, prior=prior, device=args.device)
        *_, trained, priors = load_models(config)
    else:
        trained, priors = load_model(path), None
        trained.model.to(runtime.pick_device(args.device))
    print(f"{path}{f' with {prior}' if prior else ''}")
    if prior and args.files:
        coder = Coder(trained, prior, args.device)
        return Contender(trained.model, priors, coder, *through_files(trained, test, coder))
    found = predict.score_split(trained.model, test, args.batch_size, None)
    return Contender(trained.model, priors, None, *found)


def through_files(
    trained: Trained, test: SliceDataset, coder: Coder
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Of every slice the scores of what its file of codes gives back; the file's codes and bits."""
    scores, maps = [], {name: [] for name in (*LEVELS, "bits")}
    with TemporaryDirectory() as folder:
        config = ReconstructConfig(out=folder, save=folder)
        for path in tqdm(test.paths, desc="files of codes", unit="slice", disable=None):
            row = reconstruct_file(trained, str(path), path.name, config, coder)
            scores.append({score: row[score] for score in SCORES})
            *_, coded = coder.unpack(config.save_as(path.name).read_bytes())
            for name, value in zip(maps, (*coded.top, *coded.bottom, row["bits"]), strict=True):
                maps[name].append(value)
    return scores, {name: np.stack(found) for name, found in maps.items()}


def in_set(contender: Contender, test: SliceDataset, chosen: np.ndarray) -> dict:
    """Score a model on the slices `chosen` (N,) bool: intervals, patients, rates and codes used."""
    patients = [f"{patient:03d}" for patient in test.patients[chosen]]
    scores = [scores for scores, wanted in zip(contender.scores, chosen, strict=True) if wanted]
    codes = {level: contender.maps[level][chosen] for level in LEVELS}
    pixels = test.shapes[chosen].prod(1)  # of the slices' own files
    result = predict.rates(contender.model, codes, int(pixels.sum()))
    result = predict.summarise(scores, patients) | result
    if contender.prior:
        bits = prior_bits(contender.prior, codes, test.positions[chosen])
        result["bits_per_pixel"]["prior"] = bits / int(pixels.sum())
    if contender.coder:
        groups = volumes(test, np.flatnonzero(chosen))
        sizes = sum(file_size(contender, test, group) for group in groups)
        bits = {"slice": int(contender.maps["bits"][chosen].sum()), "volume": 8 * sizes}
        files = {f"{kind}_file": count / int(pixels.sum()) for kind, count in bits.items()}
        result["bits_per_pixel"] |= files
    return result


@torch.inference_mode()
def prior_bits(prior: Prior, codes: dict[str, np.ndarray], positions: np.ndarray) -> float:
    """The bound on -log2 p of all these code maps, (N, h, w) a level, by two masks of each map."""
    device, nats = next(prior.parameters()).device, 0.0
    maps = [torch.from_numpy(codes[level].astype(np.int64)).to(device) for level in LEVELS]
    at = torch.as_tensor(positions, device=device)
    for seed, part in product(range(2), torch.arange(len(at)).split(16)):
        random = torch.Generator().manual_seed(1_000_003 * seed + int(part[0]))
        known = (level[part] for level in maps)
        found = prior(*known, at[part], prior.as_it_is(len(part)), generator=random)
        for level, codes_of in zip(LEVELS, maps, strict=True):
            nats += found[level].sum().item() * codes_of[0].numel()
    return nats / 2 / math.log(2)


def volumes(test: SliceDataset, indices: np.ndarray) -> list[list[int]]:
    """The slices `indices` (n,) by the volume that they are of."""
    return [list(group) for _, group in groupby(indices, lambda i: test.names[i][:2])]


def file_size(contender: Contender, test: SliceDataset, indices: Sequence[int]) -> int:
    """Bytes of one file of the codes of these slices, all headers counted."""
    scale = np.random.default_rng(0).random((len(indices), 2), np.float32)  # as large as any other
    coded = Coded(*(contender.maps[level][indices] for level in LEVELS), scale)
    header = nifti.read(test.paths[indices[0]]).header
    return len(contender.coder.pack(header, "", coded)[0])


def sweep(test: SliceDataset, codecs: dict[str, image_codecs.Codec]) -> list[image_codecs.Points]:
    """Send every slice through every codec at every quality, in file order."""

    def one(index: int) -> image_codecs.Points:
        return image_codecs.sweep_slice(test.images([index])[0, 0].numpy(), codecs)

    return list(in_parallel(one, range(len(test)), "image codecs", "slice"))


def add_volumes(points: list[image_codecs.Points], test: SliceDataset, codec) -> None:
    """Add what AVIF makes of whole volumes to the points of their slices."""
    for group in volumes(test, np.arange(len(test))):
        planes = test.images(group)[:, 0].numpy()
        for index, found in zip(group, image_codecs.sweep_volume(planes, codec), strict=True):
            points[index] |= found


def rate_panel(curves: image_codecs.Curves, models: dict[str, dict], score: str) -> tuple:
    """One panel of `draw`: the codecs' curves and the models' points, by name."""
    lines = {codec: image_codecs.curve_points(curve, score) for codec, curve in curves.items()}
    points = {}
    for name, model in models.items():
        rates, mean = model["bits_per_pixel"].items(), model[score]["mean"]
        points[name] = {kind.replace("_", " "): (bits, mean) for kind, bits in rates}
    return lines, points


def print_set(title: str, board: dict, curves: image_codecs.Curves, rates: list[float]) -> None:
    """Each codec at the rates, each model, and the bits that codecs need for each model's SSIM."""
    print(f"\n{title}: {board['n']} slices, {board['people']} people; SSIM, report / PSNR, dB")
    heads = "".join(f"{rate:>16.4g}" for rate in rates)
    print(f"{'bits per pixel':<34}{heads}{'headers':>10}")
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
    heads = "".join(f"{codec:>16}" for codec in curves)
    print(f"{'for the same SSIM, report':<34}{'bits per pixel':>16}{heads}")
    for name, model in board["models"].items():
        for kind, bits in model["bits_per_pixel"].items():
            needs = [c["bits_per_pixel_for"]["ssim_report"] for c in model["codecs"].values()]
            cells = ["-" if b is None else f"{b:.3f} ({b / bits - 1:+.0%})" for b in needs]
            row = "".join(f"{cell:>16}" for cell in cells)
            print(f"{f'{name}, {kind}':<34}{bits:>16.3f}{row}")


def draw(path: Path | str, panels: Mapping[str, Mapping[str, tuple]], note: str = "") -> None:
    """Scores over bits per pixel, a column for each set: codecs are curves, models points.

    A model has one point for each way of counting its bits, joined by a line of its colour.

    Args:
        panels: score -> title of the set -> (codec -> (bits (Q,), scores (Q,)), model -> way of
            counting -> its point).
    """
    columns = len(next(iter(panels.values())))
    figure = figures.new_figure(4.6 * columns + 2.4, 4.2 * len(panels) + 0.4)
    figure.suptitle(note, fontsize=10)
    every_axes = figure.subplots(len(panels), columns, squeeze=False)
    legend: dict[str, dict[str, Line2D]] = {"image codecs": {}, "models": {}, "bits counted by": {}}
    drawn = ((score, *one) for score, row in panels.items() for one in row.items())
    for axes, (score, title, (codecs, models)) in zip(every_axes.flat, drawn, strict=True):
        for i, (name, curve) in enumerate(codecs.items()):
            (legend["image codecs"][name],) = axes.plot(*curve, color=f"C{i}", lw=1.5, label=name)
        for (name, counted), colour in zip(models.items(), cycle(MODEL_COLOURS), strict=False):
            line = {"color": colour, "lw": 2.5, "label": name, "zorder": 3}
            (legend["models"][name],) = axes.plot(*np.transpose([*counted.values()]), **line)
            for way, point in counted.items():
                marker = {"marker": MARKERS[way], "ls": "", "label": way}
                axes.plot(*point, color=colour, zorder=4, **marker)
                legend["bits counted by"][way] = Line2D([], [], color="black", **marker)
        _zoom_to_models(axes, codecs, models)
        axes.set(title=title, xlabel="bits per pixel", ylabel=score)
        axes.grid(alpha=0.3)
    # One legend for all panels. A heading is an entry without a line.
    entries = {}
    for heading, lines in legend.items():
        entries |= {f"{heading}:": Line2D([], [], ls="")} | lines
    figure.legend(entries.values(), entries, loc="outside right upper", fontsize=8)
    figures.save(figure, path)


def _zoom_to_models(axes, codecs: Mapping[str, tuple], models: Mapping[str, Mapping]) -> None:
    """Show what can be compared: the models' points, and the curves near their rates."""
    bits, scores = np.array([point for counted in models.values() for point in counted.values()]).T
    left, right = 0.5 * bits.min(), 1.3 * bits.max()
    at_the_ends = [np.interp((left, right), *curve) for curve in codecs.values()]
    low, high = min(scores.min(), np.min(at_the_ends)), max(scores.max(), np.max(at_the_ends))
    margin = 0.05 * (high - low)
    axes.set(xlim=(0.9 * left, 1.02 * right), ylim=(low - margin, high + margin))


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
    parser.add_argument(
        "--files", action="store_true", help="size of files too, a second a slice; needs --prior"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.2, 0.4, 0.5625, 0.703])
    parser.add_argument("--out", default="benchmarks/results", help="folder to write to")
    parser.add_argument("--batch-size", type=int, default=32, help="slices at a time")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--cache", default="", help="decoded slices; empty is ~/.cache/vqvae2-slices"
    )
    return parser, parser.parse_args()


def main() -> None:
    parser, args = parse_flags()
    out, pairs = runtime.writable_folder(args.out), pair_up(args.checkpoints, args.prior)
    models, test = {}, None
    for path, name in zip(args.checkpoints, labels(args.checkpoints), strict=True):
        data = DataConfig(data=args.data or (str(test.study) if test else ""), cache=args.cache)
        own = open_trained_study(load_model(path).study, data, path)["test"]
        if test and own.pixels.shape != test.pixels.shape:
            parser.error(
                f"{path}: trained at another size than {args.checkpoints[0]}; expected one size"
            )
        test, models[name] = own, score(path, pairs.get(path), own, args)
    codecs, size = dict(image_codecs.CODECS), test.pixels.shape[1:]
    points, patients = sweep(test, codecs), test.patients

    if args.files:
        add_volumes(points, test, codecs["AVIF"])
        codecs |= dict.fromkeys(("AVIF tall", "AVIF film"), codecs["AVIF"])

    result, panels = {"sets": {}}, {label: {} for label in DRAWN.values()}
    for title, chosen in named_sets(patients, args.below, args.sets).items():
        curves = image_codecs.mean_curves([points[i] for i in np.flatnonzero(chosen)])
        board = {"n": int(chosen.sum()), "people": len(set(patients[chosen])), "models": {}}
        board["codecs"] = image_codecs.scoreboard(curves, *size, codecs)
        for name, contender in models.items():
            scores = in_set(contender, test, chosen)
            means = {score: scores[score]["mean"] for score in SCORES}
            beside = image_codecs.compare(curves, scores["bits_per_pixel"], means)
            board["models"][name] = scores | {"codecs": beside}
        print_set(title, board, curves, args.rates)
        result["sets"][title] = board
        for score_name, label in DRAWN.items():
            panel = rate_panel(curves, board["models"], score_name)
            panels[label][f"{title} (n = {board['n']})"] = panel
    speed = image_codecs.CODECS["AVIF"].settings[0]["speed"]
    print(f"\nAVIF at speed {speed}; headers are part of each codec's bits per pixel")
    result |= {
        "data": {"study": test.study.resolve().name, "fingerprint": test.fingerprint},
        "checkpoints": {path: runtime.sha256(path) for path in (*args.checkpoints, *args.prior)},
        "pillow": PIL.__version__,
        "provenance": runtime.provenance(),
    }
    runtime.write_json(out / "rate_distortion.json", result)
    draw(out / "rate_distortion.png", panels, predict.SYNTHETIC * test.synthetic)
    print(f"wrote {out}/: rate_distortion.json, rate_distortion.png")


if __name__ == "__main__":
    runtime.run_cli(main)
