"""Task vectors: what they hold, how little they read, and every misfit they refuse before work starts."""

import copy
import re
import weakref
from collections.abc import Iterator, Mapping

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge import InputError, TaskVectors, merge
from adamerge.differences import Differences
from adamerge.misfits import check
from adamerge.rules import Mean


def identical(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Same names in the same order, same dtypes, same bits."""
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


# -- what they hold ----------------------------------------------------------------------------------------------------


def test_deltas_are_differences_stacked_in_the_order_of_the_tasks(base, experts):
    tv = TaskVectors.from_state_dicts(base, experts)
    assert tv.tasks == tuple(experts)
    assert list(tv.base) == list(tv.deltas) == list(tv.rows) == list(base)
    for name in base:
        assert torch.equal(tv.deltas[name], torch.stack([experts[task][name] - base[name] for task in experts]))


def test_an_expert_comes_back_as_it_went_in(base, experts):
    tv = TaskVectors.from_state_dicts(base, experts)
    assert all(identical(tv.expert(task), experts[task]) for task in experts)


def test_an_unknown_expert_is_named(base, experts):
    with pytest.raises(InputError, match="no expert is called 'cars'; there are digits, letters, signs"):
        TaskVectors.from_state_dicts(base, experts).expert("cars")


def test_the_order_of_an_experts_tensors_is_harmless(base, experts):
    reordered = {task: dict(reversed(list(state.items()))) for task, state in experts.items()}
    tv, other = TaskVectors.from_state_dicts(base, experts), TaskVectors.from_state_dicts(base, reordered)
    assert identical(tv.deltas, other.deltas)
    assert tv.fingerprints == other.fingerprints
    assert tv.rows == other.rows


def test_arguments_are_never_changed(base, experts):
    base["steps"] = torch.tensor(7)
    experts = {task: {**state, "steps": torch.tensor(9)} for task, state in experts.items()}
    kept = copy.deepcopy((base, experts))
    tv = TaskVectors.from_state_dicts(base, experts)
    merge(tv, scale=0.3)
    merge(tv, rules=[Mean()])
    tv.expert("digits")["0.weight"].zero_()
    assert tv.fingerprints
    assert identical(base, kept[0])
    assert all(identical(experts[task], kept[1][task]) for task in experts)


def test_parameters_that_take_gradients_leave_no_graph(model, experts):
    parameters = dict(model.named_parameters())
    tv = TaskVectors.from_state_dicts(parameters, experts)
    tensors = [*tv.base.values(), *tv.deltas.values(), *merge(tv).values()]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(parameter.requires_grad for parameter in parameters.values())


# -- the kinds of tensors ----------------------------------------------------------------------------------------------


def test_integer_buffers_have_no_delta(base, experts):
    base["position_ids"] = torch.arange(3)
    experts = {task: {**state, "position_ids": torch.arange(3) + 1} for task, state in experts.items()}
    tv = TaskVectors.from_state_dicts(base, experts)
    assert "position_ids" not in tv.deltas
    assert "position_ids" not in tv.rows
    assert torch.equal(tv.expert("digits")["position_ids"], base["position_ids"])


def test_a_tensor_that_no_expert_changed_gets_no_row_and_no_memory(base, experts):
    base["frozen"] = torch.randn(1000, 100)
    experts = {task: {**state, "frozen": base["frozen"].clone()} for task, state in experts.items()}
    tv = TaskVectors.from_state_dicts(base, experts)
    assert tv.rows == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert tv.deltas["frozen"].shape == (3, 1000, 100)
    assert not tv.deltas["frozen"].any()
    assert tv.deltas["frozen"].untyped_storage().nbytes() == 4


def test_a_tensor_that_one_expert_changed_gets_a_row(base, experts):
    for task in ("digits", "letters"):
        experts[task]["0.bias"] = base["0.bias"].clone()
    assert "0.bias" in TaskVectors.from_state_dicts(base, experts).rows


def test_running_statistics_get_no_row():
    norm = nn.BatchNorm1d(4).double()
    expert = {name: value + 1 for name, value in norm.state_dict().items()}
    tv = TaskVectors.from_state_dicts(norm.state_dict(), {"digits": expert})
    assert tv.rows == ("weight", "bias")
    assert set(tv.deltas) == {"weight", "bias", "running_mean", "running_var"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_experts_keep_their_small_differences(dtype):
    base = {"w": torch.ones(4, dtype=dtype)}
    step = torch.finfo(dtype).eps
    experts = {str(k): {"w": torch.full((4,), 1 + k * step, dtype=dtype)} for k in (1, 2, 3)}
    tv = TaskVectors.from_state_dicts(base, experts)
    assert tv.deltas["w"].dtype == torch.float32
    assert tv.deltas["w"][:, 0].tolist() == [step, 2 * step, 3 * step]
    assert all(identical(tv.expert(task), state) for task, state in experts.items())
    # 0.3 of each is less than half a step and would vanish one by one; their sum is not
    assert merge(tv, scale=0.3)["w"].tolist() == [1 + 2 * step] * 4


def test_a_half_precision_expert_far_from_its_base_comes_back():
    base, expert = {"w": torch.tensor([1000.0]).half()}, {"w": torch.tensor([0.1]).half()}
    assert identical(TaskVectors.from_state_dicts(base, {"a": expert}).expert("a"), expert)


def test_half_precision_experts_of_a_float_base(base, experts):
    half = {task: {name: value.half() for name, value in state.items()} for task, state in experts.items()}
    tv = TaskVectors.from_state_dicts({name: value.float() for name, value in base.items()}, half)
    for k, state in enumerate(half.values()):
        assert torch.equal(tv.deltas["0.weight"][k], state["0.weight"].float() - base["0.weight"].float())


def test_scalars_and_empty_tensors_are_tensors_too():
    base = {"logit_scale": torch.tensor(4.0), "none": torch.zeros(0, 3)}
    experts = {"a": {**base, "logit_scale": torch.tensor(5.0)}, "b": {**base, "logit_scale": torch.tensor(7.0)}}
    tv = TaskVectors.from_state_dicts(base, experts)
    assert tv.deltas["logit_scale"].tolist() == [1.0, 3.0]
    assert tv.rows == ("logit_scale",)
    assert merge(tv, scale=0.5)["logit_scale"] == 6.0


# -- tied weights ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose matrix is the output layer's, too."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        nn.init.constant_(self.embed.weight, 1 + shift)


TIED_EXPERTS = {"a": Tied(0.5), "b": Tied(0.25)}


def test_tied_weights_are_one_tensor():
    tv = TaskVectors.from_state_dicts(Tied().state_dict(), {t: e.state_dict() for t, e in TIED_EXPERTS.items()})
    assert tv.tied == {"head.weight": "embed.weight"}
    assert list(tv.deltas) == list(tv.rows) == ["embed.weight"]
    merged = merge(tv)
    assert list(merged) == ["embed.weight", "head.weight"]
    assert merged["embed.weight"].data_ptr() == merged["head.weight"].data_ptr()
    assert (merged["head.weight"] == 1.75).all()
    assert (tv.expert("a")["head.weight"] == 1.5).all()


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("prefix", ["", "net."])
def test_tied_weights_in_files_that_keep_one_name(tmp_path, kept, prefix):
    torch.save({prefix + name: value for name, value in Tied().state_dict().items()}, tmp_path / "base.pt")
    for task, expert in TIED_EXPERTS.items():
        save_file({prefix + kept: expert.state_dict()[kept]}, tmp_path / f"{task}.safetensors")
    files = {task: tmp_path / f"{task}.safetensors" for task in TIED_EXPERTS}
    tv = TaskVectors.open(tmp_path / "base.pt", files, prefix=prefix)
    whole = TaskVectors.from_state_dicts(Tied().state_dict(), {t: e.state_dict() for t, e in TIED_EXPERTS.items()})
    assert tv.rows == whole.rows
    assert (merge(tv)["head.weight"] == 1.75).all()
    assert tv.fingerprints == whole.fingerprints


def test_tied_experts_of_a_base_file_that_keeps_one_name(tmp_path):
    save_file({"embed.weight": Tied().embed.weight.detach()}, tmp_path / "base.safetensors")
    for task, expert in TIED_EXPERTS.items():
        torch.save(expert.state_dict(), tmp_path / f"{task}.pt")
    tv = TaskVectors.open(tmp_path / "base.safetensors", {task: tmp_path / f"{task}.pt" for task in TIED_EXPERTS})
    assert list(merge(tv)) == ["embed.weight"]


def test_an_expert_that_unties_them_is_refused():
    expert = {name: value + k for k, (name, value) in enumerate(Tied().state_dict().items())}
    with pytest.raises(InputError, match=r"expert 'a': head.weight and embed.weight are one tied tensor in the base"):
        TaskVectors.from_state_dicts(Tied().state_dict(), {"a": expert})


# -- from files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, base, experts) -> dict[str, str]:
    """Base and experts as safetensors files."""
    states = {"base": base, **experts}
    for name, state in states.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in states}


def test_opened_files_are_what_is_in_memory(files, base, experts):
    lazy = TaskVectors.open(files["base"], {task: files[task] for task in experts})
    whole = TaskVectors.from_state_dicts(base, experts)
    assert lazy.tasks == whole.tasks
    assert set(lazy.rows) == set(whole.rows)  # a file keeps its own order
    for other in (lazy, lazy.load()):
        assert {n: v.tolist() for n, v in other.base.items()} == {n: v.tolist() for n, v in whole.base.items()}
        assert all(torch.equal(other.deltas[name], whole.deltas[name]) for name in whole.deltas)
        assert other.fingerprints == whole.fingerprints
        assert all(torch.equal(merge(other, scale=0.3)[n], v) for n, v in merge(whole, scale=0.3).items())


def test_files_of_any_format_mix(tmp_path, files, base, experts):
    torch.save(experts["letters"], tmp_path / "letters.pt")
    torch.save({"state_dict": experts["signs"], "epoch": 3}, tmp_path / "signs.ckpt")
    mixed = {"digits": files["digits"], "letters": tmp_path / "letters.pt", "signs": tmp_path / "signs.ckpt"}
    tv = TaskVectors.open(files["base"], mixed)
    assert tv.fingerprints == TaskVectors.from_state_dicts(base, experts).fingerprints


class Watched(Mapping[str, Tensor]):
    """A lazy state that counts its reads and how many of its tensors are alive at once."""

    reads, alive, most = 0, 0, 0

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        Watched.reads, Watched.alive = Watched.reads + 1, Watched.alive + 1
        Watched.most = max(Watched.most, Watched.alive)
        tensor = self.state[name].clone()
        weakref.finalize(tensor.untyped_storage(), self.gone)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def meta(self, name: str) -> Tensor:
        return self.state[name].to("meta")

    @staticmethod
    def gone() -> None:
        Watched.alive -= 1


@pytest.fixture
def watched(base, experts) -> tuple[Watched, dict[str, Watched]]:
    Watched.reads = Watched.alive = Watched.most = 0
    return Watched(base), {task: Watched(state) for task, state in experts.items()}


def test_opening_reads_headers_alone(monkeypatch, files, experts):
    read = []
    monkeypatch.setattr(
        "adamerge.checkpoints.SafetensorsState.__getitem__", lambda self, name: read.append(name) or torch.zeros(())
    )
    TaskVectors.open(files["base"], {task: files[task] for task in experts})
    assert read == []
    TaskVectors.open(files["base"], {task: files[task] for task in experts}, prefix="2.")
    assert read == []


def test_a_delta_holds_one_expert_at_a_time(watched):
    base, experts = watched
    differences = Differences(base, experts, check(base, experts))
    assert Watched.reads == 0
    assert differences["0.weight"].shape == (3, 8, 6)
    assert Watched.reads == 4
    assert Watched.most == 2  # the base and one expert, beside the stack that is being filled


# -- what is refused ---------------------------------------------------------------------------------------------------


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


MISFITS = {
    "missing": (
        lambda s: without(s, "0.bias"),
        "expert 'letters' does not have the tensors of the base: missing 0.bias",
    ),
    "extra": (lambda s: {**s, "new": torch.zeros(1)}, "expert 'letters' .* not in the base new"),
    "renamed": (
        lambda s: {name.replace("2.bias", "2.offset"): value for name, value in s.items()},
        "missing 2.bias; not in the base 2.offset; if they were only renamed, rename them back",
    ),
    "many": (lambda s: {}, "missing 0.weight, 0.bias, 2.weight and 1 more"),
    "shape": (
        lambda s: {**s, "0.bias": torch.zeros(9)},
        r"expert 'letters': 0.bias has shape \[9\], the base has \[8\]",
    ),
    "broadcastable": (
        lambda s: {**s, "0.weight": torch.zeros(1, 6)},
        r"expert 'letters': 0.weight has shape \[1, 6\], the base has \[8, 6\]",
    ),
    "transposed": (lambda s: {**s, "0.weight": s["0.weight"].T}, r"0.weight has shape \[6, 8\], the base has \[8, 6\]"),
    "integer": (
        lambda s: {**s, "0.bias": torch.zeros(8, dtype=torch.int8)},
        "expert 'letters': 0.bias is torch.int8, the base has torch.float64",
    ),
    "complex": (lambda s: {**s, "0.bias": s["0.bias"] + 0j}, "0.bias is torch.complex128, the base has torch.float64"),
    "nan": (
        lambda s: {**s, "0.bias": s["0.bias"] / 0 * 0},
        "expert 'letters' has 8 NaN or infinite values in 0.bias; fine-tune or save it again",
    ),
    "infinite": (
        lambda s: {**s, "2.bias": s["2.bias"].clone().index_fill_(0, torch.tensor(1), float("-inf"))},
        "expert 'letters' has 1 NaN or infinite values in 2.bias",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISFITS.values(), ids=MISFITS)
def test_an_expert_that_does_not_fit_is_refused_by_name(base, experts, spoil, message):
    experts["letters"] = spoil(experts["letters"])
    with pytest.raises(InputError, match=message):
        TaskVectors.from_state_dicts(base, experts)


@pytest.mark.parametrize("misfit", ["missing", "renamed", "shape", "broadcastable", "integer"])
def test_a_file_that_does_not_fit_is_refused_when_opened(files, experts, misfit):
    spoil, message = MISFITS[misfit]
    state = {name: value.contiguous() for name, value in spoil(experts["letters"]).items()}
    save_file(state, files["letters"])
    with pytest.raises(InputError, match=message):
        TaskVectors.open(files["base"], {task: files[task] for task in experts})


@pytest.mark.parametrize("use", [TaskVectors.load, merge, lambda tv: tv.fingerprints], ids=["load", "merge", "hash"])
def test_nan_in_a_file_is_found_by_whatever_reads_it(files, experts, use):
    spoil, message = MISFITS["nan"]
    save_file(spoil(experts["letters"]), files["letters"])
    tv = TaskVectors.open(files["base"], {task: files[task] for task in experts})
    with pytest.raises(InputError, match=message):
        use(tv)


def test_nan_in_the_base_is_the_bases(base, experts):
    base["0.bias"][0] = float("nan")
    with pytest.raises(InputError, match=r"the base has 1 NaN or infinite values in 0.bias"):
        TaskVectors.from_state_dicts(base, experts)


def test_an_expert_like_the_base_is_warned_of_and_merged(base, experts):
    experts["letters"] = copy.deepcopy(base)
    with pytest.warns(UserWarning, match="expert 'letters' is identical to the base") as caught:
        tv = TaskVectors.from_state_dicts(base, experts)
    assert len(caught) == 1
    assert not any(delta[1].any() for delta in tv.deltas.values())


def test_a_merge_needs_experts(base):
    with pytest.raises(InputError, match="no expert given: a merge needs at least one"):
        TaskVectors.from_state_dicts(base, {})


def test_no_task_takes_the_name_of_the_base(base, experts):
    with pytest.raises(InputError, match="a task cannot be called 'base'"):
        TaskVectors.from_state_dicts(base, {"base": experts["digits"]})


def test_the_first_of_several_faulty_experts_is_named_alone(base, experts):
    spoiled = {task: without(state, "0.bias") for task, state in experts.items()}
    with pytest.raises(InputError, match=re.escape("expert 'digits'")) as error:
        TaskVectors.from_state_dicts(base, spoiled)
    assert "letters" not in str(error.value)
