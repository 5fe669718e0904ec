"""Statistics of experts on their data: what data-informed rules take, measured once and kept in files."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.batches import Logits, Targets, output_logits
from adamerge.checkpoints import open_state
from adamerge.errors import InputError
from adamerge.files import cache_folder, expanded, replacing
from adamerge.fingerprint import BASE, fingerprint
from adamerge.observing import Measure, Observation, observe
from adamerge.provenance import examine, signature
from adamerge.task_vectors import TaskVectors

log = logging.getLogger(__name__)

#: Goes into the cache key: raise it when the same inputs give other numbers.
VERSION = 1


class Statistics:
    """What was measured of each expert on its own data.

    From files, a tensor is read when it is asked for: a rule that takes the experts one after the other needs no more
    memory for many of them than for one.

    Args:
        observations: by expert.
    """

    def __init__(self, observations: Mapping[str, Observation]) -> None:
        self.observations = dict(observations)

    @classmethod
    def open(cls, where: "Statistics | str | Path") -> "Statistics":
        """Those of a folder that `save` wrote, or the argument itself. Raises InputError for another folder."""
        if isinstance(where, Statistics):
            return where
        files = sorted(expanded(where).glob("*.safetensors"))
        if not files:
            raise InputError(f"{where} holds no statistics: give the folder that Statistics.save or collect wrote")
        return cls({unquote(file.stem): read_observation(file) for file in files})

    def save(self, folder: str | Path) -> None:
        """Write one file for each expert."""
        for task, observation in self.observations.items():
            write_observation(observation, expanded(folder) / f"{quote(task, safe=' ')}.safetensors")

    def find(self, measure: Measure, task: str, name: str) -> Tensor | None:
        """One statistic of one parameter of an expert; None where nothing was measured."""
        return self.observations[task].find(measure, name)

    def of_layer(self, measure: Measure, name: str, tasks: Sequence[str], size: int) -> Iterator[Tensor] | None:
        """[size, size] of one linear layer, by expert, each read when its turn comes; None where none was measured.

        Raises InputError where some experts have it and others do not, and for another size.
        """
        lacking = [task for task in tasks if not self.observations[task].has(measure, name)]
        if lacking:
            if len(lacking) < len(tasks):
                raise InputError(f"{name}: the {measure} of {lacking[0]!r} was not measured, that of other experts was")
            return None
        return (self._square(measure, name, task, size) for task in tasks)

    def _square(self, measure: Measure, name: str, task: str, size: int) -> Tensor:
        found = self.observations[task].find(measure, name)
        if found is None or found.shape != (size, size):
            got = "none" if found is None else list(found.shape)
            raise InputError(f"{name}: the {measure} of {task!r} has shape {got}, expected {[size, size]}")
        return found

    def transposed(self, name: str) -> bool:
        """Whether a weight is [in, out]."""
        return any(observation.flipped(name) for observation in self.observations.values())

    def check(self, measures: Sequence[Measure], tasks: Sequence[str], owner: str) -> None:
        """Raise InputError for an expert of which these were not measured; `owner` needs them."""
        for task in tasks:
            if task not in self.observations:
                raise InputError(
                    f"{owner} has no statistics of {task!r}, only of {', '.join(self.observations)}: collect them"
                )
            for measure in measures:
                if not any(key.startswith(f"{measure}/") for key in self.observations[task].tensors):
                    raise InputError(f"{owner} needs the {measure} of {task!r}, which was not measured: collect it")


class Informed:
    """What rules have in common that take statistics: put it before `Rule` or `Correction` among the bases.

    Attributes:
        measures: what is needed of every expert.
        labelled: whether it must have been measured with labels.
        of_base: whether it is needed of the base, on the data of all tasks, and not of the experts.
        statistics: them, or their folder. None for those of the suite that a run is on; nothing else can merge then.
    """

    measures: ClassVar[tuple[Measure, ...]]
    labelled: ClassVar[bool] = False
    of_base: ClassVar[bool] = False
    statistics: Statistics | str | Path | None

    def check(self, tasks: tuple[str, ...]) -> None:
        """Raise InputError for experts of which something was not measured."""
        self.opened().check(self.measures, (BASE,) if self.of_base else tasks, type(self).__name__)

    def examine(self, task_vectors: TaskVectors, weights: bool = True) -> None:
        """Raise InputError for statistics of another model, or of other weights than these experts have.

        Args:
            task_vectors: before any transform.
            weights: False to read no weights, and to look at names and shapes alone.
        """
        examine(self.opened(), self.measures, task_vectors, self.of_base, type(self).__name__, weights)

    def opened(self) -> Statistics:
        """The statistics; raises InputError where there are none."""
        if self.statistics is None:
            raise InputError(
                f"{type(self).__name__} needs statistics of the experts on their data: give it those that "
                "adamerge.statistics.collect measured, or the folder where they were saved"
            )
        return Statistics.open(self.statistics)


def collect(
    model: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    batches: Mapping[str, Callable[[], Iterable[Any]]],
    measures: Sequence[Measure] = ("gram",),
    targets: Targets = "sampled",
    logits: Logits | Mapping[str, Logits] = output_logits,
    seed: int = 0,
    data: Mapping[str, str] | None = None,
) -> Statistics:
    """Measure every expert on its own data, one after the other (see `adamerge.observing.observe`).

    Args:
        model: of the experts' architecture, on the device to work on; a copy is used.
        experts: state dicts, by expert.
        batches: by expert, a function that gives its batches.
        measures: what is wanted.
        targets: where gradients are measured: the classes whose log-likelihood is differentiated.
        logits: finds them in the model's output; one for all experts, or one for each.
        seed: of classes that are drawn.
        data: by expert, what tells its batches from others, the data set's name and the number of examples or a
            fingerprint. With it, what was measured before is read from the user's cache folder, and kept there.

    Raises:
        InputError: for an expert without batches, one that does not fit the model, and as `observe`.
    """
    measures = sorted(set(measures))
    if missing := [task for task in experts if task not in batches]:
        raise InputError(f"no data for expert {missing[0]!r}: there are batches for {', '.join(batches) or 'none'}")
    model = (
        copy.deepcopy(model).eval().requires_grad_({"fisher", "sensitivity", "output_gram"} & set(measures) != set())
    )
    found = {}
    for task, state in experts.items():
        path = None
        if data is not None:
            key = json.dumps([VERSION, fingerprint(state), data[task], measures, targets, seed])
            path = cache_folder() / "statistics" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if path is None or not path.is_file():
            log.info("Measuring %s of expert %s", ", ".join(measures), task)
            load(model, state, task)
            finds = logits[task] if isinstance(logits, Mapping) else logits
            seen = observe(model, batches[task](), measures, targets, finds, seed)
            found[task] = replace(seen, signatures=signatures(seen, state))
            if path is None:
                continue
            write_observation(found[task], path)
        found[task] = read_observation(path)
    return Statistics(found)


def signatures(observation: Observation, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Of the weights of which something was measured, so that no other expert takes it for its own."""
    names = dict.fromkeys(key.split("/", 1)[1] for key in observation.tensors)
    return {name: signature(state[name]) for name in names if name in state}


def load(model: nn.Module, state: Mapping[str, Tensor], task: str) -> None:
    """Put an expert's weights into a model; raises InputError where they do not fit."""
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise InputError(f"expert {task!r} does not fit the model: {error}") from error


def write_observation(observation: Observation, path: Path) -> None:
    """Write one as a safetensors file."""
    header = {
        "shared": json.dumps(dict(observation.shared)),
        "transposed": json.dumps(sorted(observation.transposed)),
        "signatures": json.dumps(dict(observation.signatures)),
    }
    tensors = {key: observation.tensors[key].cpu().contiguous() for key in observation.tensors}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, header)


def read_observation(path: Path) -> Observation:
    """Open one; its tensors are read when they are asked for. Raises InputError for another file."""
    tensors = open_state(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    if "shared" not in header:
        raise InputError(f"{path} holds no statistics that adamerge has collected")
    shared, transposed = json.loads(header["shared"]), frozenset(json.loads(header["transposed"]))
    return Observation(tensors, shared, transposed, json.loads(header.get("signatures", "{}")))
