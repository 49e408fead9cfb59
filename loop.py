"""The training loop of both stages: steps, exact validation, logs, checkpoints, resuming. It knows no model.

A stage (train.py has two) brings the model and its data:

    kind                the name of its checkpoints: vqvae2, prior
    model               an nn.Module
    splits              {"train": ..., "validate": ...}, the slices of which `terms` takes indices
    names               of what `terms` returns, "loss" first
    counted             what it has counted in this epoch, which its checkpoints keep; {} for nothing
    settings()          what its checkpoints hold beside the run: model_config, data, ...
    draw(generator)     what is random about each slice of the train split in the coming epoch
    terms(split, indices)  {"loss": (), ...} of a batch, means over its examples; counts codes if it has any
    idle()              instead of `terms` where a batch has no slice for this rank
    statistics()        what was counted since the last call, by all ranks, for the log
    describe(record)    the terms that matter of an epoch's line of the log, for the terminal

Under torchrun every rank runs all of this on its stretch of each batch; what must not differ between ranks
(gradients, sums, the time, the wish to stop) is added up over them, and only rank 0 writes. No step
waits for a GPU.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import figures
import runtime
from optimiser import Muon, split_parameters
from runtime import UserError, option

SWITCH = ("auto", "on", "off")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the report's hyperparameters."""

    out: str = option("Results", "folder for checkpoints, logs and plots")
    epochs: int = option(10, "passes over the train split")
    minutes: float = option(0.0, "train for this much wall time instead of --epochs; 0 means by epochs")
    batch_size: int = option(16, "slices in a step of each process")
    optimiser: str = option("adam", "muon: for weight matrices, Adam for the rest", choices=("adam", "muon"))
    lr: float = option(3e-4, "learning rate, at its highest")
    schedule: str = option("constant", "learning rate over the run", choices=("constant", "cosine"))
    warmup: float = option(0.0, "share of the run in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay; 0 is Adam")
    clip: float = option(0.0, "largest norm of the gradient; 0 means unclipped")
    patience: int = option(0, "stop after this many epochs without a better validation loss; 0 never does")
    seed: int = option(0, "of weights, order and augmentation")
    device: str = option("auto", "where to train", choices=("auto", "cpu", "cuda"))
    bf16: str = option(
        "auto", "bfloat16 autocast; auto: where it is faster, on GPUs and CPUs with AMX", choices=SWITCH
    )
    weights: str = option(
        "", "begin with the weights of this checkpoint, of an autoencoder of the same shape"
    )
    channels_last: str = option("auto", "memory layout NHWC; auto: on", choices=SWITCH)
    compile: str = option("auto", "torch.compile; auto: off, its warm-up costs minutes", choices=SWITCH)
    save_every: int = option(1, "epochs between checkpoints vqvae2_epoch_N.pth")
    keep: int = option(3, "how many of those to keep; 0 keeps all")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 1")
        for name in ("minutes", "warmup", "weight_decay", "clip", "patience", "keep", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected 0 or more")
        if self.warmup > 1:
            raise UserError(f"--warmup is {self.warmup}; expected a share of the run, at most 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr is {self.lr}; expected more than 0")


def switched(flag: str, default: bool) -> bool:
    return default if flag == "auto" else flag == "on"


def learning_rate(config: TrainConfig, progress: float) -> float:
    """The learning rate at the share `progress` in [0, 1] of the run: linear warm-up, then the schedule."""
    rise = min(1.0, progress / config.warmup) if config.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))) if config.schedule == "cosine" else 1.0
    return config.lr * rise * fall


class Run:
    """A training run: all that a checkpoint holds, and the steps that change it.

    `epoch`, and `seen` slices of the next one, are done. The order of an epoch's slices and what is drawn for
    them depend on the seed and the epoch alone, all other random numbers on the seed, the step and the rank:
    so a run goes on in the middle of an epoch, on any number of ranks. `history` is log.jsonl, a dictionary a
    line.
    """

    KEPT = ("epoch", "seen", "step", "best", "best_epoch", "seconds", "epoch_seconds", "history")

    def __init__(self, stage, config: TrainConfig, checkpoint: dict | None):
        self.stage, self.config = stage, config
        self.sizes = {name: len(split) for name, split in stage.splits.items()}
        self.out = Path(config.out)
        self.batch_size = config.batch_size * runtime.world()
        self.device = next(stage.model.parameters()).device
        self.generator = runtime.generator_of(self.device)
        self.bf16 = switched(config.bf16, runtime.has_fast_bf16(self.device))
        torch.backends.cudnn.benchmark = True  # every batch but the last has one shape
        if switched(config.compile, False):
            # no CUDA graphs: they replay what a step did, and the first ones start the codebooks
            stage.model.compile(mode="max-autotune-no-cudagraphs" if self.device.type == "cuda" else None)
        matrices, others = (
            split_parameters(stage.model) if config.optimiser == "muon" else ([], stage.model.parameters())
        )
        self.optimiser = Muon(matrices, others, config.lr, config.weight_decay, fused=True)
        self.epoch = self.step = self.best_epoch = 0
        self.best = math.inf
        self.seconds = 0.0  # spent before `began`
        self.clock = 0.0  # rank 0's `elapsed`, for all
        self.looked = 0.0  # when the loss was last read
        self.saved: Path | None = None
        self.history: list[dict] = []
        self.start_epoch()
        self.prefix = "" if stage.kind == "vqvae2" else f"{stage.kind}_"  # of the names of logs
        self.began = time.monotonic()
        if checkpoint:
            self.restore(checkpoint)
        for tensor in stage.model.state_dict().values():
            if runtime.rank():
                tensor.zero_()  # then the sum is rank 0's: machines may round an initialisation apart
            runtime.sum_over_ranks(tensor)
        settings = {"train": dataclasses.asdict(config), "ranks": runtime.world(), **stage.settings()}
        # logs are shared: they name the study and not its path
        settings["data"] = settings["data"] | {"study": Path(settings["data"]["study"]).name}
        self.history.append(
            {"run": runtime.provenance(), "device": str(self.device), "bf16": self.bf16, **settings}
        )

    # what a checkpoint holds

    def state(self) -> dict:
        run = {name: getattr(self, name) for name in self.KEPT} | {"seconds": self.elapsed()}
        return {
            "kind": self.stage.kind,
            "model": self.stage.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "train_config": dataclasses.asdict(self.config),
            "counted": self.stage.counted,
            "sums": self.sums,
            **self.stage.settings(),
            **run,
        }

    def restore(self, checkpoint: dict) -> None:
        if checkpoint["model_config"] != self.stage.settings()["model_config"]:
            raise UserError(
                "--resume: the checkpoint is of a network of another shape. Fix: leave out its flags."
            )
        if (was := checkpoint["train_config"]["optimiser"]) != self.config.optimiser:
            raise UserError(f"--resume: the checkpoint is of --optimiser {was}. Fix: leave it out.")
        try:
            self.stage.model.load_state_dict(checkpoint["model"])
        except RuntimeError as error:  # of a revision whose network has other parts
            raise UserError("--resume: weights of another network than this. Fix: train again.") from error
        self.optimiser.load_state_dict(checkpoint["optimiser"])
        for group in self.optimiser.param_groups:
            group["weight_decay"] = self.config.weight_decay
        for name in self.KEPT:
            setattr(self, name, checkpoint[name])
        best, lost = self.out / f"{self.stage.kind}_best.pth", torch.zeros(1)
        if runtime.rank() == 0:
            # what the run has counted so far lies with one rank
            self.sums.copy_(checkpoint["sums"])
            for name, counts in self.stage.counted.items():
                counts.copy_(checkpoint["counted"][name])
            lost += (
                not best.is_file()
                or runtime.load_checkpoint(best, self.stage.kind)["epoch"] != self.best_epoch
            )
        runtime.sum_over_ranks(lost)
        if lost:  # the best so far is not in this folder: the next epoch becomes it
            self.best, self.best_epoch = math.inf, self.epoch

    def save(self, name: str) -> Path:
        path = self.out / f"{self.stage.kind}_{name}.pth"
        if runtime.rank() == 0:
            runtime.save_checkpoint(path, self.state())
        self.saved = path
        return path

    # where the run stands

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def progress(self) -> float:
        """The share of the run that is done, by wall time or by steps; 1 when patience has run out."""
        if self.config.patience and self.epoch - self.best_epoch >= self.config.patience:
            return 1.0
        if self.config.minutes:
            return self.clock / (60 * self.config.minutes)
        return (self.epoch + self.seen / self.sizes["train"]) / self.config.epochs

    def start_epoch(self) -> None:
        self.seen = 0
        self.epoch_seconds = 0.0
        self.sums = torch.zeros(len(self.stage.names), dtype=torch.float64, device=self.device)

    def agree(self, stopped: list[int]) -> bool:
        """Set the clock to rank 0's; returns whether any rank is to stop. The ranks must not part ways."""
        said = torch.tensor([0.0 if runtime.rank() else self.elapsed(), len(stopped)], dtype=torch.float64)
        runtime.sum_over_ranks(said)
        self.clock = said[0].item()
        return bool(said[1])

    def terms(self, split: str, indices: Tensor, sums: Tensor) -> Tensor:
        """The loss of a batch; all terms are added to `sums`."""
        with runtime.autocast(self.device, self.bf16):
            terms = self.stage.terms(split, indices)
        values = torch.stack([terms[name].detach() for name in self.stage.names])
        sums.add_(values.double(), alpha=len(indices))
        return terms["loss"]

    def means(self, sums: Tensor, count: int, where: str) -> dict[str, float]:
        """Every term's mean over `count` slices, of the sums of all ranks, which are joined.

        ValueError where the loss is not finite: nothing of these weights must be saved.
        """
        runtime.sum_over_ranks(sums)
        means = dict(zip(self.stage.names, (sums / count).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise UserError(self.lost(means["loss"], self.step, where))
        return means

    def lost(self, loss: float, step: int, where: str) -> str:
        return (
            f"the loss is {loss} at epoch {self.epoch + 1}, step {step}, {where}. Last good checkpoint: "
            f"{self.saved or 'none of this run'}. Fix: a lower --lr, or --clip 1."
        )

    # training and validation

    def train_step(self, batch: Tensor, bar: tqdm) -> None:
        """One step on a batch, of which this rank has its share: that of one process on the whole of it."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.progress())
        seed = (1_000_003 * self.config.seed + self.step) * 1_000_003 + runtime.rank()
        self.generator.manual_seed(seed % 2**63)
        self.optimiser.zero_grad()
        parameters, mine = list(self.stage.model.parameters()), runtime.share(batch)
        if len(mine):
            loss = self.terms("train", mine, self.sums)
            self.look(loss, mine, bar)
            (loss * (len(mine) / len(batch))).backward()
        else:
            self.stage.idle()
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        runtime.sum_over_ranks(*(parameter.grad for parameter in parameters))
        if self.config.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self.optimiser.step()

    def look(self, loss: Tensor, indices: Tensor, bar: tqdm) -> None:
        """Show the loss, and stop at one that is not finite; of a GPU twice a second, for this waits for it."""
        cuda = self.device.type == "cuda"
        if cuda and time.monotonic() < self.looked + 0.5:
            return
        value = loss.item()
        self.looked = time.monotonic()
        bar.set_postfix(epoch=self.epoch + 1, loss=f"{value:.4f}", refresh=False)
        if not math.isfinite(value):
            files = ", ".join(self.stage.splits["train"].paths[i].name for i in indices.tolist())
            raise UserError(self.lost(value, self.step + 1, "or before" if cuda else f"on {files}"))

    def train_epoch(self, bar: tqdm, stopped: list[int]) -> bool:
        """Train to the end of the epoch, of the minutes, or until a rank is to stop; returns whether one is."""
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.epoch)
        order = torch.randperm(self.sizes["train"], generator=generator)
        self.stage.draw(generator)
        self.stage.model.train()
        began = time.monotonic() - self.epoch_seconds
        stop = False
        for start in range(self.seen, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            self.train_step(batch, bar)
            self.seen += len(batch)
            self.step += 1
            stop = self.agree(stopped)
            if self.config.minutes:
                # how many slices fit is not known before; the bar's ETA follows from this
                bar.total = round((bar.n + len(batch)) / min(self.progress(), 1.0))
            bar.update(len(batch))
            if stop or (self.config.minutes and self.progress() >= 1):
                break
        self.sums.tolist()  # waits for a GPU to end what the clock is to count
        self.epoch_seconds = time.monotonic() - began
        return stop

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Exact means of every term over the validate split."""
        self.stage.model.eval()
        size, sums = self.sizes["validate"], torch.zeros_like(self.sums)
        for indices in runtime.share(torch.arange(size)).split(self.config.batch_size):
            if len(indices):
                self.terms("validate", indices, sums)
        return self.means(sums, size, "in validation")

    def end_epoch(self) -> None:
        """Validate, log, and save what is due."""
        seen, terms, statistics = self.seen, {}, {}
        terms["train"] = self.means(self.sums, seen, "or before")
        statistics["train"] = self.stage.statistics()
        terms["validate"] = self.validate()
        statistics["validate"] = self.stage.statistics()
        self.epoch += 1
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": terms["train"]["loss"],
            "val_loss": terms["validate"]["loss"],
            "slices_per_s": round(seen / self.epoch_seconds, 2),
            "seconds": round(self.elapsed(), 1),
            "lr": self.optimiser.param_groups[0]["lr"],
            **terms,
            "codes": statistics,
        }
        self.history.append(record)
        slow = self.epoch_seconds > 10
        self.start_epoch()  # before anything is saved: a resumed run begins with the next epoch
        better = record["val_loss"] < self.best
        if better:
            self.best, self.best_epoch = record["val_loss"], self.epoch
        tqdm.write(
            f"epoch {self.epoch}: train {record['train_loss']:.4f}, validate {record['val_loss']:.4f}"
            f"{' (best so far)' if better else ''}, {self.stage.describe(record)}, "
            f"{record['slices_per_s']:.1f} slices/s"
        )
        if better:
            self.save("best")
        if self.epoch % self.config.save_every == 0:
            self.save(f"epoch_{self.epoch}")
            if self.config.keep:
                old = self.epoch - self.config.keep * self.config.save_every
                (self.out / f"{self.stage.kind}_epoch_{old}.pth").unlink(missing_ok=True)
        self.write_logs(plot=slow)  # of a short epoch the plot would take a good part

    def interrupt(self) -> Path:
        """Save in the middle of an epoch, with what all ranks have counted in it."""
        if self.seen:
            self.means(self.sums, self.seen, "or before")
        runtime.sum_over_ranks(*self.stage.counted.values())
        return self.save("interrupted")

    def write_logs(self, plot: bool) -> None:
        """log.jsonl and the losses, all from `history`: a resumed run's files are those of one run."""
        if runtime.rank():
            return
        epochs = [record for record in self.history if "epoch" in record]
        curves = {name: [record[f"{name}_loss"] for record in epochs] for name in ("train", "val")}
        for name, values in curves.items():
            lines = "".join(f"{value:.6f}\n" for value in values)
            runtime.write_text(self.out / f"{self.prefix}{name}_losses.txt", lines)
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        runtime.write_text(self.out / f"{self.prefix}log.jsonl", lines)
        if plot:
            figures.loss_plot(self.out / f"{self.prefix}loss_plot.png", *curves.values())


def fit(stage, config: TrainConfig, checkpoint: dict | None = None) -> Path:
    """Train `stage`, from `checkpoint` where one is given; returns the path of the best checkpoint.

    Raises:
        ValueError, OSError: a checkpoint of another network; a loss that is not finite; a full disk.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, with a checkpoint written that --resume continues.
    """
    run = Run(stage, config, checkpoint)
    examples = run.sizes["train"]
    millions = sum(p.numel() for p in stage.model.parameters()) / 1e6
    length = f"{config.minutes:g} minutes" if config.minutes else f"{config.epochs} epochs"
    precision = "bfloat16" if run.bf16 else "float32"
    where = run.device if runtime.world() == 1 else f"{runtime.world()} x {run.device.type}"
    print(f"training {millions:.2f} M parameters on {where} in {precision}, {examples} slices, {length}")
    bar = tqdm(
        total=None if config.minutes else config.epochs * examples,
        initial=run.epoch * examples + run.seen,
        unit="slice",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=runtime.rank() > 0,
    )
    with runtime.stop_signals() as stopped, bar:
        stop = run.agree(stopped)
        while not stop and (run.progress() < 1 or run.seen):
            stop = run.train_epoch(bar, stopped)
            if not stop:
                run.end_epoch()
                stop = run.agree(stopped)
        path = run.interrupt() if stop else run.save("epoch_final")  # while a second signal still waits
        if not stop and run.best == math.inf:
            run.save("best")  # nothing was left to do, in a folder that has no best yet
    run.write_logs(plot=True)
    if stop:
        print(f"stopped in epoch {run.epoch + 1}; go on with: python train.py --resume {path}")
        raise KeyboardInterrupt
    kind, prefix = stage.kind, run.prefix
    print(
        f"wrote {run.out}/: {kind}_best.pth (epoch {run.best_epoch}), {kind}_epoch_final.pth, {prefix}log.jsonl,"
    )
    print(f"  {prefix}loss_plot.png, {prefix}train_losses.txt and {prefix}val_losses.txt")
    return run.out / f"{kind}_best.pth"
