"""What is wrong with a configuration, in one line that says what to do."""

import re
from importlib import import_module
from inspect import signature
from typing import Any

import yaml

from adamerge.errors import InputError, did_you_mean

#: A parser's message about an argument that it does not know.
UNKNOWN = re.compile(r"unrecognized arguments: (--[^\s=]+)")
_LONGEST = 600
#: Of a parser's nested report: where it is, and what else it tried.
_NOISE = re.compile(
    r"Parser key|Problem with given|Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Subclass types expect|a class path \(str\)|a dict with"
)
#: Where several things are said in one line.
_BREAK = re.compile(r"  - |Type typing\.Callable.* expects a function or a callable class: ")
_PLAIN = (
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", r"\1 is no \2: give the dotted path of one"),
    (r"Expected '(\S+)' to be a subclass of <class '(\w+)'>.*", r"\1 is no \2: give the dotted path of one"),
    (r"Expected a dot import path string: ?(.*)", r"'\1' is no dotted path of a class, such as modules.Entropy"),
    (r"Not a valid subclass of (\w+)", r"Expected the class_path of a \1, and init_args"),
    (r"(No module named '.+')", r"\1: it is neither installed nor in the working directory; is it spelt right?"),
    (r"Expected a <class '(?:\w+\.)*(\w+)'>", r"Expected \1"),
    (r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1"),
    (r"\.+ Got value: Namespace\(.*", ""),
    (r"\.? Got value:$", ", got ''"),
    (r"\.? Got value: (.*)", r", got \1"),
    (r"Unable to load config (.*)", r"\1 is neither a mapping of its keys nor a file of one"),
    (r"Call to compute_fn of link .* failed: (.*)", r"\1"),
)


def sentence(error: Exception) -> str:
    """What is wrong in one line: of a parser's nested report, where it happened and its innermost reason."""
    if isinstance(error, InputError):
        return " ".join(str(error).split("\n"))
    text = str(error) if not isinstance(error, yaml.MarkedYAMLError) else _of_yaml(error)
    lines = [line.strip(" -") for line in _BREAK.sub("\n", text).splitlines()]
    lines = [line for line in lines if line]
    if len(lines) == 1 or isinstance(error, yaml.YAMLError):
        return _shortened(_plain(" ".join(lines)))
    keys = [match[1] for line in lines if (match := re.fullmatch(r'Parser key "(.+)":', line))]
    classes = [match[1] for line in lines if (match := re.fullmatch(r"Problem with given class_path '(.+)':", line))]
    reasons = [line for line in lines if not _NOISE.match(line)]
    reasons = [line for line in reasons if not re.match("Expected a path|either not", line)] or reasons or lines
    where = ".".join(keys) + (f" ({classes[-1]})" if classes else "")
    reason = _reason(reasons, lines) + _near(reasons[0], classes)
    return _shortened(f"{where}: {reason}" if where else reason)


def got(value: Any) -> str:
    """What was found instead, shortened, as YAML would call it."""
    if value is None or isinstance(value, bool):
        return f"got {'null' if value is None else str(value).lower()}"
    kinds = ((dict, "the mapping "), (list, "the list "), (str, "the text "))
    kind = next((name for each, name in kinds if isinstance(value, each)), "")
    return f"got {kind}{_shortened(repr(value), 120)}"


def _reason(reasons: list[str], lines: list[str]) -> str:
    """The innermost reason; of types that none fits, all, and what was given."""
    types = [line for line in reasons if re.match(r"Expected a (?!dot)|Not a valid", line)]
    if reasons[0] not in types or lines[lines.index(reasons[0]) - 1] != "Errors:":
        return _plain(reasons[0])
    given = next((line for line in lines[lines.index(reasons[0]) :] if line.startswith("Given value:")), "")
    bare = [re.sub(", got .*", "", _plain(line)).removeprefix("Expected ") for line in types]
    expected = " or ".join(dict.fromkeys(bare))
    return _plain(f"Expected {expected}, got {given.removeprefix('Given value:').strip() or repr('')}")


def _near(reason: str, classes: list[str]) -> str:
    """What somebody who misspelt a name may have meant."""
    try:
        if classes and (match := re.match(r"Option '(.+)' is not accepted", reason)):
            module, _, name = classes[-1].rpartition(".")
            return did_you_mean(match[1], sorted(signature(getattr(import_module(module), name)).parameters))
        if match := re.fullmatch(r"module '(.+)' has no attribute '(.+)'", reason):
            return did_you_mean(match[2], [name for name in dir(import_module(match[1])) if name[:1].isupper()])
    except Exception:  # of a class that cannot be imported, or that says nothing of its arguments
        pass
    return ""


def _of_yaml(error: yaml.MarkedYAMLError) -> str:
    """What is wrong with YAML, and where."""
    mark = error.problem_mark or error.context_mark
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    why = "; indent with spaces, not tabs" if "cannot start any token" in str(error.problem) else ""
    return f"this is no YAML: {error.problem or error.context}{where}{why}"


def _plain(reason: str) -> str:
    for pattern, put in _PLAIN:
        reason = re.sub(pattern, put, reason)
    return reason


def _shortened(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"
