"""Experts in few bits from the command line: a recipe's into one file, and one of them into a folder again."""

from pathlib import Path

from safetensors.torch import save_file

from adamerge.compressed import open_compressed, save_compressed
from adamerge.errors import InputError
from adamerge.files import replacing
from adamerge.recipes import Job, locate
from adamerge.rules import Transform, transform
from adamerge.rules.base import check_transforms
from adamerge.running import check_output, copy_companions


def compress(job: Job, output: Path) -> Path:
    """Write the experts of a recipe, transformed by its rules, to one file; see `save_compressed`.

    Raises:
        InputError: for rules that combine experts or correct a merge, for what only a merge has (scale, exclude, ...),
            and for a file that is there already.
    """
    steps = [step for step in job.rules if isinstance(step, Transform)]
    if odd := [type(step).__name__ for step in job.rules if step not in steps]:
        raise InputError(f"{odd[0]} makes one model of all experts: leave it out, or use `adamerge merge`")
    if job.scale != 1.0 or job.exclude or job.dtype or job.split_fused_qkv:
        raise InputError("scale, exclude, dtype and split_fused_qkv are about merges: leave them out of this recipe")
    check_transforms(steps)
    if output.exists():
        raise InputError(f"{output} exists already: name another file, or remove it first")
    return save_compressed(transform(job.task_vectors, steps), output)


def expand(compressed: Path, task: str, base: str, output: Path) -> Path:
    """Write one expert of a file that `compress` made as a folder that `from_pretrained` opens.

    Args:
        compressed: the file.
        task: the expert's name.
        base: folder, file or Hub id of the base model, whose config, tokenizer and processor files go along.
        output: a folder that does not exist, or is empty.

    Raises:
        InputError: for a place that is taken, for an expert that is not there, and as `open_compressed`.
    """
    check_output(output)
    where = locate(base, Path())
    vectors = open_compressed(compressed, where)
    state = {name: tensor.contiguous() for name, tensor in vectors.expert(task).items() if name not in vectors.tied}
    with replacing(output / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    if where.is_dir():
        copy_companions(where, output, {})
    return output
