"""A folder with a subfolder for each part and a ``model_index.json``, as diffusers' pipelines.

What diffusers has no place for is in ``latent_diffusion.json`` and, where the loss has learned
weights, ``latent_diffusion.safetensors``.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastldm.errors import CheckpointError, ConfigError
from fastldm.models.base import ModelMixin
from fastldm.models.weights import Locator, make_locator, why_no_model
from fastldm.storage import atomic_directory, load_weights, read_json, save_weights, write_json

INDEX_FILE = "model_index.json"
FIELDS_FILE = "latent_diffusion.json"
TENSORS_FILE = "latent_diffusion.safetensors"
_DIFFUSERS_VERSION = "0.36.0"
"""The oldest release that reads these folders; its loader wants one named."""

_HOMES = {
    "AutoencoderKL": "fastldm.models",
    "CaptionTokenizer": "fastldm.models",
    "ClassEmbedder": "fastldm.models",
    "DDIMScheduler": "fastldm.schedulers",
    "DDPMScheduler": "fastldm.schedulers",
    "DPMSolverMultistepScheduler": "fastldm.schedulers",
    "DPMSolverSinglestepScheduler": "fastldm.schedulers",
    "EulerAncestralDiscreteScheduler": "fastldm.schedulers",
    "EulerDiscreteScheduler": "fastldm.schedulers",
    "HeunDiscreteScheduler": "fastldm.schedulers",
    "IdentityFirstStage": "fastldm.models",
    "LCMScheduler": "fastldm.schedulers",
    "LMSDiscreteScheduler": "fastldm.schedulers",
    "PNDMScheduler": "fastldm.schedulers",
    "SpatialRescaler": "fastldm.models",
    "TextEncoder": "fastldm.models",
    "UNet2DConditionModel": "fastldm.models",
    "UNet2DModel": "fastldm.models",
    "UniPCMultistepScheduler": "fastldm.schedulers",
    "VQModel": "fastldm.models",
}
_FASTLDM_ONLY = (
    "CaptionTokenizer", "ClassEmbedder", "IdentityFirstStage", "SpatialRescaler", "TextEncoder",
)  # fmt: skip
_FOREIGN_BASES = {
    "transformers": ("PreTrainedModel", "PreTrainedTokenizerBase"),
    "diffusers": ("ModelMixin", "SchedulerMixin"),
}
"""Base classes, one of which a class that a file names must have to be loaded."""

_IGNORED_COMPONENTS = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of Stable Diffusion's folders that take no part in making an image."""
_REQUIRED_ENTRIES: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {
        "requires_safety_checker": False,
        **{name: [None, None] for name in _IGNORED_COMPONENTS},
    }
}
"""What diffusers' pipelines want in their index beside the parts."""


@dataclass
class PipelineFolder:
    """What such a folder holds.

    Attributes:
        class_name: diffusers' pipeline that reads the folder, or ``"LatentDiffusion"``.
        components: objects by the name of their subfolder.
        fields: the entries of ``latent_diffusion.json``.
        tensors: learned weights of the loss.
    """

    class_name: str
    components: dict[str, Any]
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_pipeline(folder: str | Path, content: PipelineFolder) -> None:
    """Write all parts under a temporary name, then put them in the place of an earlier save.

    Files in the folder that belong to no earlier save stay.

    Raises:
        ConfigError: a part cannot be saved, or `folder` is a file.
        OSError: the folder cannot be written; what was there is unchanged.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; expected a folder to save into")
    index: dict[str, Any] = {
        "_class_name": content.class_name,
        "_diffusers_version": _DIFFUSERS_VERSION,
        **_REQUIRED_ENTRIES.get(content.class_name, {}),
    }
    for name, component in content.components.items():
        if not hasattr(component, "save_pretrained"):
            raise ConfigError(f"{name}: a {type(component).__name__} has no save_pretrained")
        index[name] = [_library_of(component), type(component).__name__]
    with atomic_directory(folder) as temporary:
        for name, component in content.components.items():
            component.save_pretrained(temporary / name)
        if content.tensors:
            save_weights(content.tensors, temporary / TENSORS_FILE)
        write_json(temporary / FIELDS_FILE, content.fields)
        write_json(temporary / INDEX_FILE, index)
        _keep_other_files(folder, temporary)


def _keep_other_files(folder: Path, temporary: Path) -> None:
    """Copy what is in `folder` beside an earlier save."""
    if not folder.is_dir():
        return
    replaced = {INDEX_FILE, FIELDS_FILE, TENSORS_FILE, *(path.name for path in temporary.iterdir())}
    if (folder / INDEX_FILE).is_file():
        replaced |= set(_read_index(folder / INDEX_FILE))
    for path in folder.iterdir():
        if path.name in replaced:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, temporary / path.name, symlinks=True)
        else:
            shutil.copy2(path, temporary / path.name, follow_symlinks=False)


def _library_of(component: Any) -> str:
    library = type(component).__module__.partition(".")[0]
    name = type(component).__name__
    return "diffusers" if library == "fastldm" and name not in _FASTLDM_ONLY else library


def _read_index(path: Path) -> dict[str, Any]:
    index = read_json(path)
    if not isinstance(index, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(index).__name__}")
    return index


def read_pipeline(
    source: str | Path, torch_dtype: torch.dtype | None = None, given: Mapping[str, Any] = {}
) -> PipelineFolder:
    """Load the parts of a folder here, or of a Hugging Face Hub repository.

    Args:
        source: the folder, or ``owner/name``.
        torch_dtype: floating-point dtype of the models.
        given: parts to use in place of those stored.

    Raises:
        CheckpointError: a file is missing or damaged, or names a class that is not accepted.
        ConfigError: a part's config is refused.
    """
    locate = make_locator(source, None)
    index_path = locate(INDEX_FILE)
    if index_path is None:
        raise CheckpointError(
            f"no saved latent diffusion model: {why_no_model(source, INDEX_FILE)}"
        )
    index = _read_index(index_path)
    components: dict[str, Any] = {}
    for name, entry in index.items():
        if name in given:
            components[name] = given[name]
        elif not name.startswith("_") and isinstance(entry, list) and entry[0] is not None:
            if len(entry) != 2 or not all(isinstance(part, str) for part in entry):
                raise CheckpointError(f"{index_path}: {name}: expected [library, class]")
            if name in _IGNORED_COMPONENTS:
                continue
            components[name] = _load(source, name, entry[0], entry[1], torch_dtype)
    return PipelineFolder(
        str(index.get("_class_name")),
        components,
        _read_fields(locate),
        _read_tensors(locate),
    )


def _read_fields(locate: Locator) -> dict[str, Any]:
    path = locate(FIELDS_FILE)
    fields = {} if path is None else read_json(path)
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _read_tensors(locate: Locator) -> dict[str, Tensor]:
    path = locate(TENSORS_FILE)
    return {} if path is None else load_weights(path)


def _load(
    source: str | Path, name: str, library: str, class_name: str, torch_dtype: torch.dtype | None
) -> Any:
    kind = _resolve(source, name, library, class_name)
    options: dict[str, Any] = {"subfolder": name}
    if hasattr(kind, "parameters") and torch_dtype is not None:
        options["torch_dtype"] = torch_dtype
    if library == "transformers" and hasattr(kind, "parameters"):
        options["use_safetensors"] = True
    try:
        part = kind.from_pretrained(source, **options)
    except OSError as error:
        if library != "transformers":
            raise
        raise CheckpointError(f"{Path(source, name)}: {error}") from None
    if isinstance(part, nn.Module) and not isinstance(part, ModelMixin):
        _align(part)
    return part


def _align(module: nn.Module) -> None:
    """Give each weight memory of its own, as `ModelMixin.from_pretrained` does.

    Otherwise a loaded model would not draw the images of the saved one bit for bit.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


def _resolve(source: str | Path, name: str, library: str, class_name: str) -> Any:
    """The class of a part: fastldm's where it has one, else a model of the library named."""
    if class_name in _HOMES and library in ("fastldm", "diffusers"):
        return getattr(importlib.import_module(_HOMES[class_name]), class_name)
    if library in _FOREIGN_BASES:
        try:
            module = importlib.import_module(library)
        except ImportError:
            raise CheckpointError(
                f"{source}: {name} is a {class_name} of {library}, which is not installed"
            ) from None
        kind = getattr(module, class_name, None)
        bases = tuple(getattr(module, base) for base in _FOREIGN_BASES[library])
        if isinstance(kind, type) and issubclass(kind, bases):
            return kind
    raise CheckpointError(
        f"{source}: {name} is a {class_name} of {library}, which fastldm cannot load; accepted: "
        f"{', '.join(_HOMES)}, and models and tokenizers of transformers; or give {name}="
    )
