"""Read weights from whatever they come in, tensor by tensor where the format allows, never unpickling code.

`open_state(where)` takes

- a `.safetensors` file, or a folder with `model.safetensors` or sharded files and their index (a Hugging Face folder);
- a `.pt`, `.pth`, `.bin` or `.ckpt` file of tensors, among them Lightning checkpoints (`state_dict` inside);
- a Hub id such as `openai/clip-vit-base-patch32`, downloaded once into the Hub's own cache.
"""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.fetching import persistently
from adamerge.files import exists
from adamerge.plain_files import read_json
from adamerge.tensor_files import SafetensorsState, names_in

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
_LONGEST = 255  # characters of a file's name
#: What goes along with weights: configs, tokenizers, templates, and the code of models that bring their own.
_BESIDE = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")

State: TypeAlias = Mapping[str, Tensor]

#: L [m, r] and R [r, n]: a change L R of a tensor [m, …] with n elements a row.
Factors: TypeAlias = tuple[Tensor, Tensor]


def meta(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Shape and dtype of one tensor, without reading its bytes where the state is lazy."""
    return state.meta(name) if hasattr(state, "meta") else state[name]


def rows_of(state: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    """Some rows of one tensor (of its first axis), read alone where the state is lazy."""
    return state.rows(name, rows) if hasattr(state, "rows") else state[name][rows]


def factors_of(state: Mapping[str, Tensor], name: str, rows: slice | None = None) -> Factors | None:
    """What one tensor (or some rows of it) differs by from the base's, where the state keeps that as factors."""
    return state.factors(name, rows) if hasattr(state, "factors") else None


def open_state(where: str | Path, prefix: str = "") -> Mapping[str, Tensor]:
    """Open a checkpoint as a mapping from names to tensors (lazy for safetensors, memory-mapped for torch files).

    `prefix` keeps the tensors under one submodule and drops the prefix from their names (`"backbone."`).
    Raises InputError for a file that is missing, truncated, of an unknown format, or that would run code if loaded.
    """
    return within(_open(where), prefix, where)


def within(state: Mapping[str, Tensor], prefix: str, where: str | Path) -> Mapping[str, Tensor]:
    """The tensors under a prefix, without it; `where` the state is from is for the error if there are none."""
    if not prefix:
        return state
    inner = {name[len(prefix) :]: name for name in state if name.startswith(prefix)}
    if not inner:
        raise InputError(f"{where} has no tensor under {prefix!r}; its names begin with {_first(state)}")
    return {new: state[old] for new, old in inner.items()} if isinstance(state, dict) else Renamed(state, inner)


class Renamed(Mapping[str, Tensor]):
    """A view of another state under other names: `names` maps new to old."""

    def __init__(self, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._state, self._names = state, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def rows(self, name: str, rows: slice) -> Tensor:
        """As `rows_of(state, name, rows)`, under the new name."""
        return rows_of(self._state, self._names[name], rows)

    def factors(self, name: str, rows: slice | None = None) -> Factors | None:
        """As `factors_of(state, name, rows)`, under the new name."""
        return factors_of(self._state, self._names[name], rows)

    def meta(self, name: str) -> Tensor:
        """As `meta(state, name)`, under the new name."""
        return meta(self._state, self._names[name])


def read_extra(where: str | Path, key: str) -> Any:
    """One non-tensor entry of a Lightning or torch checkpoint (`None` where there is none)."""
    path = Path(where)
    return load_torch(path).get(key) if path.suffix in _TORCH_SUFFIXES else None


def hub_folder(name: str) -> Path:
    """The local folder of a Hub model, downloaded if the Hub's cache does not hold it yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetched(weights: str) -> Path:
        return Path(persistently(lambda: snapshot_download(name, allow_patterns=[weights, *_BESIDE]), name))

    try:
        folder = fetched("*.safetensors")
        # Only without them the older format, which would be the same weights again.
        return folder if any(folder.glob("*.safetensors")) else fetched("*.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{name!r} is no local file or folder and could not be fetched from the Hub "
            f"({type(error).__name__}); check the name and the network, or give a local folder"
        ) from error


def local(where: str | Path) -> Path:
    """The file or folder itself, or the local copy of a Hub model; it need not exist."""
    path = Path(where)
    named = isinstance(where, str) and _HUB_ID.match(where) and path.suffix not in _SUFFIXES
    return hub_folder(str(where)) if named and not exists(path) and not exists(path.parent) else path


def _open(where: str | Path) -> Mapping[str, Tensor]:
    path = local(where)
    there = exists(path)
    if there and path.is_dir():
        return _open_folder(path)
    if there and path.is_file():
        if path.suffix == ".safetensors":
            return SafetensorsState(dict.fromkeys(names_in(path), path))
        if path.suffix in _TORCH_SUFFIXES:
            return _state_dict_of(load_torch(path), path)
        raise InputError(f"{path}: unknown format; expected {', '.join(_SUFFIXES)} or a folder")
    raise InputError(f"no such checkpoint: {path}")


def _open_folder(folder: Path) -> Mapping[str, Tensor]:
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (index := folder / f"{stem}.index.json").is_file():
            return _open_sharded(index)
        if (single := folder / stem).is_file():
            return _open(single)
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds an adapter, no model: give it as an expert, beside the base that it adapts")
    raise InputError(f"{folder} holds no model.safetensors, no pytorch_model.bin and no index of either")


def _open_sharded(index: Path) -> Mapping[str, Tensor]:
    try:
        files = read_json(index)["weight_map"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        # In its own words: what represents an error of decoding holds the whole file.
        raise InputError(f"{index} is not an index of shards: {type(error).__name__}: {error}") from error
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{index}: weight_map must map tensor names to file names")
    for file in sorted(set(files.values())):
        if file != Path(file).name:  # an index must not lead outside its folder
            raise InputError(f"{index}: shard {file!r} is not a plain file name")
        if len(file) > _LONGEST or not (index.parent / file).is_file():
            raise InputError(f"{index}: shard {file} is missing")
    shards = {file: _open(index.parent / file) for file in set(files.values())}
    for name, file in files.items():
        if name not in shards[file]:
            raise InputError(f"{index}: tensor {name} is not in shard {file}")
    if index.name.startswith("pytorch_model"):
        return {name: shards[file][name] for name, file in files.items()}
    return SafetensorsState({name: index.parent / file for name, file in files.items()})


def load_torch(path: Path) -> dict[str, Any]:
    """A torch file of tensors and plain values; InputError, with what to do, for a pickle or a truncated file."""
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds pickled Python objects, which could run code, and is not loaded. "
            "Where you trust it, convert it once:\n"
            f"  model = torch.load({str(path)!r}, weights_only=False)\n"
            f"  safetensors.torch.save_file(model.state_dict(), {str(path.with_suffix('.safetensors'))!r})"
        ) from error
    except Exception as error:  # broken bytes can raise anything: IndexError, KeyError, struct.error, ...
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} cannot be read; it may be truncated ({type(error).__name__}: {reason})") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}; expected a dict of tensors")
    return loaded


def _check_archive(path: Path) -> None:
    """Raise InputError for an archive whose parts are more than the file has: torch compresses nothing."""
    if not _is_archive(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except Exception as error:  # broken bytes can raise anything
        raise InputError(f"{path} cannot be read; it may be truncated ({type(error).__name__})") from error
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise InputError(f"{path} cannot be read: it claims to hold more than it does, as no file of torch does")


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one that is broken in a way that it does not catch
        return True


def _check_tensor(tensor: Tensor, name: str, path: Path) -> None:
    """Raise InputError for a tensor without all of its numbers in the file: it would take memory once it is used."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InputError(f"{path}: {name} is sparse, quantised or empty-handed; expected plain tensors")
    if tensor.nbytes > path.stat().st_size:
        raise InputError(f"{path}: {name} claims {tensor.nbytes} bytes, more than the file has")


def _state_dict_of(loaded: dict[str, Any], path: Path) -> dict[str, Tensor]:
    state = loaded.get("state_dict", loaded)
    if not isinstance(state, dict):
        raise InputError(f"{path}: state_dict is a {type(state).__name__}; expected a dict of tensors")
    odd = [name for name, value in state.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if odd or not state:
        what = odd[0] if odd and isinstance(odd[0], str) else "an entry"
        raise InputError(f"{path} is not a state dict: {what!r} is no tensor" if odd else f"{path} holds no tensor")
    for name, tensor in state.items():
        _check_tensor(tensor, name, path)
    return state


def _first(state: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in state})[:5])
