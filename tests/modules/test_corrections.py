"""Corrections: nothing at the start, one task at a time afterwards, inside networks of many kinds."""

import copy

import pytest
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from adamerge import InputError, TaskVectors
from adamerge.backbones import MLP, TinyViT
from modules import BlockRouter, Coefficients, Correction, FeatureRouter, MergedModel, Surgery, TaskBlock
from modules.blocks import Blocks, per_task, token_mean

SIZES = {"a": 2, "b": 1, "c": 3}
DIM = 16
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Pooled(nn.Module):
    """A transformers model that gives its features alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).pooler_output


def tiny_vit() -> nn.Module:
    return TinyViT(image_size=16, patch=8, dim=DIM, depth=2, heads=2)


def hf_clip() -> nn.Module:
    size = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Pooled(hf.CLIPVisionModel(hf.CLIPVisionConfig(**size, image_size=16, patch_size=8)))


def open_clip() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(16, 8, width=DIM, layers=2, heads=2, mlp_ratio=2.0, output_dim=DIM)


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, DIM, 32, num_classes=DIM)


class ResNet(nn.Module):
    """torchvision's blocks on maps of few channels."""

    def __init__(self) -> None:
        super().__init__()
        block, wider = torchvision.models.resnet.BasicBlock, nn.Conv2d(4, 8, 1, stride=2)
        self.stem, self.layer1 = nn.Conv2d(3, 4, 3, stride=4), nn.Sequential(block(4, 4), block(4, 4))
        self.layer2, self.fc = nn.Sequential(block(4, 8, 2, wider)), nn.Linear(8, DIM)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(images))).mean((2, 3)))


class Tuples(nn.Module):
    """Blocks that give a tuple, as older transformers do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, str]:
            return x + scale * self.linear(x), "more"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3 * 16 * 16, DIM), nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.flatten(1))
        for layer in self.layers:
            x = layer(x, scale=0.5)[0]
        return x


CORRECTIONS = {
    "Surgery": Surgery,
    "Surgery of blocks": lambda: Surgery(blocks=True),
    "TaskBlock": TaskBlock,
    "TaskBlock of the first": lambda: TaskBlock(0),
}
INSIDE = [name for name in CORRECTIONS if name != "Surgery"]
ARCHITECTURES = [tiny_vit, hf_clip, open_clip, torchvision_vit, ResNet, Tuples]


def moved(model: nn.Module, seed: int) -> dict[str, Tensor]:
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng, dtype=torch.float64))
    return other.state_dict()


class Case:
    def __init__(self, make) -> None:
        torch.manual_seed(0)
        self.model = make().double().eval()
        self.x = torch.randn(sum(SIZES.values()), 3, 16, 16, dtype=torch.float64)
        self.experts = {task: moved(self.model, seed) for seed, task in enumerate(SIZES, 1)}
        self.vectors = TaskVectors.from_state_dicts(self.model.state_dict(), self.experts)

    def merged(self, router=None, **kwargs) -> MergedModel:
        return MergedModel(self.model, self.vectors, Coefficients(**{"init": 0.3} | kwargs), router, features=DIM)

    def corrected(self, name: str, router=None) -> tuple[MergedModel, Correction]:
        merged = self.merged(router)
        return merged, CORRECTIONS[name]().bind(merged, DIM, self.x[:1])

    def features(self, merged: MergedModel, correction: Correction, sizes=SIZES) -> dict[str, Tensor]:
        with merged.of(sizes):
            parts = merged(self.x[: sum(sizes.values())]).split(list(sizes.values()))
        return {task: correction.features(z, task) for task, z in zip(sizes, parts, strict=True)}


@pytest.fixture(params=ARCHITECTURES, ids=lambda make: make.__name__)
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture
def vit() -> Case:
    return Case(tiny_vit)


def shake(parameters) -> None:
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn_like(p))


def of_task(correction: Correction, task: str) -> list[nn.Parameter]:
    return [p for name, p in correction.named_parameters() if task in name.split(".")]


@pytest.mark.parametrize("name", CORRECTIONS)
class TestEveryCorrection:
    def test_is_the_identity_at_the_start(self, case, name):
        merged, correction = case.corrected(name)
        expected = case.merged()(case.x).split(list(SIZES.values()))
        assert_close(list(case.features(merged, correction).values()), list(expected), **EXACT)

    def test_leaves_the_gradient_of_the_coefficients_as_it_is_at_the_start(self, case, name):
        (merged, correction), plain = case.corrected(name), case.merged()
        torch.cat(list(case.features(merged, correction).values())).square().sum().backward()
        plain(case.x).square().sum().backward()
        own, other = merged.coefficients.raw.grad, plain.coefficients.raw.grad
        assert_close(own, other, rtol=1e-9, atol=1e-9)

    def test_changes_the_images_of_its_task_alone(self, case, name):
        merged, correction = case.corrected(name)
        before = case.features(merged, correction)
        shake(of_task(correction, "b"))
        after = case.features(merged, correction)
        for task, z in after.items():
            assert torch.allclose(z, before[task], **EXACT) == (task != "b")

    def test_does_not_depend_on_the_other_tasks_of_a_batch(self, case, name):
        merged, correction = case.corrected(name)
        shake(correction.parameters())
        together = case.features(merged, correction)
        parts = case.x.split(list(SIZES.values()))
        for (task, count), x in zip(SIZES.items(), parts, strict=True):
            with merged.of({task: count}):
                assert_close(correction.features(merged(x), task), together[task], **EXACT)

    def test_gradients_reach_everything(self, case, name):
        merged, correction = case.corrected(name)
        shake(correction.parameters())
        sum(z.square().sum() for z in case.features(merged, correction).values()).backward()
        for parameter, p in correction.named_parameters():
            # attention does not depend on the bias of its keys
            assert p.grad is not None, parameter
            assert p.grad.abs().sum() > 0 or "deltas" in parameter, parameter
        assert merged.coefficients.raw.grad.abs().sum() > 0

    def test_learns_for_the_tasks_of_the_step_alone(self, case, name):
        merged, correction = case.corrected(name)
        case.features(merged, correction, {"c": 3})["c"].square().sum().backward()
        learned = {n for n, p in correction.named_parameters() if p.grad is not None}
        assert learned == {n for n, _ in correction.named_parameters() if "c" in n.split(".")}

    def test_its_precision_is_the_models(self, case, name):
        _, correction = case.corrected(name)
        assert {p.dtype for p in correction.parameters()} == {torch.float64}
        assert all(p.requires_grad for p in correction.parameters())


@pytest.mark.parametrize("name", INSIDE)
def test_a_batch_of_unknown_tasks_is_refused(vit, name):
    merged, correction = vit.corrected(name)
    assert correction.inside
    with pytest.raises(InputError, match="a batch of 6 is taken task by task, but nothing says of which tasks"):
        merged(vit.x)
    with merged.of({"a": 2}), pytest.raises(InputError, match="but 2 are said to be in it"):
        merged(vit.x)


def test_segments_are_those_of_the_innermost_block(vit):
    merged = vit.merged()
    with merged.of({"a": 1}):
        with merged.of({"b": 2}):
            assert merged.segments == {"b": 2}
        assert merged.segments == {"a": 1}
    assert merged.segments == {}


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("make", [tiny_vit, hf_clip, open_clip], ids=lambda make: make.__name__)
def test_beside_a_router(make, name):
    case = Case(make)
    merged, correction = case.corrected(name, BlockRouter(depth=1))
    with torch.no_grad():
        for p in merged.router.parameters():
            p.normal_(std=0.3)
    plain = case.merged(BlockRouter(depth=1))
    plain.router.load_state_dict(merged.router.state_dict())
    expected = plain(case.x).split(list(SIZES.values()))
    before = case.features(merged, correction)
    assert_close(list(before.values()), list(expected), **EXACT)
    shake(of_task(correction, "a"))
    after = case.features(merged, correction)
    assert [torch.allclose(after[task], before[task], **EXACT) for task in SIZES] == [False, True, True]
    sum(z.square().sum() for z in after.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in merged.router.parameters())


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("router", ["batch", "features"])
def test_routing_of_the_whole_batch_is_kept_within_a_task(vit, name, router):
    make = {"batch": lambda: BlockRouter(per="batch"), "features": lambda: FeatureRouter(dropout=0, scope="linear")}
    merged, correction = vit.corrected(name, make[router]())
    with torch.no_grad():
        for p in merged.router.parameters():
            p.normal_(std=0.3)
    plain = vit.merged(make[router]())
    plain.router.load_state_dict(merged.router.state_dict())
    with plain.of(SIZES):
        expected = plain(vit.x).split(list(SIZES.values()))
    assert_close(list(vit.features(merged, correction).values()), list(expected), **EXACT)
    shake(correction.parameters())
    together = vit.features(merged, correction)
    for task, x in zip(SIZES, vit.x.split(list(SIZES.values())), strict=True):
        with merged.of({task: len(x)}):
            assert_close(correction.features(merged(x), task), together[task], **EXACT)


@pytest.mark.parametrize("name", INSIDE)
def test_a_router_that_finds_the_task_sees_uncorrected_features(vit, name):
    merged, correction = vit.corrected(name, FeatureRouter(scope="linear"))
    expected = merged.shared(vit.x)  # of no task that anybody names
    shake(correction.parameters())
    assert_close(merged.shared(vit.x), expected, rtol=0, atol=0)
    with merged.of(SIZES):
        assert_close(merged.shared(vit.x), expected, rtol=0, atol=0)
        merged.eval()(vit.x)


# -- Surgery -----------------------------------------------------------------------------------------------------------


def test_surgery_subtracts_a_residual_of_rank_r(vit):
    _, surgery = vit.corrected("Surgery")
    shake(surgery.parameters())
    down, up = surgery.final["a"].down.weight, surgery.final["a"].up.weight
    assert (tuple(down.shape), tuple(up.shape)) == ((16, DIM), (DIM, 16))
    z = torch.randn(5, DIM, dtype=torch.float64)
    assert_close(surgery.features(z, "a"), z - (z @ down.T).clamp(min=0) @ up.T)


def test_surgery_of_blocks_corrects_all_tokens_after_every_block(vit):
    merged, surgery = vit.corrected("Surgery of blocks")
    shake(surgery.parameters())
    assert len(surgery.inner["a"]) == 2
    merge = merged.merged_state_dict()
    tower = copy.deepcopy(vit.model)
    tower.load_state_dict(merge)
    for block, residual in zip(tower.blocks, surgery.inner["b"], strict=True):
        block.register_forward_hook(
            lambda module, args, x, r=residual: x - (x @ r.down.weight.T).relu() @ r.up.weight.T
        )
    with merged.of({"b": len(vit.x)}):
        assert_close(merged(vit.x), tower(vit.x), **EXACT)


def test_surgery_of_convolutional_blocks_corrects_every_place():
    case = Case(ResNet)
    merged, surgery = case.corrected("Surgery of blocks")
    assert [r.down.in_features for r in surgery.inner["a"]] == [4, 4, 8]
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    residual = surgery.inner["a"][0]
    shake(residual.parameters())
    assert_close(residual(x)[:, :, 1, 2], residual(x[:, :, 1, 2]))
    assert merged.blocks.correct is not None


# -- TaskBlock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [-1, 0])
def test_a_task_block_may_become_the_experts(case, place):
    merged = case.merged()
    correction = TaskBlock(place).bind(merged, DIM, case.x[:1])
    name = list(merged.blocks.modules)[place]
    merge = merged.merged_state_dict()
    parameters = dict(case.model.named_parameters())
    inside = [n for n in parameters if n.startswith(f"{name}.")]
    assert [tuple(p.shape) for p in correction.deltas["b"]] == [tuple(parameters[n].shape) for n in inside]
    with torch.no_grad():
        for delta, n in zip(correction.deltas["b"], inside, strict=True):
            delta.copy_(case.experts["b"][n] - merge[n])
    expected = functional_call(case.model, merge | {n: case.experts["b"][n] for n in inside}, (case.x,))
    with merged.of({"b": len(case.x)}):
        assert_close(merged(case.x), expected, **EXACT)
    with merged.of({"a": len(case.x)}):
        assert_close(merged(case.x), functional_call(case.model, merge, (case.x,)), **EXACT)


def test_the_gradient_of_a_task_block_is_that_of_the_weights_it_adds_to(vit):
    merged, correction = vit.corrected("TaskBlock")
    with merged.of({"b": len(vit.x)}):
        merged(vit.x).square().sum().backward()
    state = {n: v.requires_grad_() for n, v in merged.merged_state_dict().items()}
    functional_call(vit.model, state, (vit.x,)).square().sum().backward()
    last = [value.grad for n, value in state.items() if n.startswith("blocks.1.")]
    assert_close([p.grad for p in correction.deltas["b"]], last, rtol=1e-9, atol=1e-11)


def test_routed_layers_of_a_task_block_stay_as_they_are(vit):
    _, correction = vit.corrected("TaskBlock", BlockRouter())
    kept = [n for n, _ in vit.model.blocks[1].named_parameters() if not n.startswith("mlp")]
    assert [tuple(p.shape) for p in correction.deltas["a"]] == [
        tuple(vit.model.blocks[1].get_parameter(n).shape) for n in kept
    ]


def test_a_block_that_is_routed_as_a_whole_has_nothing_left_for_a_task():
    case = Case(Tuples)
    for router in (BlockRouter(scope="linear"), FeatureRouter()):
        with pytest.raises(InputError, match=r"every layer of block layers\.1 is routed"):
            TaskBlock().bind(case.merged(router), DIM, case.x[:1])


def test_a_block_that_does_not_exist(vit):
    for place in (2, -3):
        with pytest.raises(InputError, match=f"no block {place}: the backbone has 2"):
            TaskBlock(place).bind(vit.merged(), DIM, vit.x[:1])


def test_a_backbone_without_blocks():
    model = MLP(image_size=4).double()
    vectors = TaskVectors.from_state_dicts(model.state_dict(), {"a": moved(model, 1)})
    merged, x = MergedModel(model, vectors, Coefficients()), torch.randn(1, 3, 4, 4).double()
    Surgery().bind(merged, 64, x)
    for correction in (TaskBlock(), Surgery(blocks=True)):
        with pytest.raises(InputError, match="MLP has no stack of blocks"):
            correction.bind(merged, 64, x)


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_recorded_are_the_token_means_of_every_blocks_corrected_output(case):
    merged, correction = case.corrected("Surgery of blocks")
    shake(correction.parameters())
    outputs: dict[str, Tensor] = {}
    for name, module in merged.blocks.modules.items():
        module.register_forward_hook(lambda m, args, out, name=name: outputs.__setitem__(name, out))
    with merged.of(SIZES), merged.blocks.recording() as record:
        merged(case.x)
    assert list(record) == list(merged.blocks.modules)
    for name, out in outputs.items():
        x = out[0] if isinstance(out, tuple) else out
        axes = {2: (), 3: (1,), 4: (2, 3)}[x.ndim]
        assert_close(record[name], x.mean(axes) if axes else x)
    with merged.of(SIZES):
        merged(case.x.flip(0))
    assert_close(record[name], token_mean(x))  # nothing is recorded outside the block


def test_blocks_of_a_model_of_ones_own(vit):
    blocks = Blocks(vit.model)
    with blocks.recording() as record:
        vit.model(vit.x)
    assert list(record) == ["blocks.0", "blocks.1"]
    assert {tuple(value.shape) for value in record.values()} == {(6, DIM)}


def test_per_task_keeps_the_order_of_the_batch():
    x = torch.arange(6.0)[:, None]
    seen = {}
    result = per_task(x, SIZES, lambda part, task: seen.setdefault(task, part) + 1)
    assert torch.equal(result, x + 1)
    assert {task: part.flatten().tolist() for task, part in seen.items()} == {"a": [0, 1], "b": [2], "c": [3, 4, 5]}
