"""The command line: `adamerge merge`, `inspect`, `fold`, `compress` and `expand`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from adamerge.recipes import Job


def parser() -> ArgumentParser:
    """What can be asked for."""
    top = ArgumentParser(prog="adamerge", description="Merge experts that were fine-tuned from one base model.")
    commands = top.add_subcommands(dest="command")
    merging = ArgumentParser(
        description="Merge experts as a recipe says, piece by piece, into a folder that from_pretrained opens. When it "
        "was interrupted, the same command goes on where it stopped."
    )
    merging.add_argument("recipe", type=Path, help="a YAML file of this project's kind, or of mergekit's")
    merging.add_argument("--output", type=Path, help="the folder to write: one that does not exist, or is empty")
    merging.add_argument("--dry-run", action="store_true", help="say what would be done; read and write no weights")
    commands.add_subcommand("merge", merging, help="merge experts as a recipe says")
    looking = ArgumentParser(
        description="Look into the experts of a recipe before they are merged: cosines, norms, signs and spectra by "
        "block, which pair fights, what a merge takes and which rule is worth trying."
    )
    looking.add_argument("recipe", type=Path, help="a YAML file as `merge` takes it; its rules are not applied")
    looking.add_argument("--output", type=Path, help="the folder for report.txt, report.json and figures")
    looking.add_argument("--matrices", type=int, default=32, help="how many to decompose, evenly from first to last")
    commands.add_subcommand("inspect", looking, help="look into the experts of a recipe")
    folding = ArgumentParser(
        description="Let an expert join a merge without the experts that are in it already. What made the merge is "
        "read from its adamerge.json, where that says."
    )
    folding.add_argument("merged", type=str, help="the merge so far: a folder")
    folding.add_argument("expert", type=str, help="the expert that joins it: a folder, a file or a Hub id")
    folding.add_argument("--base", type=str, required=True, help="the base model of all of them")
    folding.add_argument("--output", type=Path, help="the folder to write: one that does not exist, or is empty")
    folding.add_argument("--rule", type=str | None, help="that made the merge so far: Mean, TaskArithmetic or MagMax")
    folding.add_argument("--count", type=int | None, help="how many experts are in it")
    folding.add_argument("--scale", type=float | None, help="the scale that it was made with")
    folding.add_argument("--dry-run", action="store_true", help="say what would be done; read and write no weights")
    commands.add_subcommand("fold", folding, help="let an expert join a merge")
    packing = ArgumentParser(
        description="Write the experts of a recipe to one small file, as rules such as TallMask, Emr, OneBit and "
        "ComPeft make them: one model per task, of which `expand` makes a folder again."
    )
    packing.add_argument("recipe", type=Path, help="a YAML file as `merge` takes it, whose rules combine nothing")
    packing.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    commands.add_subcommand("compress", packing, help="write experts in few bits")
    unpacking = ArgumentParser(
        description="Write one expert of a compressed file as a folder that from_pretrained opens."
    )
    unpacking.add_argument("compressed", type=Path, help="the file that `compress` wrote")
    unpacking.add_argument("task", type=str, help="the expert, by its name in the recipe")
    unpacking.add_argument("--base", type=str, required=True, help="the base model: a folder, a file or a Hub id")
    unpacking.add_argument("--output", type=Path, required=True, help="the folder to write")
    commands.add_subcommand("expand", unpacking, help="write one of them as a folder")
    return top


def merge(recipe: Path, output: Path | None, dry_run: bool) -> None:
    """Merge as a recipe says."""
    # torch takes seconds to import, which --help can do without.
    from adamerge.files import expanded
    from adamerge.recipes import read

    carry_out(lambda: read(expanded(recipe)), output, dry_run)


def fold(
    merged: str,
    expert: str,
    base: str,
    output: Path | None,
    rule: str | None,
    count: int | None,
    scale: float | None,
    dry_run: bool,
) -> None:
    """Let an expert join a merge."""
    from adamerge.folding import fold_job

    carry_out(lambda: fold_job(merged, expert, base, rule, count, scale), output, dry_run)


def carry_out(read: Callable[[], "Job"], output: Path | None, dry_run: bool) -> None:
    """Check a job, say what it is going to do and, unless that is all, do it."""
    from rich.console import Console

    from adamerge.errors import InputError
    from adamerge.files import expanded
    from adamerge.preflight import report
    from adamerge.running import run

    console = Console(stderr=True)
    with _told():
        job = read()
        output = output and expanded(output)
        if output is None and not dry_run:
            raise InputError("name the folder to write: --output merged/")
        console.print(report(job, output))
        if output is not None and not dry_run:
            console.print(f"merged into {run(job, output, console)}", highlight=False)


def compress(recipe: Path, output: Path) -> None:
    """Write experts in few bits."""
    from rich.filesize import decimal

    from adamerge import packing
    from adamerge.files import expanded
    from adamerge.recipes import read

    with _told():
        path = packing.compress(read(expanded(recipe)), expanded(output))
        _say(f"written to {path}: {decimal(path.stat().st_size)}")


def expand(compressed: Path, task: str, base: str, output: Path) -> None:
    """Write one of them as a folder."""
    from adamerge import packing
    from adamerge.files import expanded

    with _told():
        _say(f"written into {packing.expand(expanded(compressed), task, base, expanded(output))}")


def inspect(recipe: Path, output: Path | None, matrices: int) -> None:
    """Look into the experts of a recipe, and say what is found."""
    from rich.console import Console

    from adamerge.files import expanded
    from adamerge.inspecting import report
    from adamerge.recipes import read

    console = Console(stderr=True)
    with _told():
        found = report.inspect(read(expanded(recipe)), matrices, console)
        Console().print(report.show(found))
        if output is not None:
            report.write(found, expanded(output))
            _say(f"written into {output}")


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong in the block is said in a sentence, and ends the program."""
    from rich.console import Console

    from adamerge.errors import InputError

    try:
        yield
    except (InputError, OSError) as error:  # no right to write somewhere, for example
        console = Console(stderr=True)
        console.print("error:", style="bold red", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _say(words: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(words, highlight=False, soft_wrap=True)


def main() -> None:
    """What the console script `adamerge` runs."""
    asked = parser().parse_args()
    commands: dict[str, Callable[..., Any]] = {
        "merge": merge,
        "inspect": inspect,
        "fold": fold,
        "compress": compress,
        "expand": expand,
    }
    commands[asked.command](**{key: value for key, value in asked[asked.command].as_dict().items() if key != "config"})


if __name__ == "__main__":
    main()
