import argparse
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT
from tqdm import tqdm

from generate import GenerateConfig
from modules import VQVAE2Config
from new_slices.prior import PriorConfig
from slice_volumes import SliceConfig
from support import runtime
from support.runtime import UserError
from support.trainer import TrainConfig
from train import LossConfig
from train_prior import CodesConfig

# What every checkpoint has.
KEYS = {"kind": "vqvae2", "model_config": {}, "train_config": {}, "data": {}, "epoch": 1}


@dataclass(frozen=True)
class Config:
    name: str = runtime.option("x", "a word", choices=("x", "y"))
    share: float = runtime.option(0.5, "a number")
    flip: bool = runtime.option(False, "a switch")


def test_flags_come_from_the_dataclass():
    parser = runtime.parser("doc", Config)
    assert runtime.fill(Config, vars(parser.parse_args([]))) == Config()
    args = parser.parse_args(["--name", "y", "--share", "2", "--flip"])
    assert runtime.fill(Config, vars(args)) == Config("y", 2.0, True)
    assert parser.parse_args(["--no-flip"]).flip is False
    for bad in (["--shar", "2"], ["--name", "z"], ["--share", "fast"]):  # no silent abbreviations
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args(bad)
        assert exit_.value.code == 2


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--batchsize 4", "; did you mean --batch-size?"),
        ("--batch_size=4 --far 3", "; did you mean --batch-size?"),
        ("--batch-sise=4 --no_flip", "; did you mean --batch-size --no-flip?"),
        ("--far 3", ""),
        ("4", ""),
    ],
)
def test_a_misspelt_flag_names_the_one_that_is_meant(flags, hint, capsys):
    @dataclass(frozen=True)
    class Config:
        """What there is."""

        batch_size: int = runtime.option(1, "slices")
        flip: bool = runtime.option(True, "mirror")

    with pytest.raises(SystemExit) as exit_:
        runtime.parser("doc", Config).parse_args(flags.split())
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {flags}{hint}\n")


@pytest.mark.parametrize(
    "error, words, code",
    [
        (runtime.UserError("bad slice"), "error: bad slice\n", 2),
        (FileNotFoundError("bad slice"), "error: bad slice\n", 2),
        (MemoryError(), "--batch-size", 2),
        (torch.OutOfMemoryError("CUDA out of memory."), "--device cpu", 2),
        (RuntimeError("[enforce fail] Allocator: can't allocate memory"), "--batch-size", 2),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_what_the_user_can_fix_is_one_message_and_an_exit_code(error, words, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit_:
        runtime.run_cli(main)
    err = capsys.readouterr().err
    assert exit_.value.code == code and words in err and err.count("\n") == 1


def test_sigterm_ends_a_command_as_ctrl_c_does_and_takes_its_temporary_files_away(tmp_path):
    code = """
import os, signal, tempfile
from support import runtime

def main():
    with tempfile.TemporaryDirectory(dir=".", prefix=runtime.TEMPORARY):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

runtime.run_cli(main)
"""
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **options)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("zip()"), RuntimeError("size"), KeyError("x")])
def test_a_bug_keeps_its_traceback(error):
    """Also one of ours, in this folder: a ValueError is no UserError."""

    def main():
        with runtime.atomic_path("never"):
            raise error

    with pytest.raises(type(error)):
        runtime.run_cli(main)


def test_a_command_whose_reader_has_gone_ends_without_a_word():
    """As of `python train.py | head -1`, and of `2>&1 | head -1`. A line comes when it is said."""
    code = """
import sys, time
from support import runtime

def main():
    for _ in range(1000):  # fewer letters than a buffer holds
        print("said")
        print("said", file=sys.stderr)
        time.sleep(0.01)

runtime.run_cli(main)
"""
    command = [sys.executable, "-c", code]
    streams = subprocess.PIPE, subprocess.STDOUT
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONUNBUFFERED": ""}}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, **options)
        for stream in streams
    ]
    for process in running:
        assert process.stdout.readline().strip() == b"said" and process.poll() is None
        process.stdout.close()
    for process in running:
        errors = process.stderr.read() if process.stderr else b""
        assert process.wait(timeout=60) == 141 and set(errors.split()) <= {b"said"}


def test_text_is_utf_8_whatever_the_name_of_a_file(tmp_path):
    """A name in Latin-1 reaches Python with a surrogate, which no encoding takes."""
    runtime.write_text(tmp_path / "a.csv", os.fsdecode(b"Jos\xe9 ") + "\u2605")
    assert (tmp_path / "a.csv").read_bytes() == "Jos? \u2605".encode()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    runtime.write_text(path, "first")
    with pytest.raises(RuntimeError), runtime.atomic_path(path) as part:
        assert part.name == "a.txt" and not part.exists()
        assert part.parent.stat().st_mode & 0o777 == 0o700  # nobody else's to see
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["a.txt"]
    runtime.write_text(path, "second")
    assert path.read_text() == "second" and os.listdir(path.parent) == ["a.txt"]


def test_checkpoints_come_back_without_running_code(tmp_path):
    saved = KEYS | {"model": {"w": torch.randn(3)}, "history": [{"epoch": 1}], "best": math.inf}
    runtime.save_checkpoint(tmp_path / "a.pth", saved)
    loaded = runtime.load_checkpoint(tmp_path / "a.pth", "vqvae2")
    assert torch.equal(loaded["model"]["w"], saved["model"]["w"])
    assert loaded["history"] == [{"epoch": 1}] and loaded["best"] == math.inf

    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"args": argparse.Namespace()}, tmp_path / "pickle.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {}}, tmp_path / "foreign.pth")
    torch.save({**saved, "model": {"w": torch.tensor([math.nan])}}, tmp_path / "nan.pth")
    for name in ("cut", "empty", "pickle", "list", "foreign", "nan"):
        with pytest.raises(UserError, match=f"{name}.pth: damaged, or not written.*Fix"):
            runtime.load_checkpoint(tmp_path / f"{name}.pth", "vqvae2")
    old = {"format": "vqvae2-2", "history": [{"run": {"revision": "5afe7e8"}}]}
    torch.save(saved | old, tmp_path / "old.pth")
    named = r"format vqvae2-2, by revision 5afe7e8.*expected vqvae2-3.*Fix"
    with pytest.raises(UserError, match=named):
        runtime.load_checkpoint(tmp_path / "old.pth", "vqvae2")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is a disk that is full")
def test_a_full_disk_says_so_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    runtime.save_checkpoint(path, {**KEYS, "model": {}, "step": 1})

    def full_disk(path, mode):
        return open("/dev/full", mode)

    monkeypatch.setattr(runtime, "open", full_disk, raising=False)
    with pytest.raises(OSError, match=r"No space left .*a\.pth"):
        runtime.save_checkpoint(path, {**KEYS, "model": {}, "step": 2})
    assert runtime.load_checkpoint(path, "vqvae2")["step"] == 1
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_where_there_is_none():
    with pytest.raises(ValueError, match="--device cpu"):
        runtime.pick_device("cuda")
    assert runtime.pick_device("auto").type == "cpu"


def test_a_run_needs_no_git_and_names_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["/home/me/train.py", "--data=/home/me/a", "--out", "/home/me/b/", "--lr", "1"]
    monkeypatch.setattr("sys.argv", words)
    found = runtime.provenance()
    assert found["revision"] == "unknown"
    assert found["argv"] == ["train.py", "--data=a", "--out", "b", "--lr", "1"]
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexit 128\n")
    git.chmod(0o755)
    assert runtime.provenance()["revision"] == "unknown"


def test_a_run_that_fails_leaves_no_empty_folder(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr(runtime.atexit, "register", lambda *call: at_exit.append(call))
    left, kept = map(runtime.writable_folder, (tmp_path / "left" / "a", tmp_path / "kept" / "a"))
    runtime.write_text(kept / "written", "")
    assert left.is_dir()
    for function, *args in reversed(at_exit):  # as at the end of the process
        function(*args)
    assert os.listdir(tmp_path) == ["kept"] and os.listdir(kept) == ["written"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file: cannot write there .* Fix: another --out"):
        runtime.writable_folder(tmp_path / "file")


OUT_OF_RANGE = {
    TrainConfig: {"epochs": [0], "minutes": [-1, math.inf], "lr": [math.nan]},
    LossConfig: {"beta": [math.nan]},
    VQVAE2Config: {"K": [0, 1], "D": [-1], "ema_decay": [1.0], "stride": [3]}
    | {f"{part}_blocks": [-1] for part in ("encoder", "top", "decoder")},
    PriorConfig: {"prior_top_layers": [0], "prior_refine_blocks": [0]},
    CodesConfig: {"bottom_every": [0], "rebuilt": [1.1]},
    GenerateConfig: {"n": [0], "top_temperature": [-1.0], "bottom_temperature": [math.nan]}
    | {"top_passes": [0, 10**6], "bottom_passes": [0], "top_spread": [-1.0, math.inf]}
    | {"guidance": [-1.0, math.inf], "position": [1.1, -0.1]}
    | {"batch_size": [-1], "nnunet": ["Dataset1"]},
}
EACH = [
    (c, name, v) for c, of in OUT_OF_RANGE.items() for name, values in of.items() for v in values
]


@pytest.mark.parametrize("config, field, value", EACH)
def test_a_setting_out_of_range_is_named(config, field, value):
    with pytest.raises(UserError, match=f"{runtime.flag(field)}.*expected"):
        config(**{field: value})


def test_a_number_that_is_too_large_is_told_the_largest():
    with pytest.raises(UserError, match=r"--minutes is inf; expected 0 to 1099511627776"):
        TrainConfig(minutes=math.inf)


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize("config", [TrainConfig, GenerateConfig, SliceConfig])
def test_a_seed_that_numpy_refuses_is_a_user_s_mistake(config, seed):
    given = {"volumes": "."} if config is SliceConfig else {}
    assert config(seed=2**32 - 1, **given)
    with pytest.raises(UserError, match=rf"--seed is {seed}; expected 0 to 4294967295"):
        config(seed=seed, **given)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So a power cut leaves the old one. A file that is renamed before its bytes come is empty."""
    done, fsync, replace = [], os.fsync, os.replace
    sizes = lambda file: (done.append(os.fstat(file).st_size), fsync(file))  # noqa: E731
    monkeypatch.setattr(os, "fsync", sizes)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    runtime.save_checkpoint(tmp_path / "a.pth", {**KEYS, "model": {}})
    # All of its bytes have left Python's buffer by then.
    assert done == [(tmp_path / "a.pth").stat().st_size, "replace"]


def test_a_command_runs_where_there_is_nowhere_to_print_to(monkeypatch):
    """As with 2>&- in a shell, or in a program without a console."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(runtime.signal, "signal", lambda *_: None)
    runtime.set_up_process()
    print("a line")
    assert list(tqdm(range(3), disable=None)) == [0, 1, 2]


def test_a_file_replaces_no_folder(tmp_path):
    (tmp_path / "a" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="a'"):
        runtime.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a" / "inside").is_dir() and os.listdir(tmp_path) == ["a"]


def test_help_has_headings_and_tells_the_defaults():
    @dataclass(frozen=True)
    class Other:
        """What else there is. And more."""

        lr: float = runtime.option(0.1, "how fast")
        far: int = runtime.option(3, "how far")

    text = runtime.parser("doc", Config, Other, everyday=("lr",)).format_help()
    assert text.index("everyday flags") < text.index("--lr") < text.index("--name")
    assert "(default: 3)" in text and "What else there is" in text
    assert "--flip" not in runtime.parser("doc", Config, without=("flip",)).format_help()


def test_commands_flush_denormals_and_compute_in_float32():
    """Denormals make long runs slower, and TF32 changes codes: neither can be measured here."""
    found, places = [], (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        runtime.pick_device("cpu")
        assert all(place.allow_tf32 for place in places)
        runtime.run_cli(lambda: found.append((torch.tensor(1e-37) * 1e-3).item()))
        assert not any(place.allow_tf32 for place in places)
    finally:
        torch.set_flush_denormal(False)
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value
    assert found == [0.0]


def test_a_node_with_fewer_gpus_than_processes_is_refused(monkeypatch):
    monkeypatch.setattr(runtime.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(runtime, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")  # the third
    said = "process 3 of a node with 2 GPUs. Fix: --nproc_per_node=2"
    with pytest.raises(UserError, match=said), runtime.ranks("cuda"):
        pass
