"""Runs on a device that is not there: `python elsewhere.py adamerging wemoe`.

Its tensors hold others on the CPU, which compute for them, and refuse to meet tensors of the CPU, as those of a GPU do:
what would be in the wrong place there is so here. Reading numbers (`item`, `tolist`) works, `numpy` does not.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("away")
torch.away.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
DEVICE = torch.device("away", 0)

aten = torch.ops.aten
#: Operations that may have tensors of the CPU beside others: those that copy, and indices.
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXED = {
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip


class Away(Tensor):
    """A tensor of that device."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Away":
        form = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **form)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return compute(func, args, dict(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Away":
        memo[id(self)] = copied = Away(self.held.clone()).requires_grad_(self.requires_grad)
        return copied

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"a tensor on {DEVICE} is no array")


def compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, whose outcome is where its arguments are, or where it is asked to be."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = any(isinstance(tensor, Away) for tensor in tensors)
    here = [tensor for tensor in tensors if not isinstance(tensor, Away) and tensor.dim()]
    if away and here and func not in COPIES and not (func in INDEXED and isinstance(args[0], Away)):
        raise RuntimeError(f"{func} with tensors on two devices, of shapes {[tuple(t.shape) for t in tensors]}")
    asked = kwargs.get("device")
    there = away if asked is None else torch.device(asked).type == DEVICE.type
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map_only(Away, lambda t: t.held, args), **tree_map_only(Away, lambda t: t.held, kwargs))
    name = func.__name__.split(".")[0]
    if "out" in kwargs or (name.endswith("_") and not name.endswith("__")):
        return kwargs.get("out", args[0])
    return tree_map_only(Tensor, Away, out) if there else out


class Dispatch(TorchDispatchMode):
    """Makes tensors there which no argument leads to."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return compute(func, args, dict(kwargs or {}))


class Literals(TorchFunctionMode):
    """Tensors of numbers come by way of the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            return func(*args, **kwargs)
        like, data = args if func is Tensor.new_tensor else (None, args[0])
        device = kwargs.pop("device", None if like is None else like.device)
        if like is not None:
            kwargs.setdefault("dtype", like.dtype)
        made = data if isinstance(data, Tensor) else torch.tensor(data, **kwargs)
        return made if device is None else made.to(device)


class Absent(Accelerator):
    """What Lightning asks of a device."""

    def setup_device(self, device: torch.device) -> None: ...
    def teardown(self) -> None: ...
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "away"


@contextmanager
def elsewhere() -> Iterator[None]:
    """Within the block, the device is there."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Dispatch(), Literals():
        yield


class Placed(L.Callback):
    """All that a run has is there."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        here = [name for name, parameter in pl_module.named_parameters() if parameter.device != DEVICE]
        assert not here, f"on the CPU: {here}"


def trainer() -> L.Trainer:
    """Three steps there, with validation."""
    return L.Trainer(
        strategy=SingleDeviceStrategy(device=DEVICE, accelerator=Absent()), devices=1, max_steps=3, limit_val_batches=2,
        val_check_interval=1, check_val_every_n_epoch=None, callbacks=[Placed()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def main(names: list[str]) -> None:
    """Adapt by each of these overlays; ends at the first that something is in the wrong place for."""
    from test_methods import build

    with elsewhere(), pytest.raises(RuntimeError, match="tensors on two devices"):
        torch.ones(2, device=DEVICE) + torch.ones(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for name in names:
        module, stream = build(name)
        with elsewhere():
            trainer().fit(module, datamodule=stream)
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
