"""How `LatentDiffusion` is read from files and written to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from fastldm.checkpoints.whole_model import FileLayout
from fastldm.latent_diffusion.saving import load_model, save_model
from fastldm.latent_diffusion.single_file import load_single_file, save_single_file

if TYPE_CHECKING:
    from fastldm.latent_diffusion.model import LatentDiffusion


class FileMethods:
    """Folders of diffusers' layout, and single files of CompVis's.

    Attributes:
        file_layout: of the single file that the model is from, or None.
    """

    file_layout: FileLayout | None = None

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        unet: nn.Module | None = None,
        conditioner: nn.Module | None = None,
    ) -> None:
        """Write a folder that `from_pretrained` reads, and where it can also diffusers.

        The folder takes the place of an earlier save once it is whole; other files in it stay.

        Args:
            unet, conditioner: saved in place of the object's own: moving averages of them.

        Raises:
            ConfigError: a part has no ``save_pretrained``, or `folder` is a file.
            OSError: the folder cannot be written; what was there is unchanged.
        """
        save_model(cast("LatentDiffusion", self), folder, unet, conditioner)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        **parts: Any,
    ) -> Self:
        """Read a folder of `save_pretrained`, or one of diffusers' latent diffusion pipelines.

        Args:
            folder: a folder here, or ``owner/name`` on the Hugging Face Hub.
            torch_dtype: floating-point dtype of the models.
            parts: objects to use in place of the stored ones: ``scheduler``, ``unet``, ….

        Returns:
            The model, in eval mode.

        Raises:
            CheckpointError: a file is missing, damaged or unsafe.
            ConfigError: a field is unknown or two parts do not fit each other.
        """
        return load_model(cast(Any, cls), folder, torch_dtype, parts)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        use_ema: bool | None = None,
        torch_dtype: torch.dtype | None = None,
        **parts: Any,
    ) -> Self:
        """Read a single file of CompVis's latent diffusion or of Stable Diffusion 1 or 2.

        The scheduler is CompVis's DDIM sampler on the file's noise schedule. A text encoder's
        tokenizer is not in such files; give it as ``tokenizer``.

        Args:
            source, config, use_ema: as of `ModelMixin.from_single_file`.
            torch_dtype: floating-point dtype of the models.
            parts: objects to use in place of those of the file: ``scheduler``, ``conditioner``,
                ``first_stage``, ``unet``; and other arguments of this class.

        Returns:
            The model, in eval mode.

        Raises:
            CheckpointError: the file is missing, damaged or unsafe, lacks a part or has one too
                many, or its weights belong to another architecture.
            ConfigError: the config has a name or value that fastldm does not know, or two parts
                do not fit each other.
        """
        return load_single_file(cast(Any, cls), source, config, use_ema, torch_dtype, parts)

    def save_single_file(
        self,
        path: str | Path,
        *,
        config_path: str | Path | None = None,
        unet: nn.Module | None = None,
        conditioner: nn.Module | None = None,
        ema: nn.Module | None = None,
    ) -> None:
        """Write one file in CompVis's layout, and the YAML file with which its code reads it.

        A model that is from such a file and has not changed is given back as it was, the UNet's
        other weights (raw or averaged) included.

        Args:
            path: ``.safetensors``, or ``.ckpt`` (``.pt``, ``.pth``) for a pickle.
            config_path: of the YAML file; None: it is not written.
            unet, conditioner: saved in place of the object's own.
            ema: a UNet that is saved as the moving averages.

        Raises:
            ConfigError: CompVis's layout cannot hold this model, or `path` has another extension.
            OSError: the file cannot be written; an earlier one is unchanged.
        """
        model = cast("LatentDiffusion", self)
        save_single_file(model, path, config_path, unet, conditioner, ema)
