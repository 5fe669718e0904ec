"""Rules as YAML has them, and the objects that they name."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from adamerge import rules
from adamerge.errors import InputError, did_you_mean
from adamerge.files import expanded
from adamerge.merge import Step
from adamerge.plain_files import check_classes
from adamerge.rules import Correction, Rule, Transform

T = TypeVar("T")


def build_rules(specs: Sequence[Any], seed: int | None = None, folder: Path | None = None) -> list[Step]:
    """Rules from `Name`, `{Name: {argument: value}}` or `{class_path: ..., init_args: ...}`.

    A rule that takes a `seed` and is given none takes this one. Rules that take other rules, as `rule` or `rules`, take
    them in the same forms. Paths among the arguments are relative to the folder: by default, the working directory.

    Raises:
        InputError: for an unknown rule or argument, with the nearest right one, and for a value of another type.
    """
    built = []
    for spec in specs:
        name, arguments = _name_and_arguments(spec)
        cls = _class(name)
        accepted = inspect.signature(cls).parameters
        for key in arguments:
            if key not in accepted:
                raise InputError(f"{cls.__name__} has no argument {key!r}{did_you_mean(str(key), accepted)}")
        if seed is not None and "seed" in accepted:
            arguments = {"seed": seed, **arguments}
        if isinstance(inner := arguments.get("rules"), list):
            arguments["rules"] = build_rules(inner, seed, folder)
        if (only := arguments.get("rule")) is not None:
            (arguments["rule"],) = build_rules([only], seed, folder)
        built.append(build(cls, arguments | _placed(cls, arguments, folder), cls.__name__))
    return built


def _placed(cls: type[Any], arguments: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """Those arguments that are paths, from the folder on; absolute ones, and `~`, stay where they are."""
    hints = get_type_hints(cls.__init__) if folder is not None else {}
    places = {key: value for key, value in arguments.items() if isinstance(value, str) and value}
    return {
        key: str(folder / expanded(value))
        for key, value in places.items()
        if folder is not None and Path in get_args(hints.get(key))
    }


def build(cls: type[T], arguments: Mapping[str, Any], what: str) -> T:
    """An object of plain arguments, checked against the types of its class."""
    for key, parameter in inspect.signature(cls).parameters.items():
        if key in arguments and arguments[key] is None and parameter.default is not None:
            raise InputError(f"{what}: {key!r} has no value; give one, or leave it out")
    check_classes(dict(arguments))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "it")
    try:
        parsed = parser.parse_object({"it": dict(arguments)})
    except ArgumentError as error:
        reason = " ".join(str(error).replace("<class '", "").replace("'>", "").split())
        raise InputError(f"{what}: {reason.replace('Parser key', '').replace('it.', '').strip()}") from error
    return cast(T, parser.instantiate(parsed).it) if arguments or "it" in parsed else cls()


def _name_and_arguments(spec: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, dict) and "class_path" in spec:
        if odd := [key for key in spec if key not in ("class_path", "init_args")]:
            raise InputError(f"a rule has class_path and init_args, and no {odd[0]!r}")
        spec = {str(spec["class_path"]): spec.get("init_args")}
    if isinstance(spec, dict) and len(spec) == 1:
        ((name, arguments),) = spec.items()
        if arguments is None or isinstance(arguments, dict):
            return str(name), dict(arguments or {})
    raise InputError(f"{spec!r} is no rule: expected Name, {{Name: {{argument: value}}}} or class_path and init_args")


def _class(path: str) -> type[Any]:
    """The rule of that name in `adamerge.rules`, or at that dotted path."""
    if not all(part.isidentifier() for part in path.split(".")):
        raise InputError(f"{path!r} is no rule: expected Name or package.module.Name")
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else rules
    except ImportError as error:
        raise InputError(f"rule {path}: {error}") from error
    found = getattr(module, name, None)
    if inspect.isclass(found) and issubclass(found, Transform | Rule | Correction) and not inspect.isabstract(found):
        return found
    known = (name for name, value in vars(module).items() if inspect.isclass(value) and not inspect.isabstract(value))
    known = (n for n in known if issubclass(getattr(module, n), Transform | Rule | Correction))
    raise InputError(f"there is no rule {path!r}{did_you_mean(name, sorted(known))}")
