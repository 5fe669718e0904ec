"""Every method against loops over numbers, and tensors of any size."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from adamerge import differences, rules
from adamerge.merge import plan
from adamerge.mergekit import METHODS
from adamerge.mergekit.masks import largest
from adamerge.mergekit.methods import combined
from adamerge.rules import sphere
from adamerge.rules.random import generator


def each(tensors: list[Tensor], function: Callable[..., float]) -> Tensor:
    """A function of the numbers at one place, applied to every place."""
    values = [function(*numbers) for numbers in zip(*(t.flatten().tolist() for t in tensors), strict=True)]
    return torch.tensor(values, dtype=torch.float64).view(tensors[0].shape)


def close(merged: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(merged) == sorted(expected)
    for name, value in expected.items():
        assert_close(merged[name], value, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


WEIGHTED = """
models:
  - model: one
    parameters: {{weight: 1.0, density: 0.5{own}}}
  - model: two
    parameters: {{weight: 0.5, density: 0.4{own}}}
  - model: three
    parameters: {{weight: {last}, density: 0.9{own}}}
merge_method: {method}
base_model: zero
parameters: {{lambda: 0.7{shared}}}
"""


def weighted(method: str, own: str = "", shared: str = "", last: float = 0.25) -> str:
    return WEIGHTED.format(method=method, own=own, shared=shared, last=last)


WEIGHTS, DENSITIES = (1.0, 0.5, 0.25), (0.5, 0.4, 0.9)


def test_models_in_the_home_folder(models, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = (
        "models: [{model: one, parameters: {weight: 1}}, {model: two, parameters: {weight: 3}}]\nmerge_method: linear"
    )
    close(run(plain.replace("one", "~/one").replace("two", "~/two")), run(plain))


# -- the methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(models, normalize, run):
    text = f"""
models: [{{model: one, parameters: {{weight: 1}}}}, {{model: two, parameters: {{weight: 0.5}}}}]
merge_method: linear
parameters: {{normalize: {str(normalize).lower()}}}
"""
    total = 1.5 if normalize else 1
    expected = {
        name: each([models["one"][name], models["two"][name]], lambda a, b: (a + 0.5 * b) / total)
        for name in models["zero"]
    }
    close(run(text), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(models, normalize, run):
    expected = {}
    total = sum(WEIGHTS) if normalize else 1
    for name in models["zero"]:
        tensors = [models[model][name] for model in ("zero", "one", "two", "three")]
        expected[name] = each(
            tensors, lambda z, *e: z + 0.7 * sum(w * (x - z) for w, x in zip(WEIGHTS, e, strict=True)) / total
        )
    close(run(weighted("task_arithmetic", shared=f", normalize: {str(normalize).lower()}")), expected)


def elect(*numbers: float, weights: tuple[float, ...], normalize: bool) -> float:
    """One entry of a TIES merge, from the base's number and the deltas that are left of the experts."""
    base, *deltas = numbers
    votes = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = 1 if sum(votes) >= 0 else -1
    agree = [(w, v) for w, v in zip(weights, votes, strict=True) if v * sign > 0]
    divisor = sum(abs(w) for w, _ in agree) if normalize and agree else 1
    return base + 0.7 * sum(v for _, v in agree) / divisor


def kept(delta: Tensor, density: float) -> Tensor:
    """The largest entries, found by sorting."""
    order = sorted(range(delta.numel()), key=lambda i: -abs(delta.flatten()[i].item()))
    left = set(order[: max(1, int(density * delta.numel()))])
    flat = [x if i in left else 0.0 for i, x in enumerate(delta.flatten().tolist())]
    return torch.tensor(flat, dtype=torch.float64).view_as(delta)


def l1(sparse: Tensor, delta: Tensor) -> Tensor:
    return sparse * (delta.abs().sum() / sparse.abs().sum()) if sparse.any() else sparse


def merged_by(
    models, masked: Callable[..., Tensor], weights=WEIGHTS, normalize=False, elected=True
) -> dict[str, Tensor]:
    """What a method of the family gives that keeps `masked(delta, density, model, name)`."""
    expected = {}
    for name, base in models["zero"].items():
        triples = zip(("one", "two", "three"), DENSITIES, strict=True)
        deltas = [masked(models[model][name] - base, density, model, name) for model, density in triples]
        if elected:
            expected[name] = each([base, *deltas], lambda *n: elect(*n, weights=weights, normalize=normalize))
        else:
            total = sum(weights) if normalize else 1
            expected[name] = base + 0.7 * sum(w * d for w, d in zip(weights, deltas, strict=True)) / total
    return expected


@pytest.mark.parametrize(("normalize", "rescale"), list(itertools.product([True, False], repeat=2)))
def test_ties(models, normalize, rescale, run):
    shared = f", normalize: {str(normalize).lower()}, rescale: {str(rescale).lower()}, int8_mask: true"

    def masked(delta, density, model, name):
        return l1(kept(delta, density), delta) if rescale else kept(delta, density)

    close(run(weighted("ties", shared=shared)), merged_by(models, masked, normalize=normalize))


def test_ties_normalises_by_default_and_does_not_rescale(models, run):
    close(run(weighted("ties")), merged_by(models, lambda d, p, *_: kept(d, p), normalize=True))


def test_ties_keep_one_entry_at_least(models, run):
    """mergekit stops at tensors of so few entries."""
    text = "models: [{model: one, parameters: {weight: 1, density: 0.05}}]\nmerge_method: ties\nbase_model: zero"
    for name, value in run(text).items():
        assert int((value != models["zero"][name]).sum()) == 1
    assert all(torch.equal(v, models["zero"][n]) for n, v in run(text.replace("0.05", "0")).items())


def test_opposite_votes_elect_plus():
    deltas, weight = torch.tensor([[-1.0], [2.0]]), torch.tensor([[1.0], [0.5]])
    assert combined(deltas, weight, elect=True, normalize=False).tolist() == [1.0]


def test_negative_weights_keep_their_sign_where_ties_normalises(models, run, job):
    close(
        run(weighted("ties", last=-0.25)),
        merged_by(models, lambda d, p, *_: kept(d, p), weights=(1.0, 0.5, -0.25), normalize=True),
    )
    for method, shared, last, said in (
        ("ties", "", -0.25, True),
        ("ties", "", 0.25, False),
        ("ties", ", normalize: false", -0.25, False),
        ("dare_ties", "", -0.25, False),
        ("dare_ties", ", normalize: true", -0.25, True),
        ("dare_linear", ", normalize: true", -0.25, False),
    ):
        assert said == any("negative weights" in note for note in job(weighted(method, "", shared, last)).notes)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare(models, method, rescale, run):
    def masked(delta, density, model, name):
        drawn = torch.rand(delta.shape, generator=generator(3, model, name))
        sparse = torch.where(drawn < density, delta, 0.0)
        return l1(sparse, delta) if rescale else sparse

    expected = merged_by(models, masked, elected=method == "dare_ties")
    close(run(weighted(method, shared=f", rescale: {str(rescale).lower()}"), seed=3), expected)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della(models, method, run):
    def masked(delta, density, model, name):
        rows = delta if delta.dim() > 1 else delta[None]
        drawn = torch.rand(delta.shape, generator=generator(0, model, name)).view(rows.shape)
        out = torch.zeros_like(rows)
        for i, row in enumerate(rows.tolist()):
            for j, value in enumerate(row):
                rank = sorted(map(abs, row)).index(abs(value))
                if drawn[i, j] < density - 0.05 + 0.1 * rank / (len(row) - 1):
                    out[i, j] = value
        return l1(out.view_as(delta), delta)

    expected = merged_by(models, masked, elected=method == "della", normalize=method == "della")
    close(run(weighted(method, own=", epsilon: 0.05")), expected)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(models, method, run):
    def masked(delta, density, model, name):
        count = delta.numel()
        left = max(1, int(density * count))
        top = min(int(0.3 * count), count - left)
        order = sorted(range(count), key=lambda i: -abs(delta.flatten()[i].item()))[top : top + left]
        flat = [x if i in order else 0.0 for i, x in enumerate(delta.flatten().tolist())]
        return torch.tensor(flat, dtype=torch.float64).view_as(delta)

    expected = merged_by(models, masked, elected=method == "breadcrumbs_ties")
    close(run(weighted(method, own=", gamma: 0.3")), expected)


def test_breadcrumbs_leave_small_tensors_their_change(models, run):
    """mergekit drops it where γ · entries is below 1: at the default of 0.01, of every tensor here."""
    merged = run(weighted("breadcrumbs"))
    assert all(bool((merged[name] != models["zero"][name]).any()) for name in merged)


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    x, y = a.flatten().tolist(), b.flatten().tolist()
    norm_x, norm_y = math.hypot(*x), math.hypot(*y)
    cosine = sum(p * q for p, q in zip(x, y, strict=True)) / norm_x / norm_y
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    mix = [
        (math.sin((1 - t) * angle) * p + math.sin(t * angle) * q) / math.sin(angle) for p, q in zip(x, y, strict=True)
    ]
    return torch.tensor(mix, dtype=torch.float64).view_as(a)


@pytest.mark.parametrize("first", ["zero", "far"])
def test_slerp_goes_from_the_base_to_the_other(models, tmp_path, first, run, save):
    other = models["far"]
    second = "far" if first == "zero" else "zero"
    rows = f"models: [{{model: {first}}}, {{model: {second}}}]"
    close(
        run(rows + "\nmerge_method: slerp\nbase_model: zero\nparameters: {t: 0.3}"),
        {name: arc(models["zero"][name], other[name], 0.3) for name in other},
    )


def test_nuslerp_on_weights_and_about_a_base(models, tmp_path, run, save):
    other = models["far"]
    text = """
models: [{model: one, parameters: {weight: 3}}, {model: far, parameters: {weight: 1}}]
merge_method: nuslerp
"""
    close(run(text), {name: arc(models["one"][name], other[name], 0.25) for name in other})
    base = models["zero"]
    about = {n: base[n] + arc(models["one"][n] - base[n], other[n] - base[n], 0.25) for n in other}
    close(run(text + "base_model: zero"), about)


@pytest.mark.parametrize("row_wise", [False, True])
def test_nuslerp_by_rows_and_columns(models, tmp_path, row_wise, run, save):
    other = models["far"]
    text = f"""
models: [{{model: one, parameters: {{weight: 1}}}}, {{model: far, parameters: {{weight: 1}}}}]
merge_method: nuslerp
parameters: {{nuslerp_flatten: false, nuslerp_row_wise: {str(row_wise).lower()}}}
"""
    expected = {}
    for name, b in other.items():
        a = models["one"][name]
        if a.dim() == 1:
            expected[name] = arc(a, b, 0.5)
        elif row_wise:
            expected[name] = torch.stack([arc(a[:, j], b[:, j], 0.5) for j in range(a.shape[1])], 1)
        else:
            expected[name] = torch.stack([arc(a[i], b[i], 0.5) for i in range(a.shape[0])])
    close(run(text), expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("base", ["", "\nbase_model: zero"])
def test_multislerp_is_the_mean_direction_at_the_mean_length(models, run, base, normalize):
    weights = {"one": 0.5, "two": 1.0, "three": 0.25}
    rows = ", ".join(f"{{model: {name}, parameters: {{weight: {weight}}}}}" for name, weight in weights.items())
    text = f"models: [{rows}]\nmerge_method: multislerp\nparameters: {{normalize_weights: {str(normalize).lower()}}}"
    merged = run(text + base)
    for name, zero in models["zero"].items():
        about = zero if base else torch.zeros_like(zero)
        vectors = {model: (models[model][name] - about).flatten().tolist() for model in weights}
        total = sum(weights.values()) if normalize else 1
        shares = {model: weight / total for model, weight in weights.items()}
        lengths = {model: math.hypot(*vector) for model, vector in vectors.items()}
        mean = [
            sum(shares[model] * vectors[model][i] / lengths[model] for model in weights) for i in range(zero.numel())
        ]
        length = sum(shares[model] * lengths[model] for model in weights)
        expected = [value / math.hypot(*mean) * length for value in mean]
        assert_close(merged[name] - about, torch.tensor(expected).double().view_as(zero), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["linear", "karcher"])
def test_a_base_that_is_not_listed_is_one_of_the_models(models, run, method):
    text = f"merge_method: {method}\nparameters: {{weight: 1}}\nmodels: [{{model: one}}, {{model: two}}"
    with_base, listed = run(text + "]\nbase_model: zero"), run(text + ", {model: zero}]\nbase_model: zero")
    without = run(text + "]")
    assert all(torch.equal(listed[name], value) for name, value in with_base.items())
    assert all(not torch.equal(without[name], value) for name, value in with_base.items())
    if method == "linear":
        mean = {name: sum(models[m][name] for m in ("zero", "one", "two")) / 3 for name in with_base}
        close(with_base, mean)


def test_karcher_of_two_is_halfway_along_the_arc(models, tmp_path, run, save):
    other = models["far"]
    merged = run("models: [{model: zero}, {model: far}]\nmerge_method: karcher\nparameters: {max_iter: 50, tol: 1e-12}")
    for name, b in other.items():
        a = models["zero"][name]
        unit = arc(a / a.norm(), b / b.norm(), 0.5)
        assert_close(merged[name], unit * (a.norm() + b.norm()) / 2, rtol=0, atol=1e-9)


@pytest.mark.parametrize("by_row", [False, True])
def test_model_stock(models, by_row, run):
    text = "models: [{model: one}, {model: two}, {model: three}]\nmerge_method: model_stock\nbase_model: zero\n"
    merged = run(text + ("parameters: {filter_wise: true}" if by_row else ""))
    for name, base in models["zero"].items():
        deltas = [(models[model][name] - base) for model in ("one", "two", "three")]
        rows = [[d[i] for d in deltas] for i in range(len(base))] if by_row and base.dim() > 1 else [deltas]
        out = []
        for vectors in rows:
            flat = [v.flatten().tolist() for v in vectors]
            pairs = list(itertools.combinations(flat, 2))
            cosines = [
                sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) for a, b in pairs
            ]
            c = max(0.0, sum(cosines) / 3)
            out.append(3 * c / (1 + 2 * c) * sum(vectors) / 3)
        assert_close(merged[name], base + torch.stack(out).view_as(base), rtol=0, atol=1e-12)


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_sce(models, keep, run):
    text = "models: [{model: one}, {model: two}, {model: three}]\nmerge_method: sce\nbase_model: zero\n"
    expected = {}
    for name, base in models["zero"].items():
        deltas = [(models[m][name] - base).flatten().tolist() for m in ("one", "two", "three")]
        spread = [sum((x - sum(e) / 3) ** 2 for x in e) for e in zip(*deltas, strict=True)]
        count = len(spread) if keep == 1 else int(keep * len(spread))
        chosen = sorted(range(len(spread)), key=lambda i: -spread[i])[:count]
        deltas = [[x if i in chosen else 0.0 for i, x in enumerate(d)] for d in deltas]
        energy = [sum(x * x for x in d) for d in deltas]
        change = []
        for entry in zip(*deltas, strict=True):
            sign = 1 if sum(entry) >= 0 else -1
            agree = [(w, x) for w, x in zip(energy, entry, strict=True) if x * sign > 0]
            change.append(sum(w * x for w, x in agree) / sum(w for w, _ in agree) if agree else 0.0)
        expected[name] = base + torch.tensor(change, dtype=torch.float64).view_as(base)
    close(run(text + f"parameters: {{select_topk: {keep}}}"), expected)


def test_sce_weighs_small_task_vectors_too(models, tmp_path, run, save):
    """mergekit weighs models equally where mean squares sum to less than 1e-6."""
    base = models["zero"]
    for model, size in (("a", 1e-4), ("b", 3e-4)):
        save(model, {name: value + size for name, value in base.items()})
    merged = run("models: [{model: a}, {model: b}]\nmerge_method: sce\nbase_model: zero")
    for name, value in base.items():  # energies 1 : 9
        assert_close(merged[name] - value, torch.full_like(value, 1e-4 * 0.1 + 3e-4 * 0.9), rtol=0, atol=1e-12)


def test_passthrough_scales(models, run):
    merged = run(
        "models: [{model: one, parameters: {scale: [{filter: mlp, value: 0.5}, {value: 1}]}}]\n"
        "merge_method: passthrough"
    )
    for name, value in models["one"].items():
        assert torch.equal(merged[name], value / 2 if "mlp" in name else value)


def test_masks_do_not_depend_on_order_or_number_of_models(models, run):
    alone = run(
        "models: [{model: two, parameters: {weight: 1, density: 0.5}}]\nmerge_method: dare_linear\nbase_model: zero"
    )
    text = """
models: [{model: three, parameters: {weight: 0}}, {model: two, parameters: {weight: 1}}, {model: zero}]
merge_method: dare_linear
base_model: zero
parameters: {density: 0.5}
"""
    assert all(torch.equal(alone[name], value) for name, value in run(text).items())
    assert any(not torch.equal(alone[name], value) for name, value in run(text, seed=1).items())


@pytest.mark.parametrize("method", sorted(name for name, how in METHODS.items() if how.elementwise))
def test_elementwise_methods_give_the_same_bits_in_pieces(models, job, monkeypatch, method):
    rows = "[{model: one}]" if METHODS[method].models[1] == 1 else "[{model: one}, {model: two}]"
    base = "base_model: zero" if METHODS[method].base == "needed" else ""
    found = job(f"models: {rows}\nmerge_method: {method}\nparameters: {{weight: 0.3, scale: 0.7}}\n{base}")
    whole = dict(plan(found.task_vectors, found.rules))
    monkeypatch.setattr(differences, "PIECE", 4)
    state = plan(found.task_vectors, found.rules)
    assert all(len(list(state.parts(name))) > 1 for name, value in whole.items() if value.dim() > 1)
    assert all(torch.equal(state[name], value) for name, value in whole.items())


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties", "sce", "karcher"])
def test_the_others_do_too_where_they_go_piece_by_piece_within_a_tensor(models, job, monkeypatch, method):
    own = {"della": "density: 0.5, epsilon: 0.3, ", "sce": "select_topk: 0.5, ", "karcher": ""}
    base = "" if METHODS[method].base == "unused" else "base_model: zero"
    given = own.get(method, "density: 0.5, ")
    found = job(
        f"models: [{{model: one}}, {{model: two}}]\nmerge_method: {method}\nparameters: {{{given}weight: 1}}\n{base}"
    )
    whole = dict(plan(found.task_vectors, found.rules))
    for module in (differences, rules.base, sphere):
        monkeypatch.setattr(module, "PIECE", 4)
    close(dict(plan(found.task_vectors, found.rules)), whole)


@pytest.mark.parametrize("count", range(8))
def test_exactly_as_many_entries_are_kept(count):
    mask = largest(torch.tensor([[2.0, 1, 2], [2, 3, 0], [0, 0, 0]]).abs(), count)
    assert mask.flatten().tolist() == [place in (4, 0, 2, 3, 1, 5, 6)[:count] for place in range(9)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_tensors_of_any_size(tmp_path, monkeypatch, method, run):
    """A scalar, one column, one row, one entry, a tensor nobody changed, half precision, integers."""
    monkeypatch.chdir(tmp_path)
    shapes = {
        "scalar": (),
        "one": (1,),
        "column": (5, 1),
        "row": (1, 5),
        "conv": (3, 2, 2, 2),
        "same": (4,),
        "zeros": (4,),
    }
    rng = torch.Generator().manual_seed(0)
    names = ("zero", "one", "two")
    for name in names:
        tensors = {n: torch.randn(shape, generator=rng).half() for n, shape in shapes.items()}
        tensors |= {"same": torch.ones(4), "zeros": torch.zeros(4), "ids": torch.arange(3) + names.index(name)}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    how = METHODS[method]
    listed = names[1:] if how.models != (1, 1) else names[1:2]
    parameters = "{weight: 0.5, density: 0.3, epsilon: 0.1, gamma: 0.2, t: 0.4, select_topk: 0.5}"
    base = "base_model: zero" if how.base == "needed" else ""
    rows = ", ".join(f"{{model: {name}}}" for name in listed)
    merged = run(f"models: [{rows}]\nmerge_method: {method}\nparameters: {parameters}\n{base}")
    first = 0 if base else 1
    assert merged["ids"].tolist() == [first, first + 1, first + 2]
    for name, value in merged.items():
        assert bool(value.isfinite().all()), name
        assert value.shape == shapes.get(name, (3,))
    assert merged["same"].tolist() == [1.0] * 4
    assert merged["zeros"].tolist() == [0.0] * 4
    assert merged["column"].dtype == torch.float16


@pytest.mark.parametrize("method", sorted(name for name, how in METHODS.items() if how.base == "needed"))
def test_models_that_are_the_base_leave_it_alone(models, tmp_path, method, run, save):
    save("copy", models["zero"])
    save("again", models["zero"])
    rows = "[{model: copy}, {model: again}]" if METHODS[method].models[1] > 1 else "[{model: copy}]"
    text = (
        f"models: {rows}\nmerge_method: {method}\nbase_model: zero\nparameters: {{weight: 0.5, density: 0.5, t: 0.3}}"
    )
    close(run(text), models["zero"])
