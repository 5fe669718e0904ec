"""What a run learns, and what it is told."""

from typing import Any

from adamerge.suites import measuring
from trainers.adaptation import Adaptation
from trainers.guards import Guard
from trainers.streams import Stream


def information(module: Adaptation, stream: Any) -> set[str]:
    """What a run is told: what its transforms, objectives and guards need, and the images of its stream."""
    watching, measured = guards(module), measuring.told(module.transforms)
    told = set[str]().union(*(phase.objective.needs for phase in module.phases), *(guard.needs for guard in watching))
    if not watching and not any(phase.objective.images and phase.stepper.learns for phase in module.phases):
        return measured | (told if learns(module) else set())
    told |= {"images"} | measured
    if isinstance(stream, Stream):
        told |= {"train data"} if stream.train_split == "train" else set()
        told = (told | {"task id"}) if stream.task_known else ((told - {"task id"}) | module.finder.needs)
    return told


def guards(module: Adaptation) -> list[Guard]:
    """The guards of a run."""
    callbacks = module._trainer.callbacks if module._trainer else []  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, Guard)]


def learns(module: Adaptation) -> bool:
    """Whether anything moves in the course of a run."""
    return any(phase.stepper.learns for phase in module.phases)


def budget(module: Adaptation, stream: Any) -> str:
    """One sentence on what a run learns, and from what."""
    if not learns(module):
        return "Learns nothing: the merge is scored as it is"
    counts = {part: sum(p.numel() for p in parameters) for part, parameters in module.learned_by_part().items()}
    parts = ", ".join(f"{count:,} of the {part}" for part, count in counts.items())
    sees = information(module, stream)
    words = {
        "teacher": "the experts' outputs",
        "anchors": "inputs made from the experts' weights",
        "task id": "the task of each image",
        "train data": "training data",
    }
    told = ", ".join(words.get(what, what) for what in sorted(sees))
    return f"Learns {sum(counts.values()):,} numbers ({parts}) from: {told}" + (
        "" if "labels" in sees else "; no labels"
    )
