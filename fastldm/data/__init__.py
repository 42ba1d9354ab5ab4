"""Images with captions and classes from folders, files, streams, the hub and an emoji font."""

from fastldm.data.config import DataConfig
from fastldm.data.grids import image_grid, save_image_grid
from fastldm.data.images import ImageDataset
from fastldm.data.load import load_images
from fastldm.data.loader import ImageDataLoader, build_dataloader, collate
from fastldm.data.streaming import StreamingImageDataset

__all__ = [
    "DataConfig",
    "ImageDataLoader",
    "ImageDataset",
    "StreamingImageDataset",
    "build_dataloader",
    "collate",
    "image_grid",
    "load_images",
    "save_image_grid",
]
