"""Config and tokenizer of a merge by a mergekit file."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge.errors import InputError

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def tokenizer(
    source: str | None, home: str, files: Mapping[str, Path], locate: Callable[[str], Path]
) -> tuple[Path, tuple[str, ...]]:
    """The folder that the tokenizer comes from, and notes.

    Args:
        source: a model, "base" or "union"; None where the file does not say.
        home: the base model, or the first if there is none.
        files: of all models that are merged.
        locate: finds a model.

    Raises:
        InputError: where the models' vocabularies do not allow what is asked for.
    """
    folder = files[home] if source in (None, "base", "union") else files.get(str(source)) or locate(str(source))
    own = vocabulary(folder)
    words = {model: vocabulary(where) for model, where in files.items()}
    odd = [model for model, found in words.items() if None not in (found, own) and found != own]
    if not odd:
        return folder, ()
    if source is None:
        return folder, (
            f"{odd[0]} has another vocabulary than {home}: embeddings are merged row by row, whatever the tokens",
        )
    other = home if source in ("base", "union") else source
    raise InputError(
        f"tokenizer {source!r} is not supported: {odd[0]} has another vocabulary than {other}, and rows of embeddings "
        "are not matched by token; leave it out to merge row by row"
    )


def vocabulary(folder: Path) -> dict[str, int] | bytes | None:
    """Tokens and their rows, or the bytes of a file that holds them, from a model's folder; None where it has none."""
    if isinstance(loaded := _json(folder / "tokenizer.json"), dict):
        tokens = loaded.get("model", {}).get("vocab", {})
        if isinstance(tokens, list):  # of a unigram model, with scores
            tokens = {token: row for row, (token, _) in enumerate(tokens)}
        return {**tokens, **{added["content"]: added["id"] for added in loaded.get("added_tokens", ())}}
    files = (folder / name for name in ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model"))
    return next((path.read_bytes() for path in files if path.is_file()), None)


def changes(
    stack: Sequence[tuple[str, int]] | None, home: str, files: Mapping[str, Path], companions: Path
) -> dict[str, Any]:
    """What the merge changes in the config.json of the folder that the tokenizer comes from.

    The config is that of `home`. Stacking changes the number of layers in it, and lists with an entry for each layer.

    Args:
        stack: model and index of every layer of the merge; None where models are merged whole.
        home: the base model, or the first if there is none.
        files: of all models that are merged.
        companions: the folder.

    Raises:
        InputError: for models to stack that have no config, or of which only some tie their embeddings.
    """
    config = _json(files[home] / "config.json")
    if not isinstance(config, dict):
        if stack:
            raise InputError(f"{files[home]} has no config.json that can be read, and slices change the layers in it")
        return {}
    if stack:
        config = _stacked(stack, home, files)
    before = _json(companions / "config.json")
    before = before if isinstance(before, dict) else {}
    return {key: value for key, value in config.items() if key not in before or before[key] != value}


def _stacked(stack: Sequence[tuple[str, int]], home: str, files: Mapping[str, Path]) -> dict[str, Any]:
    configs = {model: _json(files[model] / "config.json") for model in dict.fromkeys((home, *(m for m, _ in stack)))}
    tied = {model: config.get("tie_word_embeddings", False) for model, config in configs.items() if config}
    if len(set(tied.values())) > 1:
        raise InputError(f"only some of {', '.join(tied)} tie input and output embeddings: they cannot be stacked")
    top = configs[home]
    inside = "text_config" if not any(key in top for key in _COUNTS) and "text_config" in top else None
    texts = {model: (config or {}).get(inside, {}) if inside else config or {} for model, config in configs.items()}
    count = _count(texts[home])
    text = dict(texts[home])
    for key, value in texts[home].items():
        if key in _COUNTS:
            text[key] = len(stack)
        elif isinstance(value, list) and "layer" in key and len(value) == count:
            # Where a model does not have it, transformers fills it in from the rest of the config.
            everywhere = all(len(other.get(key) or ()) == _count(other) for other in texts.values())
            text[key] = [texts[model][key][index] for model, index in stack] if everywhere else None
    return {**top, inside: text} if inside else text


def _count(config: Mapping[str, Any]) -> int | None:
    return next((config[key] for key in _COUNTS if key in config), None)


def _json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
