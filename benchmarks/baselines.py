"""What ours is measured against: the report's model, rebuilt, and MONAI's VQVAE (`pip install monai`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GradientQuantiser(nn.Module):
    """The report's quantiser: K codes learnt by gradient, on the map flattened without moving channels last.

    A "vector" is therefore D neighbouring pixels of one channel, which is what streaks its pictures.
    """

    def __init__(self, K: int, D: int):
        super().__init__()
        self.codebook = nn.Embedding(K, D)
        nn.init.uniform_(self.codebook.weight, -1 / K, 1 / K)

    def forward(self, z: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
        flat = z.reshape(-1, self.codebook.embedding_dim)
        codes = torch.cdist(flat, self.codebook.weight).argmin(1)
        vectors = self.codebook(codes).view_as(z)
        loss = F.mse_loss(vectors, z.detach()) + beta * F.mse_loss(z, vectors.detach())
        return z + (vectors - z).detach(), loss


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ReportVQVAE2(nn.Module):
    """The report's network, rebuilt from a description of its code: 1.02 M parameters (its own: 1.07 M).

    Residual blocks of 128 channels at full resolution; "top" and "bottom" are two parallel maps of half the
    resolution, each one stride-2 convolution with K=256: no hierarchy, 4.0 bits per pixel. Where the
    description leaves a choice, this takes the cheaper one, so our speed over it is not flattered.
    """

    def __init__(self, channels: int = 128, D: int = 64, K: int = 256):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), ResidualBlock(channels), ResidualBlock(channels)
        )
        self.to_top = nn.Conv2d(channels, D, 4, stride=2, padding=1)
        self.to_bottom = nn.Conv2d(channels, D, 4, stride=2, padding=1)
        self.quantiser_top, self.quantiser_bottom = GradientQuantiser(K, D), GradientQuantiser(K, D)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * D, channels, 2, stride=2),
            ResidualBlock(channels),
            ResidualBlock(channels),
            nn.Conv2d(channels, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 1, H, W) -> reconstruction (B, 1, H, W), codebook + beta * commitment ()."""
        h = F.relu(self.encoder(x))
        top, top_loss = self.quantiser_top(self.to_top(h))
        bottom, bottom_loss = self.quantiser_bottom(self.to_bottom(h))
        return self.decoder(torch.cat([top, bottom], 1)), top_loss + bottom_loss


def monai_vqvae() -> nn.Module:
    """MONAI's VQVAE with 64x32 codes, K=512, 128 channels and two residual layers: 3.07 M parameters."""
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
