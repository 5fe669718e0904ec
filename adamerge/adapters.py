"""Experts that are LoRA adapters (arXiv:2106.09685): a folder of peft's, and the base that it adapts.

Of each module that it adapts, `adapter_model.safetensors` holds A [r, n] and B [m, r]: the weight becomes W + s B A,
s = α/r, or α/√r if `use_rslora` is set in `adapter_config.json`. Whatever else is in the file (`modules_to_save`,
biases) takes the base's place as it is. DoRA, adapters of embeddings and other kinds than LoRA are refused.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints import Factors, local, meta, open_state, rows_of
from adamerge.deltas import AnyDeltas, LowRank
from adamerge.errors import InputError
from adamerge.files import exists, json_file

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

#: `base_model.model.layers.0.q_proj.lora_A.weight`, or `….lora_A.default.weight` with the name of the adapter.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")

_REFUSED = {
    "use_dora": "DoRA scales the adapted weights as well",
    "use_qalora": "QALoRA pools the inputs of its factors",
    "use_bdlora": "its factors are block-diagonal",
    "lora_bias": "its factors have biases",
    "layer_replication": "it stacks the base's layers anew",
    "target_parameters": "it adapts parameters that are no modules' weights",
    "trainable_token_indices": "it trains rows of an embedding",
    "alora_invocation_tokens": "it is active after certain tokens only",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Pair:
    """Where the factors of one tensor are in the adapter's file, and what they are scaled by."""

    a: str
    b: str
    scale: float
    transposed: bool


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return exists(folder / CONFIG)


def open_expert(where: str | Path, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """As `open_state`, where an expert may be an adapter too: it is then `Adapted`, over this base."""
    path = local(where)
    return Adapted(base, path) if is_adapter(path) else open_state(path)


class Adapted(Mapping[str, Tensor]):
    """A lazy state: the base's tensors, with W + s B A for those that an adapter adapts, rounded to the base's dtype.

    `adamerge.checkpoints.factors_of` tells what they differ by from the base before any rounding.

    Args:
        base: the state that is adapted.
        folder: with adapter_config.json and adapter_model.safetensors.
        factored: whether the base of the task vectors is `base` itself; where it is not, factors tell nothing.

    Raises:
        InputError: for an adapter of another kind, for one that is not whole, and for one that does not fit the base.
    """

    def __init__(self, base: Mapping[str, Tensor], folder: Path, factored: bool = True) -> None:
        self.base, self.factored = base, factored
        config = _config(folder)
        self._tensors = _tensors(folder)
        self._pairs, self._whole = _places(self._tensors, config, folder)
        for name in (*self._pairs, *self._whole):
            if name not in base:
                raise InputError(
                    f"adapter {folder}: the base has no {name}, its names are {', '.join(list(base)[:2])}, …; give the "
                    "base that it was trained on"
                )
        for name, pair in self._pairs.items():
            _check_shapes(folder, name, meta(base, name).shape, pair, self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._part(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def rows(self, name: str, rows: slice) -> Tensor:
        """As `rows_of(state, name, rows)`."""
        return self._part(name, rows)

    def meta(self, name: str) -> Tensor:
        """As `meta(state, name)`."""
        return meta(self._tensors, self._whole[name]) if name in self._whole else meta(self.base, name)

    def factors(self, name: str, rows: slice | None = None) -> Factors | None:
        """As `factors_of(state, name, rows)`."""
        like = meta(self.base, name)
        if not self.factored or name in self._whole or like.dim() < 2 or not like.is_floating_point():
            return None
        if name in self._pairs:
            return self._factors(name, rows)
        count = len(range(*(rows or slice(None)).indices(like.shape[0])))
        dtype = torch.promote_types(torch.float32, like.dtype)
        return torch.zeros(count, 0, dtype=dtype), torch.zeros(0, like[0].numel(), dtype=dtype)

    def _factors(self, name: str, rows: slice | None) -> Factors:
        """√s on each of both, which leaves them in the proportion in which they were trained."""
        pair, dtype = self._pairs[name], torch.promote_types(torch.float32, meta(self.base, name).dtype)
        a = self._tensors[pair.a]
        b = self._tensors[pair.b] if rows is None or pair.transposed else rows_of(self._tensors, pair.b, rows)
        left, right = (factor.flatten(1).to(dtype) for factor in (b, a))
        if pair.transposed:
            left, right = right.T[rows or slice(None)], left.T
        root = math.sqrt(abs(pair.scale))
        return left * math.copysign(root, pair.scale), right * root

    def _part(self, name: str, rows: slice | None) -> Tensor:
        state, own = (self._tensors, self._whole[name]) if name in self._whole else (self.base, name)
        tensor = state[own] if rows is None else rows_of(state, own, rows)
        if name not in self._pairs:
            return tensor
        left, right = self._factors(name, rows)
        return (tensor.to(left.dtype) + (left @ right).view(tensor.shape)).to(tensor.dtype)


def stacked(factors: Sequence[Factors], shape: torch.Size) -> AnyDeltas:
    """The deltas of K experts whose factors may differ in rank, for a tensor [*shape]; zeros where all ranks are 0."""
    rank = max(right.shape[0] for _, right in factors)
    (left, right), size = factors[0], torch.Size((len(factors), *shape))
    if rank == 0:
        return left.new_zeros(()).expand(size)
    lefts, rights = (left.new_zeros(len(factors), *pair) for pair in ((left.shape[0], rank), (rank, right.shape[1])))
    for k, (left, right) in enumerate(factors):
        lefts[k, :, : left.shape[1]], rights[k, : right.shape[0]] = left, right
    return LowRank(lefts, rights, size)


def _config(folder: Path) -> Mapping[str, Any]:
    config = json_file(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"adapter {folder}: {CONFIG} cannot be read")
    if config.get("peft_type", "LORA") != "LORA":
        raise InputError(f"adapter {folder} is of type {config['peft_type']}: LORA alone can be merged here")
    merge = "merge it into its base with peft, and give the folder of that model"
    for key, why in _REFUSED.items():
        if config.get(key):
            raise InputError(f"adapter {folder} has {key}: {why}; {merge}")
    if all((start := config.get("init_lora_weights")) != plain for plain in _PLAIN_STARTS):
        raise InputError(f"adapter {folder}: init_lora_weights={start!r} changes the base's weights as well; {merge}")
    return config


def _tensors(folder: Path) -> Mapping[str, Tensor]:
    for file in _WEIGHTS:
        if (folder / file).is_file():
            return open_state(folder / file)
    raise InputError(f"adapter {folder} holds no {_WEIGHTS[0]}: download or save it again")


def _places(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> tuple[dict[str, _Pair], dict[str, str]]:
    """The factors of each adapted tensor of the base, and the tensors that are taken whole."""
    sides: dict[str, dict[str, str]] = {}
    whole = {}
    for key in tensors:
        name = key.removeprefix("base_model.model.")
        if found := _FACTOR.fullmatch(name):
            sides.setdefault(found["module"], {})[found["side"]] = key
        elif ".lora_" in name:
            what = "embeddings" if ".lora_embedding_" in name else f"a kind that has {key}"
            raise InputError(f"adapter {folder}: adapters of {what} are not merged here; merge it with peft first")
        else:
            whole[_WRAPPER.sub("", name)] = key
    pairs = {}
    for module, keys in sides.items():
        if len(keys) < 2:
            raise InputError(f"adapter {folder}: {module} has lora_{min(keys)} alone; download or save it again")
        rank = _matching(config, "rank_pattern", module, config.get("r", 8))
        alpha = _matching(config, "alpha_pattern", module, config.get("lora_alpha", 8))
        if (own := next(iter(meta(tensors, keys["A"]).shape), None)) != rank:
            raise InputError(f"adapter {folder}: {module} has rank {own}, {CONFIG} says {rank}; save it again")
        if rank <= 0:
            raise InputError(
                f"adapter {folder}: {module} has rank {rank}, with which nothing is adapted; save it again"
            )
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        pairs[f"{module}.weight"] = _Pair(keys["A"], keys["B"], scale, bool(config.get("fan_in_fan_out")))
    if not pairs:
        raise InputError(f"adapter {folder} holds no lora_A and lora_B: it adapts nothing")
    return pairs, whole


def _matching(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """The entry of a pattern that matches the end of a module's name; the first, as in peft."""
    patterns = config.get(key) or {}
    try:
        found = next((value for p, value in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)
        if isinstance(found, int | float) and math.isfinite(found):
            return found
    except (re.error, AttributeError, RecursionError, OverflowError):
        pass
    raise InputError(f"{CONFIG}: {key}, r or lora_alpha is no number for {module}: download or save it again")


def _check_shapes(folder: Path, name: str, shape: torch.Size, pair: _Pair, tensors: Mapping[str, Tensor]) -> None:
    a, b = (meta(tensors, key).shape for key in (pair.a, pair.b))
    made = [b[0], *a[1:]] if len(a) == len(b) >= 2 and b[1] == a[0] else None
    if list(shape) != (made[::-1] if made and pair.transposed else made):
        transposed = " (fan_in_fan_out)" if pair.transposed else ""
        raise InputError(
            f"adapter {folder}: lora_A {list(a)} and lora_B {list(b)}{transposed} do not make a change of {name} "
            f"{list(shape)}; give the base that it was trained on"
        )
