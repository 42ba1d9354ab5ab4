"""Our models and schedulers are instances of diffusers' classes in a program that uses diffusers.

Its pipelines and loaders ask ``issubclass(type(unet), diffusers.ModelMixin)`` before they save,
accept or adapt a component, and call methods of its mixins (LoRA, IP-Adapters, offloading).
fastldm never imports diffusers of its own accord: a class of ours names the one that it stands in
for, which becomes its last base when the class is first used in a program that has imported
diffusers. Everything that a class of ours defines itself stays in force. A saved pipeline names
``fastldm`` as the library of its components, which diffusers loads where fastldm is imported.
"""

from __future__ import annotations

import importlib
import logging
import sys

logger = logging.getLogger(__name__)

_JOINED: set[type] = set()

_SAVED_AND_LOADED = {
    "ModelMixin": ["save_pretrained", "from_pretrained"],
    "SchedulerMixin": ["save_pretrained", "from_pretrained"],
}


def join_diffusers(cls: type) -> None:
    """Give `cls` the base that its attribute ``diffusers_class`` names, once diffusers is there."""
    diffusers = sys.modules.get("diffusers")
    if diffusers is None:
        return
    for ours in cls.__mro__:
        if "diffusers_class" in ours.__dict__:
            break
    else:
        return
    if ours in _JOINED:
        return
    _JOINED.add(ours)
    name = ours.__dict__["diffusers_class"]
    try:
        theirs = getattr(diffusers, name)
        kept = tuple(base for base in ours.__bases__ if not issubclass(theirs, base))
        ours.__bases__ = (*kept, theirs)
        loading = importlib.import_module("diffusers.pipelines.pipeline_loading_utils")
        loading.LOADABLE_CLASSES["fastldm"] = _SAVED_AND_LOADED
    except Exception as error:  # an installation of diffusers may be broken in any way
        logger.warning("%s: not a diffusers.%s here (%s)", ours.__name__, name, error)
