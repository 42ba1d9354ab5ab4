"""What every scheduler has: a config file in diffusers' format, and seeded noise."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from fastldm.configuration import ConfigMixin
from fastldm.errors import CheckpointError, ConfigError
from fastldm.outputs import BaseOutput
from fastldm.schedulers.timesteps import TIMESTEP_SPACINGS
from fastldm.storage import write_json

_logger = logging.getLogger(__name__)

_METHOD_FIELDS = frozenset({
    # which describe another scheduler's own method
    "algorithm_type", "disable_corrector", "euler_at_final", "flow_shift", "interpolation_type",
    "lower_order_final", "noise_sampler_seed", "original_inference_steps", "predict_x0",
    "set_alpha_to_one", "skip_prk_steps", "solver_order", "solver_p", "solver_type",
    "time_shift_type", "timestep_scaling", "variance_type",
    # which matter only beside a field of `_SAMPLING_FIELDS`
    "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "steps_offset",
    "timestep_spacing",
    # which early releases of diffusers wrote and no longer read
    "predict_epsilon", "tensor_format", "timestep_values",
})  # fmt: skip
"""Fields of other schedulers that are left out."""

_SAMPLING_FIELDS: dict[str, Any] = {
    "clip_sample": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "sigma_max": None,
    "sigma_min": None,
    "thresholding": False,
    "timestep_type": "discrete",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
}
"""Fields of other schedulers that are left out with a warning, unless they have this value."""

_PROCESS_FIELDS: dict[str, Any] = {
    "rescale_betas_zero_snr": False,
    "shift_terminal": None,
    "use_dynamic_shifting": False,
    "use_flow_sigmas": False,
}
"""Fields that say how a model was trained, with the value that a scheduler without them stands for.

The last three are of flow matching, which no scheduler here has.
"""

_EXTENSIONS: dict[str, Any] = {"schedule_dtype": "float32"}
"""Fields that diffusers does not know, with the value at which both do the same."""

_NEAREST_SPACINGS = {"uniform": "leading"}
"""CompVis's spacing, and the one of diffusers that visits the same time steps if S divides T."""

_OWN_FIELDS = "_fastldm"
"""Where a file keeps what diffusers cannot read; names with an underscore are not read there."""


@dataclass
class SchedulerOutput(BaseOutput):
    """What a sampling step gives."""

    prev_sample: Tensor
    """The sample that the step leads to: the next input of the model."""
    pred_original_sample: Tensor | None = None
    """x₀ as predicted at this step, where the scheduler gives it."""


class SchedulerMixin(ConfigMixin):
    """A scheduler that is stored as ``scheduler_config.json``, in diffusers' format."""

    config_name = "scheduler_config.json"
    _compatibles: ClassVar[tuple[str, ...]] = (
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    )
    diffusers_class = "SchedulerMixin"
    """What a scheduler also is in a program that uses diffusers."""
    order = 1
    """Model evaluations a step."""
    timestep_spacings: ClassVar[tuple[str, ...]] = TIMESTEP_SPACINGS

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build the scheduler from its own config or another scheduler's, ours or diffusers'.

        Options of methods that only other schedulers have are left out, with a warning where they
        change which noise levels are visited or how x₀ is limited. So are fields that a scheduler
        of diffusers got from its own defaults.

        Args:
            config: the fields; those that start with ``_`` are metadata and skipped.
            overrides: replace single fields.

        Raises:
            ConfigError: a field is unknown to every scheduler, has a value this one refuses, or
                says that the model was trained with what this one has not.
        """
        defaulted = config.get("_use_default_values", ())
        values = {name: value for name, value in config.items() if name not in defaulted}
        values.update(_own_fields(config))
        own = inspect.signature(cls.__init__).parameters
        spacing = values.get("timestep_spacing")
        if "timestep_spacing" in own and spacing not in cls.timestep_spacings:
            values.update(_nearest_spacing(cls.__name__, spacing))
        values.update(overrides)
        if values.get("predict_epsilon") is False:
            values.setdefault("prediction_type", "sample")
        return super().from_config(_without_foreign_fields(cls.__name__, values, own))

    @property
    def compatibles(self) -> list[type]:
        """The schedulers that `from_config` builds from this one's config."""
        home = importlib.import_module("fastldm.schedulers")
        return [getattr(home, name) for name in self._compatibles]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **config_overrides: Any,
    ) -> Self:
        """Build the scheduler from a saved folder or a Hugging Face Hub repository.

        Args:
            pretrained_model_name_or_path: a folder here, or ``owner/name`` on the Hub.
            subfolder: the folder inside it, ``"scheduler"`` for a pipeline's.
            revision, cache_dir, token, force_download, local_files_only: as huggingface_hub's.
            config_overrides: replace single fields.

        Raises:
            CheckpointError: there is no such folder or repository, it has no scheduler config, or
                the config is not JSON.
            ConfigError: a field is unknown or has a value that this scheduler refuses.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return cls.from_config(cls.load_config(folder, subfolder), **config_overrides)
        try:
            file = hf_hub_download(
                str(pretrained_model_name_or_path),
                cls.config_name,
                subfolder=subfolder,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: no such folder, and {cls.config_name} cannot be "
                f"had from the Hub under that name ({reason})"
            ) from None
        return cls.from_config(cls.load_config(Path(file).parent), **config_overrides)

    def register_to_config(self, **fields: Any) -> None:
        """Change fields of the config in place; the scheduler is as newly built with them.

        Raises:
            ConfigError: a field is unknown or has a value that this scheduler refuses.
        """
        self.__dict__.update(type(self).from_config(self.config, **fields).__dict__)

    def save_config(self, folder: str | Path) -> None:
        """Write ``scheduler_config.json`` into `folder`, which is made if it is missing.

        What diffusers does not know is written where it does not look, so that it reads the file
        without a warning. In place of CompVis's spacing "uniform" it reads "leading", which visits
        the same time steps where S divides T.
        """
        fields = {name: value for name, value in self.config.items() if name not in _EXTENSIONS}
        own = {
            name: self.config[name]
            for name, neutral in _EXTENSIONS.items()
            if self.config.get(name, neutral) != neutral
        }
        spacing = fields.get("timestep_spacing")
        if spacing in _NEAREST_SPACINGS:
            own["timestep_spacing"] = spacing
            fields["timestep_spacing"] = _NEAREST_SPACINGS[spacing]
        if own:
            fields[_OWN_FIELDS] = own
        write_json(Path(folder, self.config_name), {"_class_name": type(self).__name__, **fields})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the scheduler's config where `from_pretrained` and diffusers find it.

        Raises:
            OSError: the folder cannot be written; a config that was in it is unchanged.
        """
        self.save_config(save_directory)


def _own_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `save_config` has put aside for us."""
    own = config.get(_OWN_FIELDS, {})
    if not isinstance(own, Mapping) or set(own) - {*_EXTENSIONS, "timestep_spacing"}:
        raise ConfigError(
            f"{_OWN_FIELDS}: expected {', '.join(_EXTENSIONS)}, timestep_spacing, got {own!r:.80}"
        )
    return own


def _nearest_spacing(scheduler: str, spacing: Any) -> dict[str, str]:
    """The spacing that stands for another sampler's, which `scheduler` has not."""
    if not isinstance(spacing, str) or spacing not in _NEAREST_SPACINGS:
        return {}
    nearest = _NEAREST_SPACINGS[spacing]
    _logger.warning("%s has no timestep_spacing %r; %r is taken", scheduler, spacing, nearest)
    return {"timestep_spacing": nearest}


def _without_foreign_fields(
    scheduler: str, config: Mapping[str, Any], own: Collection[str]
) -> dict[str, Any]:
    """The fields that are the scheduler's own, and those that no scheduler has."""
    kept = {}
    for name, value in config.items():
        if name in own:
            kept[name] = value
        elif name in _PROCESS_FIELDS:
            if value != _PROCESS_FIELDS[name]:
                raise ConfigError(f"{name}: got {value!r}; {scheduler} has no such noise schedule")
        elif name in _SAMPLING_FIELDS:
            if value != _SAMPLING_FIELDS[name]:
                _logger.warning("%s has no %s; %r is left out", scheduler, name, value)
        elif name not in _METHOD_FIELDS and name not in _EXTENSIONS:
            kept[name] = value
    return kept


def randn(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normal noise, the same as diffusers draws from the same generators.

    Args:
        shape: [B, …].
        generator: one for the whole batch, or a list with one a sample, so that a sample does not
            depend on the others. A CPU generator gives the same numbers for every `device`.
        device, dtype: of the result.

    Raises:
        ConfigError: a list with another length than B, or a generator of another device than
            `device` or the CPU.
    """
    if isinstance(generator, Sequence):
        if len(generator) == 1:
            return randn(shape, generator[0], device, dtype)
        if len(generator) != shape[0]:
            raise ConfigError(
                f"generator: got {len(generator)}; accepted: one, or one a sample ({shape[0]})"
            )
        return torch.cat([randn((1, *shape[1:]), one, device, dtype) for one in generator])
    source = device if generator is None else generator.device
    if source.type not in (device.type, "cpu"):
        raise ConfigError(f"generator: got one on {source}; accepted: on {device} or the CPU")
    noise = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
    return noise.to(device)
