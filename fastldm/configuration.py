"""Configurations that are recorded by the constructor and stored as JSON, as diffusers does.

A class derives from `ConfigMixin` and decorates ``__init__`` with `register_to_config`; its
``config`` then holds every constructor argument, `save_config` writes them and `from_config`
builds the object again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastldm.diffusers_classes import join_diffusers
from fastldm.errors import ConfigError
from fastldm.storage import read_json, write_json

_Config = TypeVar("_Config", bound="ConfigMixin")
_Init = TypeVar("_Init", bound=Callable[..., None])


_SETTABLE = frozenset({"encoder_hid_dim_type"})


class FrozenConfig(dict[str, Any]):
    """A read-only dict whose entries are also attributes.

    diffusers' pipelines note a loaded IP-Adapter in one attribute, which they may; the entry of
    that name, and what is saved, stay as they are.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no field {name!r}") from None

    def _read_only(self, *_: Any, **__: Any) -> Any:
        raise TypeError("a config is read-only; build the object anew with from_config(…)")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SETTABLE:
            self._read_only()
        super().__setattr__(name, value)

    __setitem__ = __delitem__ = _read_only
    __delattr__ = update = pop = popitem = setdefault = clear = _read_only

    def __reduce__(self) -> tuple[Any, ...]:
        return (FrozenConfig, (dict(self),))

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenConfig:
        return FrozenConfig(dict(self))


def register_to_config(init: _Init) -> _Init:
    """Decorate ``__init__`` so that its arguments, defaults included, become ``self.config``."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: ConfigMixin, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = {name: _plain(value) for name, value in list(bound.arguments.items())[1:]}
        self.register_config(**values)
        init(self, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _plain(value: Any) -> Any:
    """Tuples become lists, as a round trip through JSON would make them."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def read_config_file(path: Path) -> dict[str, Any]:
    """The fields in a config file.

    Raises:
        CheckpointError: there is no such file, or it is not JSON.
        ConfigError: it holds something other than fields.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object of fields, got {type(fields).__name__}")
    return fields


class ConfigMixin:
    """Gives a class ``config``, `from_config`, `load_config` and `save_config`."""

    config_name: ClassVar[str] = "config.json"
    ignored_config_keys: ClassVar[frozenset[str]] = frozenset()
    """Fields of diffusers' config files that have no effect on the result and may be dropped."""
    extension_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that diffusers does not know; at their defaults, both classes do the same."""

    @property
    def config(self) -> FrozenConfig:
        """The constructor arguments of this object, read-only."""
        return self.__dict__.get("_config", FrozenConfig())

    def register_config(self, **values: Any) -> None:
        """Record `values` beside those already in ``config``."""
        join_diffusers(type(self))
        self.__dict__["_config"] = FrozenConfig({**self.config, **values})

    def register_to_config(self, **values: Any) -> None:
        """Change fields of ``config``, as diffusers' training scripts do; nothing is rebuilt."""
        self.register_config(**values)

    @property
    def _internal_dict(self) -> FrozenConfig:
        """What diffusers' pipelines assign where they correct an old config."""
        return self.config

    @_internal_dict.setter
    def _internal_dict(self, config: Mapping[str, Any]) -> None:
        self.register_to_config(**config)

    @classmethod
    def from_config(cls: type[_Config], config: Mapping[str, Any], **overrides: Any) -> _Config:
        """Build the object from a config dict; `overrides` replace single fields.

        Keys that start with ``_`` (such as ``_class_name``) are metadata and are skipped.

        Raises:
            ConfigError: a field is not one of the constructor's, or has a value it refuses.
        """
        values = {
            name: value
            for name, value in {**config, **overrides}.items()
            if not name.startswith("_") and name not in cls.ignored_config_keys
        }
        accepted = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        unknown = sorted(set(values) - set(accepted))
        if unknown:
            raise ConfigError(
                f"{cls.__name__} has no config field {', '.join(map(repr, unknown))}; "
                f"accepted: {', '.join(accepted)}"
            )
        return cls(**values)

    @classmethod
    def load_config(cls, folder: str | Path, subfolder: str | None = None) -> dict[str, Any]:
        """Read the config file of a saved folder as a dict.

        Raises:
            CheckpointError: there is no such file, or it is not JSON.
            ConfigError: it holds something other than fields.
        """
        return read_config_file(Path(folder, subfolder or "", cls.config_name))

    def stored_config(self) -> dict[str, Any]:
        """What a config file holds: the class's name and the fields.

        Fields that diffusers does not know are left out at their defaults, so that it reads the
        file without a warning.
        """
        defaults = inspect.signature(type(self).__init__).parameters
        fields = {
            name: value
            for name, value in self.config.items()
            if name not in self.extension_fields or value != _plain(defaults[name].default)
        }
        return {"_class_name": type(self).__name__, **fields}

    def save_config(self, folder: str | Path) -> None:
        """Write the config file into `folder`, which is made if it is missing."""
        write_json(Path(folder, self.config_name), self.stored_config())
