"""Routing against plain autograd that composes every sample's weights, its limits, and what one batch may not do."""

import copy
import gc
import weakref

import pytest
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from adamerge import InputError, TaskVectors
from adamerge.backbones import TinyViT
from adamerge.deltas import LowRank, Sparse, dense
from adamerge.rules import Prune, TruncatedSVD, transform
from modules import BlockRouter, Coefficients, FeatureRouter, MergedModel, Router, structure
from modules.routers import conflict

TASKS = ("a", "b", "c")
DIM, HIDDEN, BATCH = 16, 32, 6
SMALL = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Pooled(nn.Module):
    """A transformers model that gives its features alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output = self.model(x)
        return output.pooler_output if "pooler_output" in output else output.last_hidden_state.mean(1)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 16, 16)


def tokens() -> Tensor:
    return torch.randint(20, (BATCH, 8))


def tiny_vit(ratio: float = 2.0) -> tuple[nn.Module, Tensor]:
    return TinyViT(image_size=16, patch=8, dim=DIM, depth=2, heads=2, mlp_ratio=ratio), images()


def hf_clip() -> tuple[nn.Module, Tensor]:
    return Pooled(hf.CLIPVisionModel(hf.CLIPVisionConfig(**SMALL, image_size=16, patch_size=8))), images()


def open_clip() -> tuple[nn.Module, Tensor]:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(16, 8, width=DIM, layers=2, heads=2, mlp_ratio=2.0, output_dim=DIM), images()


def torchvision_vit() -> tuple[nn.Module, Tensor]:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, DIM, HIDDEN, num_classes=DIM), images()


def gpt2() -> tuple[nn.Module, Tensor]:
    config = hf.GPT2Config(vocab_size=20, n_positions=8, n_embd=DIM, n_layer=2, n_head=2, n_inner=HIDDEN)
    return Pooled(hf.GPT2Model(config)), tokens()


def bert() -> tuple[nn.Module, Tensor]:
    return Pooled(hf.BertModel(hf.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=8))), tokens()


def torch_encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(DIM, 2, HIDDEN, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(4 * DIM, DIM)), torch.randn(BATCH, 4, DIM)


ARCHITECTURES = [tiny_vit, hf_clip, open_clip, torchvision_vit, gpt2, bert, torch_encoder]


class ConvNet(nn.Module):
    """Convolutions of many kinds: strided, dilated, grouped, without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0)), nn.Conv2d(8, 8, 3, groups=4)
        self.wide, self.same = nn.Conv2d(8, 8, 3, dilation=2, bias=False), nn.Conv2d(8, 8, 3, padding="same")
        self.norm, self.fc = nn.LayerNorm(8, bias=False), nn.Linear(8, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.wide(self.grouped(self.stem(x).relu()))).relu()
        return self.fc(self.norm(x.mean((2, 3))))


def conv_net() -> tuple[nn.Module, Tensor]:
    return ConvNet(), images()


def experts_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    def expert(seed: int) -> dict[str, Tensor]:
        moved, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p.dtype))
        return moved.state_dict()

    return {task: expert(seed) for seed, task in enumerate(TASKS, 1)}


class Case:
    def __init__(self, make) -> None:
        torch.manual_seed(0)
        model, x = make()
        self.model, self.x = model.double().eval(), x.double() if x.is_floating_point() else x
        self.experts = experts_of(self.model)
        self.vectors = TaskVectors.from_state_dicts(self.model.state_dict(), self.experts)

    def merged(self, router: Router | None = None, vectors: TaskVectors | None = None, **kwargs) -> MergedModel:
        coefficients = Coefficients(**{"grain": "model", "init": 0.3} | kwargs)
        return MergedModel(self.model, vectors or self.vectors, coefficients, router, features=DIM)

    def plain(self, state: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model, state, (self.x,))


@pytest.fixture(params=ARCHITECTURES, ids=lambda make: make.__name__)
def case(request) -> Case:
    return Case(request.param)


@pytest.fixture
def vit() -> Case:
    return Case(tiny_vit)


def spread(router: nn.Module) -> None:
    """Parameters so large that routing differs a lot from sample to sample."""
    with torch.no_grad():
        for p in router.parameters():
            p.normal_(std=0.5)


def composed(merged: MergedModel, model: nn.Module, vectors: TaskVectors, x: Tensor, coefficients: Tensor) -> Tensor:
    """The same computation by autograd alone: hooks learn nothing from the code under test but the router's gates."""
    inputs: dict[str, Tensor] = {}

    def state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        site_of = {layer: site.name for site in merged.router.find(model, {}) for layer in site.layers}
        own = {}
        for name, value in vectors.base.items():
            row = weights.get(site_of.get(name.rpartition(".")[0], ""), coefficients)
            own[name] = (
                value + torch.einsum("k,k...->...", row, vectors.deltas[name]) if name in vectors.rows else value
            )
        return own

    outputs = []
    for sample in x:
        weights: dict[str, Tensor] = {}
        for site in merged.router.find(model, {}):  # a site's input depends on the weights of those before it alone
            hook = model.get_submodule(site.layers[0]).register_forward_pre_hook(
                lambda module, args, name=site.name: inputs.__setitem__(name, args[0])
            )
            functional_call(model, state(weights), (sample[None],))
            hook.remove()
            weights[site.name] = merged.router(inputs[site.name], site.name)[0]
        outputs.append(functional_call(model, state(weights), (sample[None],)))
    return torch.cat(outputs)


class TestEveryArchitecture:
    def test_depth_0_is_static_coefficients(self, case):
        start = [0.2, 0.5, -0.1]
        merged = case.merged(BlockRouter(depth=0), init=start)
        with torch.no_grad():
            for gate in merged.router.gates.parameters():
                gate.copy_(torch.tensor(start, dtype=torch.float64))
        assert_close(merged(case.x), case.merged(init=start)(case.x), **EXACT)
        as_begun = case.merged(BlockRouter(depth=0, init=0.4), init=0.4)
        assert_close(as_begun(case.x), case.merged(init=0.4)(case.x), **EXACT)

    @pytest.mark.parametrize("router", [BlockRouter, FeatureRouter])
    def test_zero_is_the_base(self, case, router):
        merged = case.merged(router(), init=0.0)
        merged.router.requires_grad_(False)
        with torch.no_grad(), merged.routing.using(torch.zeros(len(case.x), 3).double()):
            routed = functional_call(merged._frozen.model, merged.weights(), (case.x,))
        assert_close(routed, case.plain(case.model.state_dict()), **EXACT)
        if router is BlockRouter:
            for gate in merged.router.gates.parameters():
                gate.zero_()
            assert_close(merged(case.x), routed, **EXACT)
        else:
            assert_close(merged.shared(case.x), routed, **EXACT)

    @pytest.mark.parametrize("router", [lambda: BlockRouter(depth=1), lambda: BlockRouter(depth=0, scope="linear")])
    def test_one_hot_is_the_expert(self, case, router):
        merged = case.merged(router(), init=[0.0, 1.0, 0.0])
        with torch.no_grad():
            for name, gate in merged.router.gates.named_parameters():
                gate.copy_(torch.eye(3)[1]) if name.endswith("bias") else gate.zero_()
        assert_close(merged(case.x), case.plain(case.experts["b"]), **EXACT)

    def test_output_and_gradients_are_those_of_weights_composed_for_every_sample(self, case):
        merged = case.merged(BlockRouter(depth=2))
        spread(merged.router)
        learned = [merged.coefficients.raw, *merged.router.parameters()]
        result = merged(case.x[:3])
        outer = torch.randn_like(result)
        own = torch.autograd.grad(result, learned, outer)

        coefficients = merged.coefficients().detach()[0].requires_grad_()
        expected = composed(merged, case.model, case.vectors, case.x[:3], coefficients)
        assert_close(result, expected, rtol=1e-9, atol=1e-11)
        other = torch.autograd.grad(expected, [coefficients, *merged.router.parameters()], outer)
        assert_close(list(own), [other[0][None], *other[1:]], rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize(
        "router",
        [BlockRouter, lambda: BlockRouter(per="batch"), FeatureRouter, lambda: FeatureRouter(hard=True)],
        ids=["per sample", "per batch", "soft features", "hard features"],
    )
    def test_no_image_depends_on_its_batch_when_evaluated(self, case, router):
        merged = case.merged(router(), init=0.0)
        spread(merged.router)
        merged.eval()
        with torch.no_grad(), merged.of({"a": 2, "b": 4}):
            together = merged(case.x)
        with torch.no_grad():
            alone = torch.cat([merged(one[None]) for one in case.x])
            assert_close(merged(case.x.flip(0)).flip(0), together, **EXACT)
        assert_close(alone, together, **EXACT)
        assert_close(merged(case.x), together, **EXACT)  # with a graph as well

    def test_routed_layers_take_no_static_coefficient(self, case):
        merged = case.merged(BlockRouter(), grain="tensor")
        routed = {f"{layer}.{part}" for layer in merged.routing.layers for part in ("weight", "bias")}
        assert routed.isdisjoint(merged.coefficients.rows)
        assert routed.intersection(case.vectors.rows) | set(merged.coefficients.rows) == set(case.vectors.rows)


# -- BlockRouter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_gate_begins_near_task_arithmetic(vit, depth):
    merged = vit.merged(BlockRouter(depth=depth, init=0.4))
    shapes = {0: [(3,)], 1: [(3, DIM), (3,)], 2: [(DIM, DIM), (DIM,), (3, DIM), (3,)]}[depth]
    parameters = dict(merged.router.gates[0].named_parameters())
    assert [tuple(p.shape) for p in parameters.values()] == shapes
    assert {p.dtype for p in parameters.values()} == {torch.float64}
    weights = merged.router(torch.randn(2, 5, DIM), merged.router.sites[0])
    assert_close(weights, torch.full((2, 3), 0.4).double(), rtol=0, atol=0.1)
    *others, last = (p for name, p in parameters.items() if name.endswith("bias"))
    assert last.eq(0.4).all()
    assert all(p.eq(0).all() for p in others)
    assert all(0.005 < p.std() < 0.015 for p in parameters.values() if p.ndim == 2)


def test_tokens_are_averaged_after_the_gate_or_before_it(vit):
    after, before = (vit.merged(BlockRouter(pool=pool)).router for pool in ("after", "before"))
    spread(after)
    before.load_state_dict(after.state_dict())
    x, site = torch.randn(4, 5, DIM).double(), after.sites[1]
    first, last = after.gates[1][0], after.gates[1][2]
    assert_close(after(x, site), last(first(x).relu()).mean(1), **EXACT)
    assert_close(before(x, site), last(first(x.mean(1)).relu()), **EXACT)
    assert not torch.allclose(after(x, site), before(x, site))


def test_one_layer_is_the_same_before_and_after(vit):
    after, before = (vit.merged(BlockRouter(depth=1, pool=pool)) for pool in ("after", "before"))
    spread(after.router)
    before.router.load_state_dict(after.router.state_dict())
    assert_close(after(vit.x), before(vit.x), **EXACT)


def test_a_shared_gate_is_one_gate_that_learns_from_all_sites(vit):
    shared, own = vit.merged(BlockRouter(shared=True)), vit.merged(BlockRouter())
    assert (len(shared.router.gates), len(own.router.gates)) == (1, 2)
    spread(shared.router)
    for gate in own.router.gates:
        gate.load_state_dict(shared.router.gates[0].state_dict())
    for merged in (shared, own):
        merged(vit.x).square().sum().backward()
    assert_close(shared(vit.x), own(vit.x), **EXACT)
    sums = [sum(parts) for parts in zip(*([p.grad for p in g.parameters()] for g in own.router.gates), strict=True)]
    assert_close([p.grad for p in shared.router.parameters()], sums)


def test_a_shared_gate_needs_sites_of_one_width(vit):
    with pytest.raises(InputError, match=r"one shared gate needs sites of one width; these have \[16, 32\]"):
        vit.merged(BlockRouter(shared=True, scope="linear"))


def test_while_training_a_batch_is_averaged_within_each_task(vit):
    merged = vit.merged(BlockRouter(per="batch"))
    spread(merged.router)
    for sizes in ({"a": 3, "b": 3}, {"a": 2, "b": 4}):  # one merge per task, and the general case
        parts = vit.x.split(list(sizes.values()))
        with merged.of(sizes):
            together = merged(vit.x)
        separate = []
        for task, part in zip(sizes, parts, strict=True):
            with merged.of({task: len(part)}):
                separate.append(merged(part))
        assert_close(together, torch.cat(separate), **EXACT)
        assert_close(merged(parts[0]), separate[0], **EXACT)  # nothing said: one task
        assert not torch.allclose(merged(vit.x), together)
    assert not torch.allclose(merged.eval()(vit.x), together)


def test_weights_averaged_over_a_batch_are_means_of_those_per_sample(vit):
    merged, site = vit.merged(BlockRouter(per="batch")), "blocks.0.mlp"
    spread(merged.router)
    x = torch.randn(BATCH, 5, DIM).double()
    each = merged.router(x, site)
    with merged.of({"a": 3, "b": 3}):
        assert_close(merged.routing._route(x, site), torch.stack([each[:3].mean(0), each[3:].mean(0)]))
    with merged.of({"a": 1, "b": 5}):
        expected = torch.cat([each[:1], each[1:].mean(0, keepdim=True).expand(5, -1)])
        assert_close(merged.routing._route(x, site), expected)
        merged.eval()
        assert_close(merged.routing._route(x, site), each)


# -- scopes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [r"model\.encoder\.layers\.\d\.self_attn", r"model\.encoder\.layers\.\d", "linear"])
def test_a_site_routes_by_the_layer_that_is_called_first(scope):
    # Attention of transformers' CLIP lists its key projection first and calls the query's first.
    case = Case(hf_clip)
    merged = case.merged(BlockRouter(depth=1, scope=scope))
    spread(merged.router)
    merged(case.x.flip(0))
    assert_close(merged(case.x), torch.cat([merged(one[None]) for one in case.x]), **EXACT)


def test_an_aborted_pass_leaves_no_weights_behind():
    case = Case(hf_clip)
    merged = case.merged(BlockRouter(depth=1, scope=r"model\.encoder\.layers\.\d"))
    spread(merged.router)
    expected = merged(case.x)
    norm = merged._frozen.model.get_submodule("model.encoder.layers.0.layer_norm2")

    def stop(module, args):
        raise InterruptedError

    hook = norm.register_forward_pre_hook(stop)
    with pytest.raises(InterruptedError):
        merged(case.x[:2].flip(0))
    hook.remove()
    assert_close(merged(case.x), expected, rtol=0, atol=0)


def test_a_whole_model_may_be_routed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, DIM)).double()
    experts = experts_of(model)
    vectors = TaskVectors.from_state_dicts(model.state_dict(), experts)
    merged = MergedModel(model, vectors, Coefficients(), BlockRouter(depth=0, scope="linear", init=0.0), features=DIM)
    assert merged.coefficients.rows == ()
    x = torch.randn(5, 4).double()
    assert_close(merged(x), model(x), **EXACT)
    with torch.no_grad():
        merged.router.gates[1].bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    mixed = model.state_dict() | {n: v for n, v in experts["c"].items() if n.startswith("2.")}
    assert_close(merged(x), functional_call(model, mixed, (x,)), **EXACT)


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ([[1.0, -2.0], [3.0, -1.0]], 0.0),  # the same signs
        ([[1.0, -2.0], [-1.0, 2.0]], 1.0),  # opposite
        ([[4.0, 0.0], [0.0, -1.0]], 0.0),  # different entries
        ([[3.0, 1.0], [-1.0, 1.0]], 1 - 4 / 6),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
def test_conflict_is_what_cancels_out(deltas, expected):
    for form in (torch.tensor(deltas), Sparse.from_dense(torch.tensor(deltas))):
        assert conflict(form) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("router", [BlockRouter, FeatureRouter])
def test_a_router_may_serve_the_layers_of_most_conflict(vit, router):
    one, two = copy.deepcopy(vit.model.state_dict()), copy.deepcopy(vit.model.state_dict())
    for name in one:
        nudge = torch.rand_like(one[name])
        sign = -1 if name.startswith("blocks.1.mlp") else 1
        one[name], two[name] = one[name] + nudge, two[name] + sign * nudge
    vectors = TaskVectors.from_state_dicts(vit.model.state_dict(), {"one": one, "two": two})
    everything = router(scope="conflict:1").find(vit.model, vectors.deltas)
    chosen = router(scope=f"conflict:{2 / len(everything)}").find(vit.model, vectors.deltas)
    assert len(chosen) == 2
    assert all(site.name.startswith("blocks.1.mlp") for site in chosen)
    with pytest.raises(InputError, match="scope 'conflict:half': after 'conflict:' comes a fraction"):
        router(scope="conflict:half").find(vit.model, vectors.deltas)


def test_a_scope_that_matches_nothing(vit):
    with pytest.raises(InputError, match=r"no module of TinyViT with linear layers matches 'mlps'"):
        vit.merged(BlockRouter(scope="mlps"))


def test_a_router_serves_one_model(vit):
    router = BlockRouter()
    vit.merged(router)
    with pytest.raises(InputError, match="this router belongs to another merged model already"):
        vit.merged(router)


# -- FeatureRouter -----------------------------------------------------------------------------------------------------


def test_a_feature_router_weighs_experts_by_its_classification(vit):
    merged = vit.merged(FeatureRouter(dropout=0.0), init=0.0)
    spread(merged.router)
    z = merged.shared(vit.x)
    assert_close(z, vit.plain(vit.model.state_dict()), **EXACT)
    weights = merged.router(z)
    assert_close(weights, merged.router.logits(z).softmax(1))
    assert_close(weights.sum(1), torch.ones(BATCH).double())

    expected = []
    for one, row in zip(vit.x, weights, strict=True):
        state = dict(vit.vectors.base)
        for name in vit.vectors.rows:
            if name.rpartition(".")[0] in merged.routing.layers:
                state[name] = state[name] + torch.einsum("k,k...->...", row, vit.vectors.deltas[name])
        expected.append(functional_call(vit.model, state, (one[None],)))
    assert_close(merged(vit.x), torch.cat(expected), **EXACT)


@pytest.mark.parametrize("compact", [[], [Prune(0.5)], [TruncatedSVD(2)]], ids=["dense", "sparse", "low rank"])
@pytest.mark.parametrize("make", [conv_net, hf_clip, torchvision_vit, open_clip], ids=lambda make: make.__name__)
def test_all_layers_that_can_have_weights_of_their_own_per_sample(make, compact):
    case = Case(make)
    vectors = transform(case.vectors, compact)
    merged = case.merged(FeatureRouter(dropout=0.0), vectors, init=0.0)
    spread(merged.router)
    weights = merged.router(merged.shared(case.x))
    outer = torch.randn(BATCH, DIM).double()
    own = torch.autograd.grad(merged(case.x), list(merged.router.parameters()), outer)

    expected = []
    for one, row in zip(case.x, weights, strict=True):
        state = dict(vectors.base)
        for name in vectors.rows:
            if name.rpartition(".")[0] in merged.routing.layers:
                state[name] = state[name] + torch.einsum("k,k...->...", row, dense(vectors.deltas[name]))
        expected.append(functional_call(case.model, state, (one[None],)))
    assert_close(merged(case.x), torch.cat(expected), **EXACT)
    other = torch.autograd.grad(torch.cat(expected), list(merged.router.parameters()), outer)
    assert_close(list(own), list(other), rtol=1e-8, atol=1e-10)


def test_convolutions_that_are_routed_and_those_that_are_not():
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(-1))

    model = ConvNet()
    assert list(structure.routable(model)) == ["stem", "wide", "norm", "fc"]
    model.wide = Own(8, 8, 3)
    assert list(structure.routable(model)) == ["stem", "norm", "fc"]


def test_a_gate_per_layer_is_for_layers_of_one_kind_of_input(vit):
    with pytest.raises(InputError, match="scope 'all' is for routers of features; use 'mlp' or 'linear'"):
        vit.merged(BlockRouter(scope="all"))


def test_a_hard_router_evaluates_with_one_expert(vit):
    merged = vit.merged(FeatureRouter(hard=True, dropout=0.0), init=0.0)
    spread(merged.router)
    z = merged.shared(vit.x)
    assert_close(merged.train().router(z), merged.router.logits(z).softmax(1))
    rows = merged.eval().router(z)
    assert rows.sum(1).eq(1).all()
    assert rows.argmax(1).equal(merged.router.logits(z).argmax(1))
    with torch.no_grad():
        merged.router.classifier[-1].weight.zero_()
        merged.router.classifier[-1].bias.copy_(torch.eye(3)[2])
        linear = {n for n in vit.vectors.rows if n.rpartition(".")[0] in merged.routing.layers}
        expert = vit.model.state_dict() | {n: vit.experts["c"][n] for n in linear}
        assert_close(merged(vit.x), vit.plain(expert), **EXACT)


@pytest.mark.parametrize("router", [BlockRouter, FeatureRouter])
def test_weights_that_are_given_take_the_place_of_the_routers(vit, router):
    merged = vit.merged(router(), init=0.0)
    routed = {n for n in vit.vectors.rows if n.rpartition(".")[0] in merged.routing.layers}
    before = merged.eval()(vit.x)
    with merged.routing.using(torch.eye(3).double()[[2] * BATCH]):
        expert = vit.model.state_dict() | {n: vit.experts["c"][n] for n in routed}
        assert_close(merged(vit.x), vit.plain(expert), **EXACT)
        assert_close(merged.shared(vit.x), vit.plain(vit.model.state_dict()), **EXACT)
    assert_close(merged(vit.x), before, rtol=0, atol=0)


def test_the_size_of_a_feature_router(vit):
    classifier = vit.merged(FeatureRouter(layers=1)).router.classifier
    assert [tuple(p.shape) for p in classifier.parameters() if p.ndim == 2] == [(2 * DIM, DIM), (3, 2 * DIM)]


def test_dropout_is_for_training_alone(vit):
    merged = vit.merged(FeatureRouter(dropout=0.5))
    spread(merged.router)
    z = merged.shared(vit.x)
    assert not torch.equal(merged.router(z), merged.router(z))
    assert torch.equal(merged.eval().router(z), merged.router(z))


def test_a_feature_router_learns_through_the_routed_layers(vit):
    merged = vit.merged(FeatureRouter(dropout=0.0))
    spread(merged.router)
    merged(vit.x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in merged.router.parameters())
    assert merged.coefficients.raw.grad.abs().sum() > 0


# -- compressed task vectors, precision, export ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compact", "form"), [(Prune(0.1), Sparse), (TruncatedSVD(2), LowRank)], ids=["sparse", "low rank"]
)
@pytest.mark.parametrize("router", [BlockRouter, FeatureRouter])
def test_compressed_task_vectors_route_as_their_dense_form(vit, compact, form, router):
    small = transform(vit.vectors, [compact])
    whole = vit.vectors.changed(lambda name, deltas: dense(small.deltas[name]))
    assert isinstance(small.deltas["blocks.0.mlp.fc1.weight"], form)
    assert isinstance(whole.deltas["blocks.0.mlp.fc1.weight"], Tensor)
    one, other = vit.merged(router(), small), vit.merged(router(), whole)
    spread(one.router)
    other.router.load_state_dict(one.router.state_dict())
    one.eval(), other.eval()
    for merged in (one, other):
        merged(vit.x).square().sum().backward()
    assert_close(one(vit.x), other(vit.x), **EXACT)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-11) for p, q in pairs)
    assert one.stored_parameters() < other.stored_parameters()


def test_what_is_stored_counts_the_deltas_of_routed_layers(vit):
    base = sum(p.numel() for p in vit.model.parameters())
    assert vit.merged().stored_parameters() == base
    routed = 2 * (2 * DIM * HIDDEN + DIM + HIDDEN)
    assert vit.merged(BlockRouter()).stored_parameters() == base + 3 * routed


def test_a_routing_model_has_no_merge_to_export(vit):
    merged = vit.merged(BlockRouter())
    for export in (merged.merged_state_dict, merged.materialise):
        with pytest.raises(InputError, match="weights of its own for every image: there is no merge to export"):
            export()


def test_a_model_without_a_router_has_no_shared_expert(vit):
    with pytest.raises(InputError, match="without a router has no shared expert"):
        vit.merged().shared(vit.x)


@pytest.mark.parametrize("compact", [[], [Prune(0.1)], [TruncatedSVD(2)]], ids=["dense", "sparse", "low rank"])
@pytest.mark.parametrize("router", [BlockRouter, FeatureRouter])
def test_moving_to_another_precision_moves_everything(router, compact):
    torch.manual_seed(0)
    model, x = tiny_vit()
    vectors = transform(TaskVectors.from_state_dicts(model.state_dict(), experts_of(model)), compact)
    merged = MergedModel(model, vectors, Coefficients(), router(), features=DIM).eval()
    single = merged(x)
    assert single.dtype == torch.float32
    double = merged.to(torch.float64)(x.double())
    assert double.dtype == torch.float64
    assert_close(double.float(), single, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_gates_and_weights_in_single_precision(vit):
    merged = vit.merged(BlockRouter()).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = merged(vit.x.float())
        assert merged.router(torch.randn(2, 3, DIM), "blocks.0.mlp").dtype == torch.float32
    half.float().square().sum().backward()
    assert_close(half.float(), merged(vit.x.float()), rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in merged.parameters())


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_micro_batches_give_the_gradients_of_one_forward_pass(vit, per):
    one, parts = vit.merged(BlockRouter(per=per)), vit.merged(BlockRouter(per=per))
    spread(one.router)
    parts.router.load_state_dict(one.router.state_dict())
    sizes = {"a": 3, "b": 3}
    with one.of(sizes):
        losses = [z.square().mean() for z in one(vit.x).split(3)]
    sum(losses).backward()

    def alone(task: str, x: Tensor) -> Tensor:
        with parts.of({task: len(x)}):
            return parts(x).square().mean()

    pieces = [lambda t=t, x=x: alone(t, x) for t, x in zip(sizes, vit.x.split(3), strict=True)]
    values = parts.in_parts(pieces, parts.router.parameters())
    assert all(p.grad is None for p in parts.parameters())
    sum(values).backward()
    assert_close(torch.stack(values), torch.stack(losses).detach(), **EXACT)
    for own, other in zip(parts.parameters(), one.parameters(), strict=True):
        assert_close(own.grad, other.grad, **EXACT)


def test_a_router_learns_alone_where_coefficients_do_not(vit):
    merged = vit.merged(BlockRouter())
    merged.coefficients.requires_grad_(False)
    merged(vit.x).square().sum().backward()
    assert merged.coefficients.raw.grad is None
    assert all(p.grad.abs().sum() > 0 for p in merged.router.parameters())


def test_learned_state_is_coefficients_and_gates_alone(vit):
    merged = vit.merged(BlockRouter(depth=1))
    assert list(merged.state_dict()) == [name for name, _ in merged.named_parameters()]
    expected = [f"router.gates.{i}.{part}" for i in range(2) for part in ("weight", "bias")]
    assert list(merged.state_dict()) == ["coefficients.raw", *expected]


def test_nothing_that_was_given_is_changed(vit):
    before = copy.deepcopy((vit.model.state_dict(), vit.experts))
    merged = vit.merged(BlockRouter())
    merged(vit.x).square().sum().backward()
    torch.optim.SGD(merged.parameters(), lr=1.0).step()
    merged(vit.x)
    assert all("forward" not in vars(module) and not module._forward_pre_hooks for module in vit.model.modules())
    for old, new in zip((before[0], *before[1].values()), (vit.model.state_dict(), *vit.experts.values()), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_model_that_is_let_go_frees_its_memory(vit):
    merged = vit.merged(BlockRouter())
    with torch.no_grad():
        merged(vit.x)
    gone = weakref.ref(merged)
    del merged
    gc.collect()
    assert gone() is None
