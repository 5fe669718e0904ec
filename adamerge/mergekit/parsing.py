"""Reads a mergekit file and checks every key of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import get_loader

from adamerge.errors import InputError, did_you_mean
from adamerge.files import exists, expanded
from adamerge.mergekit.methods import METHODS
from adamerge.mergekit.settings import Condition, Parameters, Setting, Settings, Slice, Source
from adamerge.plain_files import guard_yaml

_KEYS = {
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
}  # fmt: skip
#: Keys that users write and mergekit has no use for.
_UNUSED = {"name", "random_seed"}
_IDLE = {
    "int8_mask": "masks take one byte per entry anyway",
    "eps": "tensors are divided by their own lengths, and those of length 0 have no direction",
}
_REFUSED = {
    "modules": "models of several towers are merged whole here: list them under `models`",
    "experts": "mixtures of experts are not built here",
    "gate_mode": "mixtures of experts are not built here",
    "adapters": "adapters are not merged here: merge each into its model first",
}
_SHARED = {name for method in METHODS.values() for name in method.shared}
_OWN = {name for method in METHODS.values() for name in method.own}
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


def parse(path: str | Path) -> Settings:
    """Read a mergekit file.

    Raises:
        InputError: for a file that is no YAML mapping, an unknown key (with the nearest known one), and whatever is not
            supported.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    try:
        guard_yaml(text)
        loaded = get_loader("yaml")(text)
    except Exception as error:  # whatever the parser of YAML raises
        raise InputError(f"{path} is not one YAML document: {error}") from error
    return _Parser(str(path)).settings(loaded)


class _Parser:
    """Collects notes on the way; errors begin with the file's name."""

    def __init__(self, path: str) -> None:
        self.path, self.notes, self.method = path, list[str](), ""

    def settings(self, loaded: Any) -> Settings:
        for key, why in _REFUSED.items():
            if isinstance(loaded, Mapping) and key in loaded:
                raise self.error(f"`{key}` is not supported: {why}")
        if isinstance(loaded, Mapping) and (lost := [key for key in loaded if key in _SHARED | _OWN]):
            raise self.error(f"{lost[0]} belongs under `parameters`: mergekit does not see it where it is")
        file = self.mapping(loaded, "", _KEYS | _UNUSED)
        self.notes += [f"{key} has no effect, as in mergekit" for key in file if key in _UNUSED]
        self.method = file.get("merge_method", "")
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise self.error(
                f"merge_method {self.method!r} is not supported{did_you_mean(str(self.method), sorted(METHODS))}"
            )
        if ("models" in file) == ("slices" in file):
            raise self.error("expected either `models` or `slices`")
        base = self.model(file["base_model"], "base_model") if file.get("base_model") else None
        if base is None and METHODS[self.method].base == "needed" and "models" in file:
            raise self.error(f"{self.method} needs a `base_model`")
        if "models" in file:
            sources = tuple(self.source(s, f"models[{i}]", False) for i, s in enumerate(self.list(file, "models", "")))
            slices: tuple[Slice, ...] = (Slice(sources, base),)
        else:
            slices = tuple(self.slice(s, f"slices[{i}]", base) for i, s in enumerate(self.list(file, "slices", "")))
        return Settings(
            method=self.method,
            slices=slices,
            parameters=self.parameters(file.get("parameters"), "parameters", _SHARED | _OWN),
            dtype=self.dtype(file),
            tokenizer=self.tokenizer(file),
            notes=tuple(dict.fromkeys(self.notes)),
            file=file,
        )

    def slice(self, loaded: Any, where: str, base: str | None) -> Slice:
        found = self.mapping(loaded, where, {"sources", "base_model", "parameters"})
        own = self.model(found["base_model"], f"{where}.base_model") if found.get("base_model") else base
        if own is None and METHODS[self.method].base == "needed":
            raise self.error(f"{self.method} needs a `base_model`")
        listed = enumerate(self.list(found, "sources", where))
        sources = tuple(self.source(source, f"{where}.sources[{i}]", True) for i, source in listed)
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            raise self.error(f"the sources of {where} have different numbers of layers: {sorted(lengths)}")
        return Slice(sources, own, self.parameters(found.get("parameters"), f"{where}.parameters", _SHARED | _OWN))

    def source(self, loaded: Any, where: str, layered: bool) -> Source:
        found = self.mapping(loaded, where, {"model", "parameters"} | ({"layer_range"} if layered else set()))
        if "model" not in found:
            raise self.error(f"{where} names no `model`")
        layers = self.layers(found.get("layer_range"), where) if layered else None
        parameters = self.parameters(found.get("parameters"), f"{where}.parameters", _OWN)
        return Source(self.model(found["model"], where), layers, parameters)

    def layers(self, loaded: Any, where: str) -> tuple[int, int]:
        whole = isinstance(loaded, list) and len(loaded) == 2 and all(type(number) is int for number in loaded)
        if not whole or not 0 <= loaded[0] <= loaded[1]:
            raise self.error(f"{where}.layer_range: expected [start, stop] with 0 <= start <= stop, got {loaded}")
        return loaded[0], loaded[1]

    def parameters(self, loaded: Any, where: str, heard: set[str]) -> Parameters:
        found = self.mapping(loaded or {}, where, _SHARED | _OWN)
        how, kept = METHODS[self.method], {}
        for name, value in found.items():
            if name in _IDLE:
                self.notes.append(f"{name} has no effect: {_IDLE[name]}")
            elif name not in {*how.shared, *how.own}:
                self.notes.append(f"{name} has no effect: {self.method} does not use it")
            elif name not in heard:
                self.notes.append(f"{name} has no effect under {where}: it belongs to the `parameters` of the merge")
            else:
                kept[name] = self.setting(value, f"{where}.{name}")
        return kept

    def setting(self, loaded: Any, where: str) -> Setting:
        if isinstance(loaded, Mapping):
            loaded = [loaded]
        if not (isinstance(loaded, list) and any(isinstance(entry, Mapping) for entry in loaded)):
            return self.gradient(loaded, where)
        conditions = []
        for i, entry in enumerate(loaded):
            found = self.mapping(entry, f"{where}[{i}]", {"filter", "value"})
            name = None if found.get("filter") in (None, "*") else str(found["filter"])
            conditions.append(Condition(self.gradient(found.get("value"), f"{where}[{i}].value"), name))
        return tuple(conditions)

    def gradient(self, loaded: Any, where: str) -> float | tuple[float, ...]:
        if not isinstance(loaded, list):
            return self.number(loaded, where)
        if not loaded:
            raise self.error(f"{where} is an empty list")
        return tuple(self.number(entry, where) for entry in loaded)

    def number(self, loaded: Any, where: str) -> float:
        try:
            number = float(loaded)
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"{where}: expected a number, got {loaded!r}") from None
        if not abs(number) < float("inf"):
            raise self.error(f"{where}: expected a finite number, got {loaded!r}")
        return number

    def model(self, loaded: Any, where: str) -> str:
        if not isinstance(loaded, str) or not loaded:
            raise self.error(f"{where}: expected a folder or Hub id as the model, got {loaded!r}")
        if not exists(expanded(loaded)):
            if "" in (parts := loaded.split("+")) or len(parts) > 2:
                raise self.error(f"{where}: {loaded!r} is no model+adapter: expected one adapter after the model")
            if "@" in loaded:
                raise self.error(f"{where}: {loaded!r} names a revision, which is not supported; download it first")
        return loaded

    def dtype(self, file: Mapping[str, Any]) -> torch.dtype | None:
        for key in ("dtype", "out_dtype"):
            if (name := file.get(key)) is not None and (not isinstance(name, str) or name not in _DTYPES):
                raise self.error(f"{key} {name!r} is not supported{did_you_mean(str(name), sorted(_DTYPES))}")
        name = file.get("out_dtype") or file.get("dtype")
        return _DTYPES[name] if name else None

    def tokenizer(self, file: Mapping[str, Any]) -> str | None:
        if file.get("chat_template"):
            self.notes.append("chat_template has no effect: the tokenizer keeps its own")
        if file.get("tokenizer_source") and file.get("tokenizer"):
            raise self.error("expected either `tokenizer_source` or `tokenizer`")
        source = file.get("tokenizer_source")
        if file.get("tokenizer"):
            found = self.mapping(file["tokenizer"], "tokenizer", {"source", "tokens", "pad_to_multiple_of"})
            for key in ("tokens", "pad_to_multiple_of"):
                if found.get(key):
                    raise self.error(f"tokenizer.{key} is not supported: tokens are neither added nor moved here")
            source = found.get("source", "union")
        return self.model(source, "tokenizer").removeprefix("model:") if source else None

    def mapping(self, loaded: Any, where: str, known: Iterable[str]) -> dict[str, Any]:
        if not isinstance(loaded, Mapping):
            raise self.error(f"{where or 'the file'}: expected a mapping, got {loaded!r}")
        for key in loaded:
            if key not in known:
                inside = f" in {where}" if where else ""
                raise self.error(f"unknown key {key!r}{inside}{did_you_mean(str(key), sorted(known))}")
        return dict(loaded)

    def list(self, loaded: Mapping[str, Any], key: str, where: str) -> list[Any]:
        if not isinstance(loaded.get(key), list) or not loaded[key]:
            raise self.error(f"{where + '.' if where else ''}{key}: expected a list")
        found: list[Any] = loaded[key]
        return found

    def error(self, message: str) -> InputError:
        return InputError(f"{self.path}: {message}")
