"""One merged model around every kind of network: limits, gradients, cost of memory, and what it refuses."""

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertConfig, BertForMaskedLM, CLIPVisionConfig, CLIPVisionModel

from adamerge import InputError, TaskVectors, merge, read_coefficients, write_coefficients
from adamerge.rules import LearnedCoefficients, Mean
from modules import Coefficients, MergedModel

TASKS = ("a", "b", "c")


def mlp() -> tuple[nn.Module, dict[str, Tensor]]:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)), {"input": torch.randn(5, 6)}


def resnet() -> tuple[nn.Module, dict[str, Tensor]]:
    model = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4, width_per_group=64
    )
    return model, {"x": torch.randn(2, 3, 32, 32)}


def hf_clip() -> tuple[nn.Module, dict[str, Tensor]]:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return CLIPVisionModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def open_clip_visual() -> tuple[nn.Module, dict[str, Tensor]]:
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(16, 8, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=8)
    return model, {"x": torch.randn(2, 3, 16, 16)}


def tied() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    return BertForMaskedLM(config), {"input_ids": torch.randint(20, (2, 8))}


ARCHITECTURES = [mlp, resnet, hf_clip, open_clip_visual, tied]


def output(result) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result.pooler_output if "pooler_output" in result else result.logits


def expert_of(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The model's state dict with every float moved a little; sharing of tensors is kept."""
    expert, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter.dtype))
        for name, buffer in expert.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(1 + seed)
            if name.endswith("num_batches_tracked"):
                buffer.add_(seed)
    return expert.state_dict()


@pytest.fixture(params=ARCHITECTURES, ids=lambda make: make.__name__)
def case(request):
    torch.manual_seed(0)
    model, inputs = request.param()
    model = model.double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    experts = {task: expert_of(model, seed) for seed, task in enumerate(TASKS, 1)}
    return model, inputs, experts


def plain(model: nn.Module, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return output(other(**inputs))


class TestEveryArchitecture:
    def merged(self, case, **kwargs) -> MergedModel:
        model, _, experts = case
        return MergedModel(model, TaskVectors.from_state_dicts(model.state_dict(), experts), Coefficients(**kwargs))

    def test_zero_is_the_base_and_one_hot_the_expert(self, case):
        model, inputs, experts = case
        mean = merge(TaskVectors.from_state_dicts(model.state_dict(), experts), [Mean()])
        statistics = {name: value for name, value in mean.items() if "running_" in name}
        zero = output(self.merged(case, init=0.0)(**inputs))
        torch.testing.assert_close(zero, plain(model, {**model.state_dict(), **statistics}, inputs))
        one_hot = output(self.merged(case, init=[0.0, 1.0, 0.0])(**inputs))
        torch.testing.assert_close(one_hot, plain(model, {**experts["b"], **statistics}, inputs))
        assert not torch.allclose(zero, one_hot)

    @pytest.mark.parametrize("grain", ["model", "block", "tensor"])
    def test_gradient_equals_that_of_the_written_out_sum(self, case, grain):
        model, inputs, experts = case
        merged = self.merged(case, grain=grain)
        vectors = TaskVectors.from_state_dicts(model.state_dict(), experts)
        output(merged(**inputs)).square().sum().backward()

        raw = torch.full((len(merged.coefficients.groups), 3), 0.3, dtype=torch.float64, requires_grad=True)
        rows = dict(zip(merged.coefficients.groups, raw, strict=True))
        state = merge(vectors, [Mean()])
        for name in vectors.rows:
            row = rows[merged.coefficients.group_of[name]]
            state[name] = vectors.base[name] + torch.einsum("k,k...->...", row, vectors.deltas[name])
        for alias, name in vectors.tied.items():
            state[alias] = state[name]
        output(functional_call(model, state, kwargs=inputs)).square().sum().backward()
        torch.testing.assert_close(merged.coefficients.raw.grad, raw.grad, rtol=1e-9, atol=1e-12)

    def test_export_equals_the_adapted_model(self, case):
        _, inputs, _ = case
        merged = self.merged(case)
        with torch.no_grad():
            merged.coefficients.raw.add_(0.1 * torch.randn_like(merged.coefficients.raw))
        torch.testing.assert_close(output(merged.materialise()(**inputs)), output(merged(**inputs)), rtol=0, atol=1e-12)

    def test_learned_coefficients_alone_give_the_same_weights(self, case, tmp_path):
        model, _, experts = case
        merged = self.merged(case, grain="block")
        with torch.no_grad():
            merged.coefficients.raw.normal_()
        write_coefficients(merged.coefficients.table(merged.fingerprints), tmp_path / "coefficients.json")
        vectors = TaskVectors.from_state_dicts(model.state_dict(), experts)
        state = merge(vectors, [LearnedCoefficients(read_coefficients(tmp_path / "coefficients.json"))])
        for name, value in merged.merged_state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)

    def test_nothing_that_was_given_is_changed(self, case):
        model, inputs, experts = case
        before = copy.deepcopy((model.state_dict(), experts))
        flags = [(p.requires_grad, model.training) for p in model.parameters()]
        merged = self.merged(case)
        optimizer = torch.optim.SGD(merged.parameters(), lr=1.0)
        output(merged(**inputs)).square().mean().backward()
        optimizer.step()
        merged.to(torch.float32)
        for old, new in zip((before[0], *before[1].values()), (model.state_dict(), *experts.values()), strict=True):
            for name in old:
                torch.testing.assert_close(new[name], old[name], rtol=0, atol=0)
        assert [(p.requires_grad, model.training) for p in model.parameters()] == flags


def small(**kwargs) -> tuple[MergedModel, Tensor]:
    torch.manual_seed(0)
    model, inputs = mlp()
    experts = {task: expert_of(model, seed) for seed, task in enumerate(TASKS, 1)}
    return MergedModel(
        model, TaskVectors.from_state_dicts(model.state_dict(), experts), Coefficients(**kwargs)
    ), inputs["input"]


def test_only_the_coefficients_are_parameters_and_state():
    merged, _ = small()
    assert [name for name, _ in merged.named_parameters()] == ["coefficients.raw"]
    assert list(merged.state_dict()) == ["coefficients.raw"]
    assert list(merged.buffers()) == []


def test_wrapped_model_never_leaves_eval_mode():
    merged, x = small()
    torch.testing.assert_close(merged.train()(x), merged.eval()(x), rtol=0, atol=0)


def test_micro_batches_give_the_gradient_of_one_forward_pass():
    one, x = small()
    parts, _ = small()
    scale = nn.Parameter(torch.tensor(2.0))
    loss = scale * one(x).square().mean(1)
    (loss[:2].sum() + loss[2:].sum()).backward()
    expected, scale_grad = one.coefficients.raw.grad, scale.grad.clone()

    scale.grad = None
    pieces = [
        lambda: (scale * parts(x[:2]).square().mean(1)).sum(),
        lambda: (scale * parts(x[2:]).square().mean(1)).sum(),
    ]
    values = parts.in_parts(pieces, [scale])
    (0.5 * sum(values)).backward()
    torch.testing.assert_close(2 * parts.coefficients.raw.grad, expected)
    torch.testing.assert_close(2 * scale.grad, scale_grad)
    torch.testing.assert_close(torch.stack(values), torch.stack([loss[:2].sum(), loss[2:].sum()]))


def test_evaluation_merges_once_for_one_set_of_coefficients_and_never_uses_an_old_one(monkeypatch):
    merged, x = small()
    merges = []
    original = MergedModel._merge
    monkeypatch.setattr(MergedModel, "_merge", lambda self: merges.append(1) or original(self))
    with torch.no_grad():
        first = merged(x)
        merged(x)
        assert len(merges) == 1
        merged.coefficients.raw.data.add_(1.0)  # even a write that torch does not count
        assert not torch.equal(merged(x), first)
        with merged.coefficients.at(torch.full((4, 3), 0.3)):
            torch.testing.assert_close(merged(x), first)
    assert len(merges) == 3


def test_no_product_per_expert_is_saved_for_the_backward_pass():
    merged, x = small()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        merged(x)
    assert not [shape for shape in sizes if len(shape) == 3 or shape[:1] == (3,)]


def test_half_precision_experts_are_merged_in_float32_and_written_in_half():
    torch.manual_seed(0)
    model = nn.Linear(4, 4).to(torch.bfloat16)
    experts = {"a": expert_of(model, 1), "b": expert_of(model, 2)}
    merged = MergedModel(model, TaskVectors.from_state_dicts(model.state_dict(), experts), Coefficients())
    assert merged(torch.randn(2, 4)).dtype == torch.float32
    assert {value.dtype for value in merged.merged_state_dict().values()} == {torch.bfloat16}


def test_tensors_that_no_expert_changed_get_no_row():
    torch.manual_seed(0)
    model, _ = mlp()
    expert = expert_of(model, 1)
    expert["0.bias"] = model.state_dict()["0.bias"].clone()
    merged = MergedModel(model, TaskVectors.from_state_dicts(model.state_dict(), {"a": expert}), Coefficients())
    assert merged.coefficients.groups == ("0.weight", "3.weight", "3.bias")


def test_rows_are_in_the_models_order_whatever_the_files_order():
    model, _ = mlp()
    base, expert = model.state_dict(), expert_of(model, 1)
    backwards = [dict(reversed(state.items())) for state in (base, expert)]
    merged = MergedModel(model, TaskVectors.from_state_dicts(backwards[0], {"a": backwards[1]}), Coefficients())
    assert merged.coefficients.groups == ("0.weight", "0.bias", "3.weight", "3.bias")


def test_a_model_of_another_shape_is_refused():
    model, _ = mlp()
    vectors = TaskVectors.from_state_dicts(model.state_dict(), {"a": expert_of(model, 1)})
    with pytest.raises(InputError, match=r"base lacks 4\.weight and 1 more"):
        MergedModel(nn.Sequential(*model, nn.Linear(4, 4)), vectors, Coefficients())
    with pytest.raises(InputError, match=r"0\.weight has shape \[8, 6\] in the base, \[8, 7\] in Sequential"):
        MergedModel(nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)), vectors, Coefficients())


def test_moving_to_another_precision_moves_everything():
    merged, x = small()
    assert merged.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("make", ARCHITECTURES)
def test_columns_merge_as_the_file_of_their_coefficients_says(make, tmp_path):
    model, inputs = make()
    vectors = TaskVectors.from_state_dicts(model.state_dict(), {t: expert_of(model, k) for k, t in enumerate(TASKS, 1)})
    merged = MergedModel(model, vectors, Coefficients("column"))
    with torch.no_grad():
        merged.coefficients.raw.copy_(torch.rand(merged.coefficients.raw.shape))
    write_coefficients(merged.coefficients.table(), tmp_path / "c.json")
    expected = merge(vectors, [LearnedCoefficients(tmp_path / "c.json")])
    state = merged.merged_state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
    output(merged(**inputs)).square().sum().backward()
    assert bool((merged.coefficients.raw.grad != 0).float().mean() > 0.5)


def test_tensors_whose_coefficients_stay_take_no_gradient():
    model, inputs = mlp()
    vectors = TaskVectors.from_state_dicts(model.state_dict(), {t: expert_of(model, k) for k, t in enumerate(TASKS, 1)})
    merged = MergedModel(model, vectors, Coefficients("tensor", only=r"^0\."))
    whole = MergedModel(model, vectors, Coefficients("tensor"))
    assert {name: w.requires_grad for name, w in merged.weights().items()} == {
        "0.weight": True, "0.bias": True, "3.weight": False, "3.bias": False
    }  # fmt: skip
    for each in (merged, whole):
        each(**inputs).square().sum().backward()
    torch.testing.assert_close(merged.coefficients.raw.grad, whole.coefficients.raw.grad[:2])
