"""What to load and how each image is cut, scaled and augmented."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastldm.errors import ConfigError

Crop = Literal["center", "random", "pad", "none"]
Interpolation = Literal["lanczos", "bicubic", "bilinear", "area", "nearest"]


@dataclass
class DataConfig:
    """A data set of images, with captions and classes where the source has them.

    `source` is one of:

    - a folder of images, searched recursively; captions come from ``metadata.jsonl`` or
      ``metadata.csv`` (a ``file_name`` column and others) or from a ``.txt`` file beside each
      image, classes from the subfolders; subfolders ``train`` and ``test`` (or ``val``,
      ``validation``) are used as the splits;
    - ``"emoji"``: the images, names and groups of the installed Noto Color Emoji font;
    - ``"parquet:<file, folder or glob>"``, or a path that ends in ``.parquet``;
    - ``"webdataset:<tar, folder or glob>"``, or a path that ends in ``.tar``: always streamed;
    - ``"idx:<folder>"``: IDX files as MNIST and Fashion-MNIST publish them;
    - a folder written by ``datasets.Dataset.save_to_disk``;
    - ``"hub:<owner/name>"`` or ``"<owner/name>"``: a data set on the Hugging Face hub.

    Raises:
        ConfigError: a field has a value that is not accepted, or two fields contradict.
    """

    source: str
    """Where the images are: a folder, ``emoji``, or ``parquet:…``, ``webdataset:…``, ``idx:…`` or
    ``hub:owner/name``."""
    resolution: int = 256
    """Height and width of the images given out, in pixels."""
    channels: int = 3
    """Channels given out. Grey becomes RGB by copying, RGB becomes grey by ITU-R 601 luma; any
    other difference between the file and this number is an error. Alpha is composited on white,
    unless the number counts it (4 keeps RGBA, 2 keeps grey with alpha)."""
    crop: Crop = "center"
    """``center`` or ``random``: the shorter side is resized to `resolution` and a square cut out.
    ``pad``: white is added to make the image square before resizing. ``none``: every image must
    already be `resolution` × `resolution`."""
    tile: int | None = None
    """Cut photographs, at their own scale, into squares of this many pixels, each an item of its
    own, resized to `resolution`. Tiles lie on a grid; with ``crop="random"`` there are as many but
    each is placed at random, anew in every epoch. Splits are by photograph."""
    interpolation: Interpolation = "lanczos"
    """Resizing filter; all are antialiased when shrinking."""
    upscale: bool = False
    """Enlarge images that are smaller than asked for; otherwise they are an error."""
    horizontal_flip: bool = False
    """Mirror every second training image, chosen at random, left to right."""
    vertical_flip: bool = False
    """Mirror every second training image, chosen at random, top to bottom."""
    value_range: tuple[float, float] = (0.0, 1.0)
    """Values of float and signed-integer images that become −1 and 1; values outside are an
    error. 8-bit images always use (0, 255) and unsigned 16-bit images (0, 65535)."""
    image_field: str | None = None
    """Column with the image; by default the first of image type."""
    caption_field: str | None = None
    """Column with the caption; a dot reaches inside (``json.caption``). ``"txt"`` means the
    ``.txt`` files of a folder. Setting it makes captions required; by default they are used
    when found."""
    class_field: str | None = None
    """Column with the class, an integer or a string. ``"folder"`` means the subfolders. Setting
    it makes classes required; by default they are used when found."""
    class_names: tuple[str, ...] | None = None
    """Names that fix the number of each class; by default all names found, sorted."""
    require_captions: bool = False
    """Stop when an image has no caption."""
    require_classes: bool = False
    """Stop when an image has no class."""
    subset: str | None = None
    """Configuration name of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    holdout_fraction: float | None = None
    """Share of the images that only ``split="test"`` gives, chosen by a hash of their names, so
    that it does not change when images are added. By default the source's own test split where
    it has one, 0.1 for emoji and otherwise nothing."""
    split_seed: int = 0
    """Changes which images are held out."""
    seed: int = 0
    """Seed of the order and of random crops and flips; each depends on (seed, epoch, index)."""
    strict: bool = False
    """Stop at an unreadable image; otherwise it is named in a warning, counted and replaced by
    the next readable one."""
    streaming: bool = False
    """Read the source in order through a shuffle buffer, without random access."""
    shuffle_buffer: int = 1000
    """Images in the shuffle buffer of a stream."""
    num_workers: int = 0
    """Worker processes that decode; they change nothing in the result."""
    cache_megabytes: int = 1024
    """Memory for decoded images, shared out among the workers of one process; 0 for none."""
    emoji_skin_tones: bool = False
    """Include the skin-tone variants of emoji."""
    font_path: str | None = None
    """NotoColorEmoji.ttf; by default ``$FASTLDM_EMOJI_FONT``, then the usual font folders."""

    def __post_init__(self) -> None:
        self.value_range = tuple(self.value_range)  # type: ignore[assignment]
        if self.class_names is not None:
            self.class_names = tuple(self.class_names)
        self._check_types()
        self._check_values()
        self._check_combinations()

    def _check_types(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ConfigError(f"source must be a non-empty string, got {self.source!r}")
        _check_integer("resolution", self.resolution, 1)
        _check_integer("channels", self.channels, 1)
        _check_integer("shuffle_buffer", self.shuffle_buffer, 1)
        for name in ("num_workers", "cache_megabytes", "seed", "split_seed"):
            _check_integer(name, getattr(self, name), 0)
        if self.tile is not None:
            _check_integer("tile", self.tile, 1)

    def _check_values(self) -> None:
        for name, accepted in (("crop", Crop), ("interpolation", Interpolation)):
            if getattr(self, name) not in get_args(accepted):
                choices = ", ".join(map(repr, get_args(accepted)))
                raise ConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        fraction = self.holdout_fraction
        if fraction is not None and not 0 <= fraction < 1:
            raise ConfigError(f"holdout_fraction must be at least 0 and below 1, got {fraction!r}")
        if (
            len(self.value_range) != 2
            or not all(math.isfinite(value) for value in self.value_range)
            or self.value_range[0] >= self.value_range[1]
        ):
            raise ConfigError(
                f"value_range must be two finite numbers, low before high, got {self.value_range}"
            )
        if self.class_names is not None and len(set(self.class_names)) != len(self.class_names):
            raise ConfigError(f"class_names names a class twice: {self.class_names}")

    def _check_combinations(self) -> None:
        if self.tile is None:
            return
        if self.tile < self.resolution and not self.upscale:
            raise ConfigError(
                f"tile={self.tile} is smaller than resolution={self.resolution}; "
                "make it larger or set upscale=True"
            )
        if self.crop == "pad":
            raise ConfigError("tile cannot be combined with crop='pad'")
        if self.streams:
            raise ConfigError("tile needs random access: it cannot be combined with streaming")

    @property
    def streams(self) -> bool:
        """Whether the data set is read as a stream."""
        return self.streaming or is_webdataset(self.source)


def is_webdataset(source: str) -> bool:
    """Whether `source` names webdataset shards."""
    return source.startswith("webdataset:") or source.endswith((".tar", ".tar.gz", ".tgz"))


def _check_integer(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")
