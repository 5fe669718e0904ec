"""The residual blocks of a model: their outputs, task by task, can be corrected and recorded; each works alone too."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge import InputError
from modules import structure

#: (output [B, ..., D] of a block for one task, name of the block, task) -> corrected output.
Correct = Callable[[Tensor, str, str], Tensor]


class Blocks:
    """Hooks on every residual block of a model (see `structure.blocks`).

    A block gives [B, N, D] tokens, [B, C, H, W] maps or [B, D] vectors, alone or as the first of a tuple. `segments`
    says how many images of each task the batch holds, one task after another; `None` is a pass without corrections.
    """

    def __init__(self, model: nn.Module, segments: Callable[[], Mapping[str, int] | None] = dict) -> None:
        self.modules, self.segments = structure.blocks(model), segments
        self.correct: Correct | None = None
        self._record: dict[str, Tensor] | None = None
        for name, module in self.modules.items():
            module.register_forward_hook(partial(self._hook, name))

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Collects the token means [B, D] of every block's output, by its name."""
        record: dict[str, Tensor] = {}
        self._record = record
        try:
            yield record
        finally:
            self._record = None

    def _hook(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x: Tensor = output[0] if isinstance(output, tuple) else output
        correct, segments = self.correct, self.segments()
        if correct is not None and segments is not None:
            x = per_task(x, segments, lambda part, task: correct(part, name, task))
        if self._record is not None:
            self._record[name] = token_mean(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x


class LoneBlocks:
    """Every residual block of a model as a function of a state dict and of inputs of its own.

    Further arguments that a block takes, such as masks, are those of a pass over `image` [1, 3, H, W].

    Attributes:
        shapes: of the inputs of each block, without the batch.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        self.modules = structure.blocks(model)
        self.shapes: dict[str, torch.Size] = {}
        self._rest: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        hooks = [m.register_forward_pre_hook(partial(self._note, n), with_kwargs=True) for n, m in self.modules.items()]
        with torch.no_grad():
            model(image)
        for hook in hooks:
            hook.remove()

    def __call__(self, name: str, state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Block `name` with those tensors of a model's state dict that are its own."""
        args, kwargs = self._rest[name]
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        output = functional_call(self.modules[name], own, (inputs, *args), kwargs)
        first: Tensor = output[0] if isinstance(output, tuple) else output
        return first

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            raise InputError(f"block {name} of this model is called without a positional input: it has no anchors")
        self.shapes[name], self._rest[name] = args[0].shape[1:], (args[1:], kwargs)


def per_task(x: Tensor, segments: Mapping[str, int], function: Callable[[Tensor, str], Tensor]) -> Tensor:
    """Apply a function of (images of one task, task) to a batch that holds several tasks one after another."""
    if sum(segments.values()) != len(x):
        said = f"{sum(segments.values())} are said to be in it" if segments else "nothing says of which tasks"
        raise InputError(f"a batch of {len(x)} is taken task by task, but {said}; see MergedModel.of")
    parts = x.split(list(segments.values()))
    return torch.cat([function(part, task) for part, task in zip(parts, segments, strict=True)])


def token_mean(x: Tensor) -> Tensor:
    """[B, N, D] or [B, C, H, W] -> mean over tokens or places, [B, D]; [B, D] stays."""
    return x.flatten(2).mean(2) if x.ndim == 4 else x.flatten(1, -2).mean(1) if x.ndim > 2 else x
