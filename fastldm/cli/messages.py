"""jsonargparse's errors in the words of the command line: option, what was given, what is accepted.

Its messages describe its own types, over many lines where an option may also be left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator
from typing import Any

_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "fields with their values",
    "list": "a list",
    "tuple": "a list",
    "NoneType": "null",
}
_KEY = re.compile(r'Parser key "([^"]+)"')
_EXPECTED = re.compile(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])")
_NO_FIELDS = re.compile(r"Expected a dot import path string|Unable to load config")
_GIVEN = re.compile(
    r"(?:Got value:|Given value:|dot import path string:|Unable to load config) "
    r"(.*?)(?= - | Given value type:|$)"
)
_UNKNOWN = (
    re.compile(r"unrecognized arguments: --([\w.-]+)"),
    re.compile(r"Group '([\w.]+)' does not accept option '(.+?)'"),
    re.compile(r"Option '(.+?)' is not accepted"),
)
_REFUSED = re.compile(r"Errors: - (.*?) - Expected a <class 'NoneType'>")


def plain_message(error: Exception, kind: type, files: list[str]) -> str:
    """One line on what is wrong with the options.

    Args:
        error: from jsonargparse.
        kind: the dataclass of all options, to suggest the name that was meant.
        files: the YAML files that were given.
    """
    text = " ".join(str(error).split())
    path = _path(text)
    unknown = next((found for pattern in _UNKNOWN if (found := pattern.search(text))), None)
    if unknown is not None:
        name = ".".join([*path, *unknown.groups()])
        close = difflib.get_close_matches(name, list(option_names(kind)), n=1, cutoff=0.75)
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"{name}: there is no such option{meant}"
    if text.startswith("Problems parsing config"):
        problem = text.partition(": ")[2].replace('in "<unicode string>", ', "")
        return f"{', '.join(files)}: not YAML: {problem}"
    if text.startswith("Unexpected config"):
        return f"{', '.join(files)}: expected options with their values, as in batch_size: 8"
    given = _GIVEN.search(text)
    if path and given:
        got = given[1].strip().strip("'")
        return f"{'.'.join(path)}: expected {_expected(text)}, got {got}"
    refused = _REFUSED.search(text)
    if refused is not None:
        return refused[1]
    if path:
        return _KEY.sub(r"\1", text)
    return re.sub(r"argument --([\w.]+)\S*:", r"\1:", text)


def option_names(kind: type) -> Iterator[str]:
    """The dotted name of every option of a dataclass and those in it."""
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        yield entry.name
        hint: Any = hints[entry.name]
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from (f"{entry.name}.{name}" for name in option_names(part))


def _path(text: str) -> list[str]:
    """The keys from the outermost to the one that is wrong."""
    path: list[str] = []
    for key in _KEY.findall(text):
        if path[-1:] != [key]:
            path.append(key)
    return path


def _expected(text: str) -> str:
    """The accepted types of the innermost key; that it may be null is said where it is alone."""
    innermost = text[text.rindex("Parser key") :]
    if _NO_FIELDS.search(innermost):
        return _TYPES["dict"]
    accepted = []
    for name, choices in _EXPECTED.findall(innermost):
        accepted.append(
            "one of " + re.sub(r"['\"]", "", choices) if choices else _TYPES.get(name, f"a {name}")
        )
    given_first = innermost.find("Got value:") < innermost.find("- Expected") or not accepted
    shown = accepted[:1] if given_first and "Got value:" in innermost else accepted
    return " or ".join(dict.fromkeys(shown)) or "another value"
