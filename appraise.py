"""What samples are worth: likelihood, realism, variety and copying, beside what real slices and worthless ones score.

Models, splits and samples in; a report and the arrays for its pictures out. No files; a table is printed.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import realism
from codes import Samples, decode
from dataset import SliceDataset
from modules import VQVAE2
from prior import Prior

NEAR, FEWEST = 0.1, 8  # with --position, real slices as near as this, or this many, stand beside the samples
MOST_TRAIN = 512  # training slices whose likelihood is measured, and positive controls of the audit
MARGIN = 1.1  # a control that is not worse than the samples by this factor scores like them
SMALLEST = 16  # side of a slice whose realism can be measured
CONTROLS = ("random codes", "histogram codes", "mean image")
LOWER_IS_BETTER = ("frechet", "spectrum_db", "histogram_z")
PROTOCOL = {
    "likelihood": "exact, of the code maps given the slice's position; nominal: log2 K bits a code",
    "realism": "n slices a row against n real test slices. encoder: the top encoder's output before "
    "quantisation, pooled; plain: pooled intensity and gradient statistics; pixels: root mean square in dB of "
    "mean spectra, Wasserstein-1 distance of intensities in z units. floor: real validation slices",
    "controls": "uniform random codes; each code drawn from the training histogram of its place; the mean "
    f"training image. Not worse than the samples by a factor of {MARGIN}: the metric tells nothing here",
    "variety": "mean pairwise MS-SSIM of the samples, and of real test slices at the same positions",
    "copying": "the most similar of all training slices and their mirror images, by the correlation of pictures and "
    "by the codes in common, each weighed by its bits in the training histogram of its place; flagged: nearer than "
    "the 1st percentile of real test slices (honest; with --position those near it); margin: the share that 19 in 20 "
    "honest sets keep to; copies: training slices against others of the same patient, or against themselves where "
    "there are none; "
    "reconstructions: of the test slices, flagged for no more than what decoding does to a slice; "
    "correlation_of_flagged: median, of the pictures of samples flagged by their codes and of those training slices",
    "bounds": "bounds the copying of these samples under these measures; no guarantee of privacy. Not for "
    "diagnosis",
}


def near(split: SliceDataset, position: float) -> np.ndarray:
    """The indices of the slices at about that position; of all slices for NaN."""
    distance = np.abs(split.positions - position)
    some = max(FEWEST, np.count_nonzero(distance <= NEAR))
    return np.arange(len(split)) if math.isnan(position) else np.argsort(distance, kind="stable")[:some]


# ---- what they are worth -------------------------------------------------------------------------


class Encoded(NamedTuple):
    """A split under the autoencoder: codes (2, N, ...) uint16, as it is and mirrored; `realism.thumbnails`."""

    top: np.ndarray
    bottom: np.ndarray
    thumbnails: np.ndarray


def encoded_splits(splits: dict[str, SliceDataset], maps: dict[str, np.ndarray]) -> dict[str, Encoded]:
    """The splits with their code maps, which are those of `codes.extract_codes`."""
    found = {}
    for name, split in splits.items():
        parts = torch.arange(len(split)).split(64)
        thumbnails = [realism.thumbnails(split.images(part)[:, 0].numpy()) for part in parts]
        found[name] = Encoded(maps[f"{name}_top"], maps[f"{name}_bottom"], np.concatenate(thumbnails))
    return found


@torch.inference_mode()
def likelihood(prior: Prior, codes: Encoded, split: SliceDataset, indices: np.ndarray) -> dict:
    """Exact, of the slices `indices`, all and by patient: nats and bits a code, bits a pixel."""
    device, sums = next(prior.parameters()).device, []
    bar = tqdm(total=len(indices), desc=f"likelihood, {split.split}", unit=" slices", disable=None)
    for part in np.array_split(indices, math.ceil(len(indices) / 16)):
        maps = (torch.from_numpy(of[0, part].astype(np.int64)).to(device) for of in codes[:2])
        nats = prior.nats(*maps, torch.from_numpy(split.positions[part]).to(device))
        sums.append(torch.stack([nats[level].double() for level in ("top", "bottom")], 1).cpu())
        bar.update(len(part))
    bar.close()
    nats = torch.cat(sums).numpy()  # (n, 2)
    counts = np.array([codes.top[0, 0].size, codes.bottom[0, 0].size])

    def rate(nats: np.ndarray) -> dict:
        top, bottom = (nats.mean(0) / counts / math.log(2)).tolist()
        total = float(nats.sum(1).mean())
        result = {"n": len(nats), "nats_per_code": total / int(counts.sum()), "bits_top_code": top}
        result |= {"bits_bottom_code": bottom, "bits_per_code": result["nats_per_code"] / math.log(2)}
        return result | {"bits_per_pixel": total / math.log(2) / split.pixels[0].size}

    patients = np.array([f"{split.names[i].patient:03d}" for i in indices])
    return rate(nats) | {
        "patients": {one: rate(nats[patients == one]) for one in np.unique(patients).tolist()}
    }


@torch.inference_mode()
def encoder_features(model: VQVAE2, images: np.ndarray) -> np.ndarray:
    """The top encoder's output before quantisation, pooled: (N, 4 D)."""
    device, parts = next(model.parameters()).device, torch.from_numpy(images[:, None]).split(16)
    maps = (model.encoder_top(model.encoder_bottom(part.to(device))) for part in parts)
    return np.concatenate([realism.pooled_features(each) for each in maps])


def table_rows(
    model: VQVAE2,
    splits: dict,
    encoded: dict[str, Encoded],
    reconstructions: np.ndarray,
    samples: np.ndarray,
    position: float,
    seed: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Real test slices, and the slices of every row of the realism table: all (n, H, W), one n."""
    rng = np.random.default_rng(seed)
    test, validate = (near(splits[name], position) for name in ("test", "validate"))
    n = min(len(samples), len(test), len(validate))
    test, validate = rng.permutation(test)[:n], rng.permutation(validate)[:n]
    train, levels = splits["train"], encoded["train"][:2]

    def control(codes: list[np.ndarray]) -> np.ndarray:
        return decode(model, *(torch.from_numpy(of.astype(np.int64)) for of in codes))[0]

    uniform = [rng.integers(model.config.K, size=(n, *of.shape[2:])) for of in levels]
    # each code is that of a training slice drawn for its place alone
    placed = [
        np.take_along_axis(of[0], rng.integers(len(train), size=(n, *of.shape[2:])), 0) for of in levels
    ]
    mean = sum(train.images(part)[:, 0].numpy().sum(0) for part in np.array_split(np.arange(len(train)), 64))
    return splits["test"].images(test)[:, 0].numpy(), {
        "floor": splits["validate"].images(validate)[:, 0].numpy(),
        "reconstructions": reconstructions[test],
        "samples": samples[rng.permutation(len(samples))[:n]],
        "random codes": control(uniform),
        "histogram codes": control(placed),
        "mean image": np.repeat(mean[None] / len(train), n, 0),
    }


def score_realism(model: VQVAE2, real: np.ndarray, rows: dict[str, np.ndarray]) -> dict[str, dict]:
    """Of every row against real slices (n, H, W): {space: {row: {metric: value}}}."""
    spaces = {"encoder": lambda images: encoder_features(model, images), "plain": realism.plain_features}
    n, spectrum, table = len(real), realism.power_spectrum(real), {}
    for space, features in spaces.items():
        of_real = features(real)
        table[space] = {
            row: realism.compare(of_real, features(of), n, min(5, n - 1)) for row, of in rows.items()
        }
    table["pixels"] = {
        row: {
            "spectrum_db": realism.spectrum_distance(spectrum, realism.power_spectrum(of)),
            "histogram_z": realism.histogram_distance(real, of),
        }
        for row, of in rows.items()
    }
    return table


def doubts(table: dict[str, dict]) -> list[str]:
    """Sentences that name every metric by which a negative control is not worse than the samples."""
    found: dict[tuple[str, str], list[str]] = {}
    for space, rows in table.items():
        for metric in rows["samples"]:
            sign = 1 if metric in LOWER_IS_BETTER else -1
            of = {row: sign * scores[metric] for row, scores in rows.items()}
            slack = (MARGIN - 1) * abs(of["samples"])
            alike = [row for row in CONTROLS if of[row] <= of["samples"] + slack]
            if alike:
                # where real slices do score better the metric is sound, and the samples are at fault
                sound = min(of[row] for row in alike) > of["floor"]
                why = f"{', '.join(alike)} score as well as the samples" + " (not as real slices)" * sound
                found.setdefault((space, why), []).append(metric)
    return [f"{space} {', '.join(of)}: tells nothing here, {why}" for (space, why), of in found.items()]


def search(measure: Callable, queries: np.ndarray, train: np.ndarray, bar: tqdm) -> realism.Nearest:
    """`measure`, a few queries at a time."""
    parts = []
    for start in range(0, len(queries), 32):
        parts.append(measure(queries[start : start + 32], train))
        bar.update(len(parts[-1].index))
    return realism.Nearest(*map(np.concatenate, zip(*parts, strict=True)))


def known_copies(measure: Callable, train: np.ndarray, names: list, seed: int) -> np.ndarray:
    """The similarity of some training slices to the most similar other one of the same patient."""
    chosen = np.random.default_rng(seed).permutation(len(names))[:MOST_TRAIN]
    patients, found = np.array([name.patient for name in names]), []
    for patient in np.unique(patients[chosen]):
        mine = np.flatnonzero(patients == patient)
        asked = np.flatnonzero(np.isin(mine, chosen))
        if len(mine) > 1:
            found.append(measure(train[mine[asked]], train[mine], exclude=asked).similarity)
    return np.concatenate(found) if found else measure(train[chosen], train).similarity


def verdict(audit: dict) -> str:
    samples, copies = audit["samples"], audit["copies"]
    flagged = f"{samples['flagged']} of {samples['n']} samples flagged; {audit['margin']:.1%} could be chance"
    if samples["share"] > audit["margin"]:
        near = f"One sample in 100 is nearer than {samples['percentiles']['99']:.3f}"
        return f"COPIES: {flagged}. {near}, half of the known copies than {copies['percentiles']['50']:.3f}"
    if copies["share"] < 0.5:
        return f"cannot tell: flags only {copies['share']:.1%} of the known copies; {flagged}"
    return f"no copying beyond honest slices' own: {flagged}"


def score_copying(
    train: SliceDataset,
    encoded: dict[str, Encoded],
    reconstructions: np.ndarray,
    samples: Samples,
    honest: np.ndarray,
    K: int,
    seed: int,
) -> tuple[dict[str, dict], dict[str, dict]]:
    """By measure: the audit, with a verdict and every sample's nearest; and the `Nearest` of every set.

    `honest` are the indices of the test slices at the samples' position; `reconstructions` are of all test slices.
    """

    def flat(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.concatenate([top.reshape(len(top), -1), bottom.reshape(len(bottom), -1)], 1)

    codes = {name: flat(encoded[name].top[0], encoded[name].bottom[0]) for name in ("train", "test")}
    mirrored = flat(encoded["train"].top[1], encoded["train"].bottom[1])
    pictures = {name: encoded[name].thumbnails for name in ("train", "test")}
    queries = {
        "correlation": {
            "samples": realism.thumbnails(samples.images),
            "honest": pictures["test"][honest],
            "reconstructions": realism.thumbnails(reconstructions[honest]),
        },
        "code agreement": {"samples": flat(samples.top, samples.bottom), "honest": codes["test"][honest]},
    }
    everything = np.concatenate([codes["train"], mirrored])
    by_bits = partial(realism.code_agreement, bits=realism.code_bits(everything, K))
    sources = {  # how to measure, the training slices, and all that is searched
        "correlation": (realism.nearest, pictures["train"], pictures["train"]),
        "code agreement": (by_bits, codes["train"], everything),
    }
    bar = tqdm(
        total=sum(len(of) for sets in queries.values() for of in sets.values()), desc="copying", disable=None
    )
    report, found = {}, {}
    for name, sets in queries.items():
        by_codes = name == "code agreement"
        measure, mine, whole = sources[name]
        found[name] = {of: search(measure, items, whole, bar) for of, items in sets.items()}
        if by_codes:  # the second half of `everything` holds the mirror images
            found[name] = {
                of: best._replace(index=best.index % len(train), mirrored=best.index >= len(train))
                for of, best in found[name].items()
            }
        copies = known_copies(measure, mine, train.names, seed)
        values = {of: best.similarity for of, best in found[name].items()}
        result = realism.audit(values["samples"], values["honest"], copies)
        if not by_codes:
            result["reconstructions"] = realism.audit(values["reconstructions"], values["honest"], copies)[
                "samples"
            ]
        best = found[name]["samples"]
        result["verdict"] = verdict(result)
        result["nearest"] = [
            {"sample": i, "train": train.paths[best.index[i]].name, "mirrored": bool(best.mirrored[i])}
            | {"similarity": float(best.similarity[i])}
            for i in np.argsort(-best.similarity).tolist()
        ]
        report[name], found[name]["copies"] = result, copies
    bar.close()
    best, result = found["code agreement"]["samples"], report["code agreement"]
    flagged = best.similarity > result["threshold"]
    if flagged.any():  # have they more than codes in common with those slices?
        theirs = pictures["train"][best.index[flagged]]
        theirs = np.where(best.mirrored[flagged, None, None], theirs[:, ::-1], theirs)
        alike = np.median((queries["correlation"]["samples"][flagged] * theirs).sum((1, 2)))
        copies = report["correlation"]["copies"]["percentiles"]["50"]
        result["correlation_of_flagged"] = float(alike)
        result["verdict"] += (
            f". Pictures of the flagged correlate with those slices by {alike:.2f} (median), known "
        )
        result["verdict"] += f"copies by {copies:.2f}"
    return report, found


def appraise(
    model: VQVAE2,
    prior: Prior,
    splits: dict,
    maps: dict[str, np.ndarray],
    samples: Samples,
    twins: np.ndarray,
    position: float,
    seed: int,
) -> tuple[dict, dict]:
    """What samples are worth, beside what real slices score: the report, and the arrays for its pictures.

    `maps` are the splits' `codes.extract_codes`; `twins` (n,) are the test slices at the samples' positions. Too
    few or too small slices leave out realism.
    """
    encoded = encoded_splits(splits, maps)
    rng = np.random.default_rng(seed)
    some = {
        name: np.sort(rng.permutation(len(split))[: MOST_TRAIN if name == "train" else None])
        for name, split in splits.items()
    }
    height, width = splits["test"].pixels.shape[1:]
    report = {
        "n": len(samples.images),
        "likelihood": {"nominal_bits_per_pixel": model.config.bits_per_pixel(height, width)}
        | {name: likelihood(prior, encoded[name], split, some[name]) for name, split in splits.items()},
        "realism": None,
        "variety": None,
    }
    test = encoded["test"]
    maps = (torch.from_numpy(of[0].astype(np.int64)) for of in test[:2])
    reconstructions = decode(model, *maps)[0]
    real, rows = table_rows(model, splits, encoded, reconstructions, samples.images, position, seed)
    drawn = {"reconstructions": reconstructions, "spectra": {}}
    m = min(len(samples.images), len(np.unique(twins)))  # more would be the same real slices again
    if m >= 2 and len(real) >= 2 and min(height, width) >= SMALLEST:
        table = score_realism(model, real, rows)
        distances = [
            [table[s][r]["frechet"] for r in ("floor", "samples", *CONTROLS)] for s in ("encoder", "plain")
        ]
        ordered = all(f[0] < f[1] < min(f[2:]) for f in distances)
        report["realism"] = {"n": len(real), **table, "ordered": ordered, "doubts": doubts(table)}
        drawn["spectra"] = {
            row: realism.power_spectrum(of).mean(0) for row, of in {"real test": real, **rows}.items()
        }
        of_real = splits["test"].images(twins[:m])[:, 0].numpy()
        span = float(np.median(np.ptp(of_real, (1, 2))))
        pairs = {
            name: realism.mean_pairwise_ms_ssim(of, span, seed=seed)
            for name, of in (("samples", samples.images[:m]), ("real", of_real))
        }
        report["variety"] = {"n": m} | {k: {"ms_ssim": v, "standard_error": e} for k, (v, e) in pairs.items()}
    drawn["honest"] = near(splits["test"], position)
    report["copying"], drawn["nearest"] = score_copying(
        splits["train"], encoded, reconstructions, samples, drawn["honest"], model.config.K, seed
    )
    return report | {"protocol": PROTOCOL}, drawn


# ---- what is written and printed -----------------------------------------------------------------


def print_report(report: dict) -> None:
    rates = report["likelihood"]
    print(
        f"\n{'likelihood':<18}{'n':>6}{'nats/code':>11}{'bits/code':>11}{'bits/pixel':>12}   of the nominal"
    )
    nominal = rates["nominal_bits_per_pixel"]
    print(f"{'  nominal':<46}{nominal:>12.4f}")
    lines = [(name, rates[name]) for name in ("train", "validate", "test")]
    lines += [(f"  patient {patient}", of) for patient, of in rates["test"]["patients"].items()]
    for name, of in lines:
        bits = of["bits_per_pixel"]
        print(
            f"  {name:<16}{of['n']:>6}{of['nats_per_code']:>11.3f}{of['bits_per_code']:>11.3f}{bits:>12.4f}"
            f"   {bits / nominal - 1:+.1%}"
        )
    if report["realism"]:
        n = report["realism"]["n"]
        for space in ("encoder", "plain", "pixels"):
            rows = report["realism"][space]
            print(f"\nrealism, {space} (n = {n})".ljust(28) + "".join(f"{m:>13}" for m in rows["samples"]))
            for row, of in rows.items():
                print(f"  {row:<25}" + "".join(f"{value:>#13.4g}" for value in of.values()))
        for line in report["realism"]["doubts"]:
            print(f"  {line}")
        v = report["variety"]
        print(
            f"\nvariety (n = {v['n']}): mean pairwise MS-SSIM {v['samples']['ms_ssim']:.4f} of samples, "
            f"{v['real']['ms_ssim']:.4f} of real slices at the same positions"
        )
    for name, of in report["copying"].items():
        sets = (
            f"{k} {of[k]['flagged']}/{of[k]['n']}"
            for k in ("samples", "honest", "copies", "reconstructions")
            if k in of
        )
        print(f"copying by {name}: nearer than {of['threshold']:.4f} are {', '.join(sets)}. {of['verdict']}")
    print(PROTOCOL["bounds"])
