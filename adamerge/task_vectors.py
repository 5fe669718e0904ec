"""Task vectors: the base and, for every tensor, the stacked differences of the experts to it."""

import hashlib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from adamerge import fingerprint
from adamerge.adapters import open_expert, stacked
from adamerge.checkpoints import Factors, factors_of, meta, open_state, rows_of, within
from adamerge.deltas import AnyDeltas, Deltas, dense
from adamerge.errors import InputError
from adamerge.kinds import kind

State = Mapping[str, Tensor]

#: The base's name among the fingerprints.
BASE = "base"

#: Elements per expert that elementwise rules take at a time: a few experts' fit into a cache, and each is worth a read.
PIECE = 2**18


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
        tied = _check(base, experts)
        return cls(base, _Differences(base, experts, tied), tuple(experts), tied).load()

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
        tied = _check(base, experts)
        return cls(base, _Differences(base, experts, tied), tuple(experts), tied)

    def load(self) -> "TaskVectors":
        """Read base and deltas into memory, tensor by tensor; checks that they are finite and fingerprints them."""
        if isinstance(self.deltas, _Changed):
            base = {name: self.base[name].detach() for name in self.base}
            return self._replaced(base, {name: _compact(self.deltas[name]) for name in self.deltas})
        if not isinstance(self.deltas, _Differences):
            return self
        source = self.deltas
        digests = _Digests((BASE, *self.tasks))
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
        if isinstance(self.deltas, _Differences | _Changed):
            return self._replaced(base, _Changed(self.deltas, change, elementwise and self.elementwise))
        return self._replaced(base, {name: _compact(change(name, delta)) for name, delta in self.deltas.items()})

    def without(self, names: Iterable[str]) -> "TaskVectors":
        """Task vectors that have no delta for these tensors: merged, they stay the base's, and no rule counts them."""
        left = frozenset(self.deltas) - frozenset(names)
        deltas = self.deltas
        if isinstance(deltas, _Differences | _Changed):
            return self._replaced(self.base, deltas.only(left))
        return self._replaced(self.base, {name: deltas[name] for name in deltas if name in left})

    def viewed(self, view: Callable[[State], State], names: Callable[[Iterable[str]], Iterable[str]]) -> "TaskVectors":
        """Task vectors over views of the base and of every expert; `names` says what becomes of the tensors' names."""
        if not isinstance(self.deltas, _Differences):
            raise InputError("task vectors that are transformed cannot be split: split them first")
        base, experts = view(self.base), {task: view(state) for task, state in self.deltas.experts.items()}
        return self._replaced(base, _Differences(base, experts, self.tied, names(self.deltas.names)))

    @property
    def lazy(self) -> bool:
        """Whether deltas are read and computed each time that they are asked for."""
        return isinstance(self.deltas, _Differences | _Changed)

    @property
    def elementwise(self) -> bool:
        """Whether `piece` reads and computes pieces; else it would take the whole tensor for each of them."""
        if isinstance(self.deltas, _Differences | _Changed):
            return isinstance(self.deltas, _Differences) or self.deltas.elementwise
        return not any(isinstance(deltas, Deltas) for deltas in self.deltas.values())

    def piece(self, name: str, rows: slice | None = None) -> tuple[Tensor, AnyDeltas]:
        """Base and deltas of one tensor, or of some of its rows (of its first axis)."""
        if rows is None:
            return self.base[name], self.deltas[name]
        deltas = self.deltas
        if not isinstance(deltas, _Differences | _Changed):
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
        if isinstance(self.deltas, _Differences):
            digests = _Digests((BASE, *self.tasks))
            for name in sorted(self.base):
                base, experts = self.deltas.read(name)
                digests.update(name, [base, *experts])
            return digests.hexdigests()
        states = {BASE: self.base, **{task: self.expert(task) for task in self.tasks}}
        return {name: fingerprint.fingerprint(state) for name, state in states.items()}

    def _warn_identical(self) -> None:
        for k, task in enumerate(self.tasks):
            if not any(bool(delta[k].any()) for delta in self.deltas.values()):
                message = f"expert {task!r} is identical to the base: its coefficients will do nothing"
                warnings.warn(message, stacklevel=3)


class _Differences(Mapping[str, AnyDeltas]):
    """Deltas computed when asked for, from states that may be lazy."""

    def __init__(
        self, base: State, experts: Mapping[str, State], tied: Mapping[str, str], names: Iterable[str] | None = None
    ) -> None:
        self.base, self.experts, self.tied = base, experts, tied
        floats = (n for n in base if n not in tied and meta(base, n).is_floating_point())
        self.names = list(floats if names is None else names)
        self._known = frozenset(self.names)

    def only(self, names: Collection[str]) -> "_Differences":
        """The same for fewer tensors."""
        return _Differences(self.base, self.experts, self.tied, (name for name in self.names if name in names))

    def read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Base and experts of one tensor, checked to be finite."""
        experts = [_finite(f"expert {task!r}", name, self._expert(task, name)) for task in self.experts]
        return _finite("the base", name, self._base(name)), experts

    def rows(self, name: str, rows: slice) -> tuple[Tensor, Tensor]:
        """Base and deltas of some rows of one tensor."""
        base = rows_of(self.base, name, rows).detach()
        return base, dense(self.stack(name, base, None, rows))

    def stack(
        self, name: str, base: Tensor, experts: Iterator[Tensor] | None = None, rows: slice | None = None
    ) -> AnyDeltas:
        """[K, *shape] differences, in float32 or better; each expert is let go before the next is read.

        Where all experts are adapters their factors are the differences; where some are, these are exact nonetheless.
        `experts` are those that are read already.
        """
        factors = [self._factors(task, name, rows) for task in self.experts]
        known = [pair for pair in factors if pair is not None]
        if len(known) == len(factors):
            _finite("the base", name, base)
            return stacked(known, base.shape)
        dtype = torch.promote_types(torch.float32, base.dtype)
        start, out = base.to(dtype), base.new_empty((len(self.experts), *base.shape), dtype=dtype)
        finite = True
        for k, (task, pair) in enumerate(zip(self.experts, factors, strict=True)):
            if pair is not None:
                out[k] = (pair[0] @ pair[1]).view(base.shape)
            else:
                out[k].copy_(next(experts) if experts else self._expert(task, name, rows)).sub_(start)
            finite = finite and _sums(out[k])
        if not finite:  # then each is looked at by itself, to name it
            _finite("the base", name, base)
            for task, pair in zip(self.experts, factors, strict=True):
                if pair is None:
                    _finite(f"expert {task!r}", name, self._expert(task, name, rows))
        return out

    def _base(self, name: str) -> Tensor:
        return self.base[name].detach()

    def _expert(self, task: str, name: str, rows: slice | None = None) -> Tensor:
        state = self.experts[task]
        own = _name_in(state, name, self.tied)
        return (state[own] if rows is None else rows_of(state, own, rows)).detach()

    def _factors(self, task: str, name: str, rows: slice | None) -> Factors | None:
        state = self.experts[task]
        if (found := factors_of(state, _name_in(state, name, self.tied), rows)) is None:
            return None
        left, right = (_finite(f"expert {task!r}", name, factor) for factor in found)
        return left, right

    def __getitem__(self, name: str) -> AnyDeltas:
        if name not in self._known:
            raise KeyError(name)
        return self.stack(name, self._base(name))

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Changed(Mapping[str, AnyDeltas]):
    """Deltas changed when asked for."""

    def __init__(
        self, source: "_Differences | _Changed", change: Callable[[str, AnyDeltas], AnyDeltas], elementwise: bool
    ) -> None:
        self.source, self.change, self.elementwise = source, change, elementwise

    def only(self, names: Collection[str]) -> "_Changed":
        """The same for fewer tensors."""
        return _Changed(self.source.only(names), self.change, self.elementwise)

    @property
    def base(self) -> State:
        """The base that the files' deltas were taken from."""
        return self.source.base

    def rows(self, name: str, rows: slice) -> tuple[Tensor, AnyDeltas]:
        """That base and the changed deltas, for some rows of one tensor, if the change is elementwise."""
        base, deltas = self.source.rows(name, rows)
        return base, self.change(name, deltas)

    def __getitem__(self, name: str) -> AnyDeltas:
        return self.change(name, self.source[name])

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def pieces(shape: torch.Size) -> Iterator[slice | None]:
    """Consecutive rows of a tensor, some `PIECE` elements at a time; `None` for one that is no larger than that."""
    if not shape or shape.numel() <= PIECE:
        yield None
        return
    rows = max(1, PIECE * shape[0] // shape.numel())
    yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


class _Digests:
    """Running fingerprints of several states at once; hashing leaves the interpreter lock, so threads help."""

    def __init__(self, owners: tuple[str, ...]) -> None:
        self._owners = owners
        self._digests = [hashlib.sha256() for _ in owners]
        self._pool = ThreadPoolExecutor()

    def update(self, name: str, tensors: list[Tensor]) -> None:
        list(self._pool.map(fingerprint.update, self._digests, repeat(name), tensors))

    def hexdigests(self) -> dict[str, str]:
        self._pool.shutdown()
        return {owner: digest.hexdigest() for owner, digest in zip(self._owners, self._digests, strict=True)}


def _finite(owner: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor, without a graph; raises where it holds NaN or infinity."""
    if tensor.is_floating_point() and not _sums(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        if not bad:  # large values, whose sum overflows
            return tensor.detach()
        raise InputError(f"{owner} has {bad} NaN or infinite values in {name}; fine-tune or save it again")
    return tensor.detach()


def _sums(tensor: Tensor) -> bool:
    """Whether a sum is finite, which keeps every NaN and infinity; if not, each value must be looked at."""
    return math.isfinite(float(tensor.sum()))


def _compact(delta: AnyDeltas) -> AnyDeltas:
    """Zeros that no expert changed need no memory of their own."""
    if isinstance(delta, Deltas) or bool(delta.any()):
        return delta
    return delta.new_zeros(()).expand(delta.shape)


def _check(base: State, experts: Mapping[str, State]) -> dict[str, str]:
    """Raise for the first misfit between an expert and the base; return the tied names."""
    if not experts:
        raise InputError("no expert given: a merge needs at least one")
    if BASE in experts:
        raise InputError(f"a task cannot be called {BASE!r}: results and fingerprints use the name for the base model")
    tied = _tied(base)
    for task, expert in experts.items():
        missing = [name for name in base if _name_in(expert, name, tied) not in expert]
        twins = _tied(expert)
        present = {twins.get(name, name) for name in expert if name in base}
        extra = [name for name in expert if name not in base and twins.get(name, name) not in present]
        if missing or extra:
            raise InputError(f"expert {task!r} does not have the tensors of the base: {_name_list(missing, extra)}")
        for name in base:
            _check_tensor(task, name, meta(base, name), meta(expert, _name_in(expert, name, tied)))
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


def _name_in(state: State, name: str, tied: Mapping[str, str]) -> str:
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
