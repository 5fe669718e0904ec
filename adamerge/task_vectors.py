"""Task vectors: the base and, for every tensor, the stacked differences of the experts to it."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor

from adamerge.adapters import open_expert
from adamerge.checkpoints import State, meta, open_state, rows_of, within
from adamerge.deltas import AnyDeltas, Deltas, dense
from adamerge.differences import Changed, Differences
from adamerge.errors import InputError
from adamerge.fingerprint import BASE, Digests, fingerprint
from adamerge.kinds import kind
from adamerge.misfits import check


class TaskVectors:
    """Task vectors τₖ = θₖ − θ₀ of K experts fine-tuned from one base (Ilharco et al., arXiv:2212.04089).

    Attributes:
        tasks: the names of the K experts, as a rule of their tasks, in the order of the first axis of every delta.
        base: the base state dict.
        deltas: [K, *shape] for every floating tensor of the base; float32 at least, so that half-precision experts keep
            their small differences. Tensors that no expert changed are zeros that take no memory. Those of adapters
            are their factors, and a transform may have put another compressed form (`adamerge.deltas.Deltas`) in the
            place of a parameter's.
        tied: names that share one tensor with another name, and that other name; they are merged once.

    Build it with `from_state_dicts` or `open`; both raise InputError for experts that do not fit the base.
    """

    def __init__(
        self,
        base: State,
        deltas: Mapping[str, AnyDeltas],
        tasks: tuple[str, ...],
        tied: Mapping[str, str] | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        self.base, self.deltas, self.tasks, self.tied = base, deltas, tasks, dict(tied or {})
        self._fingerprints = fingerprints
        self._origin: TaskVectors | None = None

    @classmethod
    def from_state_dicts(cls, base: State, experts: Mapping[str, State]) -> "TaskVectors":
        """Task vectors in memory. No argument is changed; `base` is kept by reference."""
        tied = check(base, experts)
        return cls(base, Differences(base, experts, tied), tuple(experts), tied).load()

    @classmethod
    def open(cls, base: str | Path, experts: Mapping[str, str | Path], prefix: str = "") -> "TaskVectors":
        """Task vectors over checkpoint files: headers are checked now, a tensor is read when it is asked for.

        An expert may be a LoRA adapter of the base (see `adamerge.adapters`): its task vector is s B A, whatever the
        base's precision. `prefix` keeps the tensors under one submodule of every file (see
        `adamerge.checkpoints.open_state`). `load()` reads everything into memory.
        """
        whole = open_state(base)
        states = {task: within(open_expert(where, whole), prefix, where) for task, where in experts.items()}
        return cls.over(within(whole, prefix, base), states)

    @classmethod
    def over(cls, base: State, experts: Mapping[str, State]) -> "TaskVectors":
        """As `open`, over states that are lazy: a tensor, or rows of one, are read when they are asked for."""
        tied = check(base, experts)
        return cls(base, Differences(base, experts, tied), tuple(experts), tied)

    def load(self) -> "TaskVectors":
        """Read base and deltas into memory, tensor by tensor; checks that they are finite and fingerprints them."""
        if isinstance(self.deltas, Changed):
            base = {name: self.base[name].detach() for name in self.base}
            return self._replaced(base, {name: _compact(self.deltas[name]) for name in self.deltas})
        if not isinstance(self.deltas, Differences):
            return self
        source = self.deltas
        digests = Digests((BASE, *self.tasks))
        base, deltas = {}, {}
        for name in sorted(self.base):
            base[name], experts = source.read(name)
            digests.update(name, [base[name], *experts])
            if name in source:
                deltas[name] = _compact(source.stack(name, base[name], iter(experts)))
        order = [name for name in self.base if name in base]
        ordered = ({name: base[name] for name in order}, {name: deltas[name] for name in source})
        loaded = TaskVectors(*ordered, self.tasks, self.tied, digests.hexdigests())
        loaded._warn_identical()
        return loaded

    def changed(
        self, change: Callable[[str, AnyDeltas], AnyDeltas], base: State | None = None, elementwise: bool = False
    ) -> "TaskVectors":
        """Task vectors with `change(name, delta)` as deltas, for this base or another; these stay as they are.

        Fingerprints remain those of the experts that went in. What is read from files when it is asked for stays so:
        `change` is then called whenever a tensor is asked for, or a piece of one if it is `elementwise`.
        """
        base = self.base if base is None else base
        if isinstance(self.deltas, Differences | Changed):
            return self._replaced(base, Changed(self.deltas, change, elementwise and self.elementwise))
        return self._replaced(base, {name: _compact(change(name, delta)) for name, delta in self.deltas.items()})

    def without(self, names: Iterable[str]) -> "TaskVectors":
        """Task vectors that have no delta for these tensors: merged, they stay the base's, and no rule counts them."""
        left = frozenset(self.deltas) - frozenset(names)
        deltas = self.deltas
        if isinstance(deltas, Differences | Changed):
            return self._replaced(self.base, deltas.only(left))
        return self._replaced(self.base, {name: deltas[name] for name in deltas if name in left})

    def viewed(self, view: Callable[[State], State], names: Callable[[Iterable[str]], Iterable[str]]) -> "TaskVectors":
        """Task vectors over views of the base and of every expert; `names` says what becomes of the tensors' names."""
        if not isinstance(self.deltas, Differences):
            raise InputError("task vectors that are transformed cannot be split: split them first")
        base, experts = view(self.base), {task: view(state) for task, state in self.deltas.experts.items()}
        return self._replaced(base, Differences(base, experts, self.tied, names(self.deltas.names)))

    @property
    def lazy(self) -> bool:
        """Whether deltas are read and computed each time that they are asked for."""
        return isinstance(self.deltas, Differences | Changed)

    @property
    def elementwise(self) -> bool:
        """Whether `piece` reads and computes pieces; else it would take the whole tensor for each of them."""
        if isinstance(self.deltas, Differences | Changed):
            return isinstance(self.deltas, Differences) or self.deltas.elementwise
        return not any(isinstance(deltas, Deltas) for deltas in self.deltas.values())

    def piece(self, name: str, rows: slice | None = None) -> tuple[Tensor, AnyDeltas]:
        """Base and deltas of one tensor, or of some of its rows (of its first axis)."""
        if rows is None:
            return self.base[name], self.deltas[name]
        deltas = self.deltas
        if not isinstance(deltas, Differences | Changed):
            return rows_of(self.base, name, rows), dense(deltas[name])[:, rows]
        start, changes = deltas.rows(name, rows)
        return start if self.base is deltas.base else rows_of(self.base, name, rows), changes

    def _replaced(self, base: State, deltas: Mapping[str, AnyDeltas]) -> "TaskVectors":
        new = TaskVectors(base, deltas, self.tasks, self.tied, self._fingerprints)
        if self._fingerprints is None:
            # Files are hashed when somebody asks; deltas in memory at once, or they would have to be kept for it.
            new._origin, new._fingerprints = (self, None) if self.lazy else (None, self.fingerprints)
        return new

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The tensors that take a coefficient: parameters that at least one expert changed, in the base's order."""
        changed = (name for name in self.deltas if kind(name, meta(self.base, name)) == "parameter")
        return tuple(name for name in changed if bool(self.deltas[name].any()))

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 over names, shapes and bytes of the base (`"base"`) and of each expert."""
        if self._fingerprints is None:
            self._fingerprints = self._hash() if self._origin is None else self._origin.fingerprints
        return dict(self._fingerprints)

    def expert(self, task: str) -> dict[str, Tensor]:
        """The state dict of one expert, θ₀ + τ; constants are those of the base."""
        if task not in self.tasks:
            raise InputError(f"no expert is called {task!r}; there are {', '.join(self.tasks)}")
        k = self.tasks.index(task)
        state = {}
        for name, value in self.base.items():
            delta = self.deltas[name][k] if name in self.deltas else None
            state[name] = value if delta is None else (value + delta).to(value.dtype)
        return state | {alias: state[name] for alias, name in self.tied.items()}

    def _hash(self) -> dict[str, str]:
        if isinstance(self.deltas, Differences):
            digests = Digests((BASE, *self.tasks))
            for name in sorted(self.base):
                base, experts = self.deltas.read(name)
                digests.update(name, [base, *experts])
            return digests.hexdigests()
        states = {BASE: self.base, **{task: self.expert(task) for task in self.tasks}}
        return {name: fingerprint(state) for name, state in states.items()}

    def _warn_identical(self) -> None:
        for k, task in enumerate(self.tasks):
            if not any(bool(delta[k].any()) for delta in self.deltas.values()):
                message = f"expert {task!r} is identical to the base: its coefficients will do nothing"
                warnings.warn(message, stacklevel=3)


def _compact(delta: AnyDeltas) -> AnyDeltas:
    """Zeros that no expert changed need no memory of their own."""
    if isinstance(delta, Deltas) or bool(delta.any()):
        return delta
    return delta.new_zeros(()).expand(delta.shape)
