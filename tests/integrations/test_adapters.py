"""What is added to a pipeline's UNet: ControlNet, T2I-Adapter, IP-Adapter, LoRA, FreeU, words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

PROMPT = {"prompt": "a cat", "negative_prompt": "dull", "guidance_scale": 3.0}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "time_emb_proj"]

Same = Callable[..., np.ndarray]


@pytest.fixture
def same(tiny: Any) -> Same:
    """Both pipelines give the same images, which are returned."""

    def compare(pipelines: tuple[Any, Any], *arguments: Any, **keywords: Any) -> np.ndarray:
        expected, actual = (
            tiny.images(pipe, *arguments, **{**PROMPT, **keywords}) for pipe in pipelines
        )
        assert expected.shape == actual.shape
        assert np.abs(actual - expected).max() < 1e-3
        return actual

    return compare


def changed(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() > 2e-3)


def lora(tiny: Any, seed: int, unet: Any = None, rank: int = 2) -> dict[str, torch.Tensor]:
    """Weights of a LoRA for the UNet, as diffusers' training scripts save them."""
    unet = tiny.unet() if unet is None else unet
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(seed)
    return {
        f"unet.{name}": 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in get_peft_model_state_dict(unet).items()
    }


def stable_diffusion(tiny: Any) -> tuple[Any, Any]:
    return tiny.pair(diffusers.StableDiffusionPipeline, tiny.stable_diffusion())


def test_controlnet(tiny: Any, same: Same) -> None:
    parts = tiny.stable_diffusion(controlnet=tiny.controlnet())
    pipelines = tiny.pair(diffusers.StableDiffusionControlNetPipeline, parts)
    picture = tiny.picture()
    steered = same(pipelines, image=picture)
    assert changed(steered, same(pipelines, image=picture, controlnet_conditioning_scale=0.0))
    same(pipelines, image=picture, guess_mode=True)


def test_a_controlnet_is_made_from_our_unet(tiny: Any) -> None:
    unet = tiny.unet()
    expected = diffusers.ControlNetModel.from_unet(unet).state_dict()
    actual = diffusers.ControlNetModel.from_unet(tiny.ours(unet)).state_dict()
    assert expected.keys() == actual.keys()
    copied = [name for name in expected if name.startswith(("conv_in", "time_emb", "down_blocks"))]
    assert copied
    assert all(torch.equal(actual[name], expected[name]) for name in copied)


def test_t2i_adapter(tiny: Any, same: Same) -> None:
    torch.manual_seed(9)
    adapter = diffusers.T2IAdapter(
        channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    parts = tiny.stable_diffusion(adapter=adapter.eval())
    pipelines = tiny.pair(diffusers.StableDiffusionAdapterPipeline, parts)
    steered = same(pipelines, image=tiny.picture(), adapter_conditioning_scale=2.0)
    unsteered = same(pipelines, image=tiny.picture(), adapter_conditioning_scale=0.0)
    assert changed(steered, unsteered)


def ip_adapter(tiny: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of an IP-Adapter of four tokens, under the published names."""
    generator = torch.Generator().manual_seed(10)

    def random(*shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(shape, generator=generator)

    width = tiny.context
    projection = {
        "proj.weight": random(4 * width, width),
        "proj.bias": random(4 * width),
        "norm.weight": random(width),
        "norm.bias": random(width),
    }
    attentions = {}
    crossing = [n for n in tiny.unet().attn_processors if n.endswith("attn2.processor")]
    for number, name in enumerate(crossing):
        channels = 16 if name.startswith("mid_block") else 8
        for kind in ("k", "v"):
            attentions[f"{2 * number + 1}.to_{kind}_ip.weight"] = random(channels, width)
    return {"image_proj": projection, "ip_adapter": attentions}


def test_ip_adapter(tiny: Any, same: Same) -> None:
    parts = tiny.stable_diffusion(
        image_encoder=tiny.image_encoder(), feature_extractor=tiny.image_processor()
    )
    pipelines = tiny.pair(diffusers.StableDiffusionPipeline, parts)
    plain = same(pipelines)
    for pipe in pipelines:
        pipe.load_ip_adapter(
            ip_adapter(tiny), subfolder="", weight_name="", image_encoder_folder=None
        )
    picture = tiny.picture()
    steered = same(pipelines, ip_adapter_image=picture)
    assert changed(steered, plain)
    for pipe in pipelines:
        pipe.set_ip_adapter_scale(0.3)
    assert changed(same(pipelines, ip_adapter_image=picture), steered)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    same(pipelines, ip_adapter_image=picture, **masked)
    for pipe in pipelines:
        pipe.unload_ip_adapter()
    assert np.abs(same(pipelines) - plain).max() < 1e-5


def test_lora_is_loaded_scaled_switched_fused_and_unloaded(tiny: Any, same: Same) -> None:
    pipelines = stable_diffusion(tiny)
    plain = same(pipelines)
    for pipe in pipelines:
        pipe.load_lora_weights(lora(tiny, 1), adapter_name="one")
        pipe.load_lora_weights(lora(tiny, 2, rank=3), adapter_name="two")
        assert pipe.get_list_adapters() == {"unet": ["one", "two"]}

    def switched(names: list[str], weights: list[float]) -> np.ndarray:
        for pipe in pipelines:
            pipe.set_adapters(names, weights)
            assert pipe.get_active_adapters() == names
        return same(pipelines)

    first, second = switched(["one"], [1.0]), switched(["two"], [1.0])
    both = switched(["one", "two"], [0.7, 0.4])
    assert changed(first, plain)
    assert changed(second, first)
    assert changed(both, second)
    halved = same(pipelines, cross_attention_kwargs={"scale": 0.5})
    assert changed(halved, both)
    assert np.abs(same(pipelines, cross_attention_kwargs={"scale": 0.0}) - plain).max() < 1e-5
    for pipe in pipelines:
        pipe.set_adapters(["one", "two"], [0.7, 0.4])
    assert np.array_equal(same(pipelines), both)

    for pipe in pipelines:
        pipe.disable_lora()
    assert np.abs(same(pipelines) - plain).max() < 1e-5
    for pipe in pipelines:
        pipe.enable_lora()
        pipe.fuse_lora()
    assert np.abs(same(pipelines) - both).max() < 1e-3
    for pipe in pipelines:
        pipe.unfuse_lora()
        pipe.delete_adapters("two")
        pipe.set_adapters("one")
    assert np.abs(same(pipelines) - first).max() < 1e-3
    for pipe in pipelines:
        pipe.unload_lora_weights()
    assert np.abs(same(pipelines) - plain).max() < 1e-5


def test_lora_of_our_unet_is_saved_and_loaded_by_diffusers(
    tiny: Any, same: Same, tmp_path: Any
) -> None:
    pipelines = stable_diffusion(tiny)
    weights = lora(tiny, 3, unet=tiny.ours(tiny.unet()))
    assert weights.keys() == lora(tiny, 3).keys()
    bare = {name.removeprefix("unet."): value for name, value in weights.items()}
    type(pipelines[1]).save_lora_weights(tmp_path, unet_lora_layers=bare)
    plain = same(pipelines)
    for pipe in pipelines:
        pipe.load_lora_weights(tmp_path)
    assert changed(same(pipelines), plain)


def test_controlnet_with_lora(tiny: Any, same: Same) -> None:
    parts = tiny.stable_diffusion(controlnet=tiny.controlnet())
    pipelines = tiny.pair(diffusers.StableDiffusionControlNetPipeline, parts)
    picture = tiny.picture()
    steered = same(pipelines, image=picture)
    for pipe in pipelines:
        pipe.load_lora_weights(lora(tiny, 4))
    adapted = same(pipelines, image=picture)
    assert changed(adapted, steered)
    scaled = same(pipelines, image=picture, cross_attention_kwargs={"scale": 0.5})
    assert changed(scaled, adapted)


def test_sdxl_with_lora(tiny: Any, same: Same) -> None:
    pipelines = tiny.pair(diffusers.StableDiffusionXLPipeline, tiny.stable_diffusion_xl())
    plain = same(pipelines)
    for pipe in pipelines:
        pipe.load_lora_weights(lora(tiny, 5, unet=tiny.sdxl_unet()))
    assert changed(same(pipelines), plain)


def test_textual_inversion(tiny: Any, same: Same) -> None:
    # The tokenizer gains a word.
    pipelines = tuple(
        diffusers.StableDiffusionPipeline(
            **{**pipe.components, "tokenizer": type(tiny)().tokenizer},
            requires_safety_checker=False,
        )
        for pipe in stable_diffusion(tiny)
    )
    plain = same(pipelines, prompt="a")
    for pipe in pipelines:
        pipe.set_progress_bar_config(disable=True)
        pipe.load_textual_inversion({"<thing>": torch.full((tiny.context,), 3.0)})
    assert changed(same(pipelines, prompt="a <thing>"), plain)


def test_freeu(tiny: Any, same: Same) -> None:
    pipelines = stable_diffusion(tiny)
    plain = same(pipelines)
    for pipe in pipelines:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert changed(same(pipelines), plain)
    same(pipelines, height=24, width=40)
    for pipe in pipelines:
        pipe.disable_freeu()
    assert np.array_equal(same(pipelines), plain)
