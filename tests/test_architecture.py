"""The house's own rules, read from the source: which way imports go, and what library code never does."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("adamerge", "modules", "trainers")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

#: trainers -> modules -> adamerge, never back; the library knows no training framework.
FORBIDDEN = {
    "adamerge": {"modules", "trainers", "benchmarks", "tests", "lightning", "pytorch_lightning"},
    "modules": {"trainers", "benchmarks", "tests", "lightning", "pytorch_lightning"},
    "trainers": {"benchmarks", "tests"},
}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere, functions included."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""
        elif isinstance(node, ast.Call) and name_of(node.func) in {"importlib.import_module", "__import__"}:
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def name_of(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Name, place and node of every call in the three packages."""
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Call):
                yield name_of(node.func), f"{path.relative_to(ROOT)}:{node.lineno}", node


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    back = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if path.relative_to(ROOT).parts[0] == package
        for name in imported(path)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert back == []


@pytest.mark.parametrize("name", NAMES)
def test_every_module_imports_and_says_what_it_is(name):
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert importlib.import_module(module).__doc__


def arguments(node: ast.AST) -> set[str]:
    """What a function takes, or a class to be made."""
    if isinstance(node, ast.ClassDef):
        return next((arguments(each) for each in node.body if getattr(each, "name", "") == "__init__"), set())
    if not isinstance(node, ast.FunctionDef):
        return set()
    given = node.args
    return {each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}


def test_docstrings_that_list_arguments_list_all_of_them():
    left_out = []
    for path in FILES:
        for node in nodes(path):
            listed = (ast.get_docstring(node) or "").partition("Args:")[2] if (takes := arguments(node)) else ""
            said = set(re.findall(r"\w+", " ".join(re.findall(r"^ {4}(\S.*?):", listed, re.MULTILINE))))
            left_out += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in takes - said if listed]
    assert not left_out


def test_library_code_does_not_print_or_run_what_it_reads():
    banned = {"print", "eval", "exec", "pickle.load", "pickle.loads", "joblib.load"}
    assert [f"{where}: {name}" for name, where, _ in calls() if name in banned] == []


def test_torch_files_are_loaded_as_weights_only():
    loads = [(where, call) for name, where, call in calls() if name == "torch.load"]
    assert loads, "this test looks for the wrong name"
    for where, call in loads:
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
        assert keywords.get("weights_only") is True, where


def test_library_code_names_no_path_of_one_machine():
    absolute = re.compile(r"/(?!proc/|dev/|sys/)[\w.]+/\w|[A-Z]:\\")  # what every Linux has is of no one machine
    strings = (
        (path, node)
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert [f"{path}:{node.lineno}" for path, node in strings if absolute.match(node.value)] == []
