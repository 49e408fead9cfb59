"""What README.md says of the code holds: the functions it refers to, its commands and their flags."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCES = re.findall(r"`([\w.]+)` in \[(\w+\.py)\]\((\w+\.py)\)", README)
COMMANDS = re.findall(
    r"(?:python|torchrun \S+) (?:-m )?([\w.]+?)(?:\.py)?((?: [^#&`\n]*)?)[#&`\n]", README.replace("\\\n", "")
)


@pytest.mark.parametrize("name, file, target", REFERENCES)
def test_a_function_that_is_referred_to_is_in_that_file(name, file, target):
    found = importlib.import_module(file.removesuffix(".py"))
    for part in name.split("."):
        found = getattr(found, part)
    assert file == target and found.__module__ == file.removesuffix(".py")


def test_every_term_of_the_loss_has_a_reference():
    assert len(REFERENCES) >= 6


@pytest.mark.parametrize("script, flags", [command for command in COMMANDS if command[0] != "pytest"])
def test_a_command_s_flags_exist(script, flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    known = capsys.readouterr().out
    for flag in re.findall(r"--[\w-]+", flags):
        assert f"{flag} " in known, flag


def test_every_file_of_the_table_is_there_and_no_script_is_missing():
    table = README.split("## What is where")[1].split("## Data")[0]
    named = set(re.findall(r"\[(\w+\.py)\]", table))
    assert named == {path.name for path in ROOT.glob("*.py")}
