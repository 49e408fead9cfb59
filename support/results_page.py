"""Results/index.html: everything that lies in a results folder on one page, to open and to send.

The page is written whole from the files beside it, so it never shows what a later run has replaced:
what was made with a checkpoint that has changed since is left out, and the page says so. It is one
file without scripts, and its pictures are inside it; the files beside it hold the exact pixels and
numbers.
"""

import base64
import json
import re
from html import escape
from io import BytesIO
from pathlib import Path

from PIL import Image

from support import runtime

NAME = "index.html"
LABELS = {
    "ssim_report": "SSIM, report",
    "ssim_standard": "SSIM, standard",
    "ssim_report_body": "SSIM, report, body",
    "ssim_standard_body": "SSIM, standard, body",
    "psnr": "PSNR, dB",
    "psnr_body": "PSNR, body, dB",
    "mae": "MAE, z units",
    "nominal_bits_per_pixel": "nominal bits per pixel",
    "ms_ssim": "MS-SSIM",
    "frechet": "Fréchet distance",
    "K": "K",
    "D": "D",
}
FOLDED = ("patients", "percentiles")  # long tables that a click unfolds
STALE = '<p class="warning">The {} in this folder are of an earlier {}. Run {} again.</p>'
SYNTHETIC = '<p class="warning">SYNTHETIC data, a phantom: nothing here says anything about MRI of people.</p>'
STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; background: #fff; color: #1c2430;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; margin: 24px 0 4px; overflow-wrap: anywhere } h2 { margin: 40px 0 8px;
padding-top: 12px;
     border-top: 1px solid #d5dbe3 } h3 { margin: 24px 0 4px; font-size: 1.05rem } h4 { margin: 16px
     0 4px }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 12px 0 }
a { color: #1f5fa8 } p { max-width: 75ch; margin: 8px 0 } small, figcaption { color: #566273 }
.warning { background: #fff4d6; border-left: 4px solid #d99a00; padding: 8px 12px }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; padding: 0; list-style: none }
.numbers li { border: 1px solid #d5dbe3; border-radius: 8px; padding: 8px 14px; min-width: 130px }
.numbers b { display: block; font-size: 1.35rem }
.wide { overflow-x: auto; margin: 8px 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid #e7ebf0;
vertical-align: top } th:first-child, td:first-child, .text td { text-align: left } thead th {
color: #566273; font-weight: 600 } td:first-child { white-space: nowrap } .text td { overflow-wrap:
anywhere; min-width: 90px } figure { margin: 16px 0; overflow-x: auto } figure img { max-width:
100%; height: auto; display: block } code { font-size: .9em; overflow-wrap: anywhere } summary {
cursor: pointer; color: #1f5fa8 }
"""


# ---- pieces of HTML ------------------------------------------------------------------------------


def hide_folders(text: str) -> str:
    """The text with each absolute path cut down to its last name: a page that is sent tells nothing
    of a disk.
    """
    path = r"(?<![\w.~])(?:~|[A-Za-z]:)?[/\\]"
    if found := re.fullmatch(
        rf"(--[\w-]+=)?{path}.*[/\\]([^/\\]+)", text
    ):  # nothing but a path: it may hold spaces
        return (found[1] or "") + found[2]
    return re.sub(rf"{path}(?:[^\s/\\'\"]+[/\\])+", "", text)


def cell(value, decimals: str = "#.4g") -> str:
    """A number, word or nothing, as text for a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:{decimals}}"
    return escape(hide_folders(str(value)))


def label(name: str) -> str:
    return escape(LABELS.get(name, name.replace("_", " ")))


def table(rows: dict[str, dict], corner: str = "", kind: str = "") -> str:
    """Rows by name, each a dictionary of cells by column; a row may lack some columns."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["".join(f"<th>{name}</th>" for name in (escape(corner), *map(label, columns)))]
    for name, row in rows.items():
        cells = "".join(f"<td>{cell(row.get(column, ''))}</td>" for column in columns)
        lines.append(f"<td>{label(name)}</td>{cells}")
    head, *body = (f"<tr>{line}</tr>" for line in lines)
    body = "".join(body)
    return f'<div class="wide"><table class="{kind}"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def values(entries: dict) -> str:
    """Two columns, a name and its value."""
    rows = "".join(
        f"<tr><td>{label(name)}</td><td>{cell(value, 'g')}</td></tr>"
        for name, value in entries.items()
    )
    return f'<div class="wide"><table class="text"><tbody>{rows}</tbody></table></div>'


def folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def tree(value: dict, level: int = 4) -> str:
    """Nested results as tables: children that hold numbers become rows, deeper ones get headings
    and tables.

    Sentences stand below; lists that are not of sentences (one entry a slice) stay in the JSON.
    """

    def is_cell(entry) -> bool:
        return not isinstance(entry, dict | list) and len(str(entry)) < 60

    def cells(entries: dict) -> dict:
        return {name: entry for name, entry in entries.items() if is_cell(entry)}

    children = {
        name: child
        for name, child in value.items()
        if isinstance(child, dict) and name not in FOLDED
    }
    rows = {name: cells(child) for name, child in children.items() if cells(child)}
    html = values(cells(value)) if cells(value) else ""
    html += table(rows) if rows else ""
    for name, child in children.items():
        inner = tree(
            {
                k: v
                for k, v in child.items()
                if k not in FOLDED and not (name in rows and is_cell(v))
            },
            level + 1,
        )
        html += f"<h{min(level, 6)}>{label(name)}</h{min(level, 6)}>{inner}" if inner else ""
    for name in FOLDED:
        tables = {child: entries[name] for child, entries in children.items() if name in entries}
        html += folded(name, tree(tables, level + 1)) if tables else ""
    for entry in value.values():
        sentences = (
            entry
            if isinstance(entry, list)
            else []
            if isinstance(entry, dict) or is_cell(entry)
            else [entry]
        )
        html += "".join(f"<p>{cell(text)}</p>" for text in sentences if isinstance(text, str))
    return html


def picture(path: Path, caption: str) -> str:
    """A picture inside the page, or nothing where the file is not there."""
    try:
        with Image.open(path) as image:
            image.convert("RGB").save(file := BytesIO(), "WEBP", quality=88, method=2)
            width, height = image.size
    except OSError:
        return ""
    data = base64.b64encode(file.getvalue()).decode()
    least = (
        min(720, width) if width > 2 * height else 0
    )  # a wide picture is scrolled on a small screen
    return (
        f'<figure><img style="width: {0.8 * width:.0f}px; min-width: {least}px" alt="{escape(caption)}" '
        f'src="data:image/webp;base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


# ---- what lies in the folder ---------------------------------------------------------------------


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """The settings of the last run in a log, and the records of its epochs."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return {}, []
    settings = [line for line in lines if "epoch" not in line]
    return (settings[-1] if settings else {}), [line for line in lines if "epoch" in line]


def changed(folder: Path, made_with: dict) -> bool:
    """Whether the checkpoint {"file", "sha256"} that something was made with is another file by
    now.
    """
    path = folder / str(made_with.get("file", ""))
    return path.is_file() and runtime.sha256(path) != made_with.get("sha256")


def command(provenance: dict) -> str:
    return " ".join(["python", *map(hide_folders, provenance.get("argv", []))])


# ---- the parts of the page -----------------------------------------------------------------------


def training(folder: Path, prefix: str) -> str:
    """Loss curves, the last epoch and the settings of a stage; `prefix` is that of its files."""
    settings, epochs = read_log(folder / f"{prefix}log.jsonl")
    if not epochs:
        return ""
    last = epochs[-1]
    html = (
        f"<p>{len(epochs)} epochs, {last['step']:,} steps, {last['seconds'] / 60:.1f} minutes.</p>"
    )
    html += picture(folder / f"{prefix}loss_plot.png", "Mean loss of each epoch")
    html += table(
        {"train": last["train"], "validation": last["validate"]}, f"epoch {last['epoch']}"
    )
    for split, levels in last.get("codes", {}).items():
        html += table(levels, f"codes in use, {split}") if split == "validate" and levels else ""
    parts = ("model_config", "loss_config", "codes_config", "train", "data")
    rows = "".join(
        f"<h4>{label(part)}</h4>{values(flat(settings[part]))}"
        for part in parts
        if part in settings
    )
    return html + folded("Settings and data", rows)


def flat(settings: dict) -> dict:
    """Settings of one level; of fingerprints the first digits."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= {f"{name} {inner}": str(each)[:12] for inner, each in value.items()}
        else:
            found[name] = value
    return found


def score_table(metrics: dict) -> str:
    """Every score of metrics.json, over all slices, with its interval, and by patient."""
    scores = {}
    for name, entry in metrics.items():
        found = {name: entry} | (
            {f"{name}, {k}": v for k, v in entry.items()} if isinstance(entry, dict) else {}
        )
        scores |= {k: v for k, v in found.items() if isinstance(v, dict) and "per_patient" in v}
    rows = {
        "all": {
            "slices": metrics.get("n"),
            **{name: score["mean"] for name, score in scores.items()},
        }
    }
    for end, title in (("low", "95 % from"), ("high", "95 % to")):
        rows[title] = {name: score.get(end) for name, score in scores.items()}
    for patient, n in metrics.get("patients", {}).items():
        means = {name: score["per_patient"].get(patient) for name, score in scores.items()}
        rows[f"patient {patient}"] = {"slices": n, **means}
    return table(rows)


def test_scores(folder: Path, metrics: dict) -> str:
    if not metrics:
        return ""
    html = score_table(metrics)
    html += "<p><small>Intervals: bootstrap over patients. metrics.py states the two protocols of SSIM.</small></p>"
    html += picture(folder / "comparison.png", "Best, median and worst test slice by SSIM: original, reconstruction, "
                    "difference")  # fmt: skip
    html += picture(folder / "ssim_histogram.png", "SSIM of every test slice, by patient")
    levels = {
        level: {"codes used": n, "perplexity": metrics.get("perplexity", {}).get(level)}
        for level, n in metrics.get("codes_used", {}).items()
    }
    html += table(levels, "codes in use") + values(
        {
            f"bits per pixel, {kind}": bits
            for kind, bits in metrics.get("bits_per_pixel", {}).items()
        }
    )
    return html + picture(
        folder / "code_maps.png", "A slice and its code maps; colours only tell codes apart"
    )


def priors(folder: Path, settings: dict) -> str:
    autoencoder = {"file": "vqvae2_best.pth", "sha256": settings.get("autoencoder_sha256")}
    if settings and changed(folder, autoencoder):
        return STALE.format("priors", "autoencoder", "train.py --stage prior")
    return training(folder, "prior_")


def versions(runs: dict[str, dict | None]) -> str:
    rows = {
        name: {
            "command": command(run),
            **{key: value for key, value in run.items() if key != "argv"},
        }
        for name, run in runs.items()
        if run
    }
    return table(rows, kind="text") if rows else ""


def new_slices(folder: Path, generated: Path) -> str:
    report = read_json(generated / "report.json")
    manifest = report.get("manifest", {})
    if not report:
        return ""
    if any(changed(folder, manifest.get(model, {})) for model in ("autoencoder", "prior")):
        return STALE.format("new slices", "autoencoder or prior", "generate.py")
    html = f"<p>{escape(manifest.get('note', ''))}</p>"
    html += picture(
        generated / "overview.png", "Real slices, their reconstructions, and new slices"
    )
    html += picture(
        generated / "grid.png",
        "The first new slices, unselected, beside real ones at the same positions",
    )
    titles = {
        "likelihood": "Likelihood of the codes of real slices",
        "realism": "What the new slices are worth, beside real slices (floor) and worthless ones (controls)",
        "copying": "Copying: how near each set comes to the training slices",
    }
    for name, part in report.items():
        if isinstance(part, dict) and name not in ("manifest", "protocol"):
            html += f"<h3>{escape(titles.get(name, name.capitalize()))}</h3>{tree(part)}"
            html += picture(generated / f"{name}.png", titles.get(name, name))
    return html + picture(generated / "nearest.png", "The nearest pairs: new and real test slices, each beside the "
                          "training slice that is most like it")  # fmt: skip


def summary(metrics: dict) -> str:
    """The numbers that a reader looks for first."""
    shown = {
        "SSIM, report": metrics.get("ssim_report", {}).get("mean"),
        "SSIM, standard": metrics.get("ssim_standard", {}).get("mean"),
        "PSNR, dB": metrics.get("psnr", {}).get("mean"),
        "bits per pixel": metrics.get("bits_per_pixel", {}).get("nominal"),
        "test slices": metrics.get("n"),
    }
    items = "".join(
        f"<li><b>{cell(v)}</b>{escape(k)}</li>" for k, v in shown.items() if v is not None
    )
    return f'<ul class="numbers">{items}</ul>'


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def write(folder: Path | str) -> Path:
    """Write the page of a results folder from the files in it; for its `generated` folder, the same
    page.

    Returns the path of the page. What is not there, or cannot be read, is left out.
    """
    folder = Path(folder)
    if folder.name == "generated":
        folder = folder.parent
    generated = folder / "generated" if (folder / "generated").is_dir() else folder
    stage_one, stage_two = (read_log(folder / name)[0] for name in ("log.jsonl", "prior_log.jsonl"))
    metrics = read_json(folder / "metrics.json")
    outdated = changed(folder, metrics.get("checkpoint", {}))
    manifest = read_json(generated / "report.json").get("manifest", {})

    parts = {
        "Test slices": STALE.format("scores", "checkpoint", "predict.py")
        if outdated
        else test_scores(folder, metrics),
        "Autoencoder": training(folder, ""),
        "Priors": priors(folder, stage_two),
        "New slices": new_slices(folder, generated),
        "Commands and versions": versions(
            {
                "autoencoder": stage_one.get("run"),
                "test slices": metrics.get("provenance"),
                "priors": stage_two.get("run"),
                "new slices": manifest.get("provenance"),
            }
        ),
    }
    parts = {title: html for title, html in parts.items() if html}
    data = stage_one.get("data") or metrics.get("data") or manifest.get("data") or {}
    title = escape(hide_folders(f"VQ-VAE-2 on {data.get('study', folder.resolve().name)}"))
    links = "".join(f'<a href="#{anchor(part)}">{part}</a>' for part in parts)
    body = "".join(f'<h2 id="{anchor(part)}">{part}</h2>{html}' for part, html in parts.items())
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"{SYNTHETIC if data.get('synthetic') else ''}<p><small>Not for clinical use.</small></p>"
        f"{'' if outdated else summary(metrics)}<nav>{links}</nav>{body}</body></html>\n"
    )
    runtime.write_text(folder / NAME, page)
    return folder / NAME
