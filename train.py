"""Train the VQ-VAE-2 on a study's train split, validating after every epoch; then the priors over
its codes.

    python train.py --data keras_slices_data                    # the report's hyperparameters
    python train.py --data keras_slices_data --preset best      # what we would use
    python train.py --resume Results/vqvae2_epoch_3.pth         # go on where that checkpoint stopped
    python train.py --stage prior --checkpoint Results/vqvae2_best.pth
    python train.py --weights Results/vqvae2_best.pth --preset fewer-bits --out Results/fewer-bits
    torchrun --nproc_per_node=8 train.py --data keras_slices_data   # one process for each of 8 GPUs

Writes to Results/ (or --out): train_losses.txt and val_losses.txt (one value an epoch),
loss_plot.png, log.jsonl (every loss, times, versions), vqvae2_epoch_N.pth, vqvae2_best.pth (the
lowest reconstruction loss in validation) and vqvae2_epoch_final.pth. The names of the priors' files
begin with prior_. Ctrl-C and SIGTERM save a checkpoint that --resume continues.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import KEPT, DataConfig, StudyInfo, find_trained_study, open_study, open_trained_study
from modules import VQVAE2, Output, VQVAE2Config, load_model
from new_slices.code_maps import MOST_VARIANTS, Variants, extract_codes
from new_slices.layouts import middles
from new_slices.organs import mask_losses
from new_slices.prior import Prior, PriorConfig
from support import metrics, results_page, runtime
from support.runtime import UserError, option
from support.trainer import Stage, TrainConfig, fit, switched

# A preset is what differs from the report's hyperparameters, the defaults. Flags given beside it
# win. In the same time, steps of one slice learn more than steps of 16: the codebooks move with
# every step.
STEPS = {
    "batch_size": 1,
    "optimiser": "muon",
    "lr": 1.5e-3,
    "schedule": "cosine",
    "warmup": 0.03,
    "weight_decay": 0.01,
    "clip": 1.0,
}
RECIPE = STEPS | {"mse": 0.0, "l1": 0.2, "ssim": 1.0, "flip": True}
WIDER = {"channels": 96, "top_channels": 192, "residual_channels": 48}
# The bottom prior, whose codes are details of what the top places, needs fewer slices.
PRIOR_RECIPE = STEPS | {
    "batch_size": 4,
    "bottom_every": 4,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "patience": 5,
}
LIGHT = {"lr": 4e-3, "prior_dropout": 0.0, "variants": 1}  # for priors of minutes
DEEPER = {"prior_top_layers": 4, "prior_refine_blocks": 3}
PRESETS = {
    "autoencoder": {
        "report": {},
        "quick": RECIPE | {"minutes": 1.75, "lr": 3e-3},
        "best": RECIPE | WIDER | {"minutes": 30.0, "decoder_blocks": 4},
        # A GPU takes a step of 16 slices in the time of a step of one. Estimates: not yet tried on
        # a card.
        "best-gpu": RECIPE
        | WIDER
        | {"minutes": 5.0, "decoder_blocks": 4, "batch_size": 16, "lr": 4e-3},
        # with --weights of `best`: codes that the priors store in fewer bits
        "fewer-bits": RECIPE | {"minutes": 10.0, "lr": 7e-4, "bit_weight": 0.03},
        # 0.391 and 0.195 bits per pixel instead of 0.703
        "medium-rate": RECIPE | {"epochs": 5, "K": 32},
        "low-rate": RECIPE | WIDER | {"epochs": 5, "K": 1024, "stride": 8},
    },
    "prior": {
        "quick": PRIOR_RECIPE | LIGHT | {"minutes": 1.75},
        "best": PRIOR_RECIPE | DEEPER | {"minutes": 30.0},
    },
}


@dataclass(frozen=True)
class LossConfig:
    """What stage one minimises. The defaults are the report's: mean squared error, beta 0.25."""

    beta: float = option(0.25, "weight of the commitment terms")
    mse: float = option(1.0, "weight of the mean squared error in the reconstruction term")
    l1: float = option(0.0, "weight of the mean absolute error in the reconstruction term")
    ssim: float = option(0.0, "weight of 1 - SSIM in the reconstruction term")
    mask: float = option(0.02, "weight of the cross-entropy and Dice losses of masks and layouts")
    flip: bool = option(
        False,
        "mirror each slice left-right with probability 1/2, and exchange left and right labels",
    )

    def __post_init__(self) -> None:
        for name in ("beta", "mse", "l1", "ssim", "mask"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} is {getattr(self, name)}; expected 0 or more")
        if self.mse + self.l1 + self.ssim == 0:
            raise UserError(
                "--mse, --l1 and --ssim are all 0; expected at least one reconstruction term"
            )


@dataclass(frozen=True)
class CodesConfig:
    """Stage two: which autoencoder's codes the priors learn, and how."""

    checkpoint: str = option("Results/vqvae2_best.pth", "the autoencoder, for --stage prior")
    variants: int = option(
        2, "copies of each training slice: as it is, mirrored, and then altered at random"
    )
    noise: float = option(
        0.0, "share of the codes that the prior sees which is replaced at random in training"
    )
    forget: float = option(
        0.1, "share of training slices whose position is hidden from the priors, and of layouts"
    )
    bottom_every: int = option(
        1,
        "the bottom prior, which has four times the codes, learns from one slice of a batch in this many",
    )

    def __post_init__(self) -> None:
        if self.bottom_every < 1:
            raise UserError(f"--bottom-every is {self.bottom_every}; expected at least 1")
        if not 1 <= self.variants <= MOST_VARIANTS:
            raise UserError(f"--variants is {self.variants}; expected 1 to {MOST_VARIANTS}")
        for name in ("forget", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected 0 to 1")


@dataclass(frozen=True)
class Settings:
    """Everything that a run of one stage is told; `make_settings` alone makes it from a command
    line.
    """

    stage: str = "autoencoder"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: VQVAE2Config = field(default_factory=VQVAE2Config)
    loss: LossConfig = field(default_factory=LossConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    checkpoint: dict | None = None  # to go on from

    def configs(self) -> list:
        """The dataclasses, in the order of `CONFIGS`."""
        return [getattr(self, name) for name in CONFIGS]


# ---- stage one: the autoencoder ----


def losses(
    x: Tensor, output: Output, config: LossConfig, masks: Tensor | None = None
) -> dict[str, Tensor]:
    """Every loss of a batch as a scalar; "loss" is minimised, in the report's words

        loss = reconstruction + codebook + beta * commitment [+ mask * (cross-entropy + Dice loss +
        layout)].

    The codebook term ||sg[z_e] - e||^2 has no entry: the moving averages of
    `VectorQuantiser.update` minimise it (van den Oord et al. 2017, appendix A.1). Losses of weight
    0 are reported as well.
    """
    y = output.reconstruction
    terms = {
        "mse": F.mse_loss(y, x),
        "l1": F.l1_loss(y, x),
        "ssim": 1 - metrics.ssim(x, y).mean(),
        "commitment_top": output.top.commitment,
        "commitment_bottom": output.bottom.commitment,
    }
    reconstruction = (
        config.mse * terms["mse"] + config.l1 * terms["l1"] + config.ssim * terms["ssim"]
    )
    loss = reconstruction + config.beta * (terms["commitment_top"] + terms["commitment_bottom"])
    if masks is not None:
        terms |= mask_losses(output.mask_logits, masks)
        layout = mask_losses(output.layout_logits, middles(masks, output.layout_logits.shape[2:]))
        terms["layout"] = layout["mask_cross_entropy"] + layout["mask_dice"]
        loss = loss + config.mask * (
            terms["mask_cross_entropy"] + terms["mask_dice"] + terms["layout"]
        )
    return {"loss": loss, "reconstruction": reconstruction, **terms}


class Autoencoder(Stage):
    """Stage one: reconstructs z-scored slices, and counts the codes of both levels."""

    kind = "vqvae2"
    loss_names = (
        "loss",
        "reconstruction",
        "mse",
        "l1",
        "ssim",
        "commitment_top",
        "commitment_bottom",
    )
    # what is reported; the commitment rises while the codebook learns to be used
    best_by = "reconstruction"

    def __init__(self, settings: Settings) -> None:
        self.data, self.loss, config = settings.data, settings.loss, settings.train
        self.device = runtime.pick_device(config.device)
        with runtime.first_of_node():
            self.splits = open_study(self.data)
        size = self.splits["train"].pixels.shape[1:]
        settings.model.code_shapes(*size)  # a UserError for a grid that the network cannot halve
        if min(size) < 16:
            raise UserError(f"a grid of {size[0]}x{size[1]}; expected 16 or more of each to score")
        # a split that a GPU holds takes indices there: they are copied once
        self.held = {name: self.splits[name].fits_on(self.device) for name in ("train", "validate")}
        self.images = {
            name: self.splits[name].on(self.device, held) for name, held in self.held.items()
        }
        labels = self.splits["train"].labels
        if labels:
            self.loss_names += ("mask_cross_entropy", "mask_dice", "layout")
            self.masks = {
                name: self.splits[name].masks_on(self.device, self.held[name]) for name in self.held
            }
        self.mirror = self.splits["train"].mirror
        if self.mirror.note and self.loss.flip:
            print(f"{self.splits['train'].study}: {self.mirror.note}")
        runtime.seed_everything(config.seed)
        self.model = VQVAE2(replace(settings.model, labels=len(labels)))
        if config.weights and not settings.checkpoint:
            self.start_from(config.weights)
        channels_last = switched(config.channels_last, True)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=self.layout)
        zeros = torch.zeros(self.model.config.K, dtype=torch.int64, device=self.device)
        self.counts = {level: zeros.clone() for level in ("top", "bottom")}
        self.mirrored = torch.zeros(len(self.splits["train"]), dtype=torch.bool, device=self.device)

    def start_from(self, path: str) -> None:
        """Take the weights and codebooks of another autoencoder; only its --bit-weight may
        differ.
        """
        start = load_model(path).model
        model = self.model.config
        if replace(start.config, bit_weight=model.bit_weight) != model:
            raise UserError(
                f"--weights {path}: a network of {start.config}; expected {model}. Fix: give no flags of the network."
            )
        self.model.load_state_dict(start.state_dict())

    def settings(self) -> dict:
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "loss_config": dataclasses.asdict(self.loss),
            "data": StudyInfo.from_splits(self.splits).as_dict(),
        }

    def start_epoch(self, generator: torch.Generator) -> None:
        self.mirrored.copy_(torch.rand(len(self.mirrored), generator=generator) < 0.5)

    def batch_losses(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        if self.held[split]:
            indices = indices.to(self.device, non_blocking=True)
        x = self.images[split](indices).to(memory_format=self.layout)
        masks = self.masks[split](indices) if self.model.config.labels else None
        if self.loss.flip and self.model.training:
            mirrored = self.mirrored[indices.to(self.device, non_blocking=True)]
            x = self.mirror.images(x, mirrored)
            masks = masks if masks is None else self.mirror.masks(masks, mirrored)
        return self.losses_of(x, masks)

    def losses_of(self, x: Tensor, masks: Tensor | None) -> dict[str, Tensor]:
        """The losses of a batch; `compile` compiles this."""
        output = self.model(x)
        for level, counts in self.counts.items():
            codes = getattr(output, level).codes.flatten()
            counts.scatter_add_(
                0, codes, torch.ones_like(codes)
            )  # bincount would wait for the device
        return losses(x, output, self.loss, masks)

    def compile(self, mode: str | None) -> None:
        self.losses_of = torch.compile(self.losses_of, mode=mode)

    def empty_batch(self) -> None:
        nothing = torch.zeros(0, self.model.config.D, 1, 1, device=self.device)
        for quantiser in (self.model.quantiser_top, self.model.quantiser_bottom):
            quantiser(nothing)  # all ranks take part in every update of the codebooks

    def statistics(self) -> dict[str, dict[str, float]]:
        """Codes used and perplexity 2^H of each level since the last call."""
        counts = {level: histogram.clone() for level, histogram in self.counts.items()}
        for histogram in self.counts.values():
            histogram.zero_()
        runtime.sum_over_ranks(*counts.values())
        return {
            level: {
                "used": int(histogram.count_nonzero()),
                "perplexity": round(2 ** metrics.code_entropy(histogram.cpu().numpy()), 2),
            }
            for level, histogram in counts.items()
        }

    def describe(self, record: dict) -> str:
        codes = record["codes"]["validate"]
        dice = (
            f"mask Dice {1 - record['validate']['mask_dice']:.3f}, "
            if self.model.config.labels
            else ""
        )
        return (
            f"SSIM {1 - record['validate']['ssim']:.4f}, {dice}codes used {codes['top']['used']} top "
            f"{codes['bottom']['used']} bottom"
        )


def fit_or_resume(stage: Stage, settings: Settings) -> Path:
    """`fit`, and the page that shows the run."""
    best = fit(stage, settings.train, settings.checkpoint)
    if runtime.rank() == 0:
        results_page.write(settings.train.out)
    return best


def train_autoencoder(settings: Settings) -> Path:
    """Stage one; returns the path of the best checkpoint. Raises as `open_study` and `loop.fit`
    do.
    """
    data, checkpoint = settings.data, settings.checkpoint
    size = (data.height, data.width)
    if checkpoint and size != (
        trained := (checkpoint["data"]["height"], checkpoint["data"]["width"])
    ):
        raise UserError(
            f"--resume: --height and --width are {size}; the checkpoint's are {trained}. Fix: leave them out."
        )
    runtime.writable_folder(settings.train.out)
    return fit_or_resume(Autoencoder(settings), settings)


# ---- stage two: the priors ----


class CodePriors(Stage):
    """Stage two: learns the code maps of every slice, and of its variants, under one
    autoencoder.
    """

    kind = "prior"
    loss_names = ("loss", "nats_top", "nats_bottom", "bits_per_pixel")

    def __init__(self, settings: Settings) -> None:
        codes, config = settings.codes, settings.train
        self.device = runtime.pick_device(config.device)
        trained, self.codes = load_model(codes.checkpoint), codes
        self.sha256, model = trained.sha256, trained.model.to(self.device)
        with runtime.first_of_node():
            self.splits = open_trained_study(trained.study, settings.data, codes.checkpoint)
        self.study = StudyInfo.from_splits(self.splits)
        size = trained.study.height, trained.study.width
        self.pixels = math.prod(size)
        with runtime.first_of_node():
            file = Path(config.out) / "codes.npz"
            maps = extract_codes(model, self.splits, codes.variants, self.sha256, file)
        self.maps = {
            name: torch.from_numpy(codes.astype(np.int32)).to(self.device)
            for name, codes in maps.items()
        }
        self.positions = {
            name: torch.from_numpy(split.positions).to(self.device)
            for name, split in self.splits.items()
        }
        runtime.seed_everything(config.seed)
        self.top_shape = model.config.code_shapes(*size)[0]
        train = self.splits["train"]
        self.numbers = Variants(codes.variants, len(train), train.mirror).numbers.to(self.device)
        labels = len(
            self.splits["train"].labels
        )  # layouts, where the autoencoder knows these masks too
        labels = labels if labels == model.config.labels else 0
        shape = replace(settings.prior, K=model.config.K, labels=labels)
        self.model = Prior(shape, self.top_shape, self.numbers.shape[2]).to(self.device)
        self.model.start_from(model.quantiser_top.codebook, model.quantiser_bottom.codebook)
        self.counts = {}

    def settings(self) -> dict:
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "codes_config": dataclasses.asdict(self.codes)
            | {"checkpoint": Path(self.codes.checkpoint).name},
            "top_shape": list(self.top_shape),
            "autoencoder_sha256": self.sha256,
            "data": self.study.as_dict(),
        }

    def start_epoch(self, generator: torch.Generator) -> None:
        size = len(self.splits["train"])
        self.variant = torch.randint(self.codes.variants, (size,), generator=generator).to(
            self.device
        )
        self.forgotten = (torch.rand(2, size, generator=generator) < self.codes.forget).to(
            self.device
        )

    def batch_losses(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        indices = indices.to(self.device, non_blocking=True)
        position, variant = self.positions[split][indices], torch.zeros_like(indices)
        if self.model.training:
            position = position.masked_fill(self.forgotten[0, indices], math.nan)
            variant = self.variant[indices]
            random = {"generator": None, "noise": self.codes.noise}
            bottoms = math.ceil(len(indices) / self.codes.bottom_every)
        else:  # the same masks in every epoch
            random = {"generator": torch.Generator().manual_seed(0)}
            bottoms = len(indices)
        top = self.maps[f"{split}_top"][variant, indices].long()
        bottom = self.maps[f"{split}_bottom"][variant[:bottoms], indices[:bottoms]].long()
        layout = None
        if labels := self.model.config.labels:
            layout = self.maps[f"{split}_layout"][variant, indices].long()
            if self.model.training:
                layout = layout.masked_fill(self.forgotten[1, indices, None, None], labels)
        altered = self.numbers[variant, indices] if split == "train" else self.numbers[variant, 0]
        nats = self.model(top, bottom, position, altered, layout, **random)
        nats_top, nats_bottom = nats["top"].mean(), nats["bottom"].mean()  # of a code
        codes_top, codes_bottom = top[0].numel(), bottom[0].numel()
        nats_slice = codes_top * nats_top + codes_bottom * nats_bottom
        return {
            "loss": nats_slice / (codes_top + codes_bottom),
            "nats_top": nats_top,
            "nats_bottom": nats_bottom,
            "bits_per_pixel": nats_slice / (math.log(2) * self.pixels),
        }

    def describe(self, record: dict) -> str:
        bits = {
            name: record["validate"][f"nats_{name}"] / math.log(2) for name in ("top", "bottom")
        }
        return (
            f"{bits['top']:.2f} bits a top code, {bits['bottom']:.2f} a bottom code, "
            f"{record['validate']['bits_per_pixel']:.4f} a pixel"
        )


def train_prior(settings: Settings) -> Path:
    """Stage two, on the codes of a trained autoencoder; returns the path of the best checkpoint."""
    codes, config, checkpoint = settings.codes, settings.train, settings.checkpoint
    if config.batch_size % codes.bottom_every:
        raise UserError(
            f"--bottom-every is {codes.bottom_every}, --batch-size {config.batch_size}: expected a multiple of it"
        )
    runtime.writable_folder(config.out)
    stage = CodePriors(settings)
    if checkpoint and checkpoint.get("autoencoder_sha256") != stage.sha256:
        raise UserError(
            f"{checkpoint['path']}: the prior of another autoencoder than {codes.checkpoint}. "
            "Fix: name its own with --checkpoint, or train again."
        )
    return fit_or_resume(stage, settings)


# ---- the command line ----


@dataclass(frozen=True)
class StartConfig:
    """What to train, and where to start."""

    stage: str = option("autoencoder", "what to train", choices=tuple(PRESETS))
    preset: str = option(
        "",
        "settings to start from; flags beside it win. Of the autoencoder: "
        + "; of the prior: ".join(", ".join(presets) for presets in PRESETS.values())
        + ". Default: the first",
        choices=tuple(dict.fromkeys(name for presets in PRESETS.values() for name in presets)),
    )
    resume: str = option("", "go on from this checkpoint, with its settings")


CONFIGS = {"data": DataConfig, "train": TrainConfig, "model": VQVAE2Config, "loss": LossConfig}
CONFIGS |= {"codes": CodesConfig, "prior": PriorConfig}
NOT_OF_STAGE = {"autoencoder": ("codes", "prior"), "prior": ("model", "loss")}
# Stage two takes these from its autoencoder; they are flags of stage one alone.
TAKEN_FROM_AUTOENCODER = {"K", "height", "width", "fit", "weights", "channels_last"}
EVERYDAY = ("data", "preset", "minutes", "out", "resume")


def flags_of(stage: str) -> set[str]:
    """The fields of the dataclasses that are flags of a stage."""
    configs = (config for name, config in CONFIGS.items() if name not in NOT_OF_STAGE[stage])
    fields = {each.name for config in configs for each in dataclasses.fields(config)}
    return fields - TAKEN_FROM_AUTOENCODER if stage == "prior" else fields


def flags(doc: str, *configs: type, without: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The flags of a script that trains: those of `CONFIGS` and of more dataclasses, `without`
    some.
    """
    return runtime.parser(
        doc, StartConfig, *configs, *CONFIGS.values(), everyday=EVERYDAY, without=without
    )


def study_flags(study: StudyInfo, path: str, given: dict) -> dict:
    """The flags that open the study of a checkpoint as its training did, unless `given` names
    another.
    """
    data = given.get("data") or find_trained_study(study, path, given.get("cache", ""))
    return {"data": data, **{name: getattr(study, name) for name in KEPT}}


def make_settings(given: dict, preset: str = "") -> Settings:
    """The settings for the flags `given`, a dictionary of fields of `StartConfig` and `CONFIGS`.

    They win over the settings of the checkpoint to resume; or else of the preset, which win over
    those of --weights. Without a preset in `given` it is `preset`, or the first of the stage.
    UserError for a flag without effect.
    """
    given = dict(given)
    stage, named, resume = (given.pop(name, "") for name in ("stage", "preset", "resume"))
    checkpoint = None
    if resume:
        if named:
            raise UserError(
                "--resume and --preset: a resumed run has its checkpoint's settings. Fix: leave one out."
            )
        checkpoint = runtime.load_checkpoint(resume, Autoencoder.kind, CodePriors.kind)
        resumed = "prior" if checkpoint["kind"] == CodePriors.kind else "autoencoder"
        if stage and stage != resumed:
            raise UserError(f"--stage {stage}: {resume} is of the other. Fix: leave out --stage.")
        stage, start = resumed, {}
        with runtime.reading(resume):
            for name, config in CONFIGS.items():
                if name not in ("data", *NOT_OF_STAGE[stage]):
                    key = "model_config" if name in ("model", "prior") else f"{name}_config"
                    start |= vars(runtime.from_saved(config, checkpoint[key]))
        if "checkpoint" in start:  # the autoencoder's name: checkpoints name no folders
            start["checkpoint"] = str(Path(resume).parent / start["checkpoint"])
        study = StudyInfo.from_checkpoint(checkpoint, resume)
        start |= {"out": str(Path(resume).parent), **study_flags(study, resume, given)}
    else:
        stage = stage or "autoencoder"
        presets = PRESETS[stage]
        if named and named not in presets:
            raise UserError(
                f"--preset {named}: the presets of --stage {stage} are {', '.join(presets)}"
            )
        start = presets.get(named or preset, next(iter(presets.values())))
        if given.get("weights") and stage == "autoencoder":
            weights = load_model(given["weights"])
            study = study_flags(weights.study, given["weights"], given)
            start = vars(weights.model.config) | study | start
    if useless := [runtime.flag(name) for name in given if name not in flags_of(stage)]:
        other = "prior" if stage == "autoencoder" else "autoencoder"
        raise UserError(f"{', '.join(useless)}: for --stage {other} alone. Fix: leave it out.")
    if "epochs" in given and "minutes" not in given:
        start = start | {
            "minutes": 0.0
        }  # --epochs wins over the minutes of a preset or of the checkpoint
    values = start | given
    made = {
        name: config(
            **{f.name: values[f.name] for f in dataclasses.fields(config) if f.name in values}
        )
        for name, config in CONFIGS.items()
    }
    return Settings(stage, **made, checkpoint=checkpoint)


def main() -> None:
    parser = flags(__doc__)
    given, help_wanted = runtime.given_flags(parser)
    settings = make_settings(given)
    if help_wanted:
        runtime.print_help(parser, *settings.configs())
    with runtime.ranks(settings.train.device):
        (train_prior if settings.stage == "prior" else train_autoencoder)(settings)


if __name__ == "__main__":
    runtime.run_cli(main)
