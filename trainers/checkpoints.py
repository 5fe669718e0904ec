"""What a checkpoint of an adaptation says of its run, and the runs that it is refused by."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adamerge import InputError
from adamerge.fingerprint import SHORT
from trainers.settings import settings

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

#: The key of our own entry in a checkpoint.
ENTRY = "adamerge"


def entry(run: "Adaptation") -> dict[str, Any]:
    """What must agree between the run that wrote a checkpoint and one that loads it."""
    return {
        "tasks": list(run.merged.tasks),
        "rows": list(run.coefficients.groups),
        "fingerprints": run.merged.fingerprints,
        "transforms": [settings(each) for each in run.transforms],
    }


def check_entry(saved: Mapping[str, Any] | None, run: "Adaptation") -> None:
    """Raise InputError, with what differs, for the entry of another kind of run."""
    if saved is None:
        raise InputError("this checkpoint was not written by an adaptation run")
    own = entry(run)
    prints = saved.get("fingerprints") if isinstance(saved, Mapping) else None
    if not isinstance(prints, Mapping) or not all(isinstance(text, str) for text in (*prints, *prints.values())):
        raise InputError("this checkpoint is damaged: it does not say what it was learned on")
    _check_fingerprints(prints, own["fingerprints"])
    for key, words in {"tasks": "tasks", "rows": "coefficient rows", "transforms": "transforms"}.items():
        theirs, ours = saved.get(key, []), own[key]
        if theirs != ours:
            odd = sorted(set(map(str, theirs)) ^ set(map(str, ours)))[:3] or "their order"
            raise InputError(f"the checkpoint's {words} are not those of this run; they differ in {odd}")


def _check_fingerprints(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    odd = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if odd:
        words = "; ".join(
            f"{name}: {saved.get(name, 'absent')[:SHORT]} in the checkpoint, {own.get(name, 'absent')[:SHORT]} here"
            for name in odd
        )
        other = not any(name in saved and name in own for name in odd)
        pool = ", or add trainers.Experts to the callbacks to go on with other experts" if other else ""
        raise InputError(f"the checkpoint was learned on other models ({words}); give the suite it was made with{pool}")
