"""Variants for ablation.py that no flag makes: a function here changes the code that train.py then runs.

    python -m benchmarks.variants relu --data keras_slices_data --preset quick

They live here because they lost: the scripts hold only what is used. For studies without masks.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loop
import metrics
import modules
import runtime
import train
from modules import ResidualBlock, VectorQuantiser


def relu() -> None:
    nn.SiLU, F.silu = nn.ReLU, F.relu


def group_norm() -> None:
    """Put a GroupNorm of 8 groups at the start of every residual block."""

    class Normalised(ResidualBlock):
        def __init__(self, channels: int, hidden: int):
            super().__init__(channels, hidden)
            self.norm = nn.GroupNorm(8, channels)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))

    modules.ResidualBlock = Normalised


def cosine_codes() -> None:
    """Normalise vectors and codes to length 1 (Yu et al. 2022, "Improved VQGAN", section 3.2)."""
    quantise, update = VectorQuantiser.forward, VectorQuantiser.update

    def unit_update(self, flat: Tensor, codes: Tensor) -> None:
        update(self, flat, codes)
        self.codebook.copy_(F.normalize(self.codebook, dim=1))

    VectorQuantiser.forward = lambda self, z: quantise(self, F.normalize(z, dim=1))
    VectorQuantiser.update = unit_update


def rotation_trick() -> None:
    """Rotate and scale gradients as the encoder's output is rotated onto its code (Fifty et al. 2024, equation 4)."""
    quantise = VectorQuantiser.forward

    def forward(self, z: Tensor):
        quantised = quantise(self, z)
        q, fixed = quantised.vectors.detach(), z.detach()
        e_hat, q_hat = F.normalize(fixed, dim=1), F.normalize(q, dim=1)
        r = F.normalize(e_hat + q_hat, dim=1)
        scale = q.norm(dim=1, keepdim=True) / fixed.norm(dim=1, keepdim=True).clamp_min(1e-6)
        turned = z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * q_hat * (e_hat * z).sum(1, keepdim=True)
        return quantised._replace(vectors=scale * turned)

    VectorQuantiser.forward = forward


def small_codebook(level: str, K: str) -> None:
    """Give one level, quantiser_top or quantiser_bottom, a codebook of K codes, fewer than --K."""
    build = modules.VQVAE2.__init__

    def init(self, config) -> None:
        build(self, config)
        setattr(
            self, level, VectorQuantiser(int(K), config.D, config.ema_decay, config.revive, config.bit_weight)
        )

    modules.VQVAE2.__init__ = init


def ssim_of_scales() -> None:
    """In the loss, average the SSIM of the slice at full, half and quarter size."""
    plain = metrics.ssim

    def several(x: Tensor, y: Tensor) -> Tensor:
        if not y.requires_grad:  # validation still measures SSIM at full size
            return plain(x, y)
        return sum(plain(F.avg_pool2d(x, n), F.avg_pool2d(y, n)) for n in (1, 2, 4)) / 3

    metrics.ssim = several


def patch_gan(weight: str = "0.02") -> None:
    """Train against a discriminator of 22-pixel patches (Isola et al. 2017) with hinge losses."""
    layers = [nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    critic = nn.Sequential(*layers, nn.Conv2d(64, 1, 4, 1, 1))
    optimiser = torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.9))
    plain = train.losses

    def losses(x: Tensor, output: modules.Output, *more) -> dict[str, Tensor]:
        terms, y = plain(x, output, *more), output.reconstruction
        if y.requires_grad:  # not in validation
            critic.to(x.device).requires_grad_(True)
            (F.relu(1 - critic(x)).mean() + F.relu(1 + critic(y.detach())).mean()).backward()
            optimiser.step()
            optimiser.zero_grad()
            critic.requires_grad_(False)
            terms["loss"] = terms["loss"] - float(weight) * critic(y).mean()
        return terms

    train.losses = losses


def weight_averaging(decay: float = 0.998) -> None:
    """Validate moving averages of the weights over about 500 steps."""
    step, validate = loop.Trainer.train_step, loop.Trainer.validate

    def train_step(self, batch: Tensor, bar) -> None:
        step(self, batch, bar)
        weights = [p.detach() for p in self.stage.model.parameters()]
        if not hasattr(self, "averages"):
            self.averages = [w.clone() for w in weights]
        torch._foreach_lerp_(self.averages, weights, max(1 - decay, 1 / (1 + self.progress.step)))

    def averaged(self) -> dict[str, float]:
        weights = [p.detach() for p in self.stage.model.parameters()]
        kept = [w.clone() for w in weights]
        torch._foreach_copy_(weights, self.averages)
        try:
            return validate(self)
        finally:
            torch._foreach_copy_(weights, kept)

    loop.Trainer.train_step, loop.Trainer.validate = train_step, averaged


def shifts(most: int = 4) -> None:
    """Move training slices by up to 4 pixels along each axis, wrapping at the edges."""
    augment(lambda x: x.roll(torch.randint(-most, most + 1, (2,)).tolist(), (2, 3)))


def intensities() -> None:
    """Scale and shift the intensities of training slices by about a tenth of their standard deviation."""
    augment(lambda x: x * (1 + 0.1 * torch.randn(())) + 0.1 * torch.randn(()))


def augment(change) -> None:
    flip = train.flip_left_right
    train.flip_left_right = lambda x, mirrored: change(flip(x, mirrored))


def main() -> None:
    words = [*sys.argv[1:], "--"]
    end = next(i for i, word in enumerate(words) if word.startswith("--"))
    change, *arguments = words[:end] or [""]
    if not callable(globals().get(change)):
        raise runtime.UserError(
            f"variants.py has no variant {change!r}. Fix: name one of its functions first."
        )
    globals()[change](*arguments)
    del sys.argv[1 : end + 1]
    train.main()


if __name__ == "__main__":
    runtime.run_cli(main)
