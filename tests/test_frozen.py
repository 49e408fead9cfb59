"""What the networks and layouts gave for fixed weights and inputs, as frozen.json keeps it.

A trained model means what its arithmetic means: a change that moves these numbers makes
checkpoints say something else. If that is meant, raise the format of checkpoints, and

    python -m tests.test_frozen

writes the file anew.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import train
from dataset import Mirror
from modules import VQVAE2, VectorQuantiser, VQVAE2Config
from new_slices import layouts, organs, prior
from new_slices.code_maps import Variants
from support import metrics
from support.optimiser import Muon, split_parameters
from support.trainer import TrainConfig, learning_rate

FILE = Path(__file__).with_name("frozen.json")


def scatter(*shape: int, of: float = 0.0) -> Tensor:
    """Numbers in [-1, 1), float64, that look random and are the same everywhere."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((12.9898 * count + of).sin() * 43758.5453 % 2 - 1).view(shape)


def filled(module: nn.Module) -> nn.Module:
    """With such numbers as its weights, which keep the size of what passes through."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.copy_(scatter(*parameter.shape) * (3 / fan) ** 0.5)
    return module


def digest(values) -> list[float]:
    """Four weighted sums: they change if anything in `values` does."""
    flat = torch.as_tensor(np.asarray(values), dtype=torch.float64).flatten()
    sums = scatter(4, len(flat), of=0.5) @ flat / len(flat) ** 0.5
    return [float(f"{value:.6g}") for value in sums]


def autoencoder() -> dict:
    config = VQVAE2Config(16, D=4, channels=8, top_channels=12, bit_weight=0.01, labels=3)
    model = filled(VQVAE2(config))
    for level in (model.quantiser_top, model.quantiser_bottom):
        level.codebook.copy_(scatter(16, 4))
        level.ema_count.copy_(2 + scatter(16))
    x = scatter(2, 1, 64, 32).float()
    masks = (scatter(2, 64, 32) * 2 + 2).long().to(torch.uint8).clamp_max(2)
    with torch.no_grad():
        output = model.eval()(x)
        weights = train.LossConfig(beta=0.3, mse=0.5, l1=0.2, ssim=1.0, mask_weight=0.1)
        losses = train.losses(x, output, weights, masks, 0.7)
    found = {
        "reconstruction": output.reconstruction,
        "mask_logits": output.mask_logits,
        "coarse mask": output.coarse_mask_logits,
        "top codes": output.top.codes,
        "bottom codes": output.bottom.codes,
    }
    return found | {f"{name} loss": value for name, value in losses.items()}


def quantiser() -> dict:
    level = VectorQuantiser(16, 4, revive=0.0, bit_weight=0.02, price_rise=5).train()
    level.codebook.copy_(scatter(16, 4))
    level.ema_sum.copy_(level.codebook)
    level.updates += 1
    for step in range(3):
        level(scatter(2, 4, 8, 4, of=step).float())
    return {name: getattr(level, name) for name in ("codebook", "ema_count", "ema_sum")}


def priors() -> dict:
    config = prior.PriorConfig(16, 3, 24, 2, 2, 1, 2)
    model = filled(prior.Prior(config, (8, 5))).double().eval()
    top = (scatter(2, 8, 5) * 8 + 8).long()
    bottom, layout = (scatter(2, 16, 10) * 8 + 8).long(), (scatter(2, 16, 10) * 4.5 + 4.5).long()
    about = torch.tensor([0.3, math.nan]).double(), scatter(2, 7)
    hidden = {"generator": torch.Generator().manual_seed(0)}
    with torch.no_grad():
        nats = model(top, bottom, *about, layout, **hidden)
        known = {"top": (*about, layout), "bottom": (*about, top)}
        maps = {"top": top.clone(), "bottom": bottom.clone()}
        found = {f"nats, {name}": value for name, value in nats.items()}
        for name, codes in maps.items():
            level, codes[:, ::2] = getattr(model, name), 16  # half of the rows are hidden
            found[f"logits, {name}"] = level(codes, level.context(*known[name]))
        how = prior.Sampling(5, 0.8, 10.0, 1.0), prior.Sampling(4, 0.8, 1.0)
        drawn = model.sample(about[0].float(), [3, 4], *how, layouts=layout)
    return found | dict(zip(("sampled top", "sampled bottom"), drawn, strict=True))


def segmenter() -> dict:
    net = filled(organs.Segmenter(3, 8)).eval()
    with torch.no_grad():
        return {"logits": net(scatter(2, 1, 64, 40).float())}


def discs() -> Tensor:
    """(40, 48, 32): masks of two organs, of four slices each of ten patients."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(32.0), indexing="ij")
    masks = torch.zeros(40, 48, 32, dtype=torch.uint8)
    for i, (row, column, size) in enumerate(2 * scatter(40, 3)):
        for organ, down in ((1, 16), (2, 32)):
            radius = torch.hypot(rows - down - row, columns - 16 - 2 * column)
            masks[i][radius < 6 + size] = organ
    return masks


def new_layouts() -> dict:
    masks = discs()
    images = masks.float()[:, None] + 0.3 * scatter(40, 1, 48, 32).float()
    images[:, :, :4] = -2
    cells, borders = (24, 16), np.array([-1.5, -0.2, 0.3, 0.8, 1.4])
    tissue = layouts.smoothed(images, cells)
    known = layouts.layouts_of(tissue, masks, borders, 3)
    depths = layouts.depths_of(masks, 3, cells)
    where = np.tile(np.linspace(0, 1, 4), 10), np.repeat(np.arange(10), 4), borders, 3
    composer = layouts.Composer(known, tissue, depths, *where)
    drawn, shapes = composer.draw([0.1, 0.5, 0.9, math.nan], range(4))
    found = {"known": known, "depths": depths, "drawn": drawn, "shapes": np.stack(shapes)}
    return found | {"rebuilt": composer.rebuild(5), "closest": composer.closest}


def altered() -> dict:
    variants, some, masks = Variants(4, 3, Mirror(-1, ((1, 2),))), torch.arange(3), discs()[:3]
    images = masks[:, None].float() + 0.2 * scatter(3, 1, 48, 32).float()
    both = {"images": (variants.images, images), "masks": (variants.masks, masks)}
    return {
        f"{name}, {variant}": change(x, variant, some)
        for name, (change, x) in both.items()
        for variant in range(4)
    }


def measures() -> dict:
    a, b = scatter(40, 24).numpy(), scatter(30, 24, of=1).numpy() + 0.2
    codes, others = ((scatter(n, 40, of=n) * 8 + 8).long().numpy() for n in (6, 9))
    slices = discs().float().numpy() + 0.5 * scatter(40, 48, 32).float().numpy()
    large = slices[:6].repeat(4, 1).repeat(6, 2)
    weights = scatter(6, 40).float().numpy() + 1
    return {
        "organs": np.nan_to_num(organs.measure(discs().numpy(), 3)),
        "code bits": metrics.code_bits(codes, 16),
        "code agreement": metrics.code_agreement(codes, others, weights),
        "contrast": metrics.contrast(slices, (12, 8)),
        "correlations": metrics.correlations(
            *(metrics.thumbnails(some) for some in (slices[:5], slices[5:]))
        ),
        "kernel distance": metrics.kernel_distance(a, b),
        "ms-ssim": metrics.ms_ssim(large[:3], large[3:], 4.0),
    }


def optimisers() -> dict:
    found = {}
    model = filled(nn.Sequential(nn.Conv2d(16, 24, 3), nn.Conv2d(24, 40, 1), nn.Linear(40, 3)))
    muon = Muon(*split_parameters(model), lr=0.01, weight_decay=0.1)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = scatter(*parameter.shape, of=step).float()
        muon.step()
    found |= {f"after steps, {name}": each.detach() for name, each in model.named_parameters()}
    shares = np.linspace(0, 1, 9)
    for schedule in ("cosine", "constant"):
        config = TrainConfig(lr=0.3, warmup=0.1, schedule=schedule)
        found[f"rates, {schedule}"] = [learning_rate(config, share) for share in shares]
    return found


MADE = (autoencoder, quantiser, priors, segmenter, new_layouts, altered, measures, optimisers)


def values_of(make) -> dict[str, list[float]]:
    return {name: digest(value) for name, value in make().items()}


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_what_was_frozen_is_found_again(make):
    frozen = json.loads(FILE.read_text())[make.__name__]
    found = values_of(make)
    assert found.keys() == frozen.keys()
    for name, sums in found.items():
        assert sums == pytest.approx(frozen[name], rel=2e-4, abs=2e-4), name


if __name__ == "__main__":
    FILE.write_text(json.dumps({make.__name__: values_of(make) for make in MADE}, indent=1) + "\n")
