"""The residual block of the UNets and autoencoders."""

from __future__ import annotations

from torch import Tensor, nn

from fastldm.errors import ConfigError
from fastldm.modules.activations import get_activation, group_norm
from fastldm.modules.sampling import Downsample2D, Upsample2D


class ResnetBlock2D(nn.Module):
    """GroupNorm, activation, 3×3 convolution, twice, beside a shortcut.

    The time embedding enters before the second norm as a sum ("default"), or after it as a scale
    and a shift ("scale_shift"; AdaGN of Dhariwal & Nichol, https://arxiv.org/abs/2105.05233).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, `in_channels` if None.
        dropout: probability of dropout before the second convolution.
        temb_channels: width of the time embedding; None: the block takes none.
        groups: groups of the first norm.
        groups_out: groups of the second norm, `groups` if None.
        eps: of both norms.
        non_linearity: "silu" (or "swish"), "gelu", "mish" or "relu".
        skip_time_act: the time embedding comes with its activation applied.
        time_embedding_norm: "default" or "scale_shift".
        output_scale_factor: the sum is divided by it.
        use_in_shortcut: whether a 1×1 convolution is in the shortcut; None: where channels change.
        up, down: resample by two after the first activation, in both branches.
        conv_shortcut_bias: whether that convolution has a bias.
        conv_2d_out_channels: channels of the second convolution, `out_channels` if None.

    Raises:
        ConfigError: an argument has a value that is not listed, or channels and groups disagree.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        temb_channels: int | None = 512,
        groups: int = 32,
        groups_out: int | None = None,
        eps: float = 1e-6,
        non_linearity: str = "swish",
        skip_time_act: bool = False,
        time_embedding_norm: str = "default",
        output_scale_factor: float = 1.0,
        use_in_shortcut: bool | None = None,
        up: bool = False,
        down: bool = False,
        conv_shortcut_bias: bool = True,
        conv_2d_out_channels: int | None = None,
    ) -> None:
        super().__init__()
        if time_embedding_norm not in ("default", "scale_shift"):
            raise ConfigError(
                "time_embedding_norm: expected 'default' or 'scale_shift', "
                f"got {time_embedding_norm!r}"
            )
        if up and down:
            raise ConfigError("up, down: a residual block resamples one way, got both")
        self.in_channels = in_channels
        self.out_channels = out_channels = in_channels if out_channels is None else out_channels
        self.output_scale_factor = output_scale_factor
        self.time_embedding_norm = time_embedding_norm
        self.skip_time_act = skip_time_act

        self.nonlinearity = get_activation(non_linearity)
        self.norm1 = group_norm(in_channels, groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Linear | None = None
        if temb_channels is not None:
            both = 2 if time_embedding_norm == "scale_shift" else 1
            self.time_emb_proj = nn.Linear(temb_channels, both * out_channels)
        self.norm2 = group_norm(out_channels, groups if groups_out is None else groups_out, eps)
        self.dropout = nn.Dropout(dropout)
        last_channels = conv_2d_out_channels or out_channels
        self.conv2 = nn.Conv2d(out_channels, last_channels, 3, padding=1)

        self.resample: nn.Module | None = None
        if up:
            self.resample = Upsample2D(in_channels)
        elif down:
            self.resample = Downsample2D(in_channels)
        if use_in_shortcut is None:
            use_in_shortcut = in_channels != last_channels
        self.conv_shortcut: nn.Conv2d | None = None
        if use_in_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, last_channels, 1, bias=conv_shortcut_bias)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """
        Args:
            input_tensor: [B, in_channels, H, W].
            temb: [B, temb_channels], needed where the block was built with `temb_channels`.

        Returns:
            [B, out_channels, H, W], or twice or half the size with `up` or `down`.
        """
        hidden_states = self.norm1(input_tensor, self.nonlinearity)
        if self.resample is not None:
            input_tensor = self.resample(input_tensor)
            hidden_states = self.resample(hidden_states)
        hidden_states = self.conv1(hidden_states)
        hidden_states = self.norm2(
            hidden_states, self.nonlinearity, **self._time_conditioning(temb)
        )
        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = input_tensor + hidden_states
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor

    def _time_conditioning(self, temb: Tensor | None) -> dict[str, Tensor]:
        """The time embedding as arguments of the second norm."""
        if self.time_emb_proj is None:
            return {}
        if temb is None:
            raise ValueError("temb: this residual block needs a time embedding, got None")
        projected = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "default":
            return {"channel_add": projected}
        scale, shift = projected.chunk(2, dim=1)
        return {"scale": scale, "shift": shift}
