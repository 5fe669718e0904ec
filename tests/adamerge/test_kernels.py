"""Kernels against torch's own operations: interpreted on the CPU, compiled for a GPU, and run where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from adamerge import ops
from adamerge.stored import Stored

pytest.importorskip("triton", reason="no Triton")

SCRIPT = Path(__file__).with_name("interpreted.py")
LONG, FLOAT = "*i64", "*fp32"
TABLES = {"deltas": LONG, "halves": "*i32", "sizes": LONG, "owners": LONG, "offsets": LONG}
SIGNATURES = {
    "_merge": {"out": FLOAT, "starts": LONG, "bases": LONG, "coefficients": FLOAT, **TABLES},
    "_contract": {"partial": FLOAT, "grads": LONG, **TABLES},
    "_add": {"out": FLOAT, "partial": FLOAT, "firsts": LONG},
}


def test_interpreted_they_give_the_sums_and_gradients_of_float64():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNATURES)
def test_they_compile_for_a_gpu_that_is_not_there(name, tmp_path, monkeypatch):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from adamerge import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"experts": 8, **({"chunk": kernels.CHUNK} if name == "_add" else {"entries": kernels.TILE})}
    signature = {**SIGNATURES[name], **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(getattr(kernels, name), signature, constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=kernels._OPTIONS)
    assert made.asm["cubin"]


def test_on_a_cpu_nobody_asks_for_them():
    assert not ops._in_kernels(torch.ones(3), torch.ones(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_on_a_gpu_they_give_what_torch_gives(half):
    bases = [torch.randn(shape) for shape in ((), (5,), (300, 70), (768, 3072))]
    dense = [torch.randn(8, *base.shape).bfloat16().float() for base in bases]
    found = []
    for device in ("cpu", "cuda"):
        rows = torch.linspace(-1, 1, 8 * len(bases)).view(-1, 8).to(device).requires_grad_()
        deltas = [delta.to(device) for delta in dense]
        deltas = [Stored.from_dense(delta, torch.bfloat16) for delta in deltas] if half else deltas
        assert all(map(ops._in_kernels, [base.to(device) for base in bases], deltas)) == (device == "cuda")
        merged = ops.weighted_sums(rows.unbind(), [base.to(device) for base in bases], deltas)
        torch.stack([part.square().sum() for part in merged]).sum().backward()
        found.append((merged, rows.grad))
    (merged, grad), (there, right) = found
    assert_close([part.cpu() for part in there], merged, rtol=1e-5, atol=1e-5)
    assert_close(right.cpu(), grad, rtol=1e-4, atol=1e-2)
