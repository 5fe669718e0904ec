"""JSON and YAML as strangers may have written them: what is too deep or too large when written out is refused.

A few hundred bytes of YAML whose aliases name aliases are gigabytes once somebody copies or prints them.
"""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml

from adamerge.errors import InputError

_MOST = 50_000  # values, with those behind aliases as often as they are named
_DEEPEST = 100
#: Characters of YAML that are read.
MOST_TEXT = 1_000_000
_BUILT = (torch.nn.Module, torch.utils.data.Dataset, torch.optim.Optimizer)


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises OSError, or ValueError for a file that is none or nested without end."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError for text that is none, nested without end, or of numbers without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def guard_yaml(text: str) -> None:
    """Raise yaml.YAMLError for text that is no YAML, that gives a key twice, or that is too deep or too large once
    aliases are written out.
    """
    if len(text) > MOST_TEXT:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {MOST_TEXT:,}")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested without end") from None
    left, count = [(node, 0)], 0
    while left:
        node, depth = left.pop()
        count += 1
        if depth > _DEEPEST:
            raise yaml.YAMLError("it is nested without end")
        if count + len(left) > _MOST:
            raise yaml.YAMLError(f"with its aliases written out, it has more than {_MOST} values")
        _check_once(node)
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        left += [(each, depth + 1) for part in inner for each in (part if isinstance(part, tuple) else (part,))]


def _check_once(node: yaml.Node | None) -> None:
    """Raise yaml.YAMLError for a mapping that gives a key twice: YAML's loaders drop the first without a word."""
    seen: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.YAMLError(f"the key {key.value!r} is given twice, in lines {seen[key.value]} and {line}")
            seen[key.value] = line


def check_classes(values: Any) -> None:
    """Raise InputError for a `class_path`, anywhere in these values, that would call something instead of building it.

    Classes are checked against the expected one by whoever builds them; of functions, those that say that they return a
    module, a data set or an optimiser may stand for a class.
    """
    left = [values]
    while left:
        value = left.pop()
        held = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else None
        if held is None:
            left += value if isinstance(value, list | tuple) else ()
            continue
        if isinstance(path := held.get("class_path"), str) and "." in path and not _builds(path):
            raise InputError(f"class_path {path!r} is no class: nothing else is built or called")
        if isinstance(value, Mapping) or type(value).__name__ == "Namespace":
            left += held.values()


def _builds(path: str) -> bool:
    """Whether what a dotted path names is a class, or a function that says it returns one of the usual kinds."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception:  # whatever importing it raises: who builds it will say so
        return True
    if inspect.isclass(found):
        return True
    try:
        returned = get_type_hints(found).get("return")
    except Exception:  # annotations that cannot be resolved
        return False
    return inspect.isclass(returned) and issubclass(returned, _BUILT)
