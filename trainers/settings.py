"""The settings that a result depends on, as plain values."""

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

_PLAIN = (bool, int, float, str, list, dict, nn.ModuleList)


def describe(run: "Adaptation") -> dict[str, Any]:
    """The choice on every axis that makes up a run's method."""
    optimizer = run.configure_optimizers()
    # Without the switches that are off, of which torch has many.
    plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, (int, float, tuple)) and v is not False}
    return {
        "transforms": [settings(each) for each in run.transforms],
        "coefficients": settings(run.coefficients),
        "elements": settings(run.elements),
        "router": settings(run.router),
        "correction": settings(run.correction),
        "phases": [
            {
                "objective": settings(phase.objective),
                "program": settings(phase.stepper),
                "learn": run.learning(phase),
                "share": phase.share,
            }
            for phase in run.phases
        ],
        "optimizer": {"name": type(optimizer).__name__, **plain, "by_part": run.learning_rates},
        "task_id": run.task_id,
    }


def settings(thing: object) -> dict[str, Any] | None:
    """A class's name and the arguments it was made with, as far as they are plain values."""
    if thing is None:
        return None
    given = {name: getattr(thing, name, None) for name in inspect.signature(type(thing)).parameters}
    plain = {name: _plain(value) for name, value in given.items() if isinstance(value, _PLAIN)}
    return {"name": type(thing).__name__, **plain}


def _plain(value: Any) -> Any:
    """Parts in lists by their own settings, all else as it is."""
    if not isinstance(value, (list, nn.ModuleList)):
        return value
    return [_plain(each) if isinstance(each, _PLAIN) else settings(each) for each in value]
