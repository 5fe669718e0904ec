"""Everything that needs a GPU: `python -m benchmarks.gpu`, its tests first, then time and memory there.

Says in a sentence where there is none. Steps run in bfloat16 autocast; deltas, sums and coefficients in float32.
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
    "benchmarks.scaling --device cuda --only step experts memory evaluation --repeats 5",
    "benchmarks.scaling --device cuda --only step memory --size ViT-L/14 --repeats 5",
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
    failed = [command for command in COMMANDS if subprocess.run([sys.executable, "-m", *command.split()]).returncode]
    for command in failed:
        console.print(f"failed: python -m {command}")
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
