"""Errors that a user can act on.

Each also derives from the builtin that callers would catch without knowing fastldm. The command
line prints any of them as one line and exits with status 2; every other exception is a bug and
keeps its traceback.
"""


class FastLDMError(Exception):
    """Base of every error that fastldm raises about its input or surroundings."""


class ConfigError(FastLDMError, ValueError):
    """A configuration key or value is unknown, of the wrong type or inconsistent."""


class CheckpointError(FastLDMError, ValueError):
    """A weights file or model folder is damaged, unsafe or belongs to another architecture."""


class DataError(FastLDMError, ValueError):
    """A data set, image, caption or label cannot be used."""


class NothingHeldOutError(DataError):
    """Held-out images are asked for, and the data set has none."""


class BackendUnavailableError(FastLDMError, RuntimeError):
    """An operator backend was asked for by name and cannot serve the call."""


class TrainingError(FastLDMError, RuntimeError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """A loss became NaN or infinite; the last good checkpoint is kept."""
