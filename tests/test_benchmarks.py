import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import command

from benchmarks import ablation, baselines, peers, plausible, startup, step
from dataset import DataConfig, open_study
from modules import VQVAE2, VQVAE2Config

SMALL = {
    "ours": lambda: VQVAE2(VQVAE2Config(K=512, channels=8, top_channels=8)),
    "single": lambda: baselines.SingleLevelVQVAE(8),
    "report": lambda: baselines.ReportVQVAE2(8),
}


@torch.inference_mode()
def test_the_stated_rates_are_those_of_the_codes():
    """By what is counted for a small slice, as rates are per pixel."""
    x = torch.randn(1, 1, 64, 32)
    ours, single, report = (build().eval() for build in SMALL.values())
    h = torch.relu(report.encoder(x))
    levels = {
        "ours": [(codes, ours.config.K) for codes in ours.encode(x)],
        "single": [(single.quantiser(single.encoder(x)).codes, single.quantiser.K)],
        "report": [
            (quantiser.nearest(to_level(h)), quantiser.codebook.num_embeddings)
            for quantiser, to_level in (
                (report.quantiser_top, report.to_top),
                (report.quantiser_bottom, report.to_bottom),
            )
        ],
    }
    if importlib.util.find_spec("monai"):
        monai = baselines.monai_vqvae().eval()
        levels["monai"] = [(monai.index_quantize(x), monai.num_embeddings)]
    for name, found in levels.items():
        assert all(codes.min() >= 0 and codes.max() < K for codes, K in found)
        bits = sum(codes.numel() * np.log2(K) for codes, K in found)
        assert bits / x.numel() == peers.PEERS[name].bits / (256 * 128), name


def test_report_s_vectors_are_runs_of_pixels_of_one_channel():
    """Four pixels in a row of a channel that equal a code find it, four channels of one do not."""
    quantiser = baselines.GradientQuantiser(3, 4)
    quantiser.codebook.weight.data = torch.tensor([[0.0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]])
    z = torch.zeros(1, 4, 2, 4)
    z[0, 2, 1] = torch.tensor([5.0, 6, 7, 8])
    assert quantiser.nearest(z).tolist() == [[0, 0, 0, 0, 0, 2, 0, 0]]


def test_a_timing_counts_whole_steps_of_whole_batches(monkeypatch):
    """By a clock that moves 2 s at every look: two steps of 3 slices in 5 s, which end at 6 s."""
    now = iter(range(0, 100, 2))
    monkeypatch.setattr(peers.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(peers, "SIZE", (32, 16))
    seen = []
    small = peers.PEERS["single"]._replace(
        build=lambda: baselines.SingleLevelVQVAE(8),
        forward=lambda model, x: (seen.append(len(x)), model(x))[1],
    )
    monkeypatch.setitem(peers.PEERS, "single", small)
    row = peers.measure("single", 3, 5.0, torch.device("cpu"))
    assert seen == [1, 3, 3] and row["slices_per_s"] == 3 * 2 / 6
    assert row["bits_per_pixel"] == 2048 * 9 / (32 * 16) and 100 < row["peak_memory_mib"] < 100_000


def test_every_model_takes_the_same_training_step():
    """The reconstruction and a quantiser's loss whose gradient reaches the encoder."""
    for name, build in SMALL.items():
        model, peer = build().train(), peers.PEERS[name]
        x = torch.randn(2, 1, 64, 32)
        reconstruction, quantiser_loss = peer.forward(model, x)
        assert reconstruction.shape == x.shape and quantiser_loss.shape == ()
        quantiser_loss.backward()
        first = next(p for p in model.parameters() if p.dim() == 4)
        assert first.grad.abs().sum() > 0, name


def test_the_table_compares_medians_with_ours():
    rows = {
        "ours": [{"slices_per_s": speed, "peak_memory_mib": 700.4} for speed in (20.0, 60.0, 30.0)],
        "report": [{"slices_per_s": 0.5, "peak_memory_mib": 4000.0}],
    }
    shared = {"parameters": 1_000_000, "bits_per_pixel": 4.0}
    merged = {name: peers.merge([row | shared for row in rounds]) for name, rounds in rows.items()}
    assert merged["ours"]["rounds"] == [20, 60, 30]
    ours, report = peers.table(merged).splitlines()[2:]
    assert ours == "| ours | 1.00 M | 4 | 30 | 700 |  |"
    assert report == "| report | 1.00 M | 4 | 0.5 | 4000 | 60.0 x |"
    assert peers.table({"report": merged["report"]}).endswith("|  |")


def test_peers_writes_a_row_of_each_model(tmp_path, monkeypatch):
    """Measured in a thread here, and not in a process of its own, which imports PyTorch anew."""
    here = lambda workers, *_, **__: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(peers, "ProcessPoolExecutor", here)
    flags = "--only ours --rounds 1 --seconds 0 --batch-size 1 --device cpu".split()
    _, out, _ = command(peers, *flags, "--out", tmp_path / "peers.json")
    found = json.loads((tmp_path / "peers.json").read_text())
    row = found["rows"]["ours"]
    assert row["bits_per_pixel"] == 0.703125 and row["slices_per_s"] == row["rounds"][0] > 0
    assert found["batch_size"] == 1 and found["threads"] == torch.get_num_threads()
    assert "| ours | 0.28 M |" in out


def test_startup_makes_a_study_of_as_many_slices(study, tmp_path):
    files = sorted(study.glob("keras_slices_*/*.nii.gz"))
    made = startup.link(files, tmp_path / "study", 1300)
    assert len(made) == 1300
    config = DataConfig(str(tmp_path / "study"), 64, 32, cache=str(tmp_path / "cache"))
    sizes = [len(split) for split in open_study(config).values()]
    assert sum(sizes) == 1300 and sizes[0] > 0.8 * 1300 and min(sizes) > 0


def test_a_slice_belongs_to_the_set_whose_organs_fill_it():
    figures = np.full((4, 3, 7), np.nan)
    figures[0, 0, 0], figures[1, 2, 0] = 50, 60
    figures[2, :, 0] = 40, 30, 20  # organs of both sets, the second's are larger together
    organs = {"a": np.array([True, False, False]), "b": np.array([False, True, True])}
    names, both = plausible.by_organs(figures, organs)
    assert names.tolist() == ["a", "b", "b", ""] and both == 1


def test_shares_are_of_the_set_s_slices_that_show_an_organ(monkeypatch):
    values = np.full((5, 2, 7), np.nan)
    values[[0, 1, 2], 0, 0], values[3, 1, 0] = 50, 50  # three of set a, one of b, one of no organ
    rows = plausible.Measured(values, np.zeros(5), np.array(["a", "a", "a", "b", "a"]))
    together, fine = np.array([True, True, False]), np.array([[1, 1], [1, 0], [1, 1]], bool)

    def judge(shown, *_):
        return together[: len(shown)], fine[: len(shown)]

    monkeypatch.setattr(plausible.organs, "plausible", judge)
    shows = {"a": np.array([True, False]), "b": np.array([False, True])}
    found = plausible.shares(rows, {"a": rows, "b": rows}, shows)
    assert (found["n"], found["no organ"], found["both sets"]) == (5, 1, 0)
    error = pytest.approx((2 / 9 / 3) ** 0.5)
    assert found["a"] == {"n": 3, "plausible": pytest.approx(1 / 3), "standard_error": error}
    assert found["b"] == {"n": 1, "plausible": 1, "standard_error": 0}


def test_a_step_of_the_best_preset_is_timed_and_its_parts_add_up(study, tmp_path):
    flags = "--preset best --batch-size 1 --slices 3 --height 64 --width 32 --device cpu".split()
    flags += ["--data", study, "--cache", tmp_path, "--out", tmp_path / "step.json"]
    _, out, _ = command(step, *flags)
    row = json.loads((tmp_path / "step.json").read_text())["best"]["batch 1"]
    assert row["slices_per_s"] > 0 and row["gflop_per_slice"] > 0.1
    assert sum(row["shares"].values()) == pytest.approx(1, abs=0.01)
    assert row["shares"].keys() > set(step.PARTS) and min(row["shares"].values()) > 0
    assert "best, batch 1: slices_per_s" in out


def test_the_ablation_s_kept_rows_are_shown_with_those_that_can_be_rerun():
    shown = command(ablation, "--table")[1]
    assert all(name in shown for name in (*ablation.VARIANTS, "rotation trick", "weight averaging"))
