"""Carry out a job: into a folder under a temporary name, which takes its own when everything is there."""

import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor

from adamerge import __version__
from adamerge.checkpoints import meta
from adamerge.errors import InputError
from adamerge.files import flush, json_file, locked, room_for, write_text
from adamerge.fused import Joined
from adamerge.memory import kept
from adamerge.merge import plan, plan_split
from adamerge.recipes import Job
from adamerge.rules.combining import MergedState
from adamerge.rules.magnitudes import survey
from adamerge.threads import one_thread
from adamerge.writing import layout, write_weights

#: What is written beside the weights; of an unfinished merge, it says whether the next one may go on with it.
RECORD = "adamerge.json"

#: Held while a merge is written.
LOCK = ".lock"

#: Files of a model's folder that go with the merge: all that `from_pretrained` may ask for but weights.
_COMPANIONS = re.compile(r".+\.(json|txt|model|jinja|py|tiktoken)")
_NO_COMPANIONS = re.compile(rf".+\.index\.json|{RECORD}|adapter_config\.json|trainer_state\.json|requirements\.txt")


def run(job: Job, output: Path, console: Console | None = None) -> Path:
    """Merge and write: sharded safetensors, index, config, tokenizer and processor files, and a record of the job.

    An unfinished merge by the same recipe of the same files is gone on with; any other is begun again.

    Raises:
        InputError: where the output folder holds something already, or another merge is writing it, and when the disk
            is full.
    """
    console = console or Console(stderr=True)
    check_output(output)
    place = output.resolve()  # of a link, where it leads
    partial = place.parent / f".{place.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with locked(partial / LOCK):
            _write(job, partial, console)
            for path in (*partial.iterdir(), partial):
                with room_for(path):
                    flush(path)
            if place.is_dir():
                place.rmdir()
            partial.rename(place)
            flush(place.parent)
    except BlockingIOError as error:
        raise InputError(f"another merge into {output} is going on: wait for it, or name another folder") from error
    (place / LOCK).unlink(missing_ok=True)
    return output


def _write(job: Job, partial: Path, console: Console) -> None:
    """Everything that a merge writes, into this folder."""
    tensors = outcome(job)
    files = layout(tensors, job.shard_size)
    asked = {"recipe": plain(job.recipe), "files": identities(job.sources), "versions": _versions()}
    _begin(partial, asked, console)
    with _resources(job), _progress(sum(tensor.nbytes for tensor in tensors.values()), console) as advance:
        planned = plan_split if job.split_fused_qkv else plan
        state = planned(job.task_vectors, job.rules, job.scale, job.exclude, job.dtype)
        write_weights(state, files, partial, advance)
    if job.copy_from is not None:
        copy_companions(job.copy_from, partial, _config_changes(job))
    write_text(partial / RECORD, json.dumps(asked | {"elements": _elements(state)}, indent=2) + "\n")


def check_output(output: Path) -> None:
    """Raise InputError for a place that is taken."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists already: name another folder, or remove it first")
    if output.exists() and output.samefile(Path()):
        raise InputError("the folder to write is made anew, and cannot be the one that you are in: name another")


def outcome(job: Job) -> dict[str, Tensor]:
    """What a job writes: its tensors without data. Tied ones are written once, as `from_pretrained` expects them."""
    base, tied = job.task_vectors.base, job.task_vectors.tied
    likes = {name: meta(base, name) for name in base if name not in tied}
    return {name: torch.empty(like.shape, dtype=_dtype(job, like), device="meta") for name, like in likes.items()}


def identities(sources: Mapping[str, Path]) -> dict[str, dict[str, list[int]]]:
    """Size and time of change of every file of weights, by source: what tells changed inputs without reading them."""
    found = {}
    for name, path in sources.items():
        files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin"))
        found[name] = {file.name: [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in files}
    return found


def copy_companions(source: Path, folder: Path, changes: Mapping[str, Any]) -> None:
    """Copy config, tokenizer and processor files; config.json with these entries changed."""
    for file in sorted(source.iterdir()):
        if file.is_file() and _COMPANIONS.fullmatch(file.name) and not _NO_COMPANIONS.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)
    if changes and isinstance(config := json_file(folder / "config.json"), dict):
        write_text(folder / "config.json", json.dumps({**config, **changes}, indent=2) + "\n")


def plain(values: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(values, default=str))


def _begin(partial: Path, asked: Mapping[str, Any], console: Console) -> None:
    """Empty the folder to write to, unless it is that of an unfinished merge that was asked for the same."""
    if (partial / RECORD).exists():
        before = json_file(partial / RECORD) or {}
        changed = [what for what in asked if before.get(what) != asked[what]]
        if changed:
            console.print(f"an unfinished merge had other {' and '.join(changed)}: begun again")
            for file in partial.iterdir():
                if file.name != LOCK:
                    file.unlink()
        else:
            console.print("going on with an unfinished merge")
    write_text(partial / RECORD, json.dumps(asked, indent=2) + "\n")


def _dtype(job: Job, like: Tensor) -> torch.dtype:
    return job.dtype if job.dtype is not None and like.is_floating_point() else like.dtype


def _config_changes(job: Job) -> dict[str, Any]:
    config = json_file(job.copy_from / "config.json") if job.copy_from else None
    if job.dtype is None or not isinstance(config, dict):
        return dict(job.config)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # its name before transformers 4.56
    return {key: str(job.dtype).removeprefix("torch."), **job.config}


def _elements(state: MergedState | Joined) -> dict[str, int]:
    """What shares are shares of: elements of all tensors, of those that rules count, of those that experts changed."""
    base, deltas = state.original.base, state.original.deltas
    return {
        "all": sum(meta(base, name).numel() for name in base),
        "counted": sum(meta(base, name).numel() for name in deltas),
        "changed": sum(survey(state.original)[0].values()),
    }


def _versions() -> dict[str, str]:
    return {"adamerge": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _resources(job: Job) -> AbstractContextManager[None]:
    """One thread for each part where parts are computed side by side; else all for one tensor, whose memory is kept."""
    return one_thread() if all(getattr(step, "elementwise", False) for step in job.rules) else kept()


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar of bytes written, which begins once the passes over all tensors are made."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("reading all tensors", total=None)

        def advance(count: int) -> None:
            progress.update(bar, description="merging", total=total, advance=count)

        yield advance
