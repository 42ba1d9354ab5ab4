"""CompVis's networks restated from their formulas, with plain functions and CompVis's names.

A network asks `Weights` for each tensor by name and shape, so running it once on fresh `Weights`
gives the state dict of such a model. Nothing of fastldm is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights(dict[str, Tensor]):
    """A state dict that grows by what is asked for."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
            noise = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
            self[name] = noise / math.sqrt(fan_in)
        assert self[name].shape == shape, (name, self[name].shape, shape)
        return self[name]

    def conv(
        self, name: str, x: Tensor, out: int, kernel: int = 3, stride: int = 1, bias: bool = True
    ) -> Tensor:
        """Padded to keep the size, but for a stride."""
        weight = self(f"{name}.weight", out, x.shape[1], *[kernel] * (x.ndim - 2))
        shift = self(f"{name}.bias", out) if bias else None
        if x.ndim == 3:
            return F.conv1d(x, weight, shift)
        padding = 0 if stride == 2 and name.endswith("downsample.conv") else kernel // 2
        return F.conv2d(x, weight, shift, stride=stride, padding=padding)

    def linear(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
        shift = self(f"{name}.bias", out) if bias else None
        return F.linear(x, self(f"{name}.weight", out, x.shape[-1]), shift)

    def group_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        groups = x.reshape(x.shape[0], 32, -1)
        mean = groups.mean(dim=2, keepdim=True)
        variance = ((groups - mean) ** 2).mean(dim=2, keepdim=True)
        y = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape)
        shape = (1, -1, *[1] * (x.ndim - 2))
        channels = x.shape[1]
        scale, shift = self(f"{name}.weight", channels), self(f"{name}.bias", channels)
        return y * scale.view(shape) + shift.view(shape)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        y = (x - mean) / (variance + 1e-5).sqrt()
        return y * self(f"{name}.weight", x.shape[-1]) + self(f"{name}.bias", x.shape[-1])


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[…, L, D] each."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1) @ v


def multi_head(w: Weights, name: str, x: Tensor, context: Tensor, heads: int, width: int) -> Tensor:
    """Projections without biases to `heads` heads of `width` channels."""
    projected = []
    for part, source in (("to_q", x), ("to_k", context), ("to_v", context)):
        y = w.linear(f"{name}.{part}", source, heads * width, bias=False)
        projected.append(y.unflatten(-1, (heads, width)).transpose(1, 2))
    return attend(*projected).transpose(1, 2).flatten(2)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    phases = t[:, None].float() * frequencies[None]
    return torch.cat([phases.cos(), phases.sin()], dim=-1).double()


def unet(
    w: Weights,
    p: dict[str, Any],
    x: Tensor,
    t: Tensor,
    context: Tensor | None = None,
    y: Tensor | None = None,
) -> Tensor:
    """UNetModel with the arguments `p`."""
    base = p["model_channels"]
    multipliers, layers = p["channel_mult"], p["num_res_blocks"]
    updown, resample = p.get("resblock_updown", False), p.get("conv_resample", True)
    emb = w.linear("time_embed.0", timestep_embedding(t, base), 4 * base)
    emb = w.linear("time_embed.2", silu(emb), 4 * base)
    if isinstance(p.get("num_classes"), int):
        assert y is not None
        emb = emb + w("label_emb.weight", p["num_classes"], 4 * base)[y]
    elif p.get("num_classes") == "sequential":
        assert y is not None
        hidden = silu(w.linear("label_emb.0.0", y, 4 * base))
        emb = emb + w.linear("label_emb.0.2", hidden, 4 * base)

    def block(name: str, h: Tensor, out: int, change: str = "") -> Tensor:
        """ResBlock; `change` is "up" or "down"."""

        def resized(z: Tensor) -> Tensor:
            if change == "up":
                return z.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            return F.avg_pool2d(z, 2) if change == "down" else z

        skip = resized(h)
        z = resized(silu(w.group_norm(f"{name}.in_layers.0", h, 1e-5)))
        z = w.conv(f"{name}.in_layers.2", z, out)
        scale_shift = p.get("use_scale_shift_norm", False)
        added = w.linear(f"{name}.emb_layers.1", silu(emb), 2 * out if scale_shift else out)
        added = added[:, :, None, None]
        if scale_shift:
            scale, shift = added.chunk(2, dim=1)
            z = w.group_norm(f"{name}.out_layers.0", z, 1e-5) * (1 + scale) + shift
        else:
            z = w.group_norm(f"{name}.out_layers.0", z + added, 1e-5)
        z = w.conv(f"{name}.out_layers.3", silu(z), out)
        if h.shape[1] != out:
            skip = w.conv(f"{name}.skip_connection", skip, out, kernel=1)
        return skip + z

    def heads_of(channels: int) -> int:
        width = p.get("num_head_channels", -1)
        return p["num_heads"] if width == -1 else channels // width

    def plain_attention(name: str, h: Tensor) -> Tensor:
        batch, channels = h.shape[:2]
        heads = heads_of(channels)
        flat = h.flatten(2)
        qkv = w.conv(f"{name}.qkv", w.group_norm(f"{name}.norm", flat, 1e-5), 3 * channels, 1)
        if p.get("use_new_attention_order", False):
            q, k, v = (part.reshape(batch * heads, -1, flat.shape[2]) for part in qkv.chunk(3, 1))
        else:
            q, k, v = qkv.reshape(batch * heads, -1, flat.shape[2]).chunk(3, dim=1)
        read = attend(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
        read = w.conv(f"{name}.proj_out", read.reshape(batch, channels, -1), channels, 1)
        return (flat + read).reshape(h.shape)

    def transformer(name: str, h: Tensor, depth: int, only_cross: bool) -> Tensor:
        channels = h.shape[1]
        heads = heads_of(channels)
        linear = p.get("use_linear_in_transformer", False)
        z = w.group_norm(f"{name}.norm", h, 1e-6)
        if not linear:
            z = w.conv(f"{name}.proj_in", z, channels, 1)
        z = z.flatten(2).transpose(1, 2)
        if linear:
            z = w.linear(f"{name}.proj_in", z, channels)
        for index in range(depth):
            inner = f"{name}.transformer_blocks.{index}"
            normed = w.layer_norm(f"{inner}.norm1", z)
            seen = context if only_cross else normed
            read = multi_head(w, f"{inner}.attn1", normed, seen, heads, channels // heads)
            z = z + w.linear(f"{inner}.attn1.to_out.0", read, channels)
            normed = w.layer_norm(f"{inner}.norm2", z)
            read = multi_head(w, f"{inner}.attn2", normed, context, heads, channels // heads)
            z = z + w.linear(f"{inner}.attn2.to_out.0", read, channels)
            normed = w.layer_norm(f"{inner}.norm3", z)
            value, gate = w.linear(f"{inner}.ff.net.0.proj", normed, 8 * channels).chunk(2, -1)
            z = z + w.linear(f"{inner}.ff.net.2", value * gelu(gate), channels)
        if linear:
            z = w.linear(f"{name}.proj_out", z, channels)
        z = z.transpose(1, 2).reshape(h.shape)
        return h + (z if linear else w.conv(f"{name}.proj_out", z, channels, 1))

    def attention(name: str, h: Tensor, level: int, in_middle: bool = False) -> Tensor:
        if not p.get("use_spatial_transformer", False):
            return plain_attention(name, h)
        depth = p.get("transformer_depth", 1)
        depth = depth if isinstance(depth, int) else depth[level]
        only_cross = p.get("disable_self_attentions")
        only_cross = bool(only_cross and only_cross[level]) and not in_middle
        return transformer(name, h, depth, only_cross)

    h = w.conv("input_blocks.0.0", x, base)
    kept, number = [h], 1
    for level, multiplier in enumerate(multipliers):
        attended = 2**level in p["attention_resolutions"]
        for _ in range(layers):
            h = block(f"input_blocks.{number}.0", h, multiplier * base)
            h = attention(f"input_blocks.{number}.1", h, level) if attended else h
            kept.append(h)
            number += 1
        if level < len(multipliers) - 1:
            name = f"input_blocks.{number}.0"
            if updown:
                h = block(name, h, h.shape[1], "down")
            else:
                h = (
                    w.conv(f"{name}.op", h, h.shape[1], stride=2)
                    if resample
                    else F.avg_pool2d(h, 2)
                )
            kept.append(h)
            number += 1
    last = len(multipliers) - 1
    h = block("middle_block.0", h, h.shape[1])
    h = attention("middle_block.1", h, last, in_middle=True)
    h = block("middle_block.2", h, h.shape[1])
    number = 0
    for level in reversed(range(len(multipliers))):
        attended = 2**level in p["attention_resolutions"]
        for layer in range(layers + 1):
            h = torch.cat([h, kept.pop()], dim=1)
            h = block(f"output_blocks.{number}.0", h, multipliers[level] * base)
            h = attention(f"output_blocks.{number}.1", h, level) if attended else h
            if level and layer == layers:
                name = f"output_blocks.{number}.{2 if attended else 1}"
                if updown:
                    h = block(name, h, h.shape[1], "up")
                else:
                    h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                    h = w.conv(f"{name}.conv", h, h.shape[1]) if resample else h
            number += 1
    return w.conv("out.2", silu(w.group_norm("out.0", h, 1e-5)), p["out_channels"])


def _coder_block(w: Weights, name: str, h: Tensor, out: int) -> Tensor:
    z = w.conv(f"{name}.conv1", silu(w.group_norm(f"{name}.norm1", h, 1e-6)), out)
    z = w.conv(f"{name}.conv2", silu(w.group_norm(f"{name}.norm2", z, 1e-6)), out)
    if h.shape[1] != out:
        h = w.conv(f"{name}.nin_shortcut", h, out, kernel=1)
    return h + z


def _coder_attention(w: Weights, name: str, h: Tensor, kind: str) -> Tensor:
    channels = h.shape[1]
    if kind == "none":
        return h
    if kind == "linear":
        qkv = w.conv(f"{name}.to_qkv", h, 3 * channels, 1, bias=False).flatten(2)
        q, k, v = qkv.chunk(3, dim=1)
        read = torch.einsum("bdk,bek,bdn->ben", k.softmax(dim=-1), v, q)
        return w.conv(f"{name}.to_out", read.reshape(h.shape), channels, 1)
    z = w.group_norm(f"{name}.norm", h, 1e-6)
    q, k, v = (
        w.conv(f"{name}.{part}", z, channels, 1).flatten(2).transpose(1, 2) for part in "qkv"
    )
    read = attend(q, k, v).transpose(1, 2).reshape(h.shape)
    return h + w.conv(f"{name}.proj_out", read, channels, 1)


def _middle(w: Weights, name: str, h: Tensor, kind: str) -> Tensor:
    h = _coder_block(w, f"{name}.mid.block_1", h, h.shape[1])
    h = _coder_attention(w, f"{name}.mid.attn_1", h, kind)
    return _coder_block(w, f"{name}.mid.block_2", h, h.shape[1])


def encode(w: Weights, p: dict[str, Any], x: Tensor) -> Tensor:
    """Encoder and quant_conv of a first stage with the arguments `p`: moments, or latents."""
    d = p["ddconfig"]
    kind, levels = d.get("attn_type", "vanilla"), len(d["ch_mult"])
    h = w.conv("encoder.conv_in", x, d["ch"])
    for level, multiplier in enumerate(d["ch_mult"]):
        name = f"encoder.down.{level}"
        for layer in range(d["num_res_blocks"]):
            h = _coder_block(w, f"{name}.block.{layer}", h, d["ch"] * multiplier)
            if d["resolution"] // 2**level in d["attn_resolutions"]:
                h = _coder_attention(w, f"{name}.attn.{layer}", h, kind)
        if level < levels - 1:
            if d.get("resamp_with_conv", True):
                h = F.pad(h, (0, 1, 0, 1))
                h = w.conv(f"{name}.downsample.conv", h, h.shape[1], stride=2)
            else:
                h = F.avg_pool2d(h, 2)
    h = silu(w.group_norm("encoder.norm_out", _middle(w, "encoder", h, kind), 1e-6))
    both = 2 if d["double_z"] else 1
    h = w.conv("encoder.conv_out", h, both * d["z_channels"])
    return w.conv("quant_conv", h, both * p["embed_dim"], kernel=1)


def quantize(w: Weights, p: dict[str, Any], z: Tensor) -> Tensor:
    """The nearest code of each latent."""
    codes = w("quantize.embedding.weight", p["n_embed"], p["embed_dim"])
    distances = ((z[:, None] - codes[None, :, :, None, None]) ** 2).sum(dim=2)
    return codes[distances.argmin(dim=1)].permute(0, 3, 1, 2)


def decode(w: Weights, p: dict[str, Any], z: Tensor) -> Tensor:
    """post_quant_conv and Decoder."""
    d = p["ddconfig"]
    kind, levels = d.get("attn_type", "vanilla"), len(d["ch_mult"])
    h = w.conv("post_quant_conv", z, d["z_channels"], kernel=1)
    h = w.conv("decoder.conv_in", h, d["ch"] * d["ch_mult"][-1])
    h = _middle(w, "decoder", h, kind)
    for level in reversed(range(levels)):
        name = f"decoder.up.{level}"
        for layer in range(d["num_res_blocks"] + 1):
            h = _coder_block(w, f"{name}.block.{layer}", h, d["ch"] * d["ch_mult"][level])
            if d["resolution"] // 2**level in d["attn_resolutions"]:
                h = _coder_attention(w, f"{name}.attn.{layer}", h, kind)
        if level:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            if d.get("resamp_with_conv", True):
                h = w.conv(f"{name}.upsample.conv", h, h.shape[1])
    h = silu(w.group_norm("decoder.norm_out", h, 1e-6))
    image = w.conv("decoder.conv_out", h, d["out_ch"])
    return image.tanh() if d.get("tanh_out", False) else image


def bert(w: Weights, p: dict[str, Any], tokens: Tensor) -> Tensor:
    """BERTEmbedder with the arguments `p`: 8 heads of 64 channels, whatever its width."""
    width, vocabulary = p["n_embed"], p["vocab_size"]
    h = w("transformer.token_emb.weight", vocabulary, width)[tokens]
    positions = w("transformer.pos_emb.emb.weight", p["max_seq_len"], width)
    h = h + positions[: tokens.shape[1]]
    for layer in range(p["n_layer"]):
        name = f"transformer.attn_layers.layers.{2 * layer}"
        normed = w.layer_norm(f"{name}.0", h)
        read = multi_head(w, f"{name}.1", normed, normed, 8, 64)
        h = h + w.linear(f"{name}.1.to_out", read, width)
        name = f"transformer.attn_layers.layers.{2 * layer + 1}"
        inner = w.linear(f"{name}.1.net.0.0", w.layer_norm(f"{name}.0", h), 4 * width)
        h = h + w.linear(f"{name}.1.net.2", gelu(inner), width)
    h = w.layer_norm("transformer.norm", h)
    w("transformer.to_logits.weight", vocabulary, width)
    w("transformer.to_logits.bias", vocabulary)
    return h


def rescale(w: Weights, p: dict[str, Any], x: Tensor) -> Tensor:
    """SpatialRescaler with the arguments `p`, halving by 2×2 means."""
    for _ in range(p["n_stages"]):
        x = F.avg_pool2d(x, 2)
    return w.conv("channel_mapper", x, p["out_channels"], kernel=1, bias=False)


def schedule(start: float, end: float, timesteps: int = 1000) -> dict[str, Tensor]:
    """The buffers of DDPM for ``beta_schedule="linear"``."""
    root = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64)
    beta = root**2
    alpha_bar = (1 - beta).cumprod(dim=0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1 - before) / (1 - alpha_bar)
    buffers = {
        "betas": beta,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": beta * before.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar),
    }
    return {name: value.float() for name, value in buffers.items()}
