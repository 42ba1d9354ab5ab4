"""Saving, loading and switching what every model shares."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from fastldm.configuration import register_to_config
from fastldm.errors import CheckpointError, ConfigError
from fastldm.models import AutoencoderKL, ModelMixin


class Tiny(ModelMixin):
    @register_to_config
    def __init__(self, width: int = 4, with_table: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("steps", torch.tensor(3))
        if with_table:
            self.register_buffer("table", torch.arange(5.0), persistent=False)
        self.dropout = nn.Dropout()


class Checkpointed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("with_table", [False, True])
def test_a_model_comes_back_as_saved_in_eval_mode(tmp_path, with_table):
    model = Tiny(5, with_table=with_table)
    model.save_pretrained(tmp_path / "a" / "b")
    loaded = Tiny.from_pretrained(tmp_path / "a" / "b")
    assert_same_state(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.linear.weight.requires_grad
    assert not loaded.frozen.requires_grad
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    if with_table:
        assert torch.equal(loaded.table, torch.arange(5.0))


def test_subfolder_and_variant_choose_the_files(tmp_path):
    full, half = Tiny(), Tiny()
    full.save_pretrained(tmp_path / "unet")
    half.save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size=70)
    assert_same_state(full, Tiny.from_pretrained(tmp_path, subfolder="unet"))
    loaded = Tiny.from_pretrained(str(tmp_path), subfolder="unet", variant="fp16")
    assert_same_state(half, loaded)


def test_loaded_weights_lie_aligned_and_not_in_the_file(tmp_path):
    Tiny(3).save_pretrained(tmp_path)
    loaded = Tiny.from_pretrained(tmp_path)
    tensors = (*loaded.parameters(), *loaded.buffers())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_floating_weights_take_the_dtype_asked_for(tmp_path):
    Tiny().half().save_pretrained(tmp_path)
    assert Tiny.from_pretrained(tmp_path).dtype == torch.float32
    loaded = Tiny.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.steps.dtype == torch.int64
    with pytest.raises(ConfigError, match="torch_dtype"):
        Tiny.from_pretrained(tmp_path, torch_dtype=torch.int8)


def test_a_weights_file_is_read_with_the_config_beside_it_or_given(tmp_path):
    model = Tiny(5)
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / Tiny.weights_name
    assert_same_state(model, Tiny.from_pretrained(file))
    assert_same_state(model, Tiny.from_pretrained(tmp_path, subfolder=f"a/{file.name}"))
    alone = file.rename(tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: no config\.json beside it"):
        Tiny.from_pretrained(alone)
    for config in (tmp_path / "a", str(tmp_path / "a" / "config.json"), {"width": 5}):
        assert_same_state(model, Tiny.from_pretrained(alone, config=config))


def test_a_pickle_is_not_read_where_only_safetensors_may_be(tmp_path):
    model = Tiny()
    model.save_pretrained(tmp_path)
    pickled = tmp_path / Tiny.weights_name.replace(".safetensors", ".bin")
    torch.save(model.state_dict(), pickled)
    (tmp_path / Tiny.weights_name).unlink()
    assert_same_state(model, Tiny.from_pretrained(tmp_path, use_safetensors=False))
    with pytest.raises(CheckpointError, match=r"none of diffusion_pytorch_model\.safetensors or"):
        Tiny.from_pretrained(tmp_path, use_safetensors=True)
    with pytest.raises(CheckpointError, match="use_safetensors"):
        Tiny.from_pretrained(pickled, use_safetensors=True)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_keywords_of_diffusers_are_taken_while_they_are_off(tmp_path, low_cpu_mem_usage):
    model = Tiny()
    model.save_pretrained(tmp_path)
    loaded = Tiny.from_pretrained(
        tmp_path,
        low_cpu_mem_usage=low_cpu_mem_usage,
        device_map=None,
        max_memory=None,
        offload_state_dict=False,
        use_flashpack=False,
    )
    assert_same_state(model, loaded)
    with pytest.raises(ConfigError, match="quantization_config: "):
        Tiny.from_pretrained(tmp_path, quantization_config={"bits": 4})


@pytest.mark.parametrize("device_map", ["meta", torch.device("meta"), {"": "meta"}])
def test_a_device_map_of_one_device_places_the_model(tmp_path, device_map):
    Tiny(with_table=True).save_pretrained(tmp_path)
    loaded = Tiny.from_pretrained(tmp_path, device_map=device_map)
    assert all(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("device_map", ["auto", {"": 0, "linear": "cpu"}, 1.5])
def test_a_device_map_of_several_devices_is_refused(tmp_path, device_map):
    Tiny().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="device_map: expected one device"):
        Tiny.from_pretrained(tmp_path, device_map=device_map)


def test_loading_takes_no_more_memory_than_the_weights(tmp_path, monkeypatch):
    Tiny(4).save_pretrained(tmp_path)
    built = []
    real = nn.Linear.reset_parameters
    monkeypatch.setattr(
        nn.Linear, "reset_parameters", lambda self: built.append(self.weight.is_meta) or real(self)
    )
    Tiny.from_pretrained(tmp_path)
    assert built == [True]


def test_overrides_replace_config_fields(tmp_path):
    Tiny().save_pretrained(tmp_path)
    assert Tiny.from_pretrained(tmp_path, with_table=True).config.with_table is True
    with pytest.raises(ConfigError, match="'colour'"):
        Tiny.from_pretrained(tmp_path, colour=1)
    with pytest.raises(CheckpointError, match=r"linear\.weight is \[4, 4\] in the file, \[6, 6\]"):
        Tiny.from_pretrained(tmp_path, width=6)


def test_an_unknown_config_field_is_named(tmp_path):
    Tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_diffusers_version": "0.1", "hidden_trick": 1}))
    with pytest.raises(ConfigError, match="'hidden_trick'"):
        Tiny.from_pretrained(tmp_path)


@pytest.mark.parametrize("width", ["4", None, [4], -1, 1.5])
def test_a_config_value_of_the_wrong_type_is_a_config_error(tmp_path, width):
    Tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "width": width}))
    with pytest.raises(ConfigError, match=f"{tmp_path}.*Tiny"):
        Tiny.from_pretrained(tmp_path)


def test_a_model_of_another_class_is_named(tmp_path):
    Tiny().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds Tiny, not AutoencoderKL"):
        AutoencoderKL.from_pretrained(tmp_path)


def test_a_folder_without_a_config_or_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Tiny.from_pretrained(tmp_path)
    Tiny().save_config(tmp_path)
    with pytest.raises(CheckpointError, match="no weights"):
        Tiny.from_pretrained(tmp_path)


def test_missing_and_unexpected_weights_are_named(tmp_path):
    model = Tiny()
    model.extra = nn.Parameter(torch.zeros(1))
    del model.linear.bias
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing linear\.bias; unexpected extra"):
        Tiny.from_pretrained(tmp_path)


def test_loaded_weights_survive_a_save_over_their_own_file(tmp_path):
    Tiny().save_pretrained(tmp_path)
    loaded = Tiny.from_pretrained(tmp_path)
    before = copy.deepcopy(loaded.state_dict())
    Tiny().save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    again = Tiny.from_pretrained(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in again.state_dict().items())


def test_parameters_are_counted():
    model = Tiny(3)
    assert model.num_parameters() == 15
    assert model.num_parameters(only_trainable=True) == 12


def test_dtype_and_device_are_those_of_the_parameters():
    model = Tiny().double()
    assert (model.dtype, model.device) == (torch.float64, torch.device("cpu"))
    assert model.to("meta").device == torch.device("meta")

    class Empty(ModelMixin):
        pass

    assert (Empty().dtype, Empty().device) == (torch.float32, torch.device("cpu"))


def test_gradient_checkpointing_is_switched_where_it_exists():
    model = Checkpointed()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ConfigError, match="Tiny has no gradient checkpointing"):
        Tiny().enable_gradient_checkpointing()


def test_the_package_s_models_are_found_by_name():
    import fastldm.models

    assert set(fastldm.models.__all__) <= set(dir(fastldm.models))
    assert fastldm.models.AutoencoderKL.__name__ == "AutoencoderKL"
    with pytest.raises(AttributeError, match="NoSuchModel"):
        _ = fastldm.models.NoSuchModel
