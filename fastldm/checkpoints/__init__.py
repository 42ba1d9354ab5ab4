"""Single files of CompVis's and Stability's latent diffusion models, read and written.

The models' own ``from_single_file`` and ``save_single_file`` are the way in; what is here works
on the tensors.
"""

from fastldm.checkpoints.loss_params import read_first_stage_loss
from fastldm.checkpoints.reading import read_tensors
from fastldm.checkpoints.sdxl import load_text_encoders, sdxl_state_dict
from fastldm.checkpoints.single_file import compvis_state_dict, load_single_file
from fastldm.checkpoints.splitting import SingleFile, split_file, split_tensors
from fastldm.checkpoints.writing import write_single_file

__all__ = [
    "SingleFile",
    "compvis_state_dict",
    "load_single_file",
    "load_text_encoders",
    "read_first_stage_loss",
    "read_tensors",
    "sdxl_state_dict",
    "split_file",
    "split_tensors",
    "write_single_file",
]
