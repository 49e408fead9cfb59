"""The page is read back as a browser would: by its tags, its pictures and its words."""

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from new_slices import sample_report
from support import results_page, runtime

VOID = {"meta", "link", "img", "br"}
SCORE = {"mean": 0.91234, "low": 0.9, "high": 0.92, "per_patient": {"040": 0.91777, "041": 0.90777}}
RUN = {"argv": ["train.py", "--data", "keras_slices_data"], "torch": "2.13.0"}
PICTURES = ("generated/overview", "loss_plot", "prior_loss_plot", "comparison", "ssim_histogram")
PICTURES += ("generated/grid", "generated/nearest")


class Reader(HTMLParser):
    """Text, sources and links of a page; every tag must be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.sources, self.links, self.open = [], [], [], []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.open += [tag] * (tag not in VOID)
        for name, into in (("src", self.sources), ("href", self.links)):
            into += [found[name]] if name in found else []
        assert tag != "script" and not any(name.startswith("on") for name in found)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [data] * (self.open[-1:] != ["style"])


def read(folder) -> Reader:
    return Reader((folder / "index.html").read_text())


def mean(value: float) -> dict:
    return SCORE | {"mean": value}


@pytest.fixture
def results(tmp_path):
    """A folder as a whole run leaves it, with pictures of few pixels."""
    folder = tmp_path / "Results"
    (folder / "generated").mkdir(parents=True)
    data = {"study": "my study & <b>", "synthetic": True}
    for prefix in ("", "prior_"):
        before = {"run": RUN | {"argv": ["train.py", "--before"]}, "data": data}
        run = RUN | {"argv": ["train_prior.py", "--seed", "1"]} if prefix else RUN
        lines = [before, {"run": run, "data": data}]  # stopped and resumed
        for n in (1, 2):
            losses = {"train_loss": 1.5 / n, "val_loss": 0.321 / n}
            codes = {"validate": {"top": {"used": 377, "perplexity": 20.5}}}
            epoch = {"epoch": n, "step": 7 * n, "seconds": 60 * n, **losses, "codes": codes}
            lines.append(epoch if prefix == "" else epoch | {"codes": {}, "val_loss": 4.25})
        (folder / f"{prefix}log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    metrics = {"n": 6, "patients": {"040": 4, "041": 2}, "data": data, "provenance": RUN}
    metrics |= {
        "ssim_report": SCORE,
        "psnr": mean(31.2345),
        "bits_per_pixel": {"nominal": 0.703125},
    }
    metrics["dice"] = {
        "decoded": {"mean": mean(0.8765), "label_3": mean(0.7654)},
        "unet": {"mean": mean(0.6543), "label_3": mean(0.5432)},
    }
    metrics["masks"] = {
        "label_3": {"pieces": {"masks": 2.25, "real": 1.125}, "faults": ["pieces 9, in real"]},
        "label_7": {"holes": {"masks": None, "real": 0.5}, "faults": []},
    }
    runtime.write_json(folder / "metrics.json", metrics)
    line = {"new slices": 56.78, "floor": 12.34, "control": 98.76, "passed": False}
    privacy = {"new slices": "0 of 3", "floor": "1 of 120", "control": None, "passed": None}
    card = {"likeness": line | {"in words": "a & b"}, "privacy, by picture": privacy}
    manifest = {"provenance": RUN, "note": "not a patient", "data": data}
    report = {"scorecard": card, "conclusion": "Bad, by likeness.", "manifest": manifest}
    runtime.write_json(folder / "generated" / "report.json", report)
    for i, name in enumerate(PICTURES):
        Image.fromarray(np.full((20, 30), 20 * i, np.uint8)).save(folder / f"{name}.png")
    return folder


def rows(reader: Reader) -> str:
    """The words of the page with a bar between two cells."""
    return " | ".join(word.strip() for word in reader.words if word.strip())


def test_one_file_shows_the_whole_run(results):
    assert results_page.write(results) == results / "index.html"
    page = read(results)
    shown = rows(page)
    # What a reader looks for first.
    assert "| 0.9123 | SSIM of test slices | 31.23 | PSNR, dB | 0.7031 | bits per pixel |" in shown
    assert "| 0.8765 | Dice of decoded masks | 6 | test slices | 2 | test patients |" in shown
    assert "| 0 of 3 | new slices too close to a training slice (held-out slices: 1 of" in shown
    # The stages, the scores by patient, masks beside the U-Net's, and the scorecard.
    assert "| autoencoder | 2 | 14 | 2.0 | 0.7500 | 0.1605 | 377 |" in shown
    assert "| priors | 2 | 14 | 2.0 | 0.7500 | 4.250 |" in shown
    assert "| scores | slices | SSIM, report | PSNR, dB | all | 6 | 0.9123 | 31.23 |" in shown
    assert "| 95 % from | 0.9000 | 0.9000 | 95 % to | 0.9200 | 0.9200 |" in shown
    assert "| patient 040 | 4 | 0.9178 | 0.9178 | patient 041 | 2 | 0.9078 | 0.9078 |" in shown
    assert "| decoded from the codes | 0.8765 | 0.7654 | a U-Net of equal cost on " in shown
    assert "| label 3 | 2.250 | 1.125 | – | – | – | – | pieces 9, in real |" in shown
    assert "| label 7 | – | – | – | 0.5000 | – | – | no fault |" in shown
    assert "| likeness | 56.78 | 12.34 | 98.76 | no | a & b | privacy, by picture |" in shown
    assert "| privacy, by picture | 0 of 3 | 1 of 120 | – | – |" in shown
    assert "| train.py --data keras_slices_data | 2.13.0 |" in shown and "--before" not in shown
    assert "| priors | train_prior.py --seed 1 |" in shown
    assert "SYNTHETIC" in shown and "not a patient | Bad, by likeness. |" in shown
    levels = [Image.open(BytesIO(base64.b64decode(source.split(",")[1]))).getpixel((9, 9))[0]
              for source in page.sources]  # fmt: skip
    assert levels == pytest.approx([20 * i for i in range(len(PICTURES))], abs=3)


def test_it_needs_nothing_from_elsewhere(results):
    results_page.write(results)
    html, page = (results / "index.html").read_text(), read(results)
    assert not page.open  # every tag is closed
    assert all(source.startswith("data:image/") for source in page.sources)
    assert page.links == ["data:,"]
    assert not re.search(r"https?:|url\(|@import", html)
    assert "my study & <b>" in page.text  # as words, not as a tag


def test_new_slices_appear_on_the_page_of_their_run(results):
    results_page.write(results / "generated")
    assert "56.78" in read(results).text and not (results / "generated" / "index.html").exists()
    alone = (results / "generated").rename(results.parent / "samples")
    results_page.write(alone)
    assert "56.78" in read(alone).text and len(read(alone).sources) == 3
    assert "SYNTHETIC" in read(alone).text and "my study & <b>" in read(alone).text
    (results.parent / "own").mkdir()
    alone = alone.rename(results.parent / "own" / "generated")  # not in a run's folder
    results_page.write(alone)
    assert (alone / "index.html").exists() and not (alone.parent / "index.html").exists()
    (alone.parent / "prior_log.jsonl").write_text((results / "prior_log.jsonl").read_text())
    results_page.write(alone)
    assert "priors" in read(alone.parent).text


def test_the_page_names_the_studies_of_all_its_parts(results):
    for name in ("log.jsonl", "metrics.json", "generated/report.json"):
        path = results / name
        path.write_text(path.read_text().replace('"synthetic": true', '"synthetic": false'))
    results_page.write(results)
    assert "SYNTHETIC" not in read(results).text
    scores = json.loads((results / "metrics.json").read_text())
    scores["data"] = {"study": "phantom", "synthetic": True}
    runtime.write_json(results / "metrics.json", scores)
    results_page.write(results)
    text = read(results).text
    assert "VQ-VAE-2 on my study & <b> and phantom" in text and "SYNTHETIC" in text


def test_what_another_autoencoder_made_is_not_on_the_page(results, capsys):
    """The phantom's run lies in Results/ when a study is trained there."""
    for name in ("best", "epoch_9"):  # the last epoch of that run, which was longer, lies here too
        (results / f"vqvae2_{name}.pth").write_bytes(name.encode())
    ours, other = (runtime.sha256(results / f"vqvae2_{name}.pth") for name in ("best", "epoch_9"))
    for sha256 in (ours, other):
        for name, keys in (
            ("metrics.json", ("checkpoint", "sha256")),
            ("generated/report.json", ("manifest", "autoencoder", "sha256")),
        ):
            tree = json.loads((results / name).read_text())
            tree |= {"checkpoint": {}} if keys[0] == "checkpoint" else {}
            inner = tree
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = sha256
            runtime.write_json(results / name, tree)
        log = (results / "prior_log.jsonl").read_text().splitlines()
        log[1] = json.dumps(json.loads(log[1]) | {"autoencoder_sha256": sha256})
        (results / "prior_log.jsonl").write_text("\n".join(log))
        results_page.write(results)
        shown, sources = rows(read(results)), read(results).sources
        assert ("0.9123" in shown) == ("Bad, by likeness" in shown) == (sha256 == ours)
        assert ("| priors |" in shown) == (sha256 == ours)
        left = "them: test slices, new slices, priors." in shown
        assert left == (sha256 == other) == ("not shown, as another" in capsys.readouterr().out)
        assert "| autoencoder |" in shown and len(sources) == (7 if sha256 == ours else 1)


def test_a_folder_with_little_or_broken_files_has_a_page(results):
    for name in ("log.jsonl", "generated/report.json", "comparison.png"):
        (results / name).write_text("{broken")
    results_page.write(results)
    text = read(results).text
    assert "0.9123" in text and "priors" in text and "likeness" not in text
    others = '{"psnr": 31.2}', "[]", "null", '{"epoch": 1, "run": "a"}', '{"run": {"id": "a1"}}'
    others += '{"n": 3, "provenance": "me"}', '{"manifest": {"version": 1}, "scorecard": {"a": 3}}'
    names = "metrics.json", "prior_log.jsonl", "generated/report.json"  # but somebody else's
    for name, content in itertools.product(names, others):
        (results / name).write_text(content)
        results_page.write(results)
    assert "0.9123" not in read(results).text
    (results.parent / "empty").mkdir()
    results_page.write(results.parent / "empty")
    assert "VQ-VAE-2 on empty" in read(results.parent / "empty").text


def test_the_scorecard_by_hand():
    """Numbers of the report under their questions; the best control counts; None is not a pass."""
    names = (sample_report.FLOOR, sample_report.SAMPLES, *sample_report.CONTROLS)
    values = {
        "kernel_distance": (10, 16, 90, 20, 80, 70),
        "plausible": (0.7, 0.6, 0.1, 0.9, 0.2, 0.7),
        "coherence": (0.95, 0.9, 0.6, 0.7, 0.95, 0.95),
    }
    by_place, halves, mixed, outside = sample_report.CONTROLS
    seen = {"kernel_distance": [by_place, halves, outside], "plausible": [by_place, mixed]}
    seen |= {"agreement": [mixed], "coherence": [by_place, halves]}
    table = {name: {key: each[i] for key, each in values.items()} for i, name in enumerate(names)}
    table[sample_report.RECONSTRUCTIONS] = {"agreement": 0.9, "kernel_distance": 11}
    table[sample_report.SAMPLES]["agreement"] = 0.8
    table[mixed]["agreement"] = 0.5

    def audit(flagged, copies):
        counts = zip(("samples", "honest", "copies"), (flagged, 1, copies), strict=True)
        return {"margin": 3 / 64} | {k: {"n": 64, "flagged": n, "share": n / 64} for k, n in counts}

    copying = {"pictures": audit(3, 64), "codes": audit(4, 64), "layouts": audit(0, 31)}
    copying["all"] = audit(40, 20)  # many, though it finds few of the planted ones
    variety = dict(zip(("samples", "real", "one patient"), (0.19, 0.17, 0.2), strict=True))
    variety = {name: {"ms_ssim": value} for name, value in variety.items()}
    report = {"realism": {"rows": table, "seen": seen}, "variety": variety, "copying": copying}
    card = sample_report.scorecard(report)
    found = {question: tuple(line.values())[:4] for question, line in card.items()}
    assert found == {
        "likeness": (16, 11, 20, False),  # nearer to the control
        "coherence": (0.9, 0.95, 0.7, True),
        "coverage": (0.19, 0.17, 0.2, False),
        "constraint": (0.6, 0.7, 0.2, True),  # nearer to the floor
        "masks": (0.8, 0.9, 0.5, True),
        "utility": (None, None, None, None),
        "privacy, by pictures": ("3 of 64", "1 of 64", "64 of 64", True),  # by chance
        "privacy, by codes": ("4 of 64", "1 of 64", "64 of 64", False),
        "privacy, by layouts": ("0 of 64", "1 of 64", "31 of 64", None),
        "privacy, by all": ("40 of 64", "1 of 64", "20 of 64", False),
    }
    assert "4.7%" in card["privacy, by codes"]["in words"]
    card = sample_report.scorecard({"realism": None, "variety": None, "copying": {}})
    assert all(line["passed"] is None for line in card.values())
    assert card["likeness"]["in words"].startswith("Cannot tell")


def test_the_conclusion_is_never_better_than_what_is_known():
    def of(unseen, **passed):
        card = {question: {"passed": value} for question, value in passed.items()}
        realism = None if unseen is None else {"unseen": unseen}
        return sample_report.conclusion({"scorecard": card, "realism": realism})

    assert of([], likeness=True, privacy=False) == "Bad: the new slices do not pass privacy."
    assert of(["two patients' halves"], likeness=False).startswith("Bad")
    halves = of(["two patients' halves"], likeness=True)
    assert halves.startswith("Cannot tell") and "two patients' halves" in halves
    assert of([], likeness=True, constraint=None).startswith("No fault found")
    assert of([], likeness=None).startswith("Cannot tell")
    blind = of([], likeness=True, **{"privacy, by layout": None, "privacy, by codes": True})
    assert blind.startswith("Cannot tell") and blind.endswith(
        "no measure here sees copies by layout."
    )
    assert of(None, likeness=None).startswith("Cannot tell")
