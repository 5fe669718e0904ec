"""A module of a few parts that may learn, all else being frozen."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from adamerge import InputError
from adamerge.checkpoints import load_torch
from adamerge.plain_files import check_classes
from trainers.finite import fuse
from trainers.phases import PARTS, Phase
from trainers.scoring import ScoredModule

#: What builds a module from a checkpoint's arguments: of a function's name that a checkpoint brings, nothing is called.
_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class LearningModule(ScoredModule):
    """Knows which of its parts learn, hands them to the optimiser, and stores what they learn and nothing else."""

    def __init__(self, optimizer: OptimizerCallable, learning_rates: Mapping[str, float]) -> None:
        super().__init__()
        self.optimizer, self.learning_rates = optimizer, dict(learning_rates)
        self._learned: list[str] = []

    def parts(self) -> dict[str, nn.Module]:
        """The parts that there are, by name."""
        return {part: module for part in PARTS if (module := getattr(self, part)) is not None}

    def learning(self, phase: Phase) -> list[str]:
        """The parts that learn in a phase."""
        return phase.learning(list(self.parts()))

    def expert_axes(self) -> dict[str, tuple[int, ...]]:
        """By parameter, the axes along which experts have parts of their own, as the run's parts say."""
        says = {part: module.expert_axes for part, module in self.parts().items() if hasattr(module, "expert_axes")}
        return {f"{part}.{name}": axes for part, own in says.items() for name, axes in cast(Any, own)().items()}

    def choose(self, parts: Collection[str]) -> None:
        """Choose, once, the parts that learn at any time."""
        for part, module in self.parts().items():
            module.requires_grad_(part in parts)
        self._learned = [name for name, p in self.named_parameters() if p.requires_grad and p.numel()]
        if not self._learned:
            raise InputError(f"nothing learns: none of {[p for p in PARTS if p in parts]} has a parameter")

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that learn at any time, by name."""
        parameters = dict(self.named_parameters())
        return ((name, parameters[name]) for name in self._learned)

    def learned_by_part(self) -> dict[str, list[nn.Parameter]]:
        """The same parameters by the part that they belong to."""
        parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.learned():
            parts.setdefault(name.partition(".")[0], []).append(parameter)
        return parts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rates = {part: {"lr": rate} for part, rate in self.learning_rates.items()}
        groups = self.learned_by_part().items()
        optimizer = optimizing(
            self.optimizer, [{"params": parameters, **rates.get(part, {})} for part, parameters in groups]
        )
        fuse(optimizer)
        return optimizer

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is learned, and a router, which begins at random."""
        everything = super().state_dict(*args, **kwargs)
        return {name: everything[name] for name in self._stored()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load learned tensors. Raises InputError for others."""
        own, wrong = self._stored(), "these are not the learned tensors of this run"
        if strict and (odd := sorted(map(str, own.keys() ^ state_dict.keys()))):
            raise InputError(f"{wrong}; they differ in {odd}")
        for name, value in state_dict.items():
            if name in own and own[name].shape != getattr(value, "shape", None):
                shapes = f"{list(getattr(value, 'shape', []))} in the checkpoint, {list(own[name].shape)} here"
                raise InputError(f"{wrong}; {name} is {shapes}")
            if name in own and not bool(torch.as_tensor(value).isfinite().all()):
                raise InputError(f"{wrong}; {name} is not finite")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])

    def _stored(self) -> dict[str, nn.Parameter]:
        own = self.named_parameters()
        return {n: p for n, p in own if n in self._learned or (n.startswith("router.") and p.numel())}

    def restore(self, path: str | Path) -> Self:
        """Load what was learned from a checkpoint, into this configuration."""
        if not Path(path).is_file():
            raise InputError(f"no such checkpoint: {path}")
        checkpoint = load_torch(Path(path))
        self.configure_model()
        try:
            self.on_load_checkpoint(checkpoint)
            state = checkpoint.get("state_dict")
            if not isinstance(state, dict):
                raise InputError("it holds nothing that was learned")
            self.load_state_dict(state)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # what others wrote into it can raise anything
            raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        return self

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, of tensors and plain values only. Raises InputError for a broken file or a pickle."""
        checkpoint = load_torch(Path(checkpoint_path))
        given = checkpoint.get("hyper_parameters", {})
        known = isinstance(given, dict) and given.get("_instantiator") in (None, _INSTANTIATOR)
        if not known or not isinstance(checkpoint.get("state_dict"), dict):
            raise InputError(f"{checkpoint_path} was not written by a run of this project, or is damaged")
        check_classes(given)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **kwargs})


def optimizing(build: OptimizerCallable, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimiser of these parameters, or groups of them; raises InputError where it cannot be built."""
    try:
        return build(parameters)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer cannot be built: {error}; look at its init_args, and at learning_rates") from error
