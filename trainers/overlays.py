"""Overlays as strangers may have written them: read whole, or refused in a sentence that names the file and the key."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    get_loader,
    set_loader,
)

from adamerge.errors import InputError, did_you_mean
from adamerge.files import nearest
from adamerge.plain_files import MOST_TEXT, guard_yaml
from trainers.sentences import got, sentence

_YAML = get_loader("yaml")
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


class Overlay(ActionConfigFile):
    """`--config`: a YAML file, or YAML itself, that changes what it names.

    Raises:
        InputError: for one that is no mapping of the parser's keys, or whose values are not what these keys take.
    """

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = os.path.expanduser(values)
        is_path = os.path.exists(path)
        try:
            text = _text(Path(path)) if is_path else values
            guard_yaml(text)
            overlay = _YAML(text)
            if isinstance(overlay, str) and not is_path:
                raise InputError(f"there is no file {path}{nearest(path)}")
            _check_keys(overlay, self._keys(parser))
            super().__call__(parser, cfg, values, option_string)
        except (ArgumentError, TypeError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"{values if is_path else '--config'}: {sentence(error)}") from error

    def _keys(self, parser: Any) -> set[str]:
        """What an overlay may name, dotted: all but overlays themselves and what prints and ends."""
        commands = parser._subcommands_action.choices if parser._subcommands_action else ()
        names = {action.dest for action in parser._actions} - {self.dest, f"print_{self.dest}"}
        return {name for name in names if name.rpartition(".")[2] != "help"} | set(commands)


def guard_overlays() -> None:
    """Let the parser refuse an overlay that would grow without end."""
    set_loader("yaml", partial(_load_yaml, load=_YAML))


def _load_yaml(text: str, load: Callable[[str], Any]) -> Any:
    if "*" in text or len(text) > 1000:  # short values without aliases, of which there are many, are as they look
        guard_yaml(text)
    return load(text)


def _text(path: Path) -> str:
    """What an overlay says. Raises InputError for what is no text."""
    if path.is_dir():
        raise InputError("this is a folder: give a YAML file in it")
    if not path.is_file():
        raise InputError("this is no file: give one of YAML")
    if path.stat().st_size > 4 * MOST_TEXT:
        raise InputError(f"this file has more than {4 * MOST_TEXT} bytes, which is no overlay")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"it is no text in UTF-8: {error}; give a YAML file") from None
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror}") from None


def _check_keys(overlay: Any, known: set[str]) -> None:
    """Raise InputError unless all keys are known, mappings stand where they belong, and strings name classes."""
    groups: dict[str, list[str]] = {}
    for name in known:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    if overlay is None:
        raise InputError(f"it is empty: give a mapping of keys such as {_some(groups[''])}")
    left = [("", overlay)]
    while left:
        outer, values = left.pop()
        if isinstance(values, str) and outer:  # a file of these keys
            continue
        for key, value in _mapping(values, outer or "it", f"keys such as {_some(groups[outer])}").items():
            name = f"{outer}.{key}" if outer else str(key)
            if name and name in groups:
                left.append((name, value))
            elif name in known and isinstance(key, str):
                _check_spec(value, name)
            elif not any(name.startswith(f"{each}.") for each in known - groups.keys()):  # else its class knows it
                beside = known if "." in str(key) else {each.rpartition(".")[2] for each in groups[outer]}
                raise InputError(f"{name!r} is no key{did_you_mean(str(key), sorted(beside))}")


def _check_spec(value: Any, name: str) -> None:
    """Raise InputError for a class, anywhere within, that is not given as a dotted path and a mapping of arguments."""
    if isinstance(value, list | tuple):
        for place, each in enumerate(value):
            _check_spec(each, f"{name}[{place}]")
    if not isinstance(value, dict):
        return
    if "class_path" in value or "init_args" in value:
        path = value.get("class_path", "modules.Entropy")
        if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
            raise InputError(f"{name}.class_path must be a dotted path such as modules.Entropy, {got(path)}")
        for key in value:
            if key not in _OF_A_CLASS:
                raise InputError(f"{name} has class_path and init_args alone: move {key!r} into init_args")
        for part in _OF_A_CLASS[1:]:
            for key in _mapping(value.get(part, {}), f"{name}.{part}", "arguments by name"):
                if not isinstance(key, str) or not key or " " in key:
                    raise InputError(f"{name}.{part} has the key {key!r}, which is no name of an argument")
    for key, inner in value.items():
        _check_spec(inner, f"{name}.{key}")


def _mapping(value: Any, name: str, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a mapping of {what}, {got(value)}")
    return value


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:6])
