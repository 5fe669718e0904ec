"""A run that goes on with other experts: what it has learned moves with them, by their names."""

import copy
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from adamerge import InputError
from adamerge.suites import Subset
from trainers.checkpoints import ENTRY, check_entry
from trainers.checks import check
from trainers.seeding import drawing

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

log = logging.getLogger(__name__)


def take(run: "Adaptation", experts: Sequence[str], step: int = 0) -> None:
    """Merge these experts of the suite from now on, everything as at the start of a run.

    Raises InputError for experts that change other tensors than those before them.
    """
    rows, device = run.coefficients.groups, run.device
    restrict(run, experts)
    for part, module in copy.deepcopy(run.unbound).items():
        setattr(run, part, module)
    run.model = None
    run.begin()
    with drawing(torch.device("cpu"), torch.initial_seed(), "experts", step):
        run.configure_model()
    run.to(device)
    if rows and (odd := sorted(set(rows) ^ set(run.coefficients.groups))):
        raise InputError(
            f"with experts {', '.join(experts)}, other tensors differ from the base than before: {odd[:3]}"
        )


def restrict(run: "Adaptation", experts: Sequence[str]) -> None:
    """Let the suite of a run have these experts alone. Raises InputError for a run that cannot work with them."""
    whole = run.whole
    run.suite = whole if tuple(experts) == whole.experts else Subset(whole, experts={name: name for name in experts})
    check(run)


def exchange(trainer: L.Trainer, run: "Adaptation", experts: Sequence[str]) -> None:
    """Go on with other experts between two steps, as a run does that is resumed with them."""
    before, callbacks = run.merged.tasks, trainer.callbacks  # type: ignore[attr-defined]
    learned, states = run.state_dict(), {number: each.state_dict() for number, each in enumerate(callbacks)}
    kept: dict[str, Any] = {
        "state_dict": learned,
        "optimizer_states": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": {number: state for number, state in states.items() if _holds(state, learned.keys())},
    }
    take(run, experts, trainer.global_step)
    move(kept, before, run)
    run.load_state_dict(kept["state_dict"])
    trainer.strategy.setup_optimizers(trainer)
    trainer.strategy.load_optimizer_state_dict(kept)
    for number, state in kept["callbacks"].items():
        callbacks[number].load_state_dict(state)
    for phase in run.phases:
        phase.stepper.reset()


def adopt(run: "Adaptation", checkpoint: dict[str, Any]) -> None:
    """Let a run take up a checkpoint of other experts of its suite: those that its schedule wants, or that it names.

    What is not the run's own to change is left to `check_entry`, which refuses it.
    """
    entry = checkpoint.get(ENTRY)
    saved: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    theirs, step = saved.get("tasks"), checkpoint.get("global_step", 0)
    if not isinstance(theirs, list) or not theirs or not all(isinstance(name, str) for name in theirs):
        return
    if run.schedule is not None:
        wanted = run.schedule(step if isinstance(step, int) else 0)
    else:
        wanted = tuple(name for name in run.whole.experts if name in theirs)
        if (run._trainer is not None and run.trainer.state.fn == "fit") or list(wanted) != theirs:
            return
    if list(wanted) == theirs == list(run.merged.tasks):
        return
    take(run, wanted, step)
    if list(wanted) == theirs:
        log.info("The checkpoint merges %s of the suite's experts", ", ".join(wanted))
        return
    own, prints = run.merged.fingerprints, saved.get("fingerprints")
    if isinstance(prints, Mapping):
        prints = {**own, **{name: text for name, text in prints.items() if name in own}}
    checkpoint[ENTRY] = {**saved, "tasks": list(wanted), "fingerprints": prints, "programs": []}
    check_entry(checkpoint[ENTRY], run)
    move(checkpoint, theirs, run)


def move(kept: dict[str, Any], before: Sequence[str], run: "Adaptation") -> None:
    """Put what was learned with the experts `before` in the place that it has in a run of other experts.

    An expert that stays keeps its numbers and its optimiser's moments, one that comes starts as the run does, with
    moments of zero, and what belongs to no expert goes on. So does whatever callbacks keep by the names of what is
    learned.
    """
    axes, start = run.expert_axes(), run.state_dict()
    sizes = {name: value.shape for name, value in kept["state_dict"].items()}

    def moved(name: str, value: Tensor, fresh: Tensor) -> Tensor:
        return relaid(value, fresh, axes[name], before, run.merged.tasks) if name in axes else value

    def learned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: moved(name, value, start[name]) if name in start else value for name, value in state.items()}

    names = [name for parts in run.learned_by_part().values() for name in _names(run, parts)]
    for optimizer in kept.get("optimizer_states", []):
        for place, state in optimizer["state"].items():
            name = names[place]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == sizes[name]:
                    state[key] = moved(name, value, torch.zeros_like(start[name]))
                elif isinstance(value, Tensor) and value.numel() > 1 and name in axes:
                    raise InputError(f"the optimiser keeps {key} of {name} in a form that has no part for each expert")
    for place, state in kept.get("callbacks", {}).items():
        kept["callbacks"][place] = _through(state, sizes.keys(), learned)
    kept["state_dict"] = learned(kept["state_dict"])


def relaid(value: Tensor, fresh: Tensor, axes: Sequence[int], before: Sequence[str], now: Sequence[str]) -> Tensor:
    """`fresh`, with the parts of experts that were there `before` from `value`; each has an equal part of the axes.

    A value that does not have the shape for that comes back as it is.
    """
    widths = {axis: fresh.shape[axis] // len(now) for axis in axes}
    expected = [len(before) * widths[a] if a in widths else size for a, size in enumerate(fresh.shape)]
    if list(value.shape) != expected:
        return value
    stay = [name for name in now if name in before]
    source, target = value, [torch.arange(size) for size in fresh.shape]
    for axis, width in widths.items():
        own = torch.arange(width)
        source = source.index_select(axis, _places(before, stay, own).to(value.device))
        target[axis] = _places(now, stay, own)
    out = fresh.to(value.device, copy=True)
    out[tuple(ix.view([-1 if a == b else 1 for b in range(out.dim())]) for a, ix in enumerate(target))] = source.to(out)
    return out


def _places(names: Sequence[str], chosen: Sequence[str], own: Tensor) -> Tensor:
    """Where the parts of the chosen experts are along an axis on which each has len(own) places."""
    return torch.cat([names.index(name) * len(own) + own for name in chosen] or [own[:0]])


def _names(run: "Adaptation", parameters: Sequence[Tensor]) -> list[str]:
    known = {id(parameter): name for name, parameter in run.learned()}
    return [known[id(parameter)] for parameter in parameters]


def _holds(state: Any, names: Collection[str]) -> bool:
    """Whether what was learned is kept anywhere in this."""
    return isinstance(state, Mapping) and (state.keys() == names or any(_holds(v, names) for v in state.values()))


def _through(state: Any, names: Collection[str], change: Callable[[Mapping[str, Tensor]], Any]) -> Any:
    """The same with `change` made to what was learned wherever it is kept."""
    if not isinstance(state, Mapping):
        return state
    return change(state) if state.keys() == names else {k: _through(v, names, change) for k, v in state.items()}
