"""Recipes: a merge described in a YAML file, and the job that it comes down to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from adamerge.adapters import is_adapter, open_expert
from adamerge.checkpoints import hub_folder, open_state
from adamerge.errors import InputError, did_you_mean
from adamerge.files import exists, expanded, nearest
from adamerge.fingerprint import BASE
from adamerge.merge import Step
from adamerge.plain_files import guard_yaml
from adamerge.rule_specs import build, build_rules
from adamerge.scales import Scale
from adamerge.task_vectors import TaskVectors
from adamerge.views import OnDevice, as_tied
from adamerge.vocabulary import Matched, Policy, fitted


@dataclass(frozen=True)
class Job:
    """What is to be merged and written, whatever it was read from: nothing has been read but headers.

    Attributes:
        task_vectors: over files.
        rules: as `adamerge.merge` takes them.
        scale: as `adamerge.merge` takes it.
        exclude: patterns of tensors that stay the base's.
        split_fused_qkv: as `adamerge.merge` takes it.
        dtype: of the merged floats; the base's if None.
        sources: folders or files that are read, by what they are ("base", an expert): a merge that is resumed must find
            them as they were.
        copy_from: the folder whose config, tokenizer and processor files go along; None for none.
        config: entries of config.json that the merge changes, `{"num_hidden_layers": 40}` say.
        recipe: what was asked for, as plain values: written beside the merge, and compared when one is resumed.
        notes: sentences that the user should read before the merge.
        shard_size: bytes of a file of weights, at most (one tensor may be larger).
    """

    task_vectors: TaskVectors
    rules: tuple[Step, ...]
    scale: Scale = 1.0
    exclude: tuple[str, ...] = ()
    split_fused_qkv: bool = False
    dtype: torch.dtype | None = None
    sources: Mapping[str, Path] = field(default_factory=dict)
    copy_from: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shard_size: int = 5 * 10**9


@dataclass
class Recipe:
    """A merge as its YAML file says it.

    Attributes:
        base: a folder or file, relative to the recipe's folder, or a Hub id.
        experts: task -> likewise, or the folder or Hub id of a LoRA adapter of the base.
        rules: in order; `Trim`, `{Trim: {keep: 0.2}}` or `{class_path: adamerge.rules.Trim, init_args: {keep: 0.2}}`.
            Paths that they take are relative to the recipe's folder, too.
        scale: a number, a list of them from the first block to the last, or either by patterns of names.
        exclude: patterns of tensors that stay the base's.
        dtype: of the merged floats; the base's by default.
        seed: for rules that draw at random and have none of their own.
        device: what computes.
        vocabulary: what to do with experts whose vocabulary is not the base's (`adamerge.vocabulary`).
        split_fused_qkv: merge queries, keys and values that are fused into one tensor as three.
        tokenizer: the expert whose tokenizer, config and processor files go along instead of the base's.
        shard_size: of a file of weights: bytes, or "5GB".
    """

    base: str
    experts: dict[str, str]
    rules: list[Any] = field(default_factory=lambda: ["TaskArithmetic"])
    scale: float | list[float] | dict[str, float | list[float]] = 1.0
    exclude: list[str] = field(default_factory=list)
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    seed: int | None = None
    device: str = "cpu"
    vocabulary: Policy = "refuse"
    split_fused_qkv: bool = False
    tokenizer: str = BASE
    shard_size: int | str = "5GB"


def read(path: Path) -> Job:
    """The job of a recipe, or of mergekit's kind of YAML, which is known by its `merge_method`.

    Raises:
        InputError: for a file that is no recipe, and for whatever does not fit in it: a key, a rule, an argument, a
            path, an expert.
    """
    try:
        text = path.read_text(encoding="utf-8")
        guard_yaml(text)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise InputError(f"there is no recipe {path}{nearest(path)}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is no recipe: expected keys such as base, experts and rules")
    if "merge_method" in values:
        from adamerge import mergekit  # which knows jobs

        return mergekit.read(path)
    try:
        return job(parse(values), path.parent)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse(values: Mapping[str, Any]) -> Recipe:
    """A recipe of plain values; raises InputError for an unknown or missing key, and for a value of another type."""
    known = [entry.name for entry in fields(Recipe)]
    for key in values:
        if key not in known:
            raise InputError(f"a recipe has no key {key!r}{did_you_mean(str(key), known)}")
    for key in ("base", "experts"):
        if key not in values:
            raise InputError(f"the recipe names no {key}: add the key {key!r}")
    experts = values["experts"] if isinstance(values["experts"], Mapping) else {}
    if odd := [name for name in experts if not isinstance(name, str) or name == BASE]:
        raise InputError(
            f"the recipe: an expert cannot be called {odd[0]!r}: give it another name, or put it in quotes"
        )
    recipe = build(Recipe, {key: value for key, value in values.items() if key != "rules"}, "the recipe")
    rules = values.get("rules", recipe.rules)  # no business of a parser that would build any class they name
    if not isinstance(rules, list):
        raise InputError(f"the recipe: expected rules to be a list, got {rules!r}")
    return replace(recipe, rules=rules)


def job(recipe: Recipe, folder: Path) -> Job:
    """What a recipe comes down to; `folder` is the one that paths are relative to."""
    if recipe.tokenizer not in (BASE, *recipe.experts):
        known = (BASE, *recipe.experts)
        raise InputError(f"tokenizer is {recipe.tokenizer!r}{did_you_mean(recipe.tokenizer, known)}")
    rules = build_rules(recipe.rules, recipe.seed, folder)
    size = parse_size(recipe.shard_size)
    sources = {BASE: recipe.base, **recipe.experts}
    paths = {name: locate(where, folder) for name, where in sources.items()}
    device = checked_device(recipe.device)
    if is_adapter(paths[recipe.tokenizer]):
        raise InputError(f"tokenizer is {recipe.tokenizer!r}, an adapter without a config of its own: leave it out")
    whole = open_state(paths[BASE])
    opened = {BASE: whole, **{task: open_expert(paths[task], whole) for task in recipe.experts}}
    states = as_tied(opened, paths)
    states, notes = fitted(states, paths, recipe.vocabulary)
    if isinstance(states[recipe.tokenizer], Matched):
        raise InputError(
            f"the merge has the base's vocabulary, and that of expert {recipe.tokenizer!r} is another: leave tokenizer "
            "out, or make that model the base"
        )
    if device.type != "cpu":
        states = {name: OnDevice(state, device) for name, state in states.items()}
    base = states.pop(BASE)
    companions = paths[recipe.tokenizer]
    return Job(
        task_vectors=TaskVectors.over(base, states),
        rules=tuple(rules),
        scale=recipe.scale,
        exclude=tuple(recipe.exclude),
        split_fused_qkv=recipe.split_fused_qkv,
        dtype=getattr(torch, recipe.dtype) if recipe.dtype else None,
        sources=paths,
        copy_from=companions if companions.is_dir() else None,
        recipe=asdict(recipe),
        notes=tuple(notes),
        shard_size=size,
    )


def locate(where: str, folder: Path) -> Path:
    """A path relative to a folder, or else the local copy of a Hub model."""
    path = folder / expanded(where)
    hub = where.count("/") == 1 and not exists(path.parent) and not path.suffix
    return hub_folder(where) if hub else path


def checked_device(name: str) -> torch.device:
    """The device of that name; raises InputError where there is none that computes."""
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # torch has no one kind for this
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used: {reason}") from error
    return device


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "200 MB" or a number."""
    text = str(size).upper().replace(" ", "").removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:], 1)
    try:
        count = int(float(text.rstrip("KMGT")) * factor)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise InputError(f"shard_size is {size!r}: expected bytes, or a size such as 5GB")
    return count
