"""Writes the files beside it, which later versions must go on reading: `python tests/trainers/golden/make.py`.

They were made by version 0.1 of the formats. Made anew they would prove nothing: new kinds are to be added.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent)]

import lightning as L  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_suite import TinySuite  # noqa: E402
from torch import Tensor  # noqa: E402

from adamerge import TaskVectors, write_coefficients  # noqa: E402
from adamerge.compressed import save_compressed  # noqa: E402
from adamerge.rules import Emr, transform  # noqa: E402
from modules import Coefficients  # noqa: E402
from trainers import Adaptation, Stream  # noqa: E402


class GoldenSuite(TinySuite):
    """The tiny suite with weights that no generator of random numbers has a part in."""

    def task_vectors(self) -> TaskVectors:
        def pattern(period: int, scale: float) -> dict[str, Tensor]:
            state = self.backbone().state_dict()
            return {n: scale * (torch.arange(x.numel()) % period - period // 2).view_as(x) for n, x in state.items()}

        base = pattern(7, 1 / 8)
        changes = [pattern(period, 1 / 16) for period in (3, 5, 11)]
        pairs = zip(self.tasks, changes, strict=True)
        return TaskVectors.from_state_dicts(base, {t: {n: base[n] + c[n] for n in base} for t, c in pairs})


def main() -> None:
    """Adapt for three steps, and write what came of it."""
    torch.manual_seed(0)
    module = Adaptation(GoldenSuite(), Coefficients("tensor"))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_steps=3, accelerator="cpu", limit_val_batches=0, default_root_dir=HERE, **quiet)
    trainer.fit(module, datamodule=Stream(batch_size=4))
    trainer.save_checkpoint(HERE / "run.ckpt")
    write_coefficients(module.coefficients.table(module.merged.fingerprints), HERE / "coefficients.json")
    vectors = GoldenSuite().task_vectors()
    save_compressed(transform(vectors, [Emr()]), HERE / "experts.safetensors")
    save_file(dict(vectors.base), HERE / "base.safetensors")


if __name__ == "__main__":
    main()
