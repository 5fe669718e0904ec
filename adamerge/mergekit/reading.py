"""From a mergekit file to a job: opens the models, resolves every parameter, settles config and tokenizer."""

import re
from collections.abc import Mapping
from pathlib import Path

from adamerge.adapters import Adapted, is_adapter
from adamerge.checkpoints import Renamed, State, hub_folder, meta, open_state
from adamerge.errors import InputError
from adamerge.files import exists, expanded
from adamerge.fingerprint import BASE
from adamerge.mergekit.companions import changes, tokenizer
from adamerge.mergekit.differences import EXPERTS, NEGATIVE
from adamerge.mergekit.methods import Mergekit, Resolved
from adamerge.mergekit.parsing import parse
from adamerge.mergekit.settings import Settings, Source
from adamerge.mergekit.stacking import Assembled, Output, layers, stacked, whole
from adamerge.recipes import Job
from adamerge.task_vectors import TaskVectors
from adamerge.views import as_tied

#: Computed anew by every model that has it, and left out of most files.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def read(path: str | Path, seed: int = 0) -> Job:
    """The job that a mergekit file describes; headers of the models are read, weights are not.

    Args:
        path: the YAML file; models in it are folders, relative to the working directory, or Hub ids.
            `model+adapter` is a model with a LoRA adapter added, in the model's precision.
        seed: of the random masks of `dare_*` and `della*`.

    Raises:
        InputError: for what the file or its models do not allow, before any weight is read.
    """
    settings = parse(path)
    parts = [(part.base, *(source.model for source in part.sources)) for part in settings.slices]
    files = {model: _locate(model) for model in dict.fromkeys(sum(parts, ())) if model is not None}
    adapters = {model: folder for model in files if (folder := _adapter(model)) is not None}
    states = {model: _open(where, adapters.get(model)) for model, where in files.items()}
    slices = settings.slices[0].sources[0].layers is not None
    home = settings.slices[0].base or settings.slices[0].sources[0].model
    if slices:
        states = {model: _with_heads_of(home, model, states, files) for model in states}
    outputs = stacked(settings, states) if slices else whole(settings, states)
    task_vectors = _task_vectors(outputs, states, files)
    resolved = {
        output.name: _resolve(settings, output, seed)
        for output in outputs
        if meta(states[output.cast.base.model], output.base).is_floating_point()
    }
    companions, said = tokenizer(settings.tokenizer, home, files, _locate)
    base = states[outputs[0].cast.base.model]
    notes = settings.notes + settings.how.notes + _differences(settings, outputs, base) + said
    divided = [numbers.own for numbers in resolved.values() if settings.how.elects and numbers.shared["normalize"]]
    if any(own["weight"] < 0 for models in divided for own in models):
        notes += (NEGATIVE,)
    return Job(
        task_vectors=task_vectors,
        rules=(Mergekit(settings.method, resolved),),
        dtype=settings.dtype,
        sources=files | {f"{model} (adapter)": folder for model, folder in adapters.items()},
        copy_from=companions if companions.is_dir() else None,
        config=changes(layers(settings) if slices else None, home, files, companions),
        recipe={**settings.file, "seed": seed},
        notes=notes,
    )


def _differences(settings: Settings, outputs: list[Output], base: State) -> tuple[str, ...]:
    """Notes on precision, experts in a layer, and what mergekit leaves out; `base` is that of the first tensor."""
    notes = [EXPERTS] if any(_EXPERT.search(output.base) for output in outputs) else []
    own = str(meta(base, outputs[0].base).dtype).removeprefix("torch.")
    if (dtype := settings.file.get("dtype") or own) in ("float16", "bfloat16"):
        notes.append(f"computed in float32 and rounded once, where mergekit computes in {dtype}")
    first, last = (len(settings.slices[place].sources) for place in (0, -1))
    if first < last:
        notes.append(
            f"what follows the layers is merged from all {last} sources of the last slice: mergekit takes as many of "
            f"them as the first slice has, {first}"
        )
    return tuple(notes)


def _locate(model: str) -> Path:
    """Where a model is, without the adapter of `model+adapter`; a Hub id is downloaded."""
    path = expanded(model)
    if exists(path):
        return path
    if "+" in model:
        return _locate(model.partition("+")[0])
    if model.count("/") != 1 or model.startswith((".", "~", "/")):
        raise InputError(f"no such model: {model}; expected a folder, a file of weights or a Hub id")
    return hub_folder(model)


def _adapter(model: str) -> Path | None:
    """Where the adapter of `model+adapter` is."""
    if exists(expanded(model)) or "+" not in model:
        return None
    folder = _locate(model.partition("+")[2])
    if not is_adapter(folder):
        raise InputError(f"{model}: {folder} holds no adapter_config.json, and only an adapter can be added to a model")
    return folder


def _open(where: Path, adapter: Path | None) -> State:
    state = open_state(where)
    if adapter is not None:
        # The base of a merge may be another model, or another layer of it, than the one that is adapted.
        state = Adapted(state, adapter, factored=False)
    kept = {name: name for name in state if not _DERIVED.search(name)}
    return state if len(kept) == len(state) else Renamed(state, kept)


def _with_heads_of(home: str, model: str, states: Mapping[str, State], files: Mapping[str, Path]) -> State:
    """A model with its tied head where `home` holds its own, and without where it does not."""
    fitted = as_tied({BASE: states[home], "other": states[model]}, {BASE: files[home], "other": files[model]})
    return fitted["other"]


def _task_vectors(outputs: list[Output], states: Mapping[str, State], files: Mapping[str, Path]) -> TaskVectors:
    """One expert for each source of a slice, called after the models that it stands for.

    Where a slice has fewer sources than another, the base fills in: its task vectors are zero.
    """
    tasks: list[str] = []
    for k in range(max(1, *(len(output.experts) for output in outputs))):
        models = [([*output.cast.experts, *[output.cast.base] * (k + 1)][k]).model for output in outputs]
        task = ", ".join(dict.fromkeys(models))
        tasks.append(f"{task} ({k + 1})" if task in (*tasks, BASE) else task)
    who = outputs[0].cast
    if who.base.layers is None:
        owners = {BASE: who.base.model} | {t: s.model for t, s in zip(tasks, who.experts or (who.base,), strict=True)}
        fitted = as_tied({o: states[m] for o, m in owners.items()}, {o: files[m] for o, m in owners.items()})
        return TaskVectors.over(fitted[BASE], {task: fitted[task] for task in tasks})
    parts: list[dict[str, tuple[State, str]]] = [{} for _ in (BASE, *tasks)]
    for output in outputs:
        base = (states[output.cast.base.model], output.base)
        own = [(states[s.model], n) for s, n in zip(output.cast.experts, output.experts, strict=True)]
        for part, where in zip(parts, [base, *own] + [base] * (len(tasks) - len(own)), strict=True):
            part[output.name] = where
    assembled = [Assembled(part) for part in parts]
    return TaskVectors.over(assembled[0], dict(zip(tasks, assembled[1:], strict=True)))


def _resolve(settings: Settings, output: Output, seed: int) -> Resolved:
    """The parameters of one tensor; raises InputError where one that must be given is not, or cannot be taken."""
    how, experts = settings.how, output.cast.experts

    def number(parameter: str, default: float | None, name: str, source: Source | None) -> float:
        value = settings.value(parameter, name, output.t, output.slice, source)
        if value is None and default is None and experts:
            whose = f"{source.model} has" if source else f"{settings.method} has"
            if source and source.model == output.slice.base:
                whose = f"{source.model}, the base_model, is one of the models that {settings.method} merges, and has"
            raise InputError(
                f"{whose} no `{parameter}` for {name}: give one in `parameters`; of several conditions, the last needs "
                "no filter"
            )
        return float(default or 0) if value is None else value

    resolved = Resolved(
        models=tuple(source.model for source in experts),
        shared={p: number(p, default, output.name, None) for p, default in how.shared.items()},
        own=tuple(
            {p: number(p, default, name, source) for p, default in how.own.items()}
            for source, name in zip(experts, output.experts, strict=True)
        ),
        based=output.cast.based,
        seed=seed,
    )
    _check(settings.method, output.name, resolved)
    return resolved


def _check(method: str, name: str, resolved: Resolved) -> None:
    """Raise InputError for numbers that a method cannot take for the tensor `name`."""
    for model, own in zip(resolved.models, resolved.own, strict=True):
        density, epsilon = own.get("density", 1.0), own.get("epsilon", 0.0)
        if density < 0:
            raise InputError(f"{model}, {name}: expected density >= 0, got {density:g}")
        if 0 < density < 1 and not 0 <= epsilon < min(density, 1 - density):
            raise InputError(f"{model}, {name}: expected 0 < density ± epsilon < 1, got {density:g} ± {epsilon:g}")
        if not 0 <= own.get("gamma", 0.0) < 1:
            raise InputError(f"{model}, {name}: expected 0 <= gamma < 1, got {own['gamma']:g}")
    total = sum(own.get("weight", 1.0) for own in resolved.own)
    normalize = {"linear": "normalize", "multislerp": "normalize_weights"}.get(method)
    if normalize and resolved.shared[normalize] and resolved.models and abs(total) < 1e-8:
        raise InputError(f"{name}: the weights sum to 0 and cannot be normalised; set `{normalize}: false`")
