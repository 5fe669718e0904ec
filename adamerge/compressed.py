"""Files of compressed experts: what tells each of them from the base, in the form in which it is held."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adamerge import fingerprint
from adamerge.checkpoints import State, meta, open_state
from adamerge.deltas import AnyDeltas, Deltas, LowRank, Sparse
from adamerge.errors import InputError
from adamerge.files import replacing
from adamerge.packed import Packed
from adamerge.plain_files import parse_json
from adamerge.stored import Stored
from adamerge.task_vectors import TaskVectors
from adamerge.tensor_files import SafetensorsState

#: The entry of a file's metadata that says what its tensors are.
ENTRY = "adamerge.compressed"
_FORMS: dict[str, Callable[..., Deltas]] = {form.__name__: form for form in (LowRank, Packed, Sparse, Stored)}
_KINDS = {"tasks": list, "tied": dict, "fingerprints": dict, "base": str, "forms": dict}


@torch.no_grad()
def save_compressed(task_vectors: TaskVectors, path: str | Path) -> Path:
    """Write the deltas of all experts to one safetensors file: bits stay bits, factors stay factors.

    The base is not in it, only its fingerprint; tensors that no expert changed take no room. Experts come back bit for
    bit with `open_compressed`. `transform(task_vectors, [Emr()])` and its like are what makes files small.

    Raises:
        InputError: for a path that is no `.safetensors` file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: compressed experts are written to a .safetensors file")
    tensors: dict[str, Tensor] = {}
    forms: dict[str, dict[str, Any]] = {}
    for name in task_vectors.deltas:
        deltas = task_vectors.deltas[name]
        if bool(deltas.any()):
            parts, forms[name] = _parts(deltas)
            tensors |= {f"{name}|{part}": _own(tensor) for part, tensor in parts.items()}
    entry = {
        "tasks": task_vectors.tasks,
        "tied": task_vectors.tied,
        "fingerprints": task_vectors.fingerprints,
        "base": fingerprint.fingerprint(task_vectors.base),  # a transform may have put another in its place
        "forms": forms,
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", ENTRY: json.dumps(entry)})
    return path


def open_compressed(path: str | Path, base: State | str | Path) -> TaskVectors:
    """The task vectors that `save_compressed` wrote, for the same base, in memory and as compressed as they were.

    `open_compressed(path, base).expert(task)` is one expert's state dict.

    Args:
        path: the file.
        base: a state dict, or whatever `adamerge.checkpoints.open_state` takes.

    Raises:
        InputError: for a file of another kind, and for another base than the one that the experts were saved from.
    """
    state = open_state(base) if isinstance(base, str | Path) else base
    entry = _entry(path)
    if (found := fingerprint.fingerprint(state)) != entry["base"]:
        short = fingerprint.SHORT
        raise InputError(
            f"{path} holds experts of another base: its fingerprint is {entry['base'][:short]}, that of the base given "
            f"is {found[:short]}"
        )
    tensors, tasks, tied = open_state(path), tuple(entry["tasks"]), entry["tied"]
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in entry["forms"]}
    for key in tensors:
        name, _, part = key.rpartition("|")
        parts.setdefault(name, {})[part] = tensors[key]
    if odd := sorted(parts.keys() - set(state)):
        raise _damaged(path, f"the base has no {odd[0]}")
    deltas: dict[str, AnyDeltas] = {}
    for name in state:
        like = meta(state, name)
        if name in parts:
            try:
                deltas[name] = _whole(parts[name], entry["forms"][name])
                shape = list(deltas[name].shape)
            except Exception as error:  # parts that do not fit together can raise anything
                raise _damaged(path, f"{name} cannot be put together ({type(error).__name__}: {error})") from error
            if shape != [len(tasks), *like.shape]:
                raise _damaged(path, f"{name} is of shape {shape}, expected {[len(tasks), *like.shape]}")
        elif like.is_floating_point() and name not in tied:
            dtype = torch.promote_types(torch.float32, like.dtype)
            deltas[name] = torch.zeros((), dtype=dtype).expand(len(tasks), *like.shape)
    return TaskVectors(state, deltas, tasks, tied, entry["fingerprints"])


def _parts(deltas: AnyDeltas) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that deltas consist of, and the plain values beside them."""
    if not isinstance(deltas, Deltas):
        return {"dense": deltas}, {"form": "dense"}
    arguments = {name: getattr(deltas, name) for name in inspect.signature(type(deltas)).parameters}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    plain = {name: list(value) for name, value in arguments.items() if isinstance(value, tuple)}
    return tensors, {"form": type(deltas).__name__, **plain}


def _own(tensor: Tensor) -> Tensor:
    """In memory of its own, as the format wants it: the scales of many tensors may be one vector."""
    return tensor.clone() if tensor.dim() == 1 else tensor.contiguous()


def _whole(tensors: dict[str, Tensor], form: dict[str, Any]) -> AnyDeltas:
    """The deltas again."""
    if form["form"] == "dense":
        return tensors["dense"]
    plain: dict[str, Any] = {name: torch.Size(value) for name, value in form.items() if name != "form"}
    return _FORMS[form["form"]](**tensors, **plain)


def _entry(path: str | Path) -> dict[str, Any]:
    """What the metadata of a file say."""
    found: dict[str, str] = {}
    if isinstance(open_state(path), SafetensorsState) and Path(path).is_file():
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    if ENTRY not in found:
        raise InputError(f"{path} holds no compressed experts: it was not written by save_compressed")
    try:
        entry = parse_json(found[ENTRY])
        whole = isinstance(entry, dict) and all(isinstance(entry[key], kind) for key, kind in _KINDS.items())
        texts = [*entry["tasks"], *entry["tied"].items(), *entry["fingerprints"].items()] if whole else [None]
    except (ValueError, LookupError) as error:
        raise _damaged(path, "what it says of its tensors cannot be read") from error
    if not all(isinstance(text, str) or (isinstance(text, tuple) and isinstance(text[1], str)) for text in texts):
        raise _damaged(path, "what it says of its tensors is of other kinds")
    return entry


def _damaged(path: str | Path, why: str) -> InputError:
    return InputError(f"{path} holds no compressed experts that are whole: {why}")
