"""Files of an earlier version are read as they were meant."""

import sys
from pathlib import Path

import torch

from adamerge import read_coefficients
from adamerge.compressed import open_compressed
from adamerge.rules import Emr, transform
from modules import Coefficients
from trainers import Adaptation

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from make import GoldenSuite  # noqa: E402


def test_a_checkpoint_is_restored_and_resumed(adapt):
    module = Adaptation(GoldenSuite(), Coefficients("tensor")).restore(GOLDEN / "run.ckpt")
    table, old = module.coefficients.table(), read_coefficients(GOLDEN / "coefficients.json")
    assert table.rows == old.rows
    assert old.fingerprints == module.merged.fingerprints
    begun = Adaptation(GoldenSuite(), Coefficients("tensor"))
    begun.configure_model()
    assert not torch.equal(module.coefficients.raw, begun.coefficients.raw)
    resumed, trainer = adapt(steps=5, suite=GoldenSuite(), ckpt_path=str(GOLDEN / "run.ckpt"))
    assert trainer.global_step == 5
    assert resumed.coefficients.raw.isfinite().all()


def test_compressed_experts_are_opened():
    found = open_compressed(GOLDEN / "experts.safetensors", GOLDEN / "base.safetensors")
    expected = transform(GoldenSuite().task_vectors(), [Emr()])
    assert found.tasks == expected.tasks == ("one", "two", "three")
    for task in found.tasks:
        for name, value in expected.expert(task).items():
            torch.testing.assert_close(found.expert(task)[name], value)
