"""Kernels against torch's own operations: interpreted on the CPU, compiled for a GPU, and run where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from adamerge import ops
from adamerge.deltas import mapped
from adamerge.stored import Stored

pytest.importorskip("triton", reason="no Triton")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("interpreted.py")
LONG, FLOAT = "*i64", "*fp32"
TILES = {"table": LONG, "owners": LONG}
SIGNATURES = {
    "_merge": {"out": FLOAT, **TILES, "coefficients": FLOAT},
    "_contract": {"partial": FLOAT, "grads": LONG, **TILES},
    "_add": {"out": FLOAT, "partial": FLOAT, "table": LONG},
}


def test_interpreted_they_give_the_sums_and_gradients_of_float64():
    interpret(SCRIPT)


def test_interpreted_they_serve_merged_models_as_torch_does():
    # what is left out is in double precision, or waits for many tiles
    chosen = "not TestEveryArchitecture and not columns_merge_as_the_file"
    files = [ROOT / "tests" / "modules" / name for name in ("interpreted.py", "test_merged.py")]
    interpret("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-k", chosen, *files)


def interpret(*command: str | Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNATURES)
def test_they_compile_for_a_gpu_that_is_not_there(name, tmp_path, monkeypatch):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adamerge import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"experts": 8, "entries": kernels.TILE, **({"chunk": kernels.CHUNK} if name == "_add" else {})}
    signature = {**SIGNATURES[name], **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(getattr(kernels, name), signature, constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=kernels._OPTIONS)
    assert made.asm["cubin"]
    # sixteen entries in 8 bits at once: what makes them faster than those of more bits
    assert ("ld.global.v4.b32" in made.asm["ptx"]) == (name != "_add")


def test_on_a_cpu_nobody_asks_for_them():
    assert not ops._in_kernels(torch.ones(3), torch.ones(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "mixed"])
def test_on_a_gpu_they_give_what_torch_gives(form):
    bases = [torch.randn(shape) for shape in ((), (5,), (300, 70), (768, 3072))]
    dense = [torch.randn(8, *base.shape).bfloat16().float() for base in bases]
    forms = [torch.float32, torch.bfloat16, torch.int8, torch.int8] if form == "mixed" else [getattr(torch, form)] * 4
    stored = [Stored.from_dense(delta, dtype) for delta, dtype in zip(dense, forms, strict=True)]
    found = []
    for device in ("cpu", "cuda"):
        rows = torch.linspace(-1, 1, 8 * len(bases)).view(-1, 8).to(device).requires_grad_()
        deltas = dense if form == "float32" else stored
        deltas = [mapped(lambda tensor: tensor.to(device), delta) for delta in deltas]  # noqa: B023
        assert all(map(ops._in_kernels, [base.to(device) for base in bases], deltas)) == (device == "cuda")
        merged = ops.weighted_sums(rows.unbind(), [base.to(device) for base in bases], deltas)
        torch.stack([part.square().sum() for part in merged]).sum().backward()
        found.append((merged, rows.grad))
    (merged, grad), (there, right) = found
    assert_close([part.cpu() for part in there], merged, rtol=1e-5, atol=1e-5)
    assert_close(right.cpu(), grad, rtol=1e-4, atol=1e-2)
