"""The training loop of both stages: steps, exact validation, logs, checkpoints, resuming.

The loop knows no model: train.py and train_prior.py bring theirs. Under torchrun every rank runs
all of this on its share of each batch. What must not differ between ranks (gradients, sums, the
clock, the wish to stop) is summed over them, and only rank 0 writes files. A step does not wait for
the GPU; the loop does, twice a second, to show the loss.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from support import figures, results_page, runtime
from support.optimiser import Muon, split_parameters
from support.runtime import UserError, option

# Of cuDNN: batches have one shape, so it may try its algorithms; TF32 is enough for gradients.
TRAINING_STEPS = {"enabled": True, "benchmark": True, "allow_tf32": True}
# What may differ in a run that goes on: where things lie, how long it lasts, and what it runs on.
MAY_CHANGE = ("resume", "data", "cache", "checkpoint", "allow_patient_overlap", "out", "epochs")
MAY_CHANGE += ("slices", "minutes", "patience", "device", "bf16", "compile", "keep")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the report's hyperparameters."""

    out: str = option("Results", "folder for checkpoints, logs and plots")
    epochs: int = option(10, "passes over the train split")
    slices: int = option(0, "train on this many slices instead of --epochs; 0: by epochs")
    minutes: float = option(0.0, "train for this much wall time instead; 0: not by time")
    batch_size: int = option(16, "slices in a step, counted per process")
    optimiser: str = option(
        "adam", "muon: Muon for weight matrices, Adam for the rest", choices=("adam", "muon")
    )
    lr: float = option(3e-4, "the highest learning rate of the run")
    schedule: str = option(
        "constant", "shape of the learning rate over the run", choices=("constant", "cosine")
    )
    warmup: float = option(0.0, "share of the run in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay; 0 is Adam")
    clip: float = option(0.0, "largest norm of the gradient; 0: no clipping")
    patience: int = option(
        0, "stop after so many epochs that were no better in validation; 0: never"
    )
    seed: int = option(0, "seed of weights, order and augmentation")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    bf16: str = option(
        "auto", "bfloat16 in training steps; auto: if it is faster", choices=("auto", "on", "off")
    )
    compile: bool = option(False, "torch.compile the training step; its warm-up takes minutes")
    keep: int = option(3, "how many epochs' checkpoints to keep; 0 keeps all")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            runtime.check_number(name, getattr(self, name), least=1)
        for name in ("slices", "minutes", "weight_decay", "clip", "patience", "keep"):
            runtime.check_number(name, getattr(self, name), least=0)
        runtime.check_seed(self.seed)
        runtime.check_number("warmup", self.warmup, least=0, most=1)
        runtime.check_number("lr", self.lr, least=1e-38, most=1e38)


def other_lengths(given: dict) -> dict:
    """The lengths of a preset that --epochs or --slices among the flags `given` set to 0.

    --minutes sets none to 0: where it is not 0 itself, it counts more than both.
    """
    other = {name: 0 for name in ("slices", "minutes") if name not in given}
    return other if given.keys() & {"epochs", "slices"} else {}


def settings_to_resume(given: dict, kind: str, configs: dict[str, Callable]) -> tuple[dict, dict]:
    """The checkpoint of a `kind` to --resume, and all settings that its run goes on with.

    `configs` make the dataclasses of the checkpoint's "<name>_config". UserError where the flags
    `given` beside --resume would make the run another one.
    """
    resume = given["resume"]
    if changed := [runtime.flag(name) for name in given if name not in MAY_CHANGE]:
        keeps = f"{', '.join(changed)}: a run that goes on keeps the settings of {resume}"
        raise UserError(f"{keeps}. Fix: leave it out, or start a new run.")
    checkpoint, settings = runtime.load_checkpoint(resume, kind), {}
    # All of them, or it is refused: one that is gone since then would be lost in silence.
    with runtime.reading(resume, checkpoint["revision"]):
        for name, config in configs.items():
            settings |= vars(config(**checkpoint[f"{name}_config"]))
    return checkpoint, settings | {"out": str(Path(resume).parent)}


def shareable(config: TrainConfig) -> dict:
    """The settings for logs and checkpoints, which are shared: no path of this machine."""
    return dataclasses.asdict(config) | {"out": Path(config.out).name}


def learning_rate(config: TrainConfig, done: float) -> float:
    """The rate when the share `done` of the run is over: linear warm-up, then the schedule."""
    rise = min(1.0, done / config.warmup) if config.warmup else 1.0
    falls = config.schedule == "cosine"
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) if falls else 1.0
    return config.lr * rise * fall


class Stage:
    """What a stage of training brings to the loop: a subclass sets these, and fills in methods.

    kind: what its checkpoints are called, "vqvae2" or "prior".
    prefix: of the names of its logs.
    command: the script that trains it, and the flags that it needs to go on.
    loss_names: the losses that `batch_losses` returns, "loss" first.
    best_by: the loss whose validation mean chooses the best checkpoint.
    model: an nn.Module, on its device.
    splits: {"train": ..., "validate": ...}: `batch_losses` takes indices of their slices.
    counts: tensors that `batch_losses` has added to in this epoch; checkpoints keep them.
    fall: the learning rate over --lr; the loop sets it before every step.
    """

    prefix, best_by, fall = "", "loss", 1.0

    def settings(self) -> dict:
        """What checkpoints and the log say of the stage: "model_config", "data" and more."""

    def start_epoch(self, generator: torch.Generator) -> None:
        """Draw what is random about each training slice in the coming epoch."""

    def batch_losses(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        """The means () of every loss over slices `indices` (B,) of a split; trains on "loss"."""

    def compile(self) -> None:
        """`torch.compile` what a step computes."""
        self.model.compile()

    def empty_batch(self) -> None:
        """Called in place of `batch_losses` where this rank has no slice of a batch."""

    def statistics(self) -> dict:
        """What all ranks have counted since the last call, for the log."""
        return {}

    def describe(self, record: dict) -> str:
        """The part of an epoch's line that only this stage knows; `record` is the log's."""

    def verdict(self, record: dict) -> str:
        """What a user should know of the last epoch when the run has ended; "" for nothing."""
        return ""


@dataclass
class Progress:
    """How far a run has come: `epoch` epochs are done, and `seen` slices of the next one."""

    epoch: int = 0
    seen: int = 0
    step: int = 0
    best: float = math.inf  # the lowest validation mean of the stage's `best_by`
    best_epoch: int = 0
    seconds: float = 0.0  # of the whole run
    epoch_seconds: float = 0.0  # of the epoch that has begun
    history: list[dict] = field(default_factory=list)  # the lines of log.jsonl


class Checkpoints:
    """Writes the checkpoints of a run and restores a run from one.

    A checkpoint holds the model, the optimiser, the settings, the `Progress` and what the epoch has
    summed up so far. The order of an epoch's slices and what is drawn for them depend on the seed
    and the epoch alone; every other random number depends on the seed, the step and the rank. So a
    run goes on in the middle of an epoch, on any number of ranks.
    """

    def __init__(
        self, stage: Stage, config: TrainConfig, optimiser: Muon, progress: Progress, sums: Tensor
    ) -> None:
        self.stage, self.config, self.optimiser = stage, config, optimiser
        self.progress, self.sums = progress, sums
        self.out = Path(config.out)
        self.last_saved: Path | None = None
        study = stage.settings()["data"]
        self.fingerprints, self.directions = study["fingerprints"], study["directions"]

    def path(self, name: str) -> Path:
        return self.out / f"{self.stage.kind}_{name}.pth"

    def contents(self) -> dict:
        return {
            "kind": self.stage.kind,
            "model": self.stage.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "train_config": shareable(self.config),
            "counts": self.stage.counts,
            "sums": self.sums,
            **self.stage.settings(),
            **vars(self.progress),
        }

    def save(self, name: str) -> Path:
        """Rank 0 writes <out>/<kind>_<name>.pth; returns its path."""
        self.last_saved = self.path(name)
        if runtime.rank() == 0:
            runtime.save_checkpoint(self.last_saved, self.contents())
        return self.last_saved

    def save_epoch(self) -> None:
        """The checkpoint of an epoch; deletes those that are too many, of an earlier run too."""
        epoch = self.progress.epoch
        self.save(f"epoch_{epoch}")
        if self.config.keep:
            kept = [self.path(f"epoch_{epoch - i}") for i in range(self.config.keep)]
            for old in set(self.out.glob(self.path("epoch_[0-9]*").name)).difference(kept):
                old.unlink(missing_ok=True)

    def finish(self) -> Path:
        """Save the final checkpoint; also as the best one, where no epoch was left to validate."""
        if self.progress.best == math.inf:
            self.save("best")
        final = self.save("epoch_final")
        # <kind>_interrupted.pth goes if this run has gone on from there, which its log tells.
        with suppress(UserError, OSError):  # there is none, or it is broken
            past = runtime.load_checkpoint(self.path("interrupted"), self.stage.kind)["history"]
            if runtime.rank() == 0 and self.progress.history[: len(past)] == past:
                self.path("interrupted").unlink()
        return final

    def start(self, checkpoint: dict | None = None) -> None:
        """Begin a run, or go on from `checkpoint`; UserError for other slices or weights."""
        if checkpoint:
            self.check_slices(checkpoint)
            with runtime.reading(checkpoint["path"], checkpoint["revision"]):
                self.restore(checkpoint)
        # Without a best checkpoint of its own in the folder, the next epoch becomes the best one.
        if not self.best_is_ours():
            self.progress.best, self.progress.best_epoch = math.inf, self.progress.epoch

    def check_slices(self, checkpoint: dict) -> None:
        """UserError where the checkpoint's training slices, masks or affines are not ours."""
        path, theirs, ours = checkpoint["path"], checkpoint["data"], self.fingerprints
        # Older checkpoints do not tell the directions.
        turned = theirs.get("directions", self.directions) != self.directions
        if turned or theirs["fingerprints"]["train"] != ours["train"]:
            raise UserError(
                f"{path}: trained on other slices, masks or affines than are in this study; those "
                f"were of {theirs['study']}. Fix: name that study with --data, or start a new run "
                f"(an autoencoder can start from these weights: --weights {path})."
            )
        if theirs["fingerprints"]["validate"] != ours["validate"]:
            other = f"note: {path} was validated on other slices or masks than are in this study"
            print(f"{other}: the search for the best epoch starts again")

    def restore(self, checkpoint: dict) -> None:
        for name, value in vars(self.progress).items():
            # By its type, so that a word is no number of epochs.
            setattr(self.progress, name, type(value)(checkpoint[name]))
        if not 0 <= self.progress.seen <= (size := len(self.stage.splits["train"])):
            raise ValueError(f"{self.progress.seen} slices of its epoch are done, of {size}")
        self.stage.model.load_state_dict(checkpoint["model"])
        self.restore_optimiser(checkpoint["optimiser"]["state"])
        # These are the sums of all ranks, and one rank alone goes on with them.
        if runtime.rank() == 0:
            self.sums.copy_(checkpoint["sums"])
            for name, counts in self.stage.counts.items():
                counts.copy_(checkpoint["counts"][name])

    def restore_optimiser(self, state: dict) -> None:
        """Load the moving averages. A fused kernel does not check their shapes, so this does."""
        expected = []
        for group in self.optimiser.param_groups:
            names = ("momentum",) if group["matrices"] else ("exp_avg", "exp_avg_sq")
            for parameter in group["params"]:
                expected.append({"step": torch.Size(), **dict.fromkeys(names, parameter.shape)})
        shapes = [{name: x.shape for name, x in state[i].items()} for i in range(len(state))]
        # Before its first step an optimiser has no state.
        if shapes != (expected if self.progress.step else []):
            raise ValueError("an optimiser of other weights")
        # The groups stay this run's: those of the checkpoint hold another run's learning rate.
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})

    def best_is_ours(self) -> bool:
        """Whether the best checkpoint in the folder is this run's; says so where it is not.

        Rank 0 decides. One that was chosen on other slices is not ours.
        """
        ours, progress = torch.zeros(1), self.progress
        if runtime.rank() == 0:
            with suppress(UserError, OSError):  # there is none, or it is broken
                there = runtime.load_checkpoint(self.path("best"), self.stage.kind)
                split = there["data"]["fingerprints"]["validate"]
                wanted = progress.best, progress.best_epoch, self.fingerprints["validate"]
                ours += (there["best"], there["best_epoch"], split) == wanted
                if not ours:
                    name, study = self.path("best"), there["data"]["study"]
                    print(f"note: this run writes over another run's {name}, on {study}")
        runtime.sum_over_ranks(ours)
        return bool(ours)


class Pace:
    """How much of a run of `config` is done, over `size` training slices."""

    def __init__(self, config: TrainConfig, progress: Progress, size: int) -> None:
        self.config, self.progress, self.size = config, progress, size
        self.began = time.monotonic() - progress.seconds
        self.clock = 0.0  # rank 0's `elapsed`, the same on every rank

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def slices_seen(self) -> int:
        return self.progress.epoch * self.size + self.progress.seen

    def slices_asked(self) -> int:
        """Of the whole run, if it does not go by minutes."""
        return self.config.slices or self.config.epochs * self.size

    def done(self) -> float:
        """The share of the run that is done, by slices or by wall time; 1 when patience ran out."""
        config, progress = self.config, self.progress
        if config.patience and progress.epoch - progress.best_epoch >= config.patience:
            return 1.0
        if config.minutes:
            return self.clock / (60 * config.minutes)
        return self.slices_seen() / self.slices_asked()

    def signalled(self, signals: list[int]) -> bool:
        """Set the clock to rank 0's; whether any rank has received a signal.

        All ranks get the same answer, so they all leave the loop after the same step.
        """
        clock = 0.0 if runtime.rank() else self.elapsed()
        shared = torch.tensor([clock, len(signals)], dtype=torch.float64)
        runtime.sum_over_ranks(shared)
        self.clock = shared[0].item()
        return bool(shared[1])


class Trainer:
    """What `fit` does with a stage: `train_step` is a step, `validate` scores held-out slices."""

    def __init__(self, stage: Stage, config: TrainConfig, checkpoint: dict | None = None) -> None:
        self.stage, self.config, self.model = stage, config, stage.model
        self.sizes = {name: len(split) for name, split in stage.splits.items()}
        self.batch_size = config.batch_size * runtime.world()
        self.device = next(self.model.parameters()).device
        fast = runtime.has_fast_bf16(self.device, config.batch_size)
        self.bf16 = fast if config.bf16 == "auto" else config.bf16 == "on"
        # AdamW for all parameters; with --optimiser muon, Muon for those that are matrices.
        matrices, others = [], self.model.parameters()
        if config.optimiser == "muon":
            matrices, others = split_parameters(self.model)
        self.optimiser = Muon(matrices, others, config.lr, config.weight_decay, fused=True)
        self.progress = Progress()
        self.sums = torch.zeros(len(stage.loss_names), dtype=torch.float64, device=self.device)
        self.checkpoints = Checkpoints(stage, config, self.optimiser, self.progress, self.sums)
        self.checkpoints.start(checkpoint)
        for tensor in self.model.state_dict().values():
            # Every rank starts from rank 0's weights: machines may round an initialisation
            # differently. The others add zeros.
            tensor.mul_(runtime.rank() == 0)
            runtime.sum_over_ranks(tensor)
        self.lr = config.lr
        self.pace = Pace(config, self.progress, self.sizes["train"])
        self.loss_shown_at = 0.0
        self.epoch_began = time.monotonic()
        settings = {"train": shareable(config), "ranks": runtime.world(), **stage.settings()}
        machine = {"run": runtime.provenance(), "device": str(self.device), "bf16": self.bf16}
        self.progress.history.append(machine | settings)

    # ---- training ----

    def start_epoch(self) -> Tensor:
        """The order of the epoch's slices that are still to come, (n,) indices.

        It follows, with what is drawn for each slice, from the seed and the epoch alone: so a run
        that was stopped in an epoch goes on with the very slices that it had not seen.
        """
        config, progress = self.config, self.progress
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + progress.epoch)
        order = torch.randperm(self.sizes["train"], generator=generator)
        self.stage.start_epoch(generator)
        self.model.train()
        self.epoch_began = time.monotonic() - progress.epoch_seconds
        most = self.sizes["train"]
        if config.slices and not config.minutes:
            most = max(0, config.slices - progress.epoch * most)
        return order[progress.seen : most]

    def train_step(self, batch: Tensor) -> Tensor | None:
        """One step on `batch` (B,), indices of slices; returns the loss () of this rank's share.

        Each rank takes its share of the batch, which may be empty; the step is the whole batch's.
        """
        share, parameters, loss = runtime.share(batch), list(self.model.parameters()), None
        self.lr = learning_rate(self.config, self.pace.done())
        # A tensor, as `torch.compile` would compile anew for every number.
        self.stage.fall = torch.full((), self.lr / self.config.lr, device=self.device)
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr
        # What is random in a step follows from the seed, the step and the rank.
        seed = (1_000_003 * self.config.seed + self.progress.step) * 1_000_003 + runtime.rank()
        torch.manual_seed(seed % 2**63)

        self.optimiser.zero_grad()
        if len(share):
            loss = self.batch_loss("train", share, self.sums)
            (loss * (len(share) / len(batch))).backward()
            loss = loss.detach()
        else:  # this rank has nothing to add, but the others wait for its part of each sum
            self.stage.empty_batch()
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        runtime.sum_over_ranks(*(parameter.grad for parameter in parameters))
        if self.config.clip:
            nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self.optimiser.step()
        return loss

    def batch_loss(self, split: str, indices: Tensor, sums: Tensor) -> Tensor:
        """The loss () of a batch; adds every loss of its slices to `sums`."""
        # Validation is float32 always: scores must not depend on what a machine is fast at.
        bf16 = self.bf16 and self.model.training
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            losses = self.stage.batch_losses(split, indices)
        means = torch.stack([losses[name].detach() for name in self.stage.loss_names])
        sums.add_(means.double(), alpha=len(indices))
        return losses["loss"]

    # ---- validation, logs, checkpoints ----

    def means(self, sums: Tensor, count: int, where: str) -> dict[str, float]:
        """The mean of every loss over `count` slices; each rank's `sums` become those of all."""
        runtime.sum_over_ranks(sums)
        means = dict(zip(self.stage.loss_names, (sums / count).tolist(), strict=True))
        check_finite(self, means["loss"], where)
        return means

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Exact means of every loss over the validate split."""
        self.model.eval()
        size, sums = self.sizes["validate"], torch.zeros_like(self.sums)
        batch_size = max(self.config.batch_size, 1 if self.device.type == "cpu" else 64)
        for indices in filter(len, runtime.share(torch.arange(size)).split(batch_size)):
            self.batch_loss("validate", indices, sums)
        return self.means(sums, size, "in validation")

    def end_epoch(self) -> dict:
        """Validate, count the epoch as done, and return the log's record of it."""
        progress = self.progress
        train = self.means(self.sums, progress.seen, "or before")  # waits for a GPU to finish
        progress.epoch_seconds = time.monotonic() - self.epoch_began
        statistics = {"train": self.stage.statistics()}
        validate = self.validate()
        statistics["validate"] = self.stage.statistics()
        speed = round(progress.seen / progress.epoch_seconds, 2)
        progress.epoch += 1
        progress.seen, progress.epoch_seconds, progress.seconds = 0, 0.0, self.pace.elapsed()
        self.sums.zero_()
        record = {
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": train["loss"],
            "val_loss": validate["loss"],
            "slices_per_s": speed,
            "seconds": round(progress.seconds, 1),
            "lr": self.lr,
            "train": train,
            "validate": validate,
            # What the stage has counted, by what it is: {"codes": {"train": ..., "validate": ...}}.
            **{
                name: {split: found[name] for split, found in statistics.items()}
                for name in statistics["train"]
            },
        }
        progress.history.append(record)
        return record

    def interrupt(self) -> Path:
        """Save in the middle of an epoch, with what all ranks have summed up in it."""
        self.progress.epoch_seconds = time.monotonic() - self.epoch_began
        self.progress.seconds = self.pace.elapsed()
        self.means(self.sums, max(1, self.progress.seen), "or before")
        runtime.sum_over_ranks(*self.stage.counts.values())
        return self.checkpoints.save("interrupted")


# ---- what a run shows and writes ----


def first_line(run: Trainer) -> str:
    """What is trained, on what, and for how long."""
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    where = f"{runtime.world()} x {run.device.type}" if runtime.world() > 1 else run.device
    what = f"training {millions:.2f} M parameters on {where}"
    minutes, slices = run.config.minutes, run.pace.slices_asked()
    length = f"{minutes:g} minutes" if minutes else f"{slices} slices"
    precision = "bfloat16" if run.bf16 else "float32"
    return f"{what} in {precision}: {length}; the train split has {run.sizes['train']}"


def progress_bar(run: Trainer) -> tqdm:
    """Counts the slices of the whole run, and tells the time left."""
    return tqdm(
        total=None if run.config.minutes else run.pace.slices_asked(),
        initial=run.pace.slices_seen(),
        unit="slice",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=runtime.rank() > 0,
    )


def show_loss(run: Trainer, loss: Tensor | None, batch: Tensor, bar: tqdm) -> None:
    """Show the loss, and stop the run if it is not finite.

    On a GPU twice a second: to read a number there waits for the step.
    """
    gpu = run.device.type != "cpu"
    if loss is None or (gpu and time.monotonic() < run.loss_shown_at + 0.5):
        return
    value = loss.item()
    run.loss_shown_at = time.monotonic()
    bar.set_postfix(epoch=run.progress.epoch + 1, loss=f"{value:.4f}", refresh=False)
    paths = [run.stage.splits["train"].paths[i].name for i in runtime.share(batch).tolist()]
    check_finite(run, value, "or before" if gpu else f"on {', '.join(paths)}")


def check_finite(run: Trainer, loss: float, where: str) -> None:
    """UserError if the loss is not finite: such weights must not be saved."""
    if not math.isfinite(loss):
        progress, last = run.progress, run.checkpoints.last_saved or "none of this run"
        found = f"the loss is {loss} at epoch {progress.epoch + 1}, step {progress.step}, {where}"
        fix = "Fix: a new run with a lower --lr, or with --clip 1"
        raise UserError(f"{found}. Last good checkpoint: {last}. {fix}.")


def epoch_line(run: Trainer, record: dict, better: bool) -> str:
    """An epoch's line on the terminal."""
    return (
        f"epoch {record['epoch']}: train {record['train_loss']:.4f}, "
        f"validate {record['val_loss']:.4f}{' (best so far)' if better else ''}, "
        f"{run.stage.describe(record)}, {record['slices_per_s']:.1f} slices/s"
    )


def write_logs(run: Trainer, plot: bool = True) -> None:
    """log.jsonl, the losses and their plot, whole from `history`.

    So the files of a run that was stopped and went on are those of one run. A plot takes as long
    as a short epoch, so `fit` does not plot after each of these. Before its first epoch ends, a run
    leaves another one's model, and so its log, as they are.
    """
    out, history = run.checkpoints.out, run.progress.history
    epochs = [record for record in history if "epoch" in record]
    if runtime.rank() or not epochs:
        return
    curves = {name: [record[f"{name}_loss"] for record in epochs] for name in ("train", "val")}
    for name, values in curves.items():
        lines = "".join(f"{value:.6f}\n" for value in values)
        runtime.write_text(out / f"{run.stage.prefix}{name}_losses.txt", lines)
    lines = "".join(json.dumps(line) + "\n" for line in history)
    runtime.write_text(out / f"{run.stage.prefix}log.jsonl", lines)
    if plot:
        figures.loss_plot(out / f"{run.stage.prefix}loss_plot.png", *curves.values())


def fit(stage: Stage, config: TrainConfig, checkpoint: dict | None = None) -> Path:
    """Train `stage`, from `checkpoint` where one is given; returns the path of the best checkpoint.

    UserError for a checkpoint that does not fit and a loss that is not finite; KeyboardInterrupt
    after Ctrl-C or SIGTERM, with a checkpoint written that --resume continues.
    """
    run = Trainer(stage, config, checkpoint)
    progress, checkpoints, first_step = run.progress, run.checkpoints, run.progress.step
    print(first_line(run))
    with runtime.stop_signals() as signals, progress_bar(run) as bar:
        stopped = run.pace.signalled(signals)
        # An epoch that has begun is always ended, even if no batch of it is left.
        while not stopped and (run.pace.done() < 1 or progress.seen):
            for batch in filter(len, run.start_epoch().split(run.batch_size)):
                # A step: the rate of the schedule, the losses, their gradients, the update.
                with torch.backends.cudnn.flags(**TRAINING_STEPS):
                    loss = run.train_step(batch)
                progress.seen += len(batch)
                progress.step += 1
                show_loss(run, loss, batch, bar)
                # Once: the first step starts the codebooks, which would break a compiled graph.
                if config.compile and progress.step == first_step + 1:
                    stage.compile()
                # After every step: does somebody want us to stop, or is the time over?
                stopped = run.pace.signalled(signals)
                if config.minutes:  # nobody knows how many slices fit into the minutes
                    bar.total = round((bar.n + len(batch)) / min(run.pace.done(), 1.0))
                bar.update(len(batch))
                if stopped or run.pace.done() >= 1:
                    break
            if stopped:
                break
            # The end of an epoch: exact means over the validate split, and its line in the log.
            record = run.end_epoch()
            # The best weights so far are kept in a file of their own; every epoch's for a while.
            value = record["validate"][stage.best_by]
            if better := value < progress.best:
                progress.best, progress.best_epoch = value, progress.epoch
                checkpoints.save("best")
            tqdm.write(epoch_line(run, record, better))
            checkpoints.save_epoch()
            write_logs(run, plot=progress.seconds > 10 * progress.epoch)
            stopped = run.pace.signalled(signals)
        # Within the block that catches signals: a second Ctrl-C must not cut the writing short.
        saved = run.interrupt() if stopped else checkpoints.finish()
        write_logs(run)
        if runtime.rank() == 0:
            results_page.write(checkpoints.out)
    if stopped:
        where = f"stopped in epoch {progress.epoch + 1}"
        print(f"{where}; go on with: {runtime.command(resume=str(saved), **stage.command)}")
        raise KeyboardInterrupt
    # A run that goes on when all of it is done has no epoch to tell of.
    last = progress.history[-1]
    if "epoch" in last and (verdict := stage.verdict(last)):
        print(verdict)
    best, names = checkpoints.path("best"), ("log.jsonl", "loss_plot.png", "train_losses.txt")
    print(f"wrote {checkpoints.out}/: {best.name} (epoch {progress.best_epoch}), {saved.name},")
    print(f"  {', '.join(run.stage.prefix + name for name in (*names, 'val_losses.txt'))}")
    return best
