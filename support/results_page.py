"""Results/index.html: a run on one page, to open and to send.

One file without scripts, with its pictures inside. It is written from the files that lie in a
results folder; what is not there, or cannot be read, is left out. All numbers and the exact pixels
are in the files beside it.
"""

import base64
import json
from collections.abc import Mapping
from functools import cache
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from support import runtime

NAME, LOGS = "index.html", ("log.jsonl", "prior_log.jsonl")
SCORES = {  # of metrics.json
    "ssim_report": "SSIM, report",
    "ssim_standard": "SSIM, standard",
    "ssim_report_body": "report, body",
    "ssim_standard_body": "standard, body",
    "psnr": "PSNR, dB",
    "psnr_body": "PSNR, body",
    "mae": "MAE",
}
MASK_SOURCES = {  # where the masks of metrics.json's "dice" come from
    "decoded": "decoded from the codes",
    "unet": "a U-Net of equal cost on the original slices",
}
IN_SHORT = {  # of report.json's "scorecard"
    "new slices without impossible anatomy": "constraint",
    "new slices too close to a training slice": "privacy, by picture",
}
OVERVIEW = "Held-out slices, their reconstructions, and new slices"
EPOCH = {"epoch", "step", "seconds", "train_loss", "val_loss"}  # in every epoch's line of a log
SYNTHETIC = """<p class="warning">SYNTHETIC data: a phantom, drawn by a program. Nothing here says
anything about MRI of people.</p>"""
STYLE = """
body { margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; background: #fff; color: #1c2430;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; margin: 24px 0 4px; overflow-wrap: anywhere }
h2 { margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid #d5dbe3 }
p { max-width: 75ch; margin: 8px 0 }
small, figcaption, th { color: #566273 }
.warning { background: #fff4d6; border-left: 4px solid #d99a00; padding: 8px 12px }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; padding: 0; list-style: none }
.numbers li { border: 1px solid #d5dbe3; border-radius: 8px; padding: 8px 14px; max-width: 190px }
.numbers b { display: block; font-size: 1.35rem }
.wide, figure { overflow-x: auto; margin: 16px 0 }
.curves { display: flex; flex-wrap: wrap; gap: 0 24px }
.curves img { width: 560px }
img { display: block; max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: 3px 16px 3px 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid #e7ebf0 }
td:last-child { white-space: normal; min-width: 36ch }
"""


# ---- pieces of HTML ----


def text(value) -> str:
    """A number, a word, yes or no, or nothing (None) as HTML."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1 else f"{value:#.4g}"
    return escape({"None": "–", "True": "yes", "False": "no"}.get(str(value), str(value)))


def table(corner: str, rows: Mapping[str, Mapping]) -> str:
    """Rows by name, each a dictionary of cells by column; a row may lack some of the columns."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    html = "".join(f"<th>{text(title)}</th>" for title in (corner, *columns))
    for name, row in rows.items():
        cells = (name, *(row.get(column, "") for column in columns))
        html += "</tr><tr>" + "".join(f"<td>{text(value)}</td>" for value in cells)
    return f'<div class="wide"><table><tr>{html}</tr></table></div>' if rows else ""


def picture(path: Path, caption: str) -> str:
    """A picture inside the page, or nothing where the file is not there.

    As WebP, because a page of the PNGs themselves would take 5 MB.
    """
    try:
        with Image.open(path) as image:
            image.convert("RGB").save(file := BytesIO(), "WEBP", quality=88)
    except OSError:
        return ""
    data, caption = base64.b64encode(file.getvalue()).decode(), escape(caption)
    image = f'<img alt="{caption}" src="data:image/webp;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


# ---- what lies in the folder ----


def read_json(path: Path, *provenance: str) -> dict:
    """What a JSON file of ours holds; {} where there is none, or where the keys `provenance` lead
    to no record of a command: then it is somebody else's.
    """
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(at(tree, *provenance, "argv"), list) else {}


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """The settings of the last run in a log, and the records of its epochs."""
    try:
        lines = [dict(json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError):
        return {}, []
    runs = [line for line in lines if isinstance(at(line, "run", "argv"), list)]
    return (runs or [{}])[-1], [line for line in lines if line.keys() >= EPOCH]


def at(tree: dict | None, *keys: str):
    """The value under a path of keys, or None where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


# ---- the parts of the page ----


def numbers(metrics: dict, card: dict) -> str:
    """What a reader looks for first, in large type."""
    shown = {
        "SSIM of test slices": at(metrics, "ssim_report", "mean"),
        "PSNR, dB": at(metrics, "psnr", "mean"),
        "bits per pixel": at(metrics, "bits_per_pixel", "nominal"),
        "Dice of decoded masks": at(metrics, "dice", "decoded", "mean", "mean"),
        "test slices": at(metrics, "n"),
        "test patients": len(metrics.get("patients", ())) or None,
    }
    for title, question in IN_SHORT.items():
        held_out = text(at(card, question, "floor"))
        shown[f"{title} (held-out slices: {held_out})"] = at(card, question, "new slices")
    known = ((title, value) for title, value in shown.items() if value is not None)
    items = (f"<li><b>{text(value)}</b>{escape(title)}</li>" for title, value in known)
    return f'<ul class="numbers">{"".join(items)}</ul>'


def training(folder: Path, priors: bool) -> str:
    """A row and the curves of each stage, with `priors` or without."""
    rows, curves = {}, ""
    stages = {"autoencoder": ""} | ({"priors": "prior_"} if priors else {})
    for stage, prefix in stages.items():
        _, epochs = read_log(folder / f"{prefix}log.jsonl")
        for last in epochs[-1:]:
            rows[stage] = {
                "epochs": len(epochs),
                "steps": last["step"],
                "minutes": f"{last['seconds'] / 60:.1f}",
                "loss, training": last["train_loss"],
                "loss, validation": last["val_loss"],
            }
            for level, use in (at(last, "codes", "validate") or {}).items():
                rows[stage][f"{level} codes in use"] = use["used"]
            curves += picture(folder / f"{prefix}loss_plot.png", f"Loss of the {stage} by epoch")
    return table("stage", rows) + f'<div class="curves">{curves}</div>' * bool(rows)


def test_scores(folder: Path, metrics: dict) -> str:
    """Every score by patient, Dice of the masks by organ, and the pictures of predict.py."""
    scores = {title: metrics[name] for name, title in SCORES.items() if name in metrics}
    if not scores:
        return ""

    def row(slices: int | str, *keys: str) -> dict:
        return {"slices": slices} | {title: at(score, *keys) for title, score in scores.items()}

    rows = {"all": row(metrics["n"], "mean")}
    rows |= {"95 % from": row("", "low"), "95 % to": row("", "high")}
    for patient, n in metrics["patients"].items():
        rows[f"patient {patient}"] = row(n, "per_patient", patient)
    dice = {}
    for source, organs in metrics.get("dice", {}).items():
        means = {name.replace("_", " "): of["mean"] for name, of in organs.items()}
        dice[MASK_SOURCES.get(source, source)] = means
    shapes = {}
    for organ, verdict in metrics.get("masks", {}).items():
        shape = shapes[organ.replace("_", " ")] = {}
        for name in ("pieces", "holes", "roughness"):
            shape[f"{name}, decoded"] = at(verdict, name, "masks")
            shape[f"{name}, the study's"] = at(verdict, name, "real")
        shape["faults"] = ", ".join(at(verdict, "faults") or []) or "no fault"
    note = """<p><small>Intervals: bootstrap over patients. SSIM follows two protocols: the report's
    (scikit-image's defaults) and the standard one of Wang et al. 2004.</small></p>"""
    return (
        picture(folder / "comparison.png", "Best, median and worst test slice by SSIM")
        + table("Dice of the masks, by label", dice)
        + table("shapes of the masks, means", shapes)
        + table("scores", rows)
        + note
        + picture(folder / "ssim_histogram.png", "SSIM of every test slice")
    )


def new_slices(generated: Path, report: dict) -> str:
    """The scorecard of report.json, and the pictures of generate.py."""
    if not report:
        return ""
    return (
        f"<p>{text(at(report, 'manifest', 'note'))}</p>"
        f"<p><b>{text(report.get('conclusion', ''))}</b></p>"
        + table("question", report.get("scorecard", {}))
        + picture(generated / "grid.png", "New slices, unselected, beside held-out ones")
        + picture(generated / "nearest.png", "The nearest to a training slice, each beside it")
    )


def made_by_others(folder: Path, made_by: dict[str, dict | None]) -> list[str]:
    """The parts of a run that another autoencoder made than the one of a folder.

    `made_by` tells the "file" and "sha256" of each part's. That of the folder has the same name, or
    else is its best one.
    """
    digest, others = cache(runtime.sha256), []
    for part, autoencoder in made_by.items():
        here, sha256 = folder / (at(autoencoder, "file") or ""), at(autoencoder, "sha256")
        here = here if here.is_file() else folder / "vqvae2_best.pth"
        if sha256 is not None and here.is_file() and digest(here) != sha256:
            others.append(part)
    return others


def write(folder: Path | str) -> Path:
    """Write the page of a results folder, or of the run around a `generated` folder; its path."""
    folder = Path(folder)
    if folder.name == "generated" and any((folder.parent / log).is_file() for log in LOGS):
        folder = folder.parent
    generated = folder / "generated" if (folder / "generated").is_dir() else folder
    stage_one, stage_two = (read_log(folder / log)[0] for log in LOGS)
    metrics = read_json(folder / "metrics.json", "provenance")
    report = read_json(generated / "report.json", "manifest", "provenance")
    # What was made with another autoencoder than the one here of that name is of another run.
    learnt_from = at(stage_two, "codes_config", "checkpoint")
    made_by = {
        "test slices": at(metrics, "checkpoint"),
        "new slices": at(report, "manifest", "autoencoder"),
        "priors": {"file": learnt_from, "sha256": at(stage_two, "autoencoder_sha256")},
    }
    others = made_by_others(folder, made_by)
    metrics = {} if "test slices" in others else metrics
    report = {} if "new slices" in others else report
    stage_two = {} if "priors" in others else stage_two
    note = f"Not shown, as another autoencoder than those here made them: {', '.join(others)}."
    if others:
        print(f"{folder / NAME}: {note[0].lower()}{note[1:]}")
    manifest, card = report.get("manifest", {}), report.get("scorecard", {})
    runs = {
        "autoencoder": stage_one.get("run"),
        "test slices": metrics.get("provenance"),
        "priors": stage_two.get("run"),
        "new slices": manifest.get("provenance"),
    }
    runs = {name: run | {"argv": " ".join(run["argv"])} for name, run in runs.items() if run}
    parts = {
        "Training": training(folder, bool(stage_two)),
        "Test slices": test_scores(folder, metrics),
        "New slices": new_slices(generated, report),
        "Commands and versions": table("step", runs),
    }
    data = [part["data"] for part in (stage_one, metrics, manifest) if part.get("data")]
    studies = dict.fromkeys(each["study"] for each in data) or [folder.resolve().name]
    title = escape(f"VQ-VAE-2 on {' and '.join(studies)}")
    body = "".join(f"<h2>{name}</h2>{html}" for name, html in parts.items() if html)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>{title}</h1>{SYNTHETIC * any(each.get("synthetic") for each in data)}
<p><small>Not for clinical use. {note if others else ""}</small></p>{numbers(metrics, card)}
{picture(generated / "overview.png", OVERVIEW) * bool(report)}
{body}</body></html>
"""
    runtime.write_text(folder / NAME, page)
    return folder / NAME
