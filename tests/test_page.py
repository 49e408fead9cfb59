"""The page is read back as a browser would: by its tags, its pictures and its words."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from support import results_page, runtime

VOID = {"meta", "link", "img", "br"}
SCORE = {"mean": 0.91234, "low": 0.9, "high": 0.92, "per_patient": {"040": 0.91777, "041": 0.90777}}
RUN = {"argv": ["train.py", "--data", "/home/someone/private/keras_slices_data"], "torch": "2.13.0"}


class Reader(HTMLParser):
    """Text, sources and links of a page; every tag must be closed."""

    def __init__(self, html: str):
        super().__init__()
        self.words, self.sources, self.links, self.ids, self.open = [], [], [], [], []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.open += [tag] * (tag not in VOID)
        for name, into in (("src", self.sources), ("href", self.links), ("id", self.ids)):
            into += [found[name]] if name in found else []
        assert tag != "script" and not any(name.startswith("on") for name in found)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [data] * (self.open[-1:] != ["style"])


def read(folder) -> Reader:
    return Reader((folder / "index.html").read_text())


@pytest.fixture
def results(tmp_path):
    """A folder as a whole run leaves it, with pictures of few pixels."""
    folder = tmp_path / "Results"
    (folder / "generated").mkdir(parents=True)
    for name in ("vqvae2_best.pth", "prior_best.pth"):
        (folder / name).write_bytes(name.encode())
    autoencoder, prior = (
        {"file": name, "sha256": runtime.sha256(folder / name)}
        for name in ("vqvae2_best.pth", "prior_best.pth")
    )
    data = {
        "study": "/home/someone/private/my study & <b>",
        "synthetic": True,
        "fingerprints": {"train": "f" * 64},
    }
    epochs = [
        {
            "epoch": n,
            "step": 7 * n,
            "seconds": 60 * n,
            "train": {"loss": 1 / n},
            "validate": {"loss": 0.321 / n},
        }
        for n in (1, 2)
    ]
    codes = {"validate": {"top": {"used": 377, "perplexity": 20.5}}}
    settings = {"run": RUN, "train": {"out": "/home/someone/out", "lr": 0.0015}, "data": data}
    stages = (("", {}), ("prior_", {"autoencoder_sha256": autoencoder["sha256"]}))
    for prefix, more in stages:
        lines = [settings | more, *(epoch | {"codes": {} if prefix else codes} for epoch in epochs)]
        (folder / f"{prefix}log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores = {
        "ssim_report": SCORE,
        "psnr": SCORE | {"mean": 31.2345},
        "dice": {"bladder": SCORE | {"mean": 0.8765}},
    }
    counts = {
        "n": 6,
        "patients": {"040": 4, "041": 2},
        "codes_used": {"top": 500},
        "perplexity": {"top": 99.5},
    }
    rates = {
        "bits_per_pixel": {"nominal": 0.703125},
        "data": data,
        "checkpoint": autoencoder,
        "provenance": RUN,
    }
    runtime.write_json(folder / "metrics.json", scores | counts | rates)
    report = {
        "n": 3,
        "likelihood": {
            "test": {
                "n": 6,
                "bits_per_pixel": 0.4567,
                "patients": {"040": {"bits_per_pixel": 0.4321}},
            }
        },
        "realism": {
            "encoder": {"floor": {"frechet": 12.34}, "samples": {"frechet": 56.78}},
            "doubts": ["a doubt"],
        },
        "copying": {
            "correlation": {
                "threshold": 0.8,
                "samples": {"flagged": 0, "n": 3},
                "verdict": "no copying " * 9,
            }
        },
        "manifest": {
            "autoencoder": autoencoder,
            "prior": prior,
            "provenance": RUN,
            "note": "not a patient",
        },
    }
    runtime.write_json(folder / "generated" / "report.json", report)
    pictures = ("loss_plot", "prior_loss_plot", "comparison", "ssim_histogram", "code_maps")
    pictures += tuple(
        f"generated/{name}" for name in ("overview", "grid", "realism", "copying", "nearest")
    )
    for i, name in enumerate(pictures):
        Image.fromarray(np.full((20, 30), 20 * i, np.uint8)).save(folder / f"{name}.png")
    return folder


def test_one_file_shows_the_whole_run(results):
    assert results_page.write(results) == results / "index.html"
    shown = read(results)
    for word in (
        "SSIM, report",
        "0.9123",
        "0.9000",
        "0.9200",
        "patient 040",
        "0.9178",
        "dice, bladder",
        "0.8765",
    ):
        assert word in shown.text, word  # scores, interval, patients
    for word in (
        "377",
        "500",
        "99.50",
        "0.703125",
        "0.1605",
        "0.0015",
        "2 epochs, 14 steps, 2.0 minutes",
    ):
        assert word in shown.text, word  # codes in use, bits, losses, settings
    for word in (
        "0.4567",
        "0.4321",
        "12.34",
        "56.78",
        "a doubt",
        "no copying",
        "not a patient",
        "SYNTHETIC",
    ):
        assert word in shown.text, word  # new slices
    assert "python train.py --data keras_slices_data" in shown.text and "2.13.0" in shown.text
    levels = [int(Image.open(BytesIO(base64.b64decode(source.split(",")[1]))).getpixel((9, 9))[0])
              for source in shown.sources]  # fmt: skip
    order = ["comparison", "ssim_histogram", "code_maps", "loss_plot", "prior_loss_plot"]
    assert len(levels) == 10 and levels[: len(order)] == pytest.approx(
        [40, 60, 80, 0, 20], abs=3
    ), order


def test_it_needs_nothing_from_elsewhere_and_tells_nothing_of_the_machine(results):
    results_page.write(results)
    html, shown = (results / "index.html").read_text(), read(results)
    assert not shown.open  # every tag is closed
    assert all(source.startswith("data:image/") for source in shown.sources)
    assert all(link[1:] in shown.ids or link == "data:," for link in shown.links)
    assert not re.search(r"https?:|url\(|@import", html)
    assert "someone" not in html and str(results.parent) not in html
    assert "my study & <b>" in shown.text  # as words, not as a tag


def test_what_belongs_to_an_earlier_checkpoint_is_left_out(results):
    (results / "vqvae2_best.pth").write_bytes(b"trained again")
    results_page.write(results)
    text = read(results).text
    assert "0.9123" not in text and "56.78" not in text
    for script in ("predict.py", "train.py --stage prior", "generate.py"):
        assert f"Run {script} again" in text
    (results / "vqvae2_best.pth").unlink()  # the small files alone, as they are sent
    results_page.write(results)
    assert "0.9123" in read(results).text and "56.78" in read(results).text


def test_new_slices_appear_on_the_page_of_their_run(results):
    results_page.write(results / "generated")
    assert "56.78" in read(results).text and not (results / "generated" / "index.html").exists()
    alone = (results / "generated").rename(results.parent / "samples")
    results_page.write(alone)
    assert "56.78" in read(alone).text and len(read(alone).sources) == 5


def test_a_folder_with_little_or_broken_files_has_a_page(results):
    for name in ("log.jsonl", "generated/report.json", "comparison.png"):
        (results / name).write_text("{broken")
    results_page.write(results)
    text = read(results).text
    assert "0.9123" in text and "Priors" in text and "New slices" not in text
    (results.parent / "empty").mkdir()
    results_page.write(results.parent / "empty")
    assert "VQ-VAE-2 on empty" in read(results.parent / "empty").text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/a b/c d.nii", "c d.nii"),
        ("no /home/a/b.nii here", "no b.nii here"),
        ("--out=/data/x/out", "--out=out"),
        ("~/data/study", "study"),
        (r"C:\Users\me\study", "study"),
        ("Results/best.pth and 3/4", "Results/best.pth and 3/4"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_name(text, shown):
    assert results_page.hide_folders(text) == shown
