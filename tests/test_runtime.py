import argparse
import os
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import runtime

KEYS = {
    "kind": "vqvae2",
    "model_config": {},
    "train_config": {},
    "data": {},
    "epoch": 1,
}  # of every checkpoint


@dataclass(frozen=True)
class Config:
    name: str = runtime.option("x", "a word", choices=("x", "y"))
    rate: float = runtime.option(0.5, "a number")
    flip: bool = runtime.option(False, "a switch")


def test_flags_come_from_the_dataclass():
    parser = runtime.parser("doc", Config)
    assert runtime.from_flags(Config, parser.parse_args([])) == Config()
    args = parser.parse_args(["--name", "y", "--rate", "2", "--flip"])
    assert runtime.from_flags(Config, args) == Config("y", 2.0, True)
    assert runtime.from_flags(Config, parser.parse_args(["--no-flip"])).flip is False
    for bad in (["--rat", "2"], ["--name", "z"], ["--rate", "fast"]):  # no silent abbreviations
        with pytest.raises(SystemExit) as exit_:
            parser.parse_args(bad)
        assert exit_.value.code == 2


@pytest.mark.parametrize("error", [ValueError("bad slice"), FileNotFoundError("bad slice")])
def test_users_mistakes_are_one_line_and_exit_2(error, capsys):
    # as if raised in this repository's own files: in runtime.py itself
    def main():
        with runtime.atomic_path("never"):
            raise error

    if isinstance(error, ValueError):
        main = lambda: runtime.load_checkpoint(__file__, "vqvae2")  # noqa: E731
    with pytest.raises(SystemExit) as exit_:
        runtime.run_cli(main)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_library_s_value_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="broadcast"):
        runtime.run_cli(lambda: np.broadcast_to(np.zeros(3), (2, 2)))


def test_ctrl_c_exits_with_130():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        runtime.run_cli(main)
    assert exit_.value.code == 130


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    runtime.write_text(path, "first")
    with pytest.raises(RuntimeError), runtime.atomic_path(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and os.listdir(path.parent) == ["a.txt"]
    runtime.write_text(path, "second")
    assert path.read_text() == "second" and os.listdir(path.parent) == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with runtime.atomic_path(tmp_path / "a") as part:
        part.mkdir()
        (part / "new").touch()
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["new"]


def test_checkpoints_come_back_without_running_code(tmp_path):
    saved = {
        **KEYS,
        "model": {"w": torch.randn(3)},
        "history": [{"epoch": 1}],
        "best": float("inf"),
    }
    runtime.save_checkpoint(tmp_path / "a.pth", saved)
    loaded = runtime.load_checkpoint(tmp_path / "a.pth", "vqvae2")
    assert torch.equal(loaded["model"]["w"], saved["model"]["w"]) and loaded["history"] == [{"epoch": 1}]

    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"args": argparse.Namespace()}, tmp_path / "pickle.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {}}, tmp_path / "foreign.pth")
    runtime.save_checkpoint(tmp_path / "keyless.pth", {"kind": "vqvae2", "model": {}})
    for name in ("cut", "empty", "pickle", "list", "foreign", "keyless"):
        with pytest.raises(ValueError, match=f"{name}.pth.*Fix"):
            runtime.load_checkpoint(tmp_path / f"{name}.pth", "vqvae2")
    with pytest.raises(ValueError, match="prior"):
        runtime.load_checkpoint(tmp_path / "a.pth", "prior")
    torch.save({**saved, "format": "vqvae2-2"}, tmp_path / "old.pth")
    with pytest.raises(
        runtime.UserError, match=r"old.pth.*before 27 November 2026.*Fix: `git checkout 5afe7e8`"
    ):
        runtime.load_checkpoint(tmp_path / "old.pth", "vqvae2")
    with pytest.raises(FileNotFoundError, match="Fix"):
        runtime.load_checkpoint(tmp_path / "none.pth", "vqvae2")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_says_so_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    runtime.save_checkpoint(path, {**KEYS, "model": {}, "step": 1})

    monkeypatch.setattr(runtime, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        runtime.save_checkpoint(path, {**KEYS, "model": {}, "step": 2})
    assert runtime.load_checkpoint(path, "vqvae2")["step"] == 1 and os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_where_there_is_none():
    with pytest.raises(ValueError, match="--device cpu"):
        runtime.pick_device("cuda")
    assert runtime.pick_device("auto").type == "cpu"


def test_provenance_names_this_python():
    assert runtime.provenance()["python"] == sys.version.split()[0]


def test_scripts_flush_denormals():
    """Left alone, they make long runs several times slower: tests/ cannot time it, so that is all they check."""
    found = []
    try:
        runtime.run_cli(lambda: found.append((torch.tensor(1e-37) * 1e-3).item()))
    finally:
        torch.set_flush_denormal(False)
    assert found == [0.0]
