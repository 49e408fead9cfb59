"""Train the priors over the codes of a trained autoencoder: generate.py samples from them.

    python train_prior.py                             # over the codes of Results/vqvae2_best.pth
    python train_prior.py --checkpoint Results/for-files/vqvae2_best.pth --out Results/for-files
    python train_prior.py --resume Results/prior_interrupted.pth  # go on where that one stopped

Writes to Results/ (or --out) what train.py does, under names that begin with prior_, and codes.npz,
the code maps of the study. prior_best.pth has the lowest bound on bits per code in validation.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import SIZE, DataConfig, StudyInfo, check_labels, open_trained_study
from modules import load_model
from new_slices.code_maps import (
    MOST_VARIANTS,
    Variants,
    composer_of,
    extract_codes,
    labels_on_layouts,
)
from new_slices.layouts import REBUILT
from new_slices.prior import Prior, PriorConfig
from support import runtime
from support.runtime import UserError, check_number, option
from support.trainer import Stage, TrainConfig, fit, other_lengths, settings_to_resume
from train import SHARED_RECIPE

# The bottom prior, whose codes are details of what the top places, needs a quarter of the slices.
RECIPE = SHARED_RECIPE | {
    "batch_size": 4,
    "bottom_every": 4,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "patience": 5,
}
# All layouts that the top prior of `best` learns from are rebuilt as new ones are composed
# (layouts.py).
PRESETS = {
    "best": RECIPE
    | {"slices": 55_000, "prior_top_layers": 4, "prior_refine_blocks": 3, "rebuilt": 1.0},
    "quick": RECIPE | {"slices": 3_400, "lr": 4e-3, "prior_dropout": 0.0, "variants": 1},
}


@dataclass(frozen=True)
class CodesConfig:
    """Which autoencoder's codes the priors learn, and how."""

    checkpoint: str = option("Results/vqvae2_best.pth", "the autoencoder")
    variants: int = option(
        2, "versions of each slice: 1 as it is, 2 mirrored too, 3 and more bent too"
    )
    forget: float = option(0.1, "share of positions, and of layouts, that the priors are not told")
    rebuilt: float = option(
        0.0, "share of layouts, not of bent slices, with tissue of other patients, as in new ones"
    )
    bottom_every: int = option(1, "train the bottom prior on one in n slices of a batch")

    def __post_init__(self) -> None:
        check_number("bottom_every", self.bottom_every, least=1)
        check_number("variants", self.variants, least=1, most=MOST_VARIANTS)
        check_number("forget", self.forget, least=0, most=1)
        check_number("rebuilt", self.rebuilt, least=0, most=1)

    def saved(self) -> dict:
        """For a checkpoint: there `variants` is called "copies", and the folder is left out."""
        values = dataclasses.asdict(self) | {"checkpoint": Path(self.checkpoint).name}
        return {"copies": values.pop("variants"), **values}

    @classmethod
    def from_saved(cls, copies: int, **others) -> "CodesConfig":
        return cls(variants=copies, **others)


@dataclass(frozen=True)
class StartConfig:
    """Where to start."""

    preset: str = option("best", "settings to start from; flags win", choices=tuple(PRESETS))
    resume: str = option("", "go on from this checkpoint, with its settings")


CONFIGS = {"data": DataConfig, "train": TrainConfig, "codes": CodesConfig, "prior": PriorConfig}
# The priors take these from their autoencoder.
OF_THE_AUTOENCODER = (*SIZE, "K")
EVERYDAY = ("checkpoint", "preset", "slices", "out", "resume")


@dataclass(frozen=True)
class Settings:
    """Everything that a run is told; `make_settings` makes it from the flags of a command line."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    checkpoint: dict | None = None  # to go on from


def make_settings(given: dict) -> Settings:
    """The settings for the flags `given`, fields of `StartConfig` and of `CONFIGS`.

    Flags win over the settings of the checkpoint to resume, or else over those of the preset.
    UserError for a flag that --resume forbids.
    """
    preset, resume = given.get("preset", ""), given.get("resume", "")
    start, checkpoint = PRESETS[preset or "best"], None
    if resume:
        saved = {"train": TrainConfig, "codes": CodesConfig.from_saved, "model": PriorConfig}
        checkpoint, start = settings_to_resume(given, CodePriors.kind, saved)
        # A checkpoint names the autoencoder, not its folder: people share checkpoints.
        start["checkpoint"] = str(Path(resume).parent / start["checkpoint"])
    values = start | other_lengths(given) | given
    configs = {name: runtime.fill(config, values) for name, config in CONFIGS.items()}
    return Settings(**configs, checkpoint=checkpoint)


class CodePriors(Stage):
    """Stage two: learns the code maps of every slice and its variants under one autoencoder."""

    kind, prefix = "prior", "prior_"
    loss_names = ("loss", "nats_top", "nats_bottom", "bits_per_pixel")

    def __init__(self, settings: Settings) -> None:
        codes, config = settings.codes, settings.train
        self.device = runtime.pick_device(config.device)
        trained, self.codes = load_model(codes.checkpoint), codes
        self.command = {"script": "train_prior.py", "checkpoint": codes.checkpoint}
        self.command["cache"] = settings.data.cache
        self.sha256, checkpoint = trained.sha256, settings.checkpoint
        if checkpoint and checkpoint["autoencoder_sha256"] != self.sha256:
            fix = "Fix: name its own with --checkpoint, or train again"
            other = f"{checkpoint['path']}: the prior of another autoencoder than"
            raise UserError(f"{other} {codes.checkpoint}. {fix}.")
        model = trained.model.to(self.device)
        with runtime.first_of_node():
            self.splits = open_trained_study(trained.study, settings.data, codes.checkpoint)
        check_labels(self.splits["train"], trained.study, codes.checkpoint)
        self.study = StudyInfo.from_splits(self.splits)
        size = trained.study.height, trained.study.width
        # Bits are counted per pixel of the slices' own files, as predict.py does.
        self.pixels = {
            name: float(split.shapes.prod(1).mean()) for name, split in self.splits.items()
        }
        with runtime.first_of_node():
            file = Path(config.out) / "codes.npz"
            maps = extract_codes(model, self.splits, codes.variants, self.sha256, file)
        self.maps = {
            name: torch.from_numpy(values.astype(np.int32)).to(self.device)
            for name, values in maps.items()
            if values.dtype == np.uint16
        }
        positions = {name: split.positions for name, split in self.splits.items()}
        self.positions = {k: torch.from_numpy(v).to(self.device) for k, v in positions.items()}
        torch.manual_seed(config.seed)
        self.top_shape = model.config.code_shapes(*size)[0]
        train = self.splits["train"]
        self.numbers = Variants(codes.variants, len(train), train.mirror).numbers.to(self.device)
        labels = labels_on_layouts(model, train)
        shape = replace(settings.prior, K=model.config.K, labels=labels)
        self.model = Prior(shape, self.top_shape).to(self.device)
        self.model.start_from(model.quantiser_top.codebook, model.quantiser_bottom.codebook)
        self.counts, self.mirror, self.rebuilt = {}, train.mirror, None
        if not labels:  # classes of layouts are tissue then, and no organs on two sides
            self.mirror = replace(train.mirror, partners=())
        if codes.rebuilt:  # (REBUILT, N, 2h, 2w)
            rebuild = composer_of(train, maps, labels).rebuild
            made = runtime.in_parallel(rebuild, range(len(train)), "layouts", " slices")
            made = np.stack([layouts.astype(np.int32) for layouts in made], 1)
            self.rebuilt = torch.from_numpy(made).to(self.device)

    def settings(self) -> dict:
        return {
            "model_config": dataclasses.asdict(self.model.config),
            "codes_config": self.codes.saved(),
            "top_shape": list(self.top_shape),
            "autoencoder_sha256": self.sha256,
            "data": dataclasses.asdict(self.study),
        }

    def start_epoch(self, generator: torch.Generator) -> None:
        size = len(self.splits["train"])
        variant = torch.randint(self.codes.variants, (size,), generator=generator)
        forgotten = torch.rand(2, size, generator=generator) < self.codes.forget
        self.variant, self.forgotten = variant.to(self.device), forgotten.to(self.device)
        # Which of its rebuilt layouts a slice has; -1: its own.
        rebuilt = torch.randint(REBUILT, (size,), generator=generator)
        own = torch.rand(size, generator=generator) >= self.codes.rebuilt
        self.which = rebuilt.masked_fill(own, -1).to(self.device)

    def batch_losses(self, split: str, indices: Tensor) -> dict[str, Tensor]:
        indices = runtime.to_device(indices, self.device)
        position, variant = self.positions[split][indices], torch.zeros_like(indices)
        bottoms, generator = len(indices), torch.Generator().manual_seed(0)  # the same masks always
        if self.model.training:
            position = position.masked_fill(self.forgotten[0, indices], math.nan)
            variant, generator = self.variant[indices], None
            bottoms = math.ceil(len(indices) / self.codes.bottom_every)
        top = self.maps[f"{split}_top"][variant, indices].long()
        bottom = self.maps[f"{split}_bottom"][variant[:bottoms], indices[:bottoms]].long()
        layout = self.maps[f"{split}_layout"][variant, indices].long()
        if self.model.training:
            if self.rebuilt is not None:
                which = self.which[indices].masked_fill(variant > 1, -1)
                others = self.mirror.masks(self.rebuilt[which, indices].long(), variant == 1)
                layout = torch.where(which[:, None, None] < 0, layout, others)
            forgotten = self.forgotten[1, indices, None, None]
            layout = layout.masked_fill(forgotten, self.model.config.classes)
        train = split == "train"
        altered = self.numbers[variant, indices] if train else self.model.as_it_is(len(indices))
        nats = self.model(top, bottom, position, altered, layout, generator=generator)
        nats_top, nats_bottom = nats["top"].mean(), nats["bottom"].mean()  # of a code
        codes_top, codes_bottom = top[0].numel(), bottom[0].numel()
        nats_slice = codes_top * nats_top + codes_bottom * nats_bottom
        return {
            "loss": nats_slice / (codes_top + codes_bottom),
            "nats_top": nats_top,
            "nats_bottom": nats_bottom,
            "bits_per_pixel": nats_slice / (math.log(2) * self.pixels[split]),
        }

    def describe(self, record: dict) -> str:
        means = record["validate"]
        top, bottom = (means[f"nats_{level}"] / math.log(2) for level in ("top", "bottom"))
        a_pixel = means["bits_per_pixel"]
        return f"{top:.2f} bits a top code, {bottom:.2f} a bottom code, {a_pixel:.4f} a pixel"


def train_prior(settings: Settings) -> Path:
    """Train; returns the path of the best checkpoint. Raises as `open_study` and `fit` do."""
    config = settings.train
    runtime.writable_folder(config.out)  # an error now, not after the training
    return fit(CodePriors(settings), config, settings.checkpoint)


def main() -> None:
    configs, without = CONFIGS.values(), OF_THE_AUTOENCODER
    parser = runtime.parser(__doc__, StartConfig, *configs, everyday=EVERYDAY, without=without)
    settings = make_settings(vars(parser.parse_args()))
    with runtime.ranks(settings.train.device):
        train_prior(settings)


if __name__ == "__main__":
    runtime.run_cli(main)
