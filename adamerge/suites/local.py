"""Local, the suite of the user's own models and images."""

from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge.checkpoints import State, meta, open_state, read_extra
from adamerge.data import DataSource, Preprocess, check_data
from adamerge.data.base import class_difference
from adamerge.errors import InputError
from adamerge.files import expanded
from adamerge.suites.base import HeadWeights, Split, Suite
from adamerge.task_vectors import TaskVectors

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_PREFIX = "backbone."


class Local(Suite):
    """Models and images of one's own: a pool of checkpoints, a backbone that they fit, a source of images per task.

    A checkpoint is one of `trainers.FineTune`, which brings the head and its class names along, or a state dict of the
    backbone, whose head is a file of its own.

    Args:
        data: the images of each task; its keys are the tasks.
        backbone: images [B, 3, H, W] -> features [B, D]; its weights do not matter.
        pool: a folder with a checkpoint named `base` and one named after each task: `.safetensors`, `.ckpt`, `.pt`,
            `.pth`, `.bin` or a Hugging Face folder. Others there are left alone.
        base: the base's checkpoint, if not the one in the pool.
        experts: checkpoints of experts by task, if not those in the pool; names that are no task's add experts.
        heads: files with `weight` [C, D] and, if there is one, `bias` [C], by task; default: the expert's checkpoint.
        preprocess: how images become tensors; the same as in fine-tuning.
        name: shown in results.
    """

    def __init__(
        self,
        data: dict[str, DataSource],
        backbone: nn.Module,
        pool: str | None = None,
        base: str | None = None,
        experts: dict[str, str] | None = None,
        heads: dict[str, str] | None = None,
        preprocess: Preprocess = Preprocess(),  # noqa: B008  immutable
        name: str = "local",
    ) -> None:
        if not data:
            raise InputError("suite Local has no task: give data one source of images per task")
        self.data, self.preprocess, self.name = dict(data), preprocess, name
        self.pool, self.base, self._experts, self.heads = pool, base, dict(experts or {}), dict(heads or {})
        if unknown := [task for task in self.heads if task not in data]:
            raise InputError(f"heads has {unknown[0]!r}, which is no task; data has {', '.join(data)}")
        if pool is None:
            missing = ["base"] * (base is None) + [f"expert {task!r}" for task in data if task not in self._experts]
            if missing:
                raise InputError(f"suite Local lacks its {missing[0]}: give it, or give pool a folder that has it")
        elif base is None and "base" in data:
            raise InputError("a task named 'base' would take the checkpoint of the base in the pool: rename the task")
        self._backbone = backbone

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.data)

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.data, *self._experts)))

    def check(self) -> None:
        self.states()
        for task in self.tasks:
            check_data(task, self.data[task])
            self._check_classes(task)
        super().check()

    def backbone(self) -> nn.Module:
        return self._backbone

    def task_vectors(self) -> TaskVectors:
        return TaskVectors.from_state_dicts(*self.states())

    def classes(self, task: str) -> tuple[str, ...]:
        return self.data[task].classes

    def head(self, task: str) -> HeadWeights:
        where, prefix = (self.heads[task], "") if task in self.heads else (self._expert(task), f"heads.{task}.")
        state = open_state(where)
        if f"{prefix}weight" not in state:
            raise InputError(_no_head(task, str(where), state, given=task in self.heads))
        bias = state.get(f"{prefix}bias")
        return HeadWeights(state[f"{prefix}weight"].clone(), None if bias is None else bias.clone())

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        return self.data[task].dataset(split, self.preprocess)

    def _expert(self, task: str) -> str | Path:
        return self._experts.get(task) or _find(self.pool, task)

    def states(self) -> tuple[State, dict[str, State]]:
        base = _open("the base", self.base or _find(self.pool, "base"), self._backbone)
        return base, {task: _open(f"expert {task!r}", self._expert(task), self._backbone) for task in self.experts}

    def _check_classes(self, task: str) -> None:
        """Raise InputError if the head that came with an expert is for other classes than those of the data."""
        if task in self.heads:
            return
        where = self._expert(task)
        trained = (read_extra(where, "classes") or {}).get(task)
        if trained is not None and (difference := class_difference(trained, self.classes(task))):
            raise InputError(f"task {task!r}: its data has not the classes that {where} was trained on: {difference}")


def _find(pool: str | None, stem: str) -> Path:
    """The one checkpoint of that name in the pool."""
    folder = expanded(pool or "")
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    found += [path for path in [folder / stem] if path.is_dir()]
    if len(found) > 1:
        several = " and ".join(path.name for path in found)
        raise InputError(f"{folder} has several checkpoints of {stem!r}, {several}: keep one")
    if not found:
        there = sorted(path.name for path in folder.iterdir())
        few = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "") or "nothing"
        raise InputError(f"{folder} has no checkpoint of {stem!r} ({', '.join(SUFFIXES)} or a folder); it holds {few}")
    return found[0]


def _open(who: str, where: str | Path, backbone: nn.Module) -> State:
    """The backbone's part of a checkpoint. Raises InputError naming the first tensor that does not fit the backbone."""
    own, state = backbone.state_dict(), open_state(where)
    if not own.keys() <= state.keys() and any(name.startswith(_PREFIX) for name in state):
        state = open_state(where, _PREFIX)
    problem = None
    for name in (*own, *(name for name in state if name not in own)):
        if name not in state:
            problem = f"it has no tensor {name}"
        elif name not in own:
            problem = f"the backbone has no tensor {name}"
        elif (shape := meta(state, name).shape) != own[name].shape:
            problem = f"{name} has shape {list(shape)}, the backbone's has {list(own[name].shape)}"
        if problem:
            raise InputError(f"{who} ({where}) does not fit the backbone {type(backbone).__name__}: {problem}")
    return state


def _no_head(task: str, where: str, state: State, given: bool) -> str:
    if given:
        return f"task {task!r}: its head {where} has no tensor 'weight'; it holds {', '.join(sorted(state)[:5])}"
    others = sorted({name.split(".")[1] for name in state if name.startswith("heads.")})
    its = f"only has heads of {', '.join(others)}" if others else "has no head"
    return (
        f"task {task!r} has no head: {where} {its}. Name the task as in fine-tuning, fine-tune the expert with "
        f"trainers.FineTune, or give heads.{task} a file with weight [C, D] and, if there is one, bias [C]"
    )
