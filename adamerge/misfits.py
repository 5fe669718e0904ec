"""Experts that do not fit their base are refused, with the first misfit named."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge.checkpoints import State, meta
from adamerge.errors import InputError
from adamerge.fingerprint import BASE


def check(base: State, experts: Mapping[str, State]) -> dict[str, str]:
    """Raise for the first misfit between an expert and the base; return the tied names."""
    if not experts:
        raise InputError("no expert given: a merge needs at least one")
    if BASE in experts:
        raise InputError(f"a task cannot be called {BASE!r}: results and fingerprints use the name for the base model")
    tied = _tied(base)
    for task, expert in experts.items():
        missing = [name for name in base if name_in(expert, name, tied) not in expert]
        twins = _tied(expert)
        present = {twins.get(name, name) for name in expert if name in base}
        extra = [name for name in expert if name not in base and twins.get(name, name) not in present]
        if missing or extra:
            raise InputError(f"expert {task!r} does not have the tensors of the base: {_name_list(missing, extra)}")
        for name in base:
            _check_tensor(task, name, meta(base, name), meta(expert, name_in(expert, name, tied)))
        for alias, name in tied.items():
            if alias in expert and name in expert and not torch.equal(expert[alias], expert[name]):
                raise InputError(f"expert {task!r}: {alias} and {name} are one tied tensor in the base but differ here")
    return tied


def _check_tensor(task: str, name: str, base: Tensor, expert: Tensor) -> None:
    if base.shape != expert.shape:
        raise InputError(f"expert {task!r}: {name} has shape {list(expert.shape)}, the base has {list(base.shape)}")
    same = base.is_floating_point() == expert.is_floating_point() and base.is_complex() == expert.is_complex()
    if not same or base.is_complex():
        raise InputError(f"expert {task!r}: {name} is {expert.dtype}, the base has {base.dtype}")


def _name_list(missing: list[str], extra: list[str]) -> str:
    parts = []
    for label, names in (("missing", missing), ("not in the base", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label} {', '.join(names[:3])}{more}")
    return "; ".join(parts) + ("; if they were only renamed, rename them back" if missing and extra else "")


def name_in(state: State, name: str, tied: Mapping[str, str]) -> str:
    """The name under which a state holds a tensor: files keep a tied tensor once, under whichever of its names."""
    if name in state:
        return name
    first = tied.get(name, name)
    twins = (first, *(alias for alias, other in tied.items() if other == first))
    return next((twin for twin in twins if twin in state), name)


def _tied(state: State) -> dict[str, str]:
    """Names that share storage with an earlier name (only in-memory states can show it)."""
    if hasattr(state, "meta"):
        return {}
    seen: dict[tuple[object, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
    return tied


def finite(owner: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor, without a graph; raises where it holds NaN or infinity."""
    if tensor.is_floating_point() and not finite_sum(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        if not bad:  # large values, whose sum overflows
            return tensor.detach()
        raise InputError(f"{owner} has {bad} NaN or infinite values in {name}; fine-tune or save it again")
    return tensor.detach()


def finite_sum(tensor: Tensor) -> bool:
    """Whether a sum is finite, which keeps every NaN and infinity; if not, each value must be looked at."""
    return math.isfinite(float(tensor.sum()))
