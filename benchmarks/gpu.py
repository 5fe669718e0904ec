"""Everything that needs a GPU: `python -m benchmarks.gpu`, its tests first, then time and memory there.

Says in a sentence where there is none. Steps run in bfloat16 autocast; deltas, sums and coefficients in float32. What a
part prints says for itself where it is otherwise: routed layers alone (`compositions`) run in float32.
"""

import platform
import subprocess
import sys
from datetime import date

import torch
from rich.console import Console

COMMANDS = (
    "pytest -q -m gpu",
    "benchmarks.adaptation_step --device cuda",
    "benchmarks.adaptation_step --device cuda --size ViT-B/16",
    "benchmarks.adaptation_step --device cuda --size ViT-L/14",
    "benchmarks.scaling --device cuda --only step experts storage memory evaluation --repeats 5",
    "benchmarks.scaling --device cuda --only step memory evaluation --size ViT-B/16 --repeats 5",
    "benchmarks.scaling --device cuda --only step memory evaluation --size ViT-L/14 --repeats 5",
    "benchmarks.scaling --device cuda --only large --size ViT-L/14 --place memory",
    "benchmarks.scaling --device cuda --only large --size ViT-L/14 --place host",
    "benchmarks.compositions --device cuda",
    "benchmarks.teachers --device cuda",
    "benchmarks.idle --device cuda",
    "benchmarks.idle --device cuda --size ViT-L/14",
    "train fit --config configs/quickstart.yaml --name gpu --trainer.accelerator gpu --trainer.devices 1",
)


def main() -> None:
    """Say where it runs, and run everything; ends with the number of what failed."""
    console = Console(soft_wrap=True, highlight=False)
    if not torch.cuda.is_available():
        console.print(
            f"no CUDA device on this machine (torch {torch.__version__}): nothing was run, and nothing measured"
        )
        return
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}"
    console.print(f"{torch.cuda.get_device_name()}, {versions}, {date.today():%d %B %Y}")
    failed = []
    for command in COMMANDS:
        console.print(f"\npython -m {command}")
        if subprocess.run([sys.executable, "-m", *command.split()]).returncode:
            failed.append(command)
    for command in failed:
        console.print(f"failed: python -m {command}")
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
