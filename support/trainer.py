"""The training loop of both stages: steps, exact validation, logs, checkpoints, resuming. It knows
no model.

    Stage        what a stage brings to the loop: a model, its data and its losses (train.py has two)
    Progress     how far a run has come
    Checkpoints  what a checkpoint holds, and how a run goes on from one
    Trainer      a step, an epoch, validation and the logs
    fit          trains a stage from beginning to end

Under torchrun every rank runs all of this on its share of each batch. What must not differ between
ranks (gradients, sums, the clock, the wish to stop) is summed over them, and only rank 0 writes
files. No step waits for a GPU.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from support import figures, runtime
from support.optimiser import Muon, split_parameters
from support.runtime import UserError, option

SWITCH = ("auto", "on", "off")
# Every batch but the last has one shape, so cuDNN may try its algorithms; TF32 is enough for
# gradients.
TRAINING_STEPS = {"enabled": True, "benchmark": True, "allow_tf32": True}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the report's hyperparameters."""

    out: str = option("Results", "folder for checkpoints, logs and plots")
    epochs: int = option(10, "passes over the train split")
    minutes: float = option(
        0.0, "train for this much wall time instead of --epochs; 0 means by epochs"
    )
    batch_size: int = option(16, "slices in a step of each process")
    optimiser: str = option(
        "adam", "muon: Muon for weight matrices, Adam for the rest", choices=("adam", "muon")
    )
    lr: float = option(3e-4, "the highest learning rate of the run")
    schedule: str = option(
        "constant", "shape of the learning rate over the run", choices=("constant", "cosine")
    )
    warmup: float = option(0.0, "share of the run in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay; 0 is Adam")
    clip: float = option(0.0, "largest norm of the gradient; 0 means no clipping")
    patience: int = option(
        0, "stop after this many epochs without a better validation loss; 0 never stops"
    )
    seed: int = option(0, "seed of weights, order and augmentation")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    bf16: str = option(
        "auto",
        "bfloat16 autocast; auto: where it is faster, on GPUs and CPUs with AMX",
        choices=SWITCH,
    )
    weights: str = option(
        "", "begin with the weights of this checkpoint, an autoencoder of the same shape"
    )
    channels_last: str = option("auto", "memory layout NHWC; auto: on", choices=SWITCH)
    compile: str = option(
        "auto", "torch.compile; auto: off, as its warm-up takes minutes", choices=SWITCH
    )
    save_every: int = option(1, "epochs between checkpoints vqvae2_epoch_N.pth")
    keep: int = option(3, "how many of those to keep; 0 keeps all")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{runtime.flag(name)} is {getattr(self, name)}; expected at least 1"
                )
        for name in ("minutes", "warmup", "weight_decay", "clip", "patience", "keep", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(
                    f"{runtime.flag(name)} is {getattr(self, name)}; expected 0 or more"
                )
        if self.warmup > 1:
            raise UserError(f"--warmup is {self.warmup}; expected a share of the run, at most 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr is {self.lr}; expected more than 0")


def shareable(config: TrainConfig) -> dict:
    """The settings for logs and checkpoints, which people share: no path of this machine is among
    them.
    """
    return dataclasses.asdict(config) | {
        name: Path(getattr(config, name)).name for name in ("out", "weights")
    }


def switched(setting: str, default: bool) -> bool:
    """Whether a setting of `SWITCH` is on; `default` decides for "auto"."""
    return default if setting == "auto" else setting == "on"


def learning_rate(config: TrainConfig, done: float) -> float:
    """The learning rate when the share `done` in [0, 1] of the run is over: linear warm-up, then
    the schedule.
    """
    rise = min(1.0, done / config.warmup) if config.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) if config.schedule == "cosine" else 1.0
    return config.lr * rise * fall


def make_optimiser(model: nn.Module, config: TrainConfig, device: torch.device) -> Muon:
    """AdamW for all parameters, or with --optimiser muon Muon for the matrices and AdamW for the
    others.

    On a GPU the learning rate is a tensor, so that a CUDA graph of a step can be replayed with
    another one.
    """
    matrices, others = (
        split_parameters(model) if config.optimiser == "muon" else ([], model.parameters())
    )
    gpu = device.type != "cpu"
    lr = torch.full((), config.lr, device=device) if gpu else config.lr
    return Muon(matrices, others, lr, config.weight_decay, fused=True, capturable=gpu)


def compile_mode(device: torch.device) -> str | None:
    """The mode for `torch.compile`. UserError where there is no compiler."""
    names = (
        [os.environ.get("CXX"), "g++"]
        if device.type == "cpu"
        else [os.environ.get("CC"), "gcc", "clang"]
    )
    if sys.platform == "darwin":
        names.append("clang++")
    if not any(name and shutil.which(name) for name in names):
        raise UserError(
            f"--compile on: no compiler ({', '.join(filter(None, names))}) on the PATH. Fix: leave out --compile, "
            "or install one."
        )
    return "max-autotune-no-cudagraphs" if device.type == "cuda" else None


class Stage:
    """What a stage of training brings to the loop. A subclass sets the attributes and fills in the
    methods.

    Attributes:
        kind: what its checkpoints are called, "vqvae2" or "prior".
        loss_names: the losses that `batch_losses` returns, "loss" first.
        best_by: the loss whose validation mean chooses the best checkpoint.
        model: an nn.Module, on its device.
        splits: {"train": ..., "validate": ...}: `batch_losses` takes indices of their slices.
        counts: tensors that `batch_losses` has added to in this epoch; checkpoints keep them.
    """

    kind: str
    loss_names: tuple[str, ...]
    best_by: str = "loss"
    model: nn.Module
    splits: dict
    counts: dict[str, Tensor]

    def settings(self) -> dict:
        """What checkpoints and the log say of the stage: "model_config", "data" and more."""
        raise NotImplementedError

    def start_epoch(self, generator: torch.Generator) -> None:
        """Draw what is random about each training slice in the coming epoch."""

    def batch_losses(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        """The means () of every loss over a batch, the slices `indices` (B,) of a split; trains on
        "loss".
        """
        raise NotImplementedError

    def compile(self, mode: str | None) -> None:
        """`torch.compile` what a step computes."""
        self.model.compile(mode=mode)

    def empty_batch(self) -> None:
        """Called in place of `batch_losses` where this rank has no slice of a batch."""

    def statistics(self) -> dict:
        """What all ranks have counted since the last call, for the log."""
        return {}

    def describe(self, record: dict) -> str:
        """The part of an epoch's line on the terminal that only this stage knows; `record` is the
        log's.
        """
        raise NotImplementedError


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
    run goes on in the middle of an epoch, on any number of ranks, and a run by --epochs in one
    process on a CPU ends with the same weights bit for bit.
    """

    def __init__(
        self, stage: Stage, config: TrainConfig, optimiser: Muon, progress: Progress, sums: Tensor
    ) -> None:
        self.stage, self.config, self.optimiser = stage, config, optimiser
        self.progress, self.sums = progress, sums
        self.out = Path(config.out)
        self.last_saved: Path | None = None

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
        """The checkpoint of an epoch that has ended, where one is due; deletes the one that is too
        many.
        """
        epoch, every = self.progress.epoch, self.config.save_every
        if epoch % every == 0:
            self.save(f"epoch_{epoch}")
            if self.config.keep:
                self.path(f"epoch_{epoch - self.config.keep * every}").unlink(missing_ok=True)

    def finish(self) -> None:
        """Save the final checkpoint; also as the best one, where no epoch was left to validate."""
        self.save("epoch_final")
        if self.progress.best == math.inf:
            self.save("best")
        if runtime.rank() == 0:
            self.remove_interrupted()

    def remove_interrupted(self) -> None:
        """Delete <kind>_interrupted.pth if this run has gone on from there, which its log tells."""
        with suppress(UserError, OSError):  # there is none, or it is broken
            past = runtime.load_checkpoint(self.path("interrupted"), self.stage.kind)["history"]
            if self.progress.history[: len(past)] == past:
                self.path("interrupted").unlink()

    def start(self, checkpoint: dict | None = None) -> None:
        """Begin a run, or go on from `checkpoint`, as `restore` does."""
        if checkpoint:
            self.restore(checkpoint)
        # Without a best checkpoint of its own in the folder, the next epoch becomes the best one.
        if not self.best_is_ours():
            self.progress.best, self.progress.best_epoch = math.inf, self.progress.epoch

    def restore(self, checkpoint: dict) -> None:
        """Go on from `checkpoint`. UserError where it is of another network or of other slices."""
        path, ours = checkpoint["path"], self.stage.settings()
        theirs = checkpoint["data"]["fingerprints"]
        if theirs["train"] != ours["data"]["fingerprints"]["train"]:
            raise UserError(
                f"{path}: trained on other slices or masks than those of {ours['data']['study']}. "
                f"Fix: --data, its own study; or begin anew, from its weights with --weights {path}."
            )
        if theirs["validate"] != ours["data"]["fingerprints"]["validate"]:
            print(
                f"note: {path} was validated on other slices or masks than those of "
                f"{ours['data']['study']}: the best so far begins anew"
            )
        if checkpoint["model_config"] != ours["model_config"]:
            raise UserError(
                f"{path}: a network of another shape. Fix: leave out the flags of the network."
            )
        if (optimiser := checkpoint["train_config"]["optimiser"]) != self.config.optimiser:
            raise UserError(
                f"{path}: trained with --optimiser {optimiser}. Fix: leave out --optimiser."
            )
        with runtime.reading(path):
            self.restore_progress(checkpoint)
            self.stage.model.load_state_dict(checkpoint["model"])
            self.restore_optimiser(checkpoint)
            # These are the sums of all ranks, and one rank alone goes on with them.
            if runtime.rank() == 0:
                self.sums.copy_(checkpoint["sums"])
                for name, counts in self.stage.counts.items():
                    counts.copy_(checkpoint["counts"][name])

    def restore_progress(self, checkpoint: dict) -> None:
        for name, value in vars(self.progress).items():
            # By its type, so that a word is no number of epochs.
            setattr(self.progress, name, type(value)(checkpoint[name]))
        if not 0 <= self.progress.seen <= (size := len(self.stage.splits["train"])):
            raise ValueError(f"{self.progress.seen} slices of its epoch are done, of {size}")

    def restore_optimiser(self, checkpoint: dict) -> None:
        """Take over the optimiser's moving averages. A fused kernel looks at no shape, so we do."""
        state, expected = checkpoint["optimiser"]["state"], []
        for group in self.optimiser.param_groups:
            names = ("momentum",) if group["matrices"] else ("exp_avg", "exp_avg_sq")
            for parameter in group["params"]:
                expected.append({"step": torch.Size(), **dict.fromkeys(names, parameter.shape)})
        shapes = [
            {name: tensor.shape for name, tensor in state[i].items()} for i in range(len(state))
        ]
        # Before its first step an optimiser has no state.
        if shapes != (expected if self.progress.step else []):
            raise ValueError("an optimiser of other weights")
        # The groups stay this run's: those of the checkpoint hold another run's learning rate.
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})

    def best_is_ours(self) -> bool:
        """Whether the folder holds the best checkpoint of this run, chosen on these slices, as rank
        0 sees it. Says so if it holds another.
        """
        found = torch.zeros(1)
        if runtime.rank() == 0:
            with suppress(UserError, OSError):  # there is none, or it is broken
                best = runtime.load_checkpoint(self.path("best"), self.stage.kind)
                data, of_this = best["data"], self.stage.settings()["data"]["fingerprints"]
                score = best["best"], best["best_epoch"], data["fingerprints"]["validate"]
                found += score == (
                    self.progress.best,
                    self.progress.best_epoch,
                    of_this["validate"],
                )
                if not found:
                    print(
                        f"note: {self.path('best')} is of another run, on {data['study']}; this run "
                        "will write over it and the files beside it. Another --out keeps them."
                    )
        runtime.sum_over_ranks(found)
        return bool(found)


class Trainer:
    """Trains a stage: `train_step` is a step, `train_epoch` an epoch, `end_epoch` validates, logs
    and saves.
    """

    def __init__(self, stage: Stage, config: TrainConfig, checkpoint: dict | None = None) -> None:
        self.stage, self.config, self.model = stage, config, stage.model
        self.sizes = {name: len(split) for name, split in stage.splits.items()}
        self.batch_size = config.batch_size * runtime.world()
        self.device = next(self.model.parameters()).device
        self.generator = runtime.generator_of(self.device)
        self.bf16 = switched(config.bf16, runtime.has_fast_bf16(self.device, config.batch_size))
        self.compile_with = [compile_mode(self.device)] if switched(config.compile, False) else []
        self.optimiser = make_optimiser(self.model, config, self.device)
        self.progress = Progress()
        self.sums = torch.zeros(len(stage.loss_names), dtype=torch.float64, device=self.device)
        self.checkpoints = Checkpoints(stage, config, self.optimiser, self.progress, self.sums)
        self.checkpoints.start(checkpoint)
        for tensor in self.model.state_dict().values():
            if runtime.rank():
                # so that the sum is rank 0's: machines may round an initialisation differently
                tensor.zero_()
            runtime.sum_over_ranks(tensor)
        self.lr = config.lr
        self.began = time.monotonic() - self.progress.seconds
        self.clock = 0.0  # rank 0's `elapsed`, the same on every rank
        self.loss_shown_at = 0.0
        self.prefix = "" if stage.kind == "vqvae2" else f"{stage.kind}_"  # of the names of logs
        settings = {"train": shareable(config), "ranks": runtime.world(), **stage.settings()}
        self.progress.history.append(
            {"run": runtime.provenance(), "device": str(self.device), "bf16": self.bf16, **settings}
        )

    # the clock

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def done(self) -> float:
        """The share of the run that is done, by wall time or by epochs; 1 when patience has run
        out.
        """
        config, progress = self.config, self.progress
        if config.patience and progress.epoch - progress.best_epoch >= config.patience:
            return 1.0
        if config.minutes:
            return self.clock / (60 * config.minutes)
        return (progress.epoch + progress.seen / self.sizes["train"]) / config.epochs

    def should_stop(self, stopped: list[int]) -> bool:
        """Set the clock to rank 0's; whether any rank has received a signal. All ranks get the same
        answer.
        """
        shared = torch.tensor(
            [0.0 if runtime.rank() else self.elapsed(), len(stopped)], dtype=torch.float64
        )
        runtime.sum_over_ranks(shared)
        self.clock = shared[0].item()
        return bool(shared[1])

    # training

    def train_step(self, batch: Tensor, bar: tqdm) -> None:
        """One step on `batch` (B,), indices of slices. Each rank takes its share; the step is the
        whole batch's.
        """
        share = runtime.share(batch)
        self.lr = learning_rate(self.config, self.done())
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr)
            else:
                group["lr"] = self.lr
        seed = (1_000_003 * self.config.seed + self.progress.step) * 1_000_003 + runtime.rank()
        self.generator.manual_seed(seed % 2**63)
        loss = self.take_step(share, len(batch))
        if len(share):
            self.show_loss(loss, share, bar)
        if (
            self.compile_with
        ):  # after a first step, which starts the codebooks: that would break the graph in two
            self.stage.compile(self.compile_with.pop())

    def take_step(self, share: Tensor, batch_size: int = 0) -> Tensor | None:
        """A step on this rank's share of a batch, which may be empty; returns the loss () of the
        share.
        """
        parameters, loss = list(self.model.parameters()), None
        self.optimiser.zero_grad()
        if len(share):
            loss = self.batch_loss("train", share, self.sums)
            (loss * (len(share) / (batch_size or len(share)))).backward()
            loss = loss.detach()
        else:
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
        # Validation is float32 always: scores must not depend on what the machine is fast at.
        with runtime.autocast(self.device, self.bf16 and self.model.training):
            losses = self.stage.batch_losses(split, indices)
        means = torch.stack([losses[name].detach() for name in self.stage.loss_names])
        sums.add_(means.double(), alpha=len(indices))
        return losses["loss"]

    def show_loss(self, loss: Tensor, indices: Tensor, bar: tqdm) -> None:
        """Show the loss and stop if it is not finite. On a GPU twice a second: reading it waits for
        the step.
        """
        gpu = self.device.type != "cpu"
        if gpu and time.monotonic() < self.loss_shown_at + 0.5:
            return
        value = loss.item()
        self.loss_shown_at = time.monotonic()
        bar.set_postfix(epoch=self.progress.epoch + 1, loss=f"{value:.4f}", refresh=False)
        if not math.isfinite(value):
            files = ", ".join(self.stage.splits["train"].paths[i].name for i in indices.tolist())
            where = "or before" if gpu else f"on {files}"
            raise UserError(self.divergence_message(value, self.progress.step + 1, where))

    def divergence_message(self, loss: float, step: int, where: str) -> str:
        return (
            f"the loss is {loss} at epoch {self.progress.epoch + 1}, step {step}, {where}. Last good checkpoint: "
            f"{self.checkpoints.last_saved or 'none of this run'}. Fix: a lower --lr, or --clip 1."
        )

    def train_epoch(self, bar: tqdm, stopped: list[int]) -> bool:
        """Train to the end of the epoch or of the minutes, or until a signal; returns whether there
        was one.
        """
        progress = self.progress
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + progress.epoch)
        order = torch.randperm(self.sizes["train"], generator=generator)
        self.stage.start_epoch(generator)
        self.model.train()
        began = time.monotonic() - progress.epoch_seconds
        stop = False
        for start in range(progress.seen, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            with torch.backends.cudnn.flags(**TRAINING_STEPS):
                self.train_step(batch, bar)
            progress.seen += len(batch)
            progress.step += 1
            stop = self.should_stop(stopped)
            if self.config.minutes:
                # nobody knows how many slices fit into the minutes; the bar's estimate follows from
                # this
                bar.total = round((bar.n + len(batch)) / min(self.done(), 1.0))
            bar.update(len(batch))
            if stop or (self.config.minutes and self.done() >= 1):
                break
        self.sums.tolist()  # waits until a GPU has done the steps that the clock counts
        progress.epoch_seconds = time.monotonic() - began
        return stop

    # validation, logs, checkpoints

    def means(self, sums: Tensor, count: int, where: str) -> dict[str, float]:
        """The mean of every loss over `count` slices, from each rank's `sums`, which become those
        of all ranks.

        UserError if the loss is not finite: these weights must not be saved.
        """
        runtime.sum_over_ranks(sums)
        means = dict(zip(self.stage.loss_names, (sums / count).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise UserError(self.divergence_message(means["loss"], self.progress.step, where))
        return means

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Exact means of every loss over the validate split."""
        self.model.eval()
        size, sums = self.sizes["validate"], torch.zeros_like(self.sums)
        batch_size = (
            self.config.batch_size if self.device.type == "cpu" else max(64, self.config.batch_size)
        )
        for indices in runtime.share(torch.arange(size)).split(batch_size):
            if len(indices):
                self.batch_loss("validate", indices, sums)
        return self.means(sums, size, "in validation")

    def next_epoch(self) -> None:
        self.progress.epoch += 1
        self.progress.seen, self.progress.epoch_seconds = 0, 0.0
        self.sums.zero_()

    def end_epoch(self) -> None:
        """Validate, log, and save what is due."""
        progress, record = self.progress, self.measure_epoch()
        progress.history.append(record)
        slow = progress.epoch_seconds > 10
        self.next_epoch()  # before anything is saved: a resumed run begins with the next epoch
        if better := record["validate"][self.stage.best_by] < progress.best:
            progress.best, progress.best_epoch = (
                record["validate"][self.stage.best_by],
                progress.epoch,
            )
        tqdm.write(
            f"epoch {progress.epoch}: train {record['train_loss']:.4f}, validate {record['val_loss']:.4f}"
            f"{' (best so far)' if better else ''}, {self.stage.describe(record)}, "
            f"{record['slices_per_s']:.1f} slices/s"
        )
        progress.seconds = self.elapsed()
        if better:
            self.checkpoints.save("best")
        self.checkpoints.save_epoch()
        self.write_logs(plot=slow)  # plotting would take a good part of a short epoch

    def measure_epoch(self) -> dict:
        """The log's record of the epoch that has just been trained."""
        progress = self.progress
        train = self.means(self.sums, progress.seen, "or before")
        codes = {"train": self.stage.statistics()}
        validate = self.validate()
        codes["validate"] = self.stage.statistics()
        return {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "train_loss": train["loss"],
            "val_loss": validate["loss"],
            "slices_per_s": round(progress.seen / progress.epoch_seconds, 2),
            "seconds": round(self.elapsed(), 1),
            "lr": self.lr,
            "train": train,
            "validate": validate,
            "codes": codes,
        }

    def interrupt(self) -> Path:
        """Save in the middle of an epoch, with what all ranks have summed up in it."""
        if self.progress.seen:
            self.means(self.sums, self.progress.seen, "or before")
        runtime.sum_over_ranks(*self.stage.counts.values())
        self.progress.seconds = self.elapsed()
        return self.checkpoints.save("interrupted")

    def finish(self) -> None:
        """Save the final checkpoint; and the best one, if nothing was left to do in a folder that
        has none.
        """
        self.progress.seconds = self.elapsed()
        self.checkpoints.finish()

    def write_logs(self, plot: bool) -> None:
        """log.jsonl and the losses, whole from `history`: the files of a resumed run are those of
        one run.
        """
        if runtime.rank():
            return
        out, history = self.checkpoints.out, self.progress.history
        epochs = [record for record in history if "epoch" in record]
        curves = {name: [record[f"{name}_loss"] for record in epochs] for name in ("train", "val")}
        for name, values in curves.items():
            lines = "".join(f"{value:.6f}\n" for value in values)
            runtime.write_text(out / f"{self.prefix}{name}_losses.txt", lines)
        lines = "".join(json.dumps(line) + "\n" for line in history)
        runtime.write_text(out / f"{self.prefix}log.jsonl", lines)
        if plot:
            figures.loss_plot(out / f"{self.prefix}loss_plot.png", *curves.values())


def fit(stage: Stage, config: TrainConfig, checkpoint: dict | None = None) -> Path:
    """Train `stage`, from `checkpoint` where one is given; returns the path of the best checkpoint.

    Raises:
        UserError, OSError: a checkpoint that does not fit; a loss that is not finite; a full disk.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint written that --resume
            continues.
    """
    trainer = Trainer(stage, config, checkpoint)
    progress, size = trainer.progress, trainer.sizes["train"]
    millions = sum(p.numel() for p in stage.model.parameters()) / 1e6
    length = f"{config.minutes:g} minutes" if config.minutes else f"{config.epochs} epochs"
    precision = "bfloat16" if trainer.bf16 else "float32"
    if trainer.device.type == "cuda" and not trainer.bf16:
        precision += " (convolutions of training steps in TF32)"
    where = trainer.device if runtime.world() == 1 else f"{runtime.world()} x {trainer.device.type}"
    print(
        f"training {millions:.2f} M parameters on {where} in {precision}, {size} slices, {length}"
    )
    bar = tqdm(
        total=None if config.minutes else config.epochs * size,
        initial=progress.epoch * size + progress.seen,
        unit="slice",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=runtime.rank() > 0,
    )
    with runtime.stop_signals() as stopped, bar:
        stop = trainer.should_stop(stopped)
        while not stop and (trainer.done() < 1 or progress.seen):
            stop = trainer.train_epoch(bar, stopped)
            if not stop:
                trainer.end_epoch()
                stop = trainer.should_stop(stopped)
        # inside the block: a second signal must not cut the writing short
        saved = trainer.interrupt() if stop else trainer.finish()
    trainer.write_logs(plot=True)
    if stop:
        print(
            f"stopped in epoch {progress.epoch + 1}; go on with: python train.py --resume {saved}"
        )
        raise KeyboardInterrupt
    kind, prefix, out = stage.kind, trainer.prefix, trainer.checkpoints.out
    print(
        f"wrote {out}/: {kind}_best.pth (epoch {progress.best_epoch}), {kind}_epoch_final.pth, {prefix}log.jsonl,"
    )
    print(f"  {prefix}loss_plot.png, {prefix}train_losses.txt and {prefix}val_losses.txt")
    return trainer.checkpoints.path("best")
