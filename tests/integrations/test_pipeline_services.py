"""What a pipeline does with its components besides running them: type, save, place, compile."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import fastldm
from fastldm.errors import ConfigError
from fastldm.modules.attention_processor import AttnProcessor as OurAttnProcessor

PROMPT = {"prompt": "a cat", "negative_prompt": "dull", "guidance_scale": 3.0}


@pytest.fixture
def pair(tiny: Any) -> tuple[Any, Any]:
    return tiny.pair(diffusers.StableDiffusionPipeline, tiny.stable_diffusion())


def test_our_components_are_instances_of_diffusers_classes(tiny: Any) -> None:
    for component in (tiny.unet(), tiny.vae(), tiny.vqvae(), tiny.unconditional_unet()):
        ours = tiny.ours(component)
        assert type(ours) is getattr(fastldm, type(component).__name__)
        assert isinstance(ours, type(component))
        assert isinstance(ours, diffusers.ModelMixin)
    assert isinstance(tiny.ours(tiny.scheduler()), diffusers.SchedulerMixin)


def test_configs_read_by_attribute_and_by_name(tiny: Any) -> None:
    unet, vae = tiny.ours(tiny.unet()), tiny.ours(tiny.vae())
    assert unet.config.in_channels == unet.config["in_channels"] == 4
    assert unet.config.get("no_such_field", 7) == 7
    assert "latent_channels" in vae.config
    assert (unet.dtype, unet.device) == (torch.float32, torch.device("cpu"))


SEPARATE = """
import sys
import fastldm
model = fastldm.{first}
assert "diffusers" not in sys.modules
unet = model(block_out_channels=[8], norm_num_groups=4, down_block_types=["DownBlock2D"],
             up_block_types=["UpBlock2D"], attention_head_dim=4)
assert "diffusers" not in sys.modules
import diffusers
assert not isinstance(unet, diffusers.ModelMixin)
model.from_config(unet.config)
assert isinstance(unet, diffusers.UNet2DModel)
assert unet.config.in_channels == 3
"""


def test_only_a_program_that_imports_diffusers_pays_for_it() -> None:
    subprocess.run([sys.executable, "-c", SEPARATE.format(first="UNet2DModel")], check=True)


def test_a_pipeline_is_saved_and_loaded_with_our_components(
    tiny: Any, pair: tuple[Any, Any], tmp_path: Path
) -> None:
    expected = tiny.images(pair[1], **PROMPT)
    pair[1].save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["fastldm", "UNet2DConditionModel"]
    assert index["vae"] == ["fastldm", "AutoencoderKL"]
    assert index["scheduler"] == ["fastldm", "DDIMScheduler"]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is fastldm.UNet2DConditionModel
    assert type(again.scheduler) is fastldm.DDIMScheduler
    assert np.array_equal(tiny.images(again, **PROMPT), expected)


def test_our_components_replace_those_of_a_saved_pipeline(
    tiny: Any, pair: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tiny.images(pair[0], **PROMPT)
    pair[0].save_pretrained(tmp_path, variant="fp16")
    ours = {
        "unet": fastldm.UNet2DConditionModel.from_pretrained(
            tmp_path, subfolder="unet", variant="fp16"
        ),
        "vae": fastldm.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae", variant="fp16"),
        "scheduler": fastldm.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
    }
    logging.getLogger("diffusers").addHandler(caplog.handler)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", **ours)
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert "Expected types" not in caplog.text
    assert pipe.unet is ours["unet"]
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(tiny.images(pipe, **PROMPT) - expected).max() < 1e-3


def test_diffusers_loads_each_component_that_we_save(tiny: Any, tmp_path: Path) -> None:
    for component in (tiny.sdxl_unet(), tiny.vae(), tiny.vqvae(), tiny.unconditional_unet()):
        ours = tiny.ours(component)
        ours.save_pretrained(tmp_path, max_shard_size=20_000, variant="fp16")
        loaded, report = type(component).from_pretrained(
            tmp_path, variant="fp16", output_loading_info=True
        )
        assert not any(report.values())
        state = component.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_pipeline_is_made_from_another(tiny: Any, pair: tuple[Any, Any]) -> None:
    image = {"image": tiny.picture(), "strength": 0.7, "num_inference_steps": 4}
    images = []
    for pipe in pair:
        other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        assert other.unet is pipe.unet
        other.set_progress_bar_config(disable=True)
        images.append(tiny.images(other, **image, **PROMPT))
    assert np.abs(images[0] - images[1]).max() < 1e-3


def test_half_precision_pipelines_run(tiny: Any, pair: tuple[Any, Any]) -> None:
    expected = tiny.images(pair[1], **PROMPT)
    low = pair[1].to(torch.bfloat16)
    assert {low.unet.dtype, low.vae.dtype} == {torch.bfloat16}
    assert np.abs(tiny.images(low, **PROMPT) - expected).max() < 0.1


@pytest.mark.parametrize("side", [32, 40])
def test_tiled_and_sliced_autoencoders(tiny: Any, pair: tuple[Any, Any], side: int) -> None:
    size = {"height": side, "width": 48, "num_images_per_prompt": 2}
    whole = tiny.images(pair[1], **size, **PROMPT)
    for pipe in pair:
        pipe.vae.enable_slicing()
    assert np.abs(tiny.images(pair[1], **size, **PROMPT) - whole).max() < 1e-5
    for pipe in pair:
        pipe.vae.enable_tiling()
    expected, tiled = (tiny.images(pipe, **size, **PROMPT) for pipe in pair)
    assert np.abs(tiled - expected).max() < 1e-3
    assert np.abs(tiled - whole).max() > 1e-5


class Counting:
    """A processor as users write it for diffusers' attention."""

    def __init__(self) -> None:
        self.calls = 0
        self.strength = 0.0

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        self.calls += 1
        self.strength = strength
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)


def test_attention_processors_are_read_set_and_reset(tiny: Any, pair: tuple[Any, Any]) -> None:
    expected = tiny.images(pair[0], **PROMPT)
    theirs, ours = pair[0].unet, pair[1].unet
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    assert list(pair[1].vae.attn_processors) == list(pair[0].vae.attn_processors)
    counting = Counting()
    ours.set_attn_processor(counting)
    scaled = tiny.images(pair[1], cross_attention_kwargs={"strength": 0.5}, **PROMPT)
    assert counting.calls == 2 * len(ours.attn_processors)
    assert counting.strength == 0.5
    assert np.abs(scaled - expected).max() < 1e-3
    ours.set_attn_processor({name: AttnProcessor2_0() for name in ours.attn_processors})
    assert np.abs(tiny.images(pair[1], **PROMPT) - expected).max() < 1e-3
    assert counting.calls == 2 * len(ours.attn_processors)
    ours.set_default_attn_processor()
    assert {type(processor) for processor in ours.attn_processors.values()} == {OurAttnProcessor}
    with pytest.raises(ConfigError, match="processor: expected one for each of"):
        ours.set_attn_processor({"down_blocks.0.attn1.processor": counting})


def test_processors_of_diffusers_give_the_same_with_a_mask(tiny: Any) -> None:
    unet = tiny.ours(tiny.unet())
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, tiny.context, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = unet(sample, 9, context, encoder_attention_mask=mask).sample
    unmasked = unet(sample, 9, context).sample
    unet.set_attn_processor(Counting())
    actual = unet(sample, 9, context, encoder_attention_mask=mask).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (unmasked - expected).abs().max() > 1e-3


def test_switches_that_change_no_number(tiny: Any, pair: tuple[Any, Any]) -> None:
    pipe = pair[1]
    expected = tiny.images(pipe, **PROMPT)
    pipe.fuse_qkv_projections()
    assert np.abs(tiny.images(pipe, **PROMPT) - expected).max() < 1e-5
    pipe.unfuse_qkv_projections()
    pipe.enable_attention_slicing()
    assert np.abs(tiny.images(pipe, **PROMPT) - expected).max() < 1e-5
    pipe.disable_attention_slicing()
    assert np.array_equal(tiny.images(pipe, **PROMPT), expected)


def test_hooks_that_place_a_whole_model_run_for_every_entry(
    tiny: Any, pair: tuple[Any, Any]
) -> None:
    expected = tiny.images(pair[1], **PROMPT)
    placed = []
    for name in ("unet", "vae"):
        model = getattr(pair[1], name)
        _, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
        before = hook.hook.pre_forward
        hook.hook.pre_forward = lambda module, *a, _before=before, _name=name, **k: (
            placed.append(_name) or _before(module, *a, **k)
        )
    assert np.array_equal(tiny.images(pair[1], **PROMPT), expected)
    assert placed == ["unet", "unet", "vae"]
    pair[1].vae.encode(tiny.picture())
    assert placed[3:] == ["vae"]


def test_weights_that_are_fetched_layer_by_layer(tiny: Any, pair: tuple[Any, Any]) -> None:
    expected = tiny.images(pair[1], **PROMPT)
    for name in ("unet", "vae"):
        accelerate.cpu_offload(getattr(pair[1], name), execution_device=torch.device("cpu"))
        assert all(weight.is_meta for weight in getattr(pair[1], name).parameters())
    generator = torch.Generator().manual_seed(11)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        context = pair[1].encode_prompt("a cat", "cpu", 1, False)[0]
        offloaded = pair[1].unet(latents, 3, context).sample
        whole = pair[0].unet(latents, 3, context).sample
    assert (offloaded - whole).abs().max() < 1e-4
    assert expected.shape == (1, 16, 16, 3)


def test_a_compiled_unet_in_a_pipeline(tiny: Any, pair: tuple[Any, Any]) -> None:
    torch._dynamo.reset()
    expected = tiny.images(pair[1], **PROMPT)
    pair[1].unet = torch.compile(pair[1].unet, fullgraph=True, backend="aot_eager")
    assert np.abs(tiny.images(pair[1], **PROMPT) - expected).max() < 1e-4
    torch._dynamo.reset()
