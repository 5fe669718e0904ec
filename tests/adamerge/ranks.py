"""Run by a test as one of two processes: `python ranks.py RANK FILE`. What each checks, it checks with the other."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from adamerge import TaskVectors
from adamerge.ops import inner, weighted
from adamerge.rules import Store
from modules import Coefficients, MergedModel

WORLD, TASKS = 2, 3


def vectors(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, TaskVectors]:
    """The same on both processes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5)).to(dtype)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    deltas = {name: 0.1 * torch.randn(TASKS, *value.shape, dtype=dtype) for name, value in base.items()}
    return model, TaskVectors(base, deltas, ("a", "b", "c"), fingerprints={})


def sums(rank: int) -> None:
    """Sums are those of the whole; products are with the mean of the processes' gradients."""
    _, whole = vectors()
    for dtype, exact in (("same", 1e-13), ("bfloat16", 1e-2), ("int8", 1e-2)):
        parts = Store(dtype, "processes")(whole)
        for name, deltas in whole.deltas.items():
            part = parts.deltas[name]
            assert part.any()
            assert part.map(lambda tensor: tensor.float()).dtype == torch.float32
            coefficients, grads = torch.randn(2, TASKS).double(), torch.randn(WORLD, 2, *deltas.shape[1:]).double()
            for rows, own in ((coefficients, grads), (coefficients[0], grads[:, 0])):
                assert_close(weighted(rows, part), weighted(rows, deltas), rtol=exact, atol=exact)
                mean = inner(own.mean(0), deltas)
                assert_close(inner(own[rank], part), mean, rtol=exact, atol=10 * exact)
            assert_close(part.dense(), deltas, rtol=exact, atol=exact)


def held() -> None:
    """Each process holds half of the entries, one more where they are odd."""
    _, whole = vectors()
    for name, part in Store("same", "processes")(whole).deltas.items():
        count = whole.base[name].numel()
        assert part.nbytes == 8 * TASKS * -(-count // WORLD)
        assert part.part.untyped_storage().nbytes() == part.nbytes


def exchanged(rank: int) -> None:
    """What DDP sends of a merged model is the gradient of λ, and it is that of one process with all images."""
    model, whole = vectors()
    images = torch.randn(8, 6).double()
    alone = MergedModel(model, whole, Coefficients())
    alone(images).square().mean().backward()
    for given in (whole, Store("same", "processes")(whole)):
        merged, sent = MergedModel(model, given, Coefficients()), []
        parallel = DistributedDataParallel(merged)

        def hook(state, bucket, sent=sent):
            sent.append(bucket.buffer().nbytes)
            return allreduce_hook(state, bucket)

        parallel.register_comm_hook(None, hook)
        parallel(images[rank::WORLD]).square().mean().backward()
        assert_close(merged.coefficients.raw.grad, alone.coefficients.raw.grad, rtol=1e-12, atol=1e-12)
        assert sum(sent) == merged.coefficients.raw.nbytes == 8 * TASKS * 4


if __name__ == "__main__":
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=WORLD)
    sums(rank)
    held()
    exchanged(rank)
    dist.destroy_process_group()
