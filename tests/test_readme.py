"""What README.md says of the code holds: its line references, its commands and their flags."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCES = re.findall(r"`([\w.]+)` in \[(\w+\.py)\]\((\w+\.py)#L(\d+)\)", README)
COMMANDS = re.findall(r"(?:python|torchrun \S+) ([\w/]+)\.py([^#&`]*?)[#&`\n]", README.replace("\\\n", ""))


@pytest.mark.parametrize("name, file, target, line", REFERENCES)
def test_a_line_reference_lies_in_the_function_it_names(name, file, target, line):
    lines = (ROOT / file).read_text().splitlines()[: int(line)]
    functions = [text.split("def ")[1].split("(")[0] for text in lines if text.lstrip().startswith("def ")]
    methods = [f for f in functions if f != "blocks"]  # a helper inside VQVAE2.__init__
    assert file == target and methods[-1] == name.split(".")[-1]


def test_every_term_of_the_loss_has_a_reference():
    assert len(REFERENCES) == 6


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_a_command_s_flags_exist(script, flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--help"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(SystemExit):
        importlib.import_module(script.split("/")[-1]).main()
    known = capsys.readouterr().out
    for flag in re.findall(r"--[\w-]+", flags):
        assert f"{flag} " in known, flag


def test_every_file_of_the_table_is_there_and_no_script_is_missing():
    table = README.split("## What is where")[1].split("## Data")[0]
    named = set(re.findall(r"\[(\w+\.py)\]", table))
    assert named == {path.name for path in ROOT.glob("*.py")}
