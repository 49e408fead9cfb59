"""Models to compare ours with: the report's, a single-level VQ-VAE, MONAI's (`pip install monai`).

Every model maps x (B, 1, H, W) to a reconstruction of that shape and its quantiser's loss ().
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from dataset import DataConfig
from modules import VectorQuantiser
from support.trainer import TrainConfig


class ResidualBlock(nn.Module):
    """x + W2 relu(W1 relu(x)): a 3x3 convolution, then a 1x1."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class GradientQuantiser(nn.Module):
    """The report's quantiser: K codes learnt by gradient, on maps whose channels do not come last.

    So a "vector" is D neighbouring pixels of one channel, which puts streaks into its pictures.
    """

    def __init__(self, K: int, D: int):
        super().__init__()
        self.codebook = nn.Embedding(K, D)
        nn.init.uniform_(self.codebook.weight, -1 / K, 1 / K)

    def forward(self, z: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
        vectors = self.codebook(self.nearest(z)).view(z.shape)
        loss = F.mse_loss(vectors, z.detach()) + beta * F.mse_loss(z, vectors.detach())
        return z + (vectors - z).detach(), loss

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, D, h, w) -> codes (B, h * w) int64 in [0, K)."""
        flat = z.reshape(-1, self.codebook.embedding_dim)
        return torch.cdist(flat, self.codebook.weight).argmin(1).view(len(z), -1)


class ReportVQVAE2(nn.Module):
    """The report's network, rebuilt from a description: 1.02 M parameters (its own: 1.07 M).

    Residual blocks of 128 channels at full resolution; "top" and "bottom" are two parallel maps of
    half the resolution, each one stride-2 convolution with K=256: no hierarchy, 4.0 bits per pixel.
    Where the description leaves a choice, this takes the cheaper one, so that the comparison does
    not flatter us.
    """

    def __init__(self, channels: int = 128, D: int = 64, K: int = 256):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            ResidualBlock(channels, channels),
            ResidualBlock(channels, channels),
        )
        self.to_top = nn.Conv2d(channels, D, 4, stride=2, padding=1)
        self.to_bottom = nn.Conv2d(channels, D, 4, stride=2, padding=1)
        self.quantiser_top, self.quantiser_bottom = GradientQuantiser(K, D), GradientQuantiser(K, D)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * D, channels, 2, stride=2),
            ResidualBlock(channels, channels),
            ResidualBlock(channels, channels),
            nn.Conv2d(channels, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, H, W) -> reconstruction, codebook and beta * commitment losses ()."""
        h = F.relu(self.encoder(x))
        top, top_loss = self.quantiser_top(self.to_top(h))
        bottom, bottom_loss = self.quantiser_bottom(self.to_bottom(h))
        return self.decoder(torch.cat([top, bottom], 1)), top_loss + bottom_loss


class SingleLevelVQVAE(nn.Module):
    """A single-level VQ-VAE of the kind that reports 0.935 on HipMRI (2025): 0.66 M parameters.

    That peer has one level of 64x32 codes for 256x128 pixels and K=512, so 0.5625 bits per pixel.
    We chose the rest, the usual ingredients (van den Oord et al. 2017, section 4.1): two stride-2
    convolutions, 128 channels, two residual blocks of 32 channels, the mirror image as decoder,
    D=64, beta 0.25. It has our quantiser, whose EMA codebook starts from data and revives dead
    codes, so that its codebook does not collapse.
    """

    def __init__(self, channels: int = 128, D: int = 64, K: int = 512, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        half = channels // 2
        blocks = [ResidualBlock(channels, channels // 4) for _ in range(4)]
        self.encoder = nn.Sequential(
            nn.Conv2d(1, half, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            *blocks[:2],
            nn.ReLU(),
            nn.Conv2d(channels, D, 1),
        )
        self.quantiser = VectorQuantiser(K, D)
        self.decoder = nn.Sequential(
            nn.Conv2d(D, channels, 3, padding=1),
            *blocks[2:],
            nn.ReLU(),
            nn.ConvTranspose2d(channels, half, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(half, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, H, W) -> reconstruction (B, 1, H, W), beta * commitment (); the EMA moves the
        codebook.
        """
        quantised = self.quantiser(self.encoder(x))
        return self.decoder(quantised.vectors), self.beta * quantised.commitment


def monai_vqvae() -> nn.Module:
    """MONAI's VQVAE: 64x32 codes, K 512, 128 channels, two residual layers, 3.07 M parameters."""
    from monai.networks.nets import VQVAE

    return VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(128, 128),
        num_res_channels=(128, 128),
        num_res_layers=2,
        downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=512,
        embedding_dim=64,
    )


def our_stage(preset: str, data: DataConfig, **settings) -> tuple[train.Autoencoder, TrainConfig]:
    """Ours as `train.py --preset` trains it, with `settings` in place of the preset's."""
    made = replace(train.make_settings({"preset": preset, **settings}), data=data)
    return train.Autoencoder(made), made.train
