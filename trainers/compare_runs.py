"""The runs of a comparison: child processes of `train.py fit`, each in a folder of its own and not repeated once done.

Beside what `fit` leaves there, a run's folder holds `log.txt`, the output of the last attempt, and `run.json`, which
tells a run that is done from one to go on with and from one that was asked for something else.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adamerge.files import write_text
from trainers.cli import BASE
from trainers.results import whole_results

TRAIN = Path(__file__).parents[1] / "train.py"
STOPPED = "stopped before it ended"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_GRACE = 20.0  # seconds that a child has to end by itself when the comparison is stopped


@dataclass(frozen=True)
class Record:
    """What a run was asked for, as a hash, and how it ended: `error` is none if it went well."""

    key: str
    error: str | None = STOPPED
    seconds: float = 0.0  # all attempts together
    peak_gb: float | None = None  # largest resident memory of the process, in 10⁹ bytes


@dataclass(frozen=True)
class Run:
    """One method with one seed, in the folder root/method/seed; the arguments are those of `train.py fit`."""

    method: str
    seed: int
    root: Path
    arguments: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.root / self.method / f"seed{self.seed}"

    def key(self) -> str:
        """A hash of the arguments, with the contents of files in place of their names."""
        digest = hashlib.sha256(BASE.read_bytes())
        for argument in self.arguments:
            name, _, value = argument.rpartition("=")
            content = Path(value).read_bytes() if os.path.isfile(value) else value.encode()
            digest.update(f"\0{name}\0".encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def record(self) -> Record | None:
        """The record of this very configuration; none if the folder holds no such thing."""
        try:
            record = Record(**json.loads((self.folder / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return record if record.key == self.key() else None

    def results(self) -> Mapping[str, Any] | None:
        """What `results.json` says, if the run is done; `start` removes old ones, so they count unless it failed."""
        record, path = self.record(), self.folder / "results.json"
        if record is None or record.error not in (None, STOPPED) or not path.is_file():
            return None
        return whole_results(path)

    def start(self) -> Record:
        """Make the folder ready: go on with an attempt of the same configuration, move anything else aside."""
        record = self.record()
        if record is None and self.folder.exists():
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.{time.time_ns()}"))
        (self.folder / "results.json").unlink(missing_ok=True)
        return self.write(replace(record, error=STOPPED) if record else Record(self.key()))

    def write(self, record: Record) -> Record:
        """Leave the record in the folder."""
        write_text(self.folder / "run.json", json.dumps(asdict(record), indent=1) + "\n")
        return record

    def command(self) -> list[str]:
        """The command line, which resumes where there is a checkpoint."""
        command = [sys.executable, str(TRAIN), "fit", *self.arguments, "--root", str(self.root)]
        last = self.folder / "checkpoints" / "last.ckpt"
        return [*command, "--ckpt_path", str(last)] if last.is_file() else command


def execute(run: Run) -> Record:
    """Run a child process to its end; what stops this process stops the child, and leaves a record of it."""
    record, began, log = run.start(), time.monotonic(), run.folder / "log.txt"
    try:
        code, peak = wait(run.command(), log)
        error = None if code == 0 and (run.folder / "results.json").is_file() else reason(code, log)
        record = replace(record, error=error, peak_gb=max(peak, record.peak_gb or 0))
    finally:
        record = run.write(replace(record, seconds=round(record.seconds + time.monotonic() - began, 1)))
    return record


def reason(code: int, log: Path) -> str:
    """Why a child failed, in a line: the signal that ended it, or the last thing it said."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    silent = f"ended with exit code {code}"
    return "ended without results: not an adaptation?" if code == 0 else (errors or lines or [silent])[-1]


def wait(command: list[str], log: Path) -> tuple[int, float]:
    """Exit code and peak memory in GB of a child whose output goes to a file."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # so that the log can be followed
    with log.open("wb") as output:
        # In a group of its own: workers of the child are stopped with it, and Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            command, 0, None, subprocess.DEVNULL, output, subprocess.STDOUT, partial(die_with, os.getpid()),
            env=environment, process_group=0,
        )  # fmt: skip
    try:
        # A child's peak is at least its parent's size, which here is that of the imports that every child makes too.
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        _stop(process)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def die_with(parent: int) -> None:
    """In a child: be killed when the parent is, lest its successor find somebody else at work in a run's folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # which died before the system was told
            os.kill(os.getpid(), signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and its workers: first with a request, in the end by force."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:  # also on a second Ctrl-C
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
