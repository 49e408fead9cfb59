import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, write_mask

import train
from benchmarks import ablation, baselines, peers, per_set, plausible, sampling, startup, step
from dataset import DataConfig, StudyInfo, open_study
from modules import VQVAE2, VQVAE2Config
from support import nifti, runtime

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


def test_a_study_s_starts_are_timed_beside_zlib_alone(study, tmp_path, monkeypatch):
    """By a clock of 1, 2, 3 and 4 s: zlib on one core, on all, decoding, and from the cache."""
    looks, unpacked, opened = iter([0, 1, 10, 12, 20, 23, 30, 34]).__next__, [], []
    monkeypatch.setattr(startup, "time", SimpleNamespace(perf_counter=looks))
    monkeypatch.setattr(startup, "gzip", SimpleNamespace(decompress=unpacked.append))
    monkeypatch.setattr(startup, "open_study", lambda data: opened.append(open_study(data)))
    flags = ["--data", study, "--slices", 610, "--out", tmp_path / "startup.json"]
    _, out, _ = command(startup, *flags)
    found = json.loads((tmp_path / "startup.json").read_text())
    timed = ("gunzip_one_core_s", "gunzip_all_cores_s", "first_start_s", "later_start_s")
    assert [found[name] for name in timed] == [1, 2, 3, 4]
    files = [path.read_bytes() for path in sorted(study.glob("keras_slices_*/*.nii.gz"))]
    made = [files[i % len(files)] for i in range(610)]
    assert unpacked[:610] == made and sorted(unpacked[610:]) == sorted(made)
    assert (found["slices"], found["mb_packed"]) == (610, round(sum(map(len, made)) / 1e6))
    assert out.count("from the cache") == 1  # the second of two
    assert [[len(split) for split in each.values()] for each in opened] == 2 * [[540, 60, 10]]


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


def test_as_many_slices_of_each_set_are_plausible_as_were_drawn_so(tmp_path, monkeypatch):
    """Set a has bright discs, b dark ones, lower in later slices; those further left are wrong."""
    rows, columns = np.mgrid[:64, :32]

    def write(split, patient, number, bright=-99, dark=-99):
        down = rows - 12 - 8 * number
        mask = 5 * (np.hypot(down, columns - bright) < 6) + 9 * (np.hypot(down, columns - dark) < 7)
        name = f"case_{patient:03d}_week_0_slice_{number}.nii.gz"
        path, pixels = tmp_path / f"keras_slices_{split}" / name, 1.0 * (mask == 5) - (mask == 9)
        nifti.write(path, pixels.astype(np.float32), np.eye(4))
        write_mask(path, mask)

    for split, patient, a, b in (("train", 4, 0, 0), ("validate", 36, 2, 1), ("test", 40, 1, 5)):
        for number in range(6):  # the first `a` and `b` are wrong
            write(split, patient, number, 8 if number < a else 16)
            write(split, 100 + patient, number, dark=8 if number < b else 16)
    write("test", 41, 0, dark=16)  # of set a, with an organ of b alone
    # The third is asked at another place; of the last position no slice was written.
    discs = (1, 16), (4, 16), (4, 16), (0,), (5,), (2, 24, 8), (3, -99, 16)
    for i, disc in enumerate(discs):
        write("synthetic", 900 + i, *disc)
    positions = [0.2, 0.8, 0.2, 0, 1, 0.4, None, 1]
    runtime.write_json(tmp_path / "manifest.json", {"positions": positions})
    study = StudyInfo.from_splits(open_study(DataConfig(str(tmp_path), cache=str(tmp_path))))
    model = SimpleNamespace(encode=lambda x: (x, None), to=lambda device: model)

    def segment(net, x):
        assert net == ("train", tmp_path)  # what it learnt from, and where it is kept
        return ((x > 1) + 2 * (x < -1)).astype(np.uint8)

    for name, stand_in in {
        "load_model": lambda _: SimpleNamespace(model=model, study=study),
        "decode": lambda _, top, __: (top[:, 0].roll(8, 2).numpy(), None),  # further right
        "organs.segmenter_of": lambda train, folder, device: (train.split, folder),
        "organs.segment": segment,
        "organs.NEAREST": 3,
    }.items():
        monkeypatch.setattr(f"benchmarks.plausible.{name}", stand_in)
    flags = ["--data", tmp_path, "--cache", tmp_path, "--below", 100, "--device", "cpu"]
    flags += ["--checkpoint", tmp_path / "best.pth", "--out", tmp_path / "out.json"]
    out = command(plausible, tmp_path, *flags)[1]
    expected = {  # slices, without an organ, with both sets'; of a and b: slices, and good ones
        "validation slices": (12, 0, 0, 6, 4, 6, 5),
        "test slices": (13, 0, 0, 7, 5, 6, 1),
        "reconstructions": (12, 0, 0, 6, 2, 6, 1),
        "generated": (7, 2, 1, 3, 2, 2, 1),
    }
    for name, row in json.loads((tmp_path / "out.json").read_text())["rows"].items():
        counts = [row[key] for key in ("n", "no organ", "both sets")]
        for of in (row["patients < 100"], row["patients >= 100"]):
            counts += of["n"], of["n"] * of["plausible"]
        assert counts == pytest.approx(expected.pop(name)), name
    printed = "generated 7 2 1 0.667 +- 0.272 (n 3) 0.500 +- 0.354 (n 2)"
    assert not expected and printed in " ".join(out.split())


def test_means_of_each_set_have_intervals_over_patients(tmp_path):
    """Of two patients the interval reaches from one's mean to the other's; of one there is none."""
    patients, table = [4, 100, 4, 7, 100, 4], np.random.default_rng(0).random((6, 5))
    names = ["mae", *per_set.SCORES[::-1]]
    lines = [f"{who}," + ",".join(map(str, row)) for who, row in zip(patients, table, strict=True)]
    (tmp_path / "scores.csv").write_text("\n".join([",".join(["patient", *names]), *lines]))
    first, second = [], []
    for score in per_set.SCORES:
        x = table[:, names.index(score)]
        low, high = sorted([x[[0, 2, 5]].mean(), x[3]])
        first.append(f"{score} {x[[0, 2, 3, 5]].mean():.4f} [{low:.4f}, {high:.4f}]")
        second.append(f"{score} {x[[1, 4]].mean():.4f}")
    out = command(per_set, tmp_path / "scores.csv", "--below", 100)[1].splitlines()
    assert out[0] == f"patients < 100: 4 slices of 2: {', '.join(first)}"
    assert out[1] == f"patients >= 100: 2 slices of 1: {', '.join(second)}"


def test_the_speed_of_sampling_is_that_of_the_fastest_round(tmp_path, monkeypatch):
    """By a clock that moves while one waits for the codes: 8, 4, 2 and 6 s."""
    now, waits, sampled, sample = [0], iter([8, 4, 2, 6]), [], sampling.Prior.sample

    def timed(prior, *asked):
        sampled.append((*sample(prior, *asked)[1].shape, prior.config.K, prior.training))
        return None, SimpleNamespace(cpu=lambda: now.append(now[-1] + next(waits)))

    monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter=lambda: now[-1]))
    monkeypatch.setattr(sampling.Prior, "sample", timed)
    flags = "--prior-channels 8 --prior-top-layers 1 --prior-heads 1 --K 16 --device cpu".split()
    command(sampling, *flags, "--batch-size", 3, 1, "--out", tmp_path / "sampling.json")
    assert sampled == 2 * [(3, 64, 32, 16, False)] + 2 * [(1, 64, 32, 16, False)]
    found = json.loads((tmp_path / "sampling.json").read_text())["batches"]
    three, one = {"seconds": 4, "slices_per_s": 0.75}, {"seconds": 2, "slices_per_s": 0.5}
    assert found == {"3": three, "1": one}


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


def test_the_ablation_keeps_the_rows_of_runs_before_one_that_fails(study, tmp_path, monkeypatch):
    """The first run in this process, and by a clock of CPU seconds of its own."""
    two, four = "steps of 2 slices, lr x 1.4", "steps of 4 slices, lr x 2"
    old = {"epochs": 1, "ssim": 0.5, "cpu_ms_per_slice": 9}
    old |= {"run": {"torch": "1"}, "data": {"fingerprints": {}}}
    kept = [old | {"name": two, "seed": 3}, old | {"name": four, "seed": 2}]
    runtime.write_json(tmp_path / "rows.json", [old | {"name": two, "seed": 2}, *kept])
    user_and_system, log = ((10, 1), (12, 4), (0, 0)), []
    used = [SimpleNamespace(ru_utime=user, ru_stime=system) for user, system in user_and_system]

    def run(words):
        if log:
            return SimpleNamespace(returncode=1)
        code = command(train, *words[2:])[0]
        log.extend((Path(words[words.index("--out") + 1]) / "log.jsonl").read_text().splitlines())
        return SimpleNamespace(returncode=code)

    clock = SimpleNamespace(RUSAGE_CHILDREN=used, getrusage=lambda who: who.pop(0))
    monkeypatch.setattr(ablation, "resource", clock)
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    flags = ["--epochs", 1, "--seed", 2, "--out", tmp_path / "rows.json"]
    code, _, err = command(ablation, "--data", study, "--only", two, four, *flags)
    assert code == 2 and four in err
    *others, row = json.loads((tmp_path / "rows.json").read_text())
    first, last = map(json.loads, log)
    settings = {"seed": 2, "epochs": 1, "batch_size": 2, "lr": 2.1e-3}
    assert others == kept and settings.items() <= first["train"].items()
    assert (row["name"], row["seed"], row["data"]) == (two, 2, first["data"])
    assert row["ssim"] == 1 - last["validate"]["ssim"] and row["mse"] == last["validate"]["mse"]
    assert row["codes"] == last["codes"]["validate"] and "argv" not in row["run"]
    assert row["cpu_ms_per_slice"] == pytest.approx(1000 * (2 + 3) / 14)
    assert f"{row['ssim']:.4f}" in command(ablation, "--table", *flags)[1]
    assert command(ablation, *flags)[0] == 2  # no study is named
