"""Linux, macOS and Windows: no module needs what Windows lacks, and no path is joined by hand.

Neither Windows nor macOS can be tried here. So these tests take away what only Unix has, and run
every command without it.
"""

import os
import re
import subprocess
import sys

from conftest import ROOT

COMMANDS = [path.name for path in sorted(ROOT.glob("*.py")) if "run_cli" in path.read_text()]
MODULES = [
    path for folder in ("", "support", "new_slices") for path in (ROOT / folder).glob("*.py")
]
WITHOUT_UNIX = """
import asyncio, builtins, os, runpy, signal, sys  # from Python 3.12 on asyncio asks for os.sysconf

whole_import = builtins.__import__
def no_unix(name, *args, **options):
    if name in ("fcntl", "resource", "pwd", "grp", "termios"):
        # Python and its libraries know how to do without these; only our own files may not ask.
        file = os.path.abspath(sys._getframe(1).f_globals.get("__file__") or "/")
        if file.startswith(os.getcwd()) and "site-packages" not in file:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return whole_import(name, *args, **options)
builtins.__import__ = no_unix
for place, names in (
    (os, "sysconf O_DIRECTORY fork getuid mkfifo setsid"), (signal, "SIGHUP SIGKILL SIGUSR1")
):
    for name in names.split():
        delattr(place, name)
"""
EVERYTHING = (
    WITHOUT_UNIX
    + """
import importlib
commands, modules = (words.split() for words in sys.argv[1:])
for command in commands:
    sys.argv = [command, "--help"]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, (command, end.code)
for module in modules:
    importlib.import_module(module)
print("imported")
"""
)


def run_without_unix(code, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_every_command_shows_its_help_without_unix():
    """And every module is imported.

    Also into a file on Windows, whose encoding lacks some letters, and from a notebook.
    """
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    assert "support.runtime" in modules and "train" in modules
    elsewhere = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://not.installed"}
    done = run_without_unix(EVERYTHING, " ".join(COMMANDS), " ".join(modules), **elsewhere)
    assert done.returncode == 0 and done.stdout.endswith(b"imported\n"), done.stderr.decode()
    assert done.stdout.count(b"usage: ") == len(COMMANDS) >= 6


def test_what_is_taken_away_is_missed():
    for code in ("import fcntl", "import os; os.O_DIRECTORY", "import signal; signal.SIGHUP"):
        ours = f"exec(compile({code!r}, 'ours', 'exec'), {{'__file__': os.getcwd() + '/ours.py'}})"
        done = run_without_unix(WITHOUT_UNIX + ours)
        assert done.returncode == 1
        assert re.search(rb"ModuleNotFoundError|AttributeError", done.stderr)


def test_paths_are_joined_by_pathlib_alone():
    for path in MODULES:
        assert not re.search(r"os\.path\.join|os\.sep\b|/tmp\b|/dev/", path.read_text()), path
