"""Inner products, norms and signs of task vectors, against loops over numbers."""

import itertools
import math

import pytest
import torch
from safetensors.torch import save_file

from adamerge import TaskVectors, differences
from adamerge.inspecting import measure

BASE = {"layers.0.weight": (4, 3), "layers.0.bias": (4,), "layers.1.weight": (4, 4), "head.scale": ()}


def states(experts: int = 3) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in BASE.items()}
    base["steps"] = torch.tensor(7)
    changed = {
        f"task{k}": {
            n: v + torch.randn(v.shape, generator=generator) if v.is_floating_point() else v for n, v in base.items()
        }
        for k in range(experts)
    }
    return base, changed


def vectors_of(*deltas: list[float]) -> TaskVectors:
    base = {"layers.0.weight": torch.zeros(len(deltas[0]))}
    experts = {f"task{k}": {"layers.0.weight": torch.tensor(delta)} for k, delta in enumerate(deltas)}
    return TaskVectors.from_state_dicts(base, experts)


def entries(tv: TaskVectors, k: int, block: str = "") -> list[float]:
    return [x for name in tv.deltas if name.startswith(block) for x in tv.deltas[name][k].flatten().tolist()]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def test_tables_of_pairs_are_those_of_the_flat_vectors():
    tv = TaskVectors.from_state_dicts(*states())
    found = measure(tv)
    assert found.blocks == ("layers.0", "layers.1", "head")
    for i, j in itertools.product(range(3), repeat=2):
        a, b = entries(tv, i), entries(tv, j)
        norms = math.hypot(*a), math.hypot(*b)
        assert found.cosine[i, j].item() == pytest.approx(dot(a, b) / norms[0] / norms[1])
        assert found.distance[i, j].item() == pytest.approx(math.dist(a, b), abs=1e-6)
        block = entries(tv, i, "layers.1"), entries(tv, j, "layers.1")
        cosine = dot(*block) / math.hypot(*block[0]) / math.hypot(*block[1])
        assert found.cosines[1, i, j].item() == pytest.approx(cosine)
        noise = math.hypot(*(x * y for x, y in zip(*block, strict=True)))
        assert found.noise[1, i, j].item() == pytest.approx(noise / math.hypot(*block[0]) / math.hypot(*block[1]))
    flat = torch.tensor([entries(tv, k) for k in range(3)], dtype=torch.float64)
    torch.testing.assert_close(found.kinship, torch.corrcoef(flat))
    torch.testing.assert_close(found.reach, (flat @ flat.sum(0)) / flat.square().sum(1))
    size = math.hypot(*(x for name in BASE for x in tv.base[name].flatten().tolist()))
    assert found.relative[0].item() == pytest.approx(math.hypot(*entries(tv, 0)) / size)


def test_signs_are_counted_and_weighed():
    found = measure(vectors_of([1.0, -1.0, 0.0, 2.0], [2.0, -1.0, 3.0, -0.5], [4.0, 2.0, 0.0, 0.0]))
    # By count: entry 1 has a minority of one, expert 2; entry 3 is divided evenly, so that each has half of it against.
    assert found.against[0].tolist() == [0.5, 0.5, 1.0]
    assert found.changed[0].tolist() == [3, 4, 2]
    # By size: entry 1 sums to 0 and counts half, in entry 3 expert 1 goes against the sum.
    assert found.against_mass[0].tolist() == [0.5, 0.5 + 0.5, 1.0]
    assert found.mass[0].tolist() == [4, 6.5, 6]
    assert found.signs[0].tolist() == [[3, 1, 0], [1, 4, 0], [0, 0, 2]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_chance_is_the_minority_of_all_ways_to_toss_coins(count):
    found = measure(vectors_of(*([1.0] for _ in range(count)))).chance
    ways = list(itertools.product([0, 1], repeat=count))
    assert found == pytest.approx(sum(min(sum(way), count - sum(way)) for way in ways) / len(ways) / count)


def test_identical_and_opposite_experts():
    same, opposite = measure(vectors_of([1.0, 2.0], [1.0, 2.0])), measure(vectors_of([1.0, 2.0], [-1.0, -2.0]))
    torch.testing.assert_close(same.cosine, torch.ones(2, 2, dtype=torch.float64))
    assert same.against_mass.sum() == 0
    assert same.reach.tolist() == pytest.approx([2, 2])
    assert opposite.cosine[0, 1].item() == pytest.approx(-1)
    assert (opposite.against_mass / opposite.mass).tolist() == [[0.5, 0.5]]
    assert opposite.reach.tolist() == [0, 0]


def test_what_is_read_from_files_in_pieces_is_what_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(differences, "PIECE", 5)
    base, experts = states()
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    lazy = TaskVectors.open(tmp_path / "base.safetensors", {n: tmp_path / f"{n}.safetensors" for n in experts})
    told: list[int] = []
    streamed, loaded = measure(lazy, told.append), measure(lazy.load())
    assert len(told) > len(BASE)
    assert sum(told) == sum(math.prod(shape) for shape in BASE.values())
    for name, value in vars(loaded).items():
        assert torch.equal(value, getattr(streamed, name)) if isinstance(value, torch.Tensor) else True


@pytest.mark.filterwarnings("ignore:expert .* is identical to the base")
def test_nothing_changed_and_one_expert_that_did_not_change():
    base, experts = states(2)
    still = measure(TaskVectors.from_state_dicts(base, {"a": base, "b": base}))
    assert still.blocks == ()
    assert still.cosine.tolist() == [[0, 0], [0, 0]]
    half = measure(TaskVectors.from_state_dicts(base, {"a": base, "b": experts["task0"]}))
    assert half.cosine[0].tolist() == [0, 0]
    assert half.reach[0].item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision(dtype):
    base, experts = states(2)
    cast = lambda state: {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}  # noqa: E731
    found = measure(TaskVectors.from_state_dicts(cast(base), {name: cast(state) for name, state in experts.items()}))
    whole = measure(TaskVectors.from_state_dicts(base, experts))
    torch.testing.assert_close(found.cosine, whole.cosine, atol=0.03, rtol=0)
