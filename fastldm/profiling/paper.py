"""The tables of the paper that bear on cost (arXiv 2112.10752v2), as data.

What is here was measured by its authors, on the device that `DEVICE` names, and is quoted. No
figure of ours stands beside it in this module, nor does a report mix the two.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv 2112.10752v2"
DEVICE = "one NVIDIA A100"


@dataclass(frozen=True)
class UNetRow:
    """A diffusion model of Table 13 or 14.

    Attributes:
        f: downsampling factor; 1 is diffusion on pixels.
        z: side and channels of the latents of a 256² image.
        num_embeddings: codes of the first stage; None without one.
        channels, multipliers: channels of the first level, and how many times as many each has.
        attention: the resolutions with attention.
        printed_parameters: of the UNet, in millions, as the table prints it.
        counted_parameters: the same, counted from the configuration.
        batch_size, learning_rate: of the training.
    """

    f: int
    z: tuple[int, int]
    num_embeddings: int | None
    channels: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    printed_parameters: float
    counted_parameters: float
    batch_size: int
    learning_rate: float


TABLE_14 = (
    UNetRow(1, (256, 3), None, 192, (1, 1, 2, 2, 4, 4), (32, 16, 8), 270, 270.5, 9, 9e-5),
    UNetRow(2, (128, 2), 2048, 192, (1, 2, 2, 4, 4), (32, 16, 8), 265, 264.5, 11, 1.1e-4),
    UNetRow(4, (64, 3), 8192, 224, (1, 2, 3, 4), (32, 16, 8), 274, 274.1, 48, 9.6e-5),
    UNetRow(8, (32, 4), 16384, 256, (1, 2, 4), (32, 16, 8), 258, 257.7, 96, 9.6e-5),
    UNetRow(16, (16, 8), 16384, 256, (1, 2, 4), (16, 8, 4), 260, 257.8, 128, 1.3e-4),
    UNetRow(32, (8, 32), 16384, 256, (1, 2, 4), (8, 4, 2), 258, 257.9, 128, 1.3e-4),
)
"""Unconditional models of CelebA; 32 channels a head."""

TABLE_13 = (
    UNetRow(1, (256, 3), None, 192, (1, 1, 2, 2, 4, 4), (32, 16, 8), 396, 396.8, 7, 4.9e-5),
    UNetRow(2, (128, 2), 2048, 192, (1, 2, 2, 4, 4), (32, 16, 8), 391, 390.9, 9, 6.3e-5),
    UNetRow(4, (64, 3), 8192, 192, (1, 2, 3, 5), (32, 16, 8), 391, 400.9, 40, 8e-5),
    UNetRow(8, (32, 4), 16384, 256, (1, 2, 4), (32, 16, 8), 395, 395.0, 64, 6.4e-5),
    UNetRow(16, (16, 8), 16384, 256, (1, 2, 4), (16, 8, 4), 395, 395.0, 112, 4.5e-5),
    UNetRow(32, (8, 32), 16384, 256, (1, 2, 4), (8, 4, 2), 395, 395.1, 112, 4.5e-5),
)
"""Class-conditional models of ImageNet: cross-attention to a context of 512 channels, one head."""


@dataclass(frozen=True)
class FirstStageRow:
    """A first stage of Table 8, measured on the validation images of ImageNet.

    Attributes:
        f, num_embeddings, latent_channels: the model; no codes (None) is a KL model.
        rfid, psnr, psim, ssim: FID of the reconstructions, PSNR in dB, perceptual distance, SSIM.
    """

    f: int
    num_embeddings: int | None
    latent_channels: int
    rfid: float
    psnr: float
    psim: float
    ssim: float


TABLE_8 = (
    FirstStageRow(2, 2048, 2, 0.16, 30.85, 0.27, 0.91),
    FirstStageRow(4, 8192, 3, 0.58, 27.43, 0.53, 0.82),
    FirstStageRow(8, 16384, 4, 1.14, 23.07, 1.17, 0.65),
    FirstStageRow(8, 256, 4, 1.49, 22.35, 1.26, 0.62),
    FirstStageRow(16, 16384, 8, 5.15, 20.83, 1.73, 0.54),
    FirstStageRow(32, 16384, 16, 31.83, 17.45, 2.58, 0.41),
    FirstStageRow(2, None, 2, 0.086, 32.47, 0.20, 0.93),
    FirstStageRow(4, None, 3, 0.27, 27.53, 0.55, 0.82),
    FirstStageRow(8, None, 4, 0.90, 24.19, 1.02, 0.69),
    FirstStageRow(16, None, 16, 0.87, 24.08, 1.07, 0.68),
    FirstStageRow(32, None, 64, 2.04, 22.27, 1.41, 0.61),
)


@dataclass(frozen=True)
class InpaintingRow:
    """A line of Table 6: inpainting at 256².

    Attributes:
        name: the model.
        f, regularization: its first stage.
        train_images_per_second, sample_images_per_second: as the table prints them.
    """

    name: str
    f: int
    regularization: str
    train_images_per_second: float
    sample_images_per_second: float


TABLE_6 = (
    InpaintingRow("LDM-1 (pixels)", 1, "none", 0.11, 0.26),
    InpaintingRow("LDM-4, KL, with attention", 4, "kl", 0.32, 0.97),
    InpaintingRow("LDM-4, VQ, without attention", 4, "vq", 0.35, 0.99),
)


@dataclass(frozen=True)
class SamplingRow:
    """A sampling throughput of Table 18.

    Attributes:
        name: the model and its data.
        f: downsampling factor.
        steps: of the sampler.
        images_per_second: as the table prints it.
        parameters: in millions; None where the table has none.
        table: 13 or 14 where the UNet is that of the row with the same f, else None.
    """

    name: str
    f: int
    steps: int
    images_per_second: float
    parameters: float | None
    table: int | None


TABLE_18 = (
    SamplingRow("LDM-8, LSUN-Churches", 8, 100, 6.80, 256, None),
    SamplingRow("LDM-4, LSUN-Bedrooms", 4, 200, 1.07, 274, 14),
    SamplingRow("LDM-4, CelebA-HQ", 4, 500, 0.43, 274, 14),
    SamplingRow("LDM-4, FFHQ", 4, 200, 1.07, 274, 14),
    SamplingRow("LDM-8, ImageNet", 8, 200, 1.9, 395, 13),
    SamplingRow("LDM-4, ImageNet", 4, 250, 0.7, 400, 13),
    SamplingRow("LDM-4-G, ImageNet, guided", 4, 250, 0.4, 400, None),
    SamplingRow("ADM, LSUN-Bedrooms (pixels)", 1, 1000, 0.03, 552, None),
    SamplingRow("ADM, ImageNet (pixels)", 1, 250, 0.12, 554, None),
)


def unet_row(table: int, f: int) -> UNetRow:
    """The row of Table 13 or 14 with the downsampling factor f."""
    rows = {13: TABLE_13, 14: TABLE_14}[table]
    return next(row for row in rows if row.f == f)


def first_stage_row(regularization: str, f: int) -> FirstStageRow:
    """The row of Table 8 with the largest codebook ("vq") or none ("kl") at f."""
    rows = [row for row in TABLE_8 if row.f == f]
    wanted = [row for row in rows if (row.num_embeddings is None) == (regularization == "kl")]
    return max(wanted, key=lambda row: row.num_embeddings or 0)
