"""Config files to and from diffusers, and seeded noise."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from fastldm import schedulers
from fastldm.errors import CheckpointError, ConfigError
from fastldm.schedulers import DDIMScheduler, DDPMScheduler, SchedulerMixin, randn

PAIRS = [(DDIMScheduler, diffusers.DDIMScheduler), (DDPMScheduler, diffusers.DDPMScheduler)]
both = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["ddim", "ddpm"])
each = pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
ALL = sorted(SchedulerMixin._compatibles)
CONFIG = {
    "num_train_timesteps": 500,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "clip_sample_range": 2.0,
    "prediction_type": "v_prediction",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.5,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "rescale_betas_zero_snr": True,
}


def fields(config):
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


@both
def test_diffusers_file_loads_here(ours, theirs, tmp_path):
    theirs(**CONFIG).save_pretrained(tmp_path / "scheduler")
    for loaded in (
        ours.from_pretrained(tmp_path / "scheduler"),
        ours.from_pretrained(tmp_path, subfolder="scheduler"),
        ours.from_pretrained(str(tmp_path), "scheduler"),
    ):
        assert fields(loaded.config) == {**fields(theirs(**CONFIG).config),
                                         "schedule_dtype": "float32"}  # fmt: skip
        assert torch.equal(loaded.alphas_cumprod, theirs(**CONFIG).alphas_cumprod)
    assert ours.from_pretrained(tmp_path / "scheduler", steps_offset=0).config.steps_offset == 0


@both
def test_our_file_loads_in_diffusers_without_a_warning(ours, theirs, tmp_path, caplog):
    ours(**CONFIG).save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        loaded = theirs.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert fields(loaded.config) == fields(theirs(**CONFIG).config)


@each
def test_own_file_gives_the_same_scheduler(cls, tmp_path):
    betas = np.linspace(0.01, 0.02, 20)
    saved = cls(20, trained_betas=betas, schedule_dtype="float64")
    saved.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.config == saved.config
    assert loaded.config.schedule_dtype == "float64"
    assert loaded.config.trained_betas == betas.tolist()
    assert torch.equal(loaded.alphas_cumprod, saved.alphas_cumprod)
    assert loaded.alphas_cumprod.dtype == torch.float64


COMPVIS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "uniform",
    "schedule_dtype": "float64",
}


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_diffusers_reads_a_compvis_sampler(name, tmp_path, caplog):
    """Without a warning, and with the same time steps where their number divides T."""
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {"clip_sample": False}
    saved = getattr(schedulers, name)(**COMPVIS, **options)
    saved.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        theirs = getattr(diffusers, name).from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    loaded = type(saved).from_pretrained(tmp_path)
    assert loaded.config == saved.config
    for steps in (2, 4, 10, 50, 200, 250, 500):
        for scheduler in (saved, loaded, theirs):
            scheduler.set_timesteps(steps)
        assert loaded.timesteps.tolist() == saved.timesteps.tolist()
        assert saved.timesteps.tolist() == theirs.timesteps.tolist()
    loaded.set_timesteps(400)
    assert len(loaded.timesteps) == 500 + (name == "PNDMScheduler")


@pytest.mark.parametrize("name", ALL)
def test_every_scheduler_takes_over_a_compvis_sampler(name, tmp_path, caplog):
    kind, saved = getattr(schedulers, name), DDIMScheduler(**COMPVIS)
    saved.save_pretrained(tmp_path)
    has_spacing = "timestep_spacing" in kind().config
    lacks_it = has_spacing and "uniform" not in kind.timestep_spacings
    for loaded in (kind.from_config(saved.config), kind.from_pretrained(tmp_path)):
        assert loaded.schedule_dtype == torch.float64
        if has_spacing:
            assert loaded.config.timestep_spacing == ("leading" if lacks_it else "uniform")
        assert ("timestep_spacing 'uniform'" in caplog.text) == lacks_it
    if lacks_it:
        with pytest.raises(ConfigError, match="timestep_spacing: got 'uniform'"):
            kind.from_config(saved.config, timestep_spacing="uniform")


def test_a_damaged_own_entry_is_named():
    for entry in ("uniform", {"colour": 1}):
        with pytest.raises(ConfigError, match="_fastldm: expected"):
            DDIMScheduler.from_config({"_fastldm": entry})


def test_saving_keeps_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    DDIMScheduler().save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "kept"
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == (
        "DDIMScheduler"
    )


OTHERS = [
    diffusers.PNDMScheduler, diffusers.LMSDiscreteScheduler, diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler, diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler,
    diffusers.DEISMultistepScheduler, diffusers.UniPCMultistepScheduler, diffusers.LCMScheduler,
    diffusers.TCDScheduler, diffusers.DDIMInverseScheduler, diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
]  # fmt: skip


@both
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("other", OTHERS, ids=lambda cls: cls.__name__)
def test_configs_of_other_schedulers_are_taken_over(ours, theirs, other):
    # Few time steps, for schedulers that tabulate them slowly.
    config = other(100, beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.013).config
    got = fields(ours.from_config(config).config)
    got.pop("schedule_dtype")
    assert got == {name: value for name, value in fields(theirs.from_config(config).config).items()
                   if name in got}  # fmt: skip
    assert got["beta_end"] == 0.013


@each
def test_configs_of_each_other_are_taken_over(cls):
    for other in (DDIMScheduler, DDPMScheduler):
        loaded = cls.from_config(other(**CONFIG).config, clip_sample=True)
        assert {name: loaded.config[name] for name in CONFIG} == {**CONFIG, "clip_sample": True}


@each
def test_fields_of_early_diffusers_releases(cls):
    config = {"tensor_format": "pt", "timestep_values": None, "beta_end": 0.0195}
    assert cls.from_config({**config, "predict_epsilon": True}).prediction_type == "epsilon"
    assert cls.from_config({**config, "predict_epsilon": False}).prediction_type == "sample"


@each
def test_bad_fields_are_named(cls):
    with pytest.raises(ConfigError, match=r"'beta_stop'.*beta_end"):
        cls.from_config({"beta_stop": 0.02})
    with pytest.raises(ConfigError, match="'beta_stop'"):
        cls.from_config({}, beta_stop=0.02)
    with pytest.raises(ConfigError, match="use_flow_sigmas"):
        cls.from_config({"use_flow_sigmas": True})


@each
def test_bad_folders_are_named(cls, tmp_path):
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json: no such file"):
        cls.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON file"):
        cls.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        cls.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        cls.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="owner/absent: no such folder"):
        cls.from_pretrained("owner/absent", local_files_only=True, cache_dir=tmp_path)


def test_a_hub_repository_is_read_from_the_cache(tmp_path):
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc" / "scheduler"
    snapshot.mkdir(parents=True)
    DDIMScheduler(**CONFIG).save_pretrained(snapshot)
    reference = tmp_path / "models--owner--model" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("abc")
    loaded = DDIMScheduler.from_pretrained(
        "owner/model", subfolder="scheduler", cache_dir=tmp_path, local_files_only=True
    )
    assert loaded.config == DDIMScheduler(**CONFIG).config


@each
def test_register_to_config_changes_the_scheduler(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    scheduler.register_to_config(prediction_type="v_prediction", beta_end=0.01)
    fresh = cls(prediction_type="v_prediction", beta_end=0.01)
    assert scheduler.config == fresh.config
    assert scheduler.prediction_type == "v_prediction"
    assert torch.equal(scheduler.alphas_cumprod, fresh.alphas_cumprod)
    assert torch.equal(scheduler.timesteps, fresh.timesteps)
    with pytest.raises(ConfigError, match="prediction_type"):
        scheduler.register_to_config(prediction_type="v")
    assert scheduler.config == fresh.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_noise_is_that_of_diffusers(dtype):
    shape, device = (3, 2, 4), torch.device("cpu")

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    for make in (lambda: seeded(1)[0], lambda: seeded(1), lambda: seeded(1, 2, 3)):
        want = randn_tensor(shape, generator=make(), device=device, dtype=dtype)
        got = randn(shape, make(), device, dtype)
        assert torch.equal(got, want)
        assert got.dtype == dtype
    torch.manual_seed(0)
    want = randn_tensor(shape, device=device, dtype=dtype)
    torch.manual_seed(0)
    assert torch.equal(randn(shape, None, device, dtype), want)


def test_generators_that_do_not_fit_are_named():
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ConfigError, match="generator: got one on cuda"):
        randn((2, 3), elsewhere, torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError, match="generator: got 2; accepted: one, or one a sample"):
        randn((3, 3), [torch.Generator()] * 2, torch.device("cpu"), torch.float32)


def test_public_names():
    assert all(hasattr(schedulers, name) for name in schedulers.__all__)


def accepted(cls, config):
    return {name: value for name, value in config.items() if name in cls().config}


@pytest.mark.parametrize("name", ALL)
def test_files_of_every_scheduler_go_both_ways(name, tmp_path, caplog):
    ours, theirs = getattr(schedulers, name), getattr(diffusers, name)
    given = {**CONFIG, "clip_sample": True, "solver_order": 3, "skip_prk_steps": True,
             "use_karras_sigmas": True, "original_inference_steps": 40}  # fmt: skip
    given = accepted(ours, given)
    theirs(**given).save_pretrained(tmp_path / "theirs")
    loaded = ours.from_pretrained(tmp_path / "theirs")
    assert {**fields(theirs(**given).config), "schedule_dtype": "float32"} == fields(loaded.config)
    loaded.save_pretrained(tmp_path / "ours")
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        back = theirs.from_pretrained(tmp_path / "ours")
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert fields(back.config) == fields(theirs(**given).config)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("other", OTHERS, ids=lambda cls: cls.__name__)
def test_every_scheduler_takes_over_every_config(name, other):
    given = {"num_train_timesteps": 100, "beta_schedule": "scaled_linear", "beta_end": 0.013}
    config = other(**given).config
    loaded = getattr(schedulers, name).from_config(config)
    assert (loaded.config.num_train_timesteps, loaded.config.beta_end) == (100, 0.013)
    loaded.set_timesteps(10)


@pytest.mark.parametrize("name", ALL)
def test_what_is_left_out_of_a_config_is_said(name, caplog):
    cls = getattr(schedulers, name)
    config = {"use_karras_sigmas": True, "thresholding": True, "skip_prk_steps": True}
    with caplog.at_level(logging.WARNING, logger="fastldm"):
        loaded = cls.from_config(config)
    for field in ("use_karras_sigmas", "thresholding"):
        assert (f"no {field}" in caplog.text) == (field not in loaded.config)
    assert "skip_prk_steps" not in caplog.text
    if "rescale_betas_zero_snr" not in loaded.config:
        with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):
            cls.from_config({"rescale_betas_zero_snr": True})
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        cls.from_config({"use_dynamic_shifting": True})
    with pytest.raises(ConfigError, match="'beta_stop'"):
        cls.from_config({"beta_stop": 0.02})


def test_compatible_schedulers_are_those_of_the_package():
    found = {cls.__name__ for cls in DDIMScheduler().compatibles}
    assert found == {name for name in schedulers.__all__
                     if name.endswith("Scheduler") and hasattr(diffusers, name)}  # fmt: skip
