"""What all commands share: flags, devices, the ranks of torchrun, whole files, checkpoints.

A user's mistake ends a command with one message on stderr and exit code 2 (`run_cli`). Files are
written to a temporary place and moved (`atomic_path`), so that nobody ever reads half a file.
"""

import argparse
import atexit
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import typing
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

FORMAT = "vqvae2-3"  # of a checkpoint; increase when its keys change meaning
KINDS = {  # of checkpoints, and what is in them
    "vqvae2": "an autoencoder of train.py",
    "prior": "the priors of train_prior.py",
    "segmenter": "a U-Net that finds organs",
}
ROOT = Path(__file__).resolve().parents[1]
# How long a rank waits for the slowest thing that another one does alone.
PATIENCE = timedelta(minutes=30)
TEMPORARY = ".part-"  # how the names of temporary folders begin
# What NumPy and json raise for a file that is not there, not whole, or of something else.
NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
# What PyTorch says, as a plain RuntimeError, where the CPU's memory does not suffice.
NO_MEMORY = ("t allocate memory", "bad_alloc", "calculation overflowed", "not create a memory")


class UserError(ValueError):
    """Something that the user can fix. The message says what was found and expected, and how."""


# ---- command line ----


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`; what the user can fix becomes one message on stderr and exit code 2.

    A command whose output nobody reads any more, as of `| head`, ends without a word. Every other
    exception is a bug of ours: it keeps its traceback, and exit code 1.
    """
    set_up_process()
    try:
        main()
    except BrokenPipeError:
        # Python would try to write once more on its way out, and complain.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        leave(141)  # what a shell reports for a process that its closed pipe ended
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        leave(130)  # what a shell reports for a process that Ctrl-C ended
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error{f' of rank {rank()}' if world() > 1 else ''}: {message}", file=sys.stderr)
        leave(2)


def set_up_process() -> None:
    """Change defaults of PyTorch and Python that do not suit a command, for the whole process."""
    # The momentum of a unit that has died decays to numbers below 1e-38. A CPU is so slow at these
    # that after two thousand steps each one took three times as long. Threads inherit this setting,
    # so it comes before they start.
    torch.set_flush_denormal(True)
    # float32 means float32 on a GPU too. By default cuDNN computes convolutions in TF32, with 10
    # bits of mantissa, on Ampere and later, which changes up to 0.7 % of the codes. Training steps
    # allow it again (trainer.py).
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # SIGTERM ends a command as Ctrl-C does, which takes its temporary files away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Without them, as by 2>&- in a shell, there is nowhere to print to.
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    # A line reaches a file when it is printed, and does not wait for many others. A character that
    # the encoding of a file lacks, as on Windows, becomes a question mark.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="replace")


def leave(code: int) -> typing.NoReturn:
    """End this process with an exit code.

    After an error a rank still has its process group, because to break it up waits for the others.
    Python's own way out would end the group's threads first, and then PyTorch may abort the
    process, with a code of its own.
    """
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def user_message(error: Exception) -> str | None:
    """What to tell the user about an error that the user can fix; None for our bugs."""
    text = str(error) or type(error).__name__
    first_line = text.splitlines()[0]
    if isinstance(error, UserError | OSError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return f"not enough memory: {first_line} Fix: a smaller --batch-size, or --device cpu."
    memory = isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    if memory or isinstance(error, MemoryError):
        return f"not enough memory: {first_line} Fix: a smaller --batch-size or network."
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: torch.compile failed here ({first_line}). Fix: leave out --compile."
    return None


def option(default, help: str, **metadata):
    """A dataclass field that `parser` turns into a flag with this help (and these `choices`)."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def command(script: str, **flags: str) -> str:
    """The command line of a script with the `flags` that are not empty, to be copied to a shell."""
    given = [part for name, value in flags.items() if value for part in (flag(name), value)]
    return shlex.join(["python", script, *given])


def flag(field: str) -> str:
    """The flag of a dataclass field: batch_size is --batch-size."""
    return "--" + field.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A parser that knows which flag a misspelt one may be."""

    def error(self, message: str) -> typing.NoReturn:
        """End with the message and exit code 2."""
        near = []
        for word in message.partition("unrecognized arguments: ")[2].split():
            name = word.partition("=")[0]
            near += difflib.get_close_matches(name, self._option_string_actions, 1, cutoff=0.75)
        super().error(f"{message}; did you mean {' '.join(near)}?" if near else message)


def parser(
    doc: str, *configs: type, everyday: Sequence[str] = (), without: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """A parser with a flag for each field of the dataclasses `configs`; it returns what was given.

    The help tells the dataclasses' defaults, and `fill` takes them. The fields named in `everyday`
    come first, those in `without` are left out. Every dataclass has a heading, the first sentence
    of its docstring. A field that two of them share is one flag.
    """
    built = Parser(
        usage="%(prog)s [flags]",
        description=doc,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    first = built.add_argument_group("everyday flags")
    groups, flags = {}, {}
    for config in configs:
        group = built.add_argument_group(config.__doc__.split(".")[0])
        types = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            # Fields without help are set by the program, never by the user.
            if "help" in field.metadata and field.name not in without:
                groups.setdefault(field.name, group)
                flags.setdefault(field.name, flag_options(field, types[field.name]))
    groups |= dict.fromkeys(everyday, first)
    for name in dict.fromkeys(name for name in (*everyday, *flags) if name in flags):
        groups[name].add_argument(flag(name), **flags[name])
    return built


def flag_options(field: dataclasses.Field, kind: type) -> dict:
    """What `add_argument` is told of a field of type `kind`."""
    shown = "" if field.default == "" else f" (default: {field.default})"
    text = field.metadata["help"].replace("%", "%%") + shown
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    else:
        how = {"type": kind, "choices": field.metadata.get("choices")}
    return {"default": argparse.SUPPRESS, "help": text, **how}


def fill(config: type, values: dict):
    """The dataclass `config` of those `values` that are its fields; it checks them itself."""
    names = (field.name for field in dataclasses.fields(config))
    return config(**{name: values[name] for name in names if name in values})


def check_number(name: str, value: float, least: float, most: float = 2**40) -> None:
    """UserError, which names the flag of the field `name`, unless least <= value <= most."""
    if not least <= value <= most:  # nor is NaN
        limited = most < 2**40 or value > most
        expected = f"{least:g} to {most:.13g}" if limited else f"{least:g} or more"
        raise UserError(f"{flag(name)} is {value}; expected {expected}")


def check_seed(seed: int) -> None:
    """UserError for a `--seed` that Python, NumPy and PyTorch do not all take."""
    check_number("seed", seed, least=0, most=2**32 - 1)


def thread_pool() -> ThreadPoolExecutor:
    """A thread for each core, at most 16."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16))


def batches(indices: np.ndarray, size: int = 64) -> list[np.ndarray]:
    """Indices (N,) in parts of at most `size`, in order."""
    return np.array_split(indices, max(1, math.ceil(len(indices) / size)))


def in_parallel(function: Callable, items: Sequence, label: str, unit: str) -> Iterator:
    """`function` of each item, in order, under a progress bar.

    Threads, not processes: zlib and NumPy release the GIL, and a process would import torch again
    and need a main guard in the caller's script.
    """
    bar = tqdm(total=len(items), desc=label, unit=unit, disable=None)
    with bar, thread_pool() as pool:
        # At most 256 results wait in memory for their reader.
        for start in range(0, len(items), 256):
            for result in pool.map(function, items[start : start + 256]):
                bar.update()
                yield result


# ---- device, seeds ----


def pick_device(name: str) -> torch.device:
    """The device `name`; "auto" is CUDA if there is one, else the CPU. UserError for no CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        fix = "Fix: --device cpu, or a CUDA build of PyTorch"
        raise UserError(f"--device cuda: PyTorch sees no CUDA device. {fix}.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    """A batch on `device`; a GPU is not waited for."""
    return batch if device.type == "cpu" else batch.pin_memory().to(device, non_blocking=True)


def has_fast_bf16(device: torch.device, batch_size: int) -> bool:
    """Whether training steps on `batch_size` slices are faster in bfloat16 than in float32 here.

    On a CPU with AMX they are; the bfloat16 of AVX-512 was half as fast as its float32
    (benchmarks/step.py). On a GPU they should be from 16 slices, which is an estimate: with fewer,
    a step's time goes into launching its kernels, and autocast adds a hundred.
    """
    if device.type == "cuda":
        return batch_size >= 16 and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list that collects Ctrl-C and SIGTERM, so that a loop can end after a whole step.

    A second signal raises KeyboardInterrupt at once.
    """
    received: list[int] = []

    def remember(number: int, frame) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- ranks: the processes that torchrun starts to train one model ----


@contextmanager
def ranks(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, each with its own GPU; only rank 0 prints.

    Without torchrun this does nothing: a lone process is rank 0 of 1. UserError on a node that has
    fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    cuda, local = pick_device(device).type == "cuda", int(os.environ["LOCAL_RANK"])
    if cuda:
        if local >= (found := torch.cuda.device_count()):
            where = f"process {local + 1} of a node with {found} GPUs"
            raise UserError(f"{where}. Fix: --nproc_per_node={found}.")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
        yield
    dist.destroy_process_group()  # not after an error, which the others may not have met


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: Tensor) -> Tensor:
    """This rank's part of a batch, perhaps empty. All ranks' parts, in order, are the batch."""
    return batch.tensor_split(world())[rank()]


def sum_over_ranks(*tensors: Tensor) -> None:
    """Sum tensors of one dtype and device over the ranks: in place, in one message.

    Ranks tell each other nothing in any other way. ConnectionError if a rank has ended, or is
    silent for longer than `PATIENCE`.
    """
    if dist.is_initialized() and tensors:
        message = torch.cat([tensor.flatten() for tensor in tensors])
        try:
            dist.all_reduce(message)
        except RuntimeError as error:
            raise ConnectionError(f"another rank is gone, see its own error ({error})") from error
        parts = message.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


@contextmanager
def first_of_node() -> Iterator[None]:
    """The first process of a node runs the block alone; the others follow, and find its files."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        sum_over_ranks(torch.zeros(1))  # which waits for all ranks
    try:
        yield
    finally:  # also after an error, which the others then meet themselves
        if first:
            sum_over_ranks(torch.zeros(1))


# ---- whole files ----


def writable_folder(path: Path | str, flag: str = "--out") -> Path:
    """Make the folder `path` where there is none; OSError if nothing can be written there.

    The error tells which `flag` names another one. If this process ends without having written to
    the folder, it goes again.
    """
    path = Path(path)
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path).cleanup()
    except OSError as error:
        why = f"{path}: cannot write there ({error.strerror})"
        raise OSError(f"{why}. Fix: another {flag}.") from error
    for folder in reversed(new):  # what is registered last, the innermost, comes first
        atexit.register(remove_if_empty, folder)
    return path


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something, or is gone already
        folder.rmdir()


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a path to write a file to, which becomes `path` if the block succeeds.

    Until then it has the same name in a temporary folder beside `path`, to which nobody else may
    write. An OSError of the block names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = {"prefix": TEMPORARY, "dir": path.parent, "ignore_cleanup_errors": True}
    try:
        with tempfile.TemporaryDirectory(**beside) as folder:
            part = Path(folder, path.name)
            yield part
            os.replace(part, path)
    except OSError as error:
        # Users know `path`, and nothing of the temporary folder.
        if error.errno and TEMPORARY in str(error.filename or TEMPORARY):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write `text` in UTF-8; bytes of a file's name that are no UTF-8 become question marks."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path | str, value) -> None:
    """Write `value` as indented JSON. ValueError for NaN and infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sha256(path: Path | str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- checkpoints ----


def save_checkpoint(path: Path | str, checkpoint: dict) -> None:
    """Write `checkpoint` (tensors and plain containers only) whole or not at all."""
    # By way of the memory: on a full disk torch.save raises a RuntimeError that says nothing of it.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    with atomic_path(path) as part, open(part, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        # It is on the disk before it has the name, so that a power cut leaves the old one.
        os.fsync(file.fileno())


@contextmanager
def reading(path: Path | str, revision: str = "") -> Iterator[None]:
    """Whatever fails in the block is the fault of the file `path`, which it reads: a UserError.

    `revision` is that of the program that wrote the file, where it is known.
    """
    try:
        yield
    except Exception as error:  # what a file can make PyTorch raise is no short list
        if isinstance(error, OSError) and error.filename:
            raise  # it names what cannot be opened
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"
        by = f"this revision of the program, but by {revision}" if revision else "this program"
        broken = f"{path}: damaged, or not written by {by} ({why})"
        raise UserError(f"{broken}. Fix: an earlier checkpoint, or train again.") from error


def load_checkpoint(path: Path | str, kind: str) -> dict:
    """Read a checkpoint that `save_checkpoint` wrote, on the CPU.

    Its "path" is added, and the "revision" of the program that wrote it, or "". No code in the file
    is run. Every byte is compared with the sums that the file carries, so that a bit that flipped
    on the disk is found, and weights that are not finite are refused. UserError for what is
    damaged, of another format or of another `kind`; FileNotFoundError for no file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected {KINDS[kind]}. Fix: train first, or name another."
        )
    with reading(path):
        with zipfile.ZipFile(path) as archive:
            # Of a member that is marked as a folder, PyTorch reads nothing, and returns what lies
            # in memory. It marks none.
            marked = [member.filename for member in archive.infolist() if member.external_attr]
            if damaged := archive.testzip() or " ".join(marked):
                raise ValueError(f"{damaged} is not what was written")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        written, of = saved["format"], str(saved["kind"])
        runs = [line["run"]["revision"] for line in saved.get("history", ()) if "run" in line]
        saved |= {"path": str(path), "revision": "".join(runs[-1:])}
        if not all(weights.isfinite().all() for weights in saved["model"].values()):
            raise ValueError("weights that are not finite")
    if written != FORMAT:
        by = f"by revision {saved['revision'] or 'unknown'} of this program"
        found = f"{path}: a checkpoint of format {written}, {by}; expected {FORMAT}"
        raise UserError(f"{found}. Fix: that revision, or train again.")
    if of != kind:
        found = f"{path}: {KINDS.get(of, of)}; expected {KINDS[kind]}"
        raise UserError(f"{found}. Fix: name {kind}_best.pth.")
    return saved


def provenance() -> dict:
    """What a result depends on beside its inputs: command, revision, versions, machine.

    Results are shared, so the command names files without their folders.
    """
    git, revision = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], ""
    with suppress(OSError, ValueError, subprocess.SubprocessError):  # no git, or no answer of it
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    # A word --data=/me/here is told as --data=here.
    words = (word.rpartition("=") for word in sys.argv)
    return {
        "argv": [name + equals + (Path(value).name or value) for name, equals, value in words],
        "revision": revision or "unknown",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs{gpu}",
    }
