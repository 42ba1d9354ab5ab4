"""What the two autoencoders share: sizes, slicing and tiling."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError, DataError
from fastldm.models.attention_mixin import AttentionMixin
from fastldm.models.base import ModelMixin
from fastldm.modules.autoencoder_blocks import Decoder, Encoder
from fastldm.outputs import BaseOutput

_Method = TypeVar("_Method", bound=Callable[..., Any])

OUTPUT_ACTIVATIONS = (None, "tanh")


def runs_forward_hook(method: _Method) -> _Method:
    """Let accelerate's hook on the model, which places its weights, run before `method`, too."""

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


@dataclass
class DecoderOutput(BaseOutput):
    """Images of a decoder.

    Attributes:
        sample: [B, C, H, W].
        commit_loss: of a `VQModel`, see its ``decode``; None otherwise.
    """

    sample: Tensor
    commit_loss: Tensor | None = None


class FirstStageModel(AttentionMixin, ModelMixin):
    """An encoder and a decoder with 1×1 convolutions between them and the latents."""

    encoder: Encoder
    decoder: Decoder
    quant_conv: nn.Conv2d | None
    post_quant_conv: nn.Conv2d | None
    _codes_reach_norms = False
    """Whether the decoder also takes the latent that `post_quant_conv` is given."""

    def _set_up(
        self,
        block_out_channels: Sequence[int],
        sample_size: int | Sequence[int],
        in_channels: int,
        latent_channels: int,
        output_activation: str | None,
    ) -> None:
        """Fields that both autoencoders derive from their configs."""
        if output_activation not in OUTPUT_ACTIVATIONS:
            raise ConfigError(
                f"output_activation: expected None or 'tanh', got {output_activation!r}"
            )
        self._downsampling_factor = 2 ** (len(block_out_channels) - 1)
        self._image_channels = in_channels
        self._latent_channels = latent_channels
        self._output_activation = output_activation
        self.use_slicing = False
        self.use_tiling = False
        size = sample_size if isinstance(sample_size, int) else sample_size[0]
        self.tile_sample_min_size = size
        self.tile_latent_min_size = size // self._downsampling_factor
        self.tile_overlap_factor = 0.25

    @property
    def downsampling_factor(self) -> int:
        """f: an image of H×W has latents of H/f × W/f."""
        return self._downsampling_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that ``encode`` gives and ``decode`` takes."""
        return self._latent_channels

    @property
    def last_layer(self) -> Tensor:
        """The weight that the adaptive adversarial weight takes its gradients from."""
        return self.decoder.conv_out.weight

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode in overlapping tiles of ``sample_size``, so that memory stays bounded.

        The overlaps are blended linearly. Each tile is normalised on its own, so the result
        differs a little from that of the whole image.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Encode and decode whole images."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode the images of a batch one after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False

    def _encode(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → what the encoder and quant_conv give, [B, ·, H/f, W/f]."""
        self._check_images(x)
        return self._in_slices(x, self._encode_slice)

    def _decode(self, z: Tensor) -> Tensor:
        """Latents, quantised where there is a codebook, to images."""
        self._check_latents(z)
        return self._in_slices(z, self._decode_slice)

    def _in_slices(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([function(image) for image in x.split(1)])
        return function(x)

    def _encode_slice(self, x: Tensor) -> Tensor:
        if self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size:
            sample, latent = self.tile_sample_min_size, self.tile_latent_min_size
            return self._tiled(x, self._encode_tile, sample, latent)
        return self._encode_tile(x)

    def _decode_slice(self, z: Tensor) -> Tensor:
        if self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size:
            sample, latent = self.tile_sample_min_size, self.tile_latent_min_size
            return self._tiled(z, self._decode_tile, latent, sample)
        return self._decode_tile(z)

    def _encode_tile(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def _decode_tile(self, z: Tensor) -> Tensor:
        h = z if self.post_quant_conv is None else self.post_quant_conv(z)
        image = self.decoder(h, z if self._codes_reach_norms else None)
        return image.tanh() if self._output_activation == "tanh" else image

    def _tiled(
        self, x: Tensor, function: Callable[[Tensor], Tensor], in_size: int, out_size: int
    ) -> Tensor:
        """`function` of overlapping square tiles, blended.

        Args:
            in_size: side of a tile of `x`.
            out_size: side of what `function` makes of such a tile.
        """
        stride = int(in_size * (1 - self.tile_overlap_factor))
        blend = int(out_size * self.tile_overlap_factor)
        kept = out_size - blend
        above: list[Tensor] = []
        bands = []
        for top in range(0, x.shape[-2], stride):
            row: list[Tensor] = []
            for column, left in enumerate(range(0, x.shape[-1], stride)):
                tile = function(x[..., top : top + in_size, left : left + in_size])
                if above:
                    tile = _blend(above[column], tile, blend, dim=-2)
                if row:
                    tile = _blend(row[-1], tile, blend, dim=-1)
                row.append(tile)
            bands.append(torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1))
            above = row
        return torch.cat(bands, dim=-2)

    def _check_images(self, x: Tensor) -> None:
        f = self._downsampling_factor
        if x.ndim != 4 or x.shape[1] != self._image_channels:
            raise DataError(
                f"images: expected [B, {self._image_channels}, H, W], got {list(x.shape)}"
            )
        height, width = x.shape[-2:]
        if height % f or width % f or not height or not width:
            raise DataError(
                f"images: height and width must be multiples of f = {f}, got {height}×{width}"
            )

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self._latent_channels:
            raise DataError(
                f"latents: expected [B, {self._latent_channels}, h, w], got {list(z.shape)}"
            )


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """`tile` with its first `extent` rows (or columns) faded in from the last ones of `before`."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if extent == 0:
        return tile
    weight = torch.arange(extent, device=tile.device, dtype=torch.float32) / extent
    weight = weight.to(tile.dtype).view(-1, 1) if dim == -2 else weight.to(tile.dtype)
    old = before.narrow(dim, before.shape[dim] - extent, extent)
    new = tile.narrow(dim, 0, extent)
    rest = tile.narrow(dim, extent, tile.shape[dim] - extent)
    return torch.cat([old * (1 - weight) + new * weight, rest], dim=dim)
