"""What all tests share: a seed, tiny experts, the reference data beside the checkout, and no network."""

import os
from pathlib import Path

# Before torch and huggingface_hub are imported, and for the processes that tests start as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors this small only wait for further threads: 10 times as long
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from torch import Tensor, nn

from adamerge import TaskVectors

State = dict[str, Tensor]

ROOT = Path(__file__).resolve().parents[1]
#: Reference numbers and real images: beside the checkout where they are, and no part of the project.
SHARED = ROOT.parent / "shared"
TASKS = ("digits", "letters", "signs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    no_shared = pytest.mark.skip(reason="no folder `shared` beside the checkout")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "shared" in getattr(item, "fixturenames", ()) and not SHARED.is_dir():
            item.add_marker(no_shared)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder with `parity/` and `data/`; tests that ask for it are skipped where there is none."""
    return SHARED


@pytest.fixture
def model() -> nn.Module:
    """Two linear layers in float64, with values of few bits: their sums and differences are exact."""
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    network.load_state_dict({name: few_bits(value) for name, value in network.state_dict().items()})
    return network


@pytest.fixture
def base(model: nn.Module) -> State:
    """The state dict of `model`."""
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def experts(base: State) -> dict[str, State]:
    """Three experts near the base, by task."""
    return {task: moved(base, seed) for seed, task in enumerate(TASKS, 1)}


@pytest.fixture
def tv(base: State, experts: dict[str, State]) -> TaskVectors:
    """Base and experts as task vectors."""
    return TaskVectors.from_state_dicts(base, experts)


def moved(state: State, seed: int) -> State:
    """The state with a little noise on every float."""
    rng = torch.Generator().manual_seed(seed)
    noise = {
        name: few_bits(0.1 * torch.randn(v.shape, generator=rng, dtype=torch.float64)) for name, v in state.items()
    }
    return {n: v + noise[n].to(v.dtype) if v.is_floating_point() else v.clone() for n, v in state.items()}


def few_bits(values: Tensor) -> Tensor:
    """Rounded to multiples of 1/1024."""
    return (values * 1024).round() / 1024
