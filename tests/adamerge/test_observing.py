"""Statistics against loops over numbers."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError
from adamerge.observing import observe


class Attention(nn.Module):
    """Tokens [B, T, 4] to logits [B, 3]: q, k and v see one input, the head the mean over tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x, attention_mask=None):
        x = self.norm(x)
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        mask = mask.to(x)
        scores = self.q(x) @ self.k(x).mT + (mask[:, None] - 1) * 1e9
        mixed = scores.softmax(-1) @ self.v(x)
        return self.head((mixed * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention().double()


def logistic(weights=(0.5, -1.0)):
    """log p(1 | x) = log σ(w x + b), as two classes with logits 0 and w x + b."""
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [weights[0]]]))
        model.bias.copy_(torch.tensor([0.0, weights[1]]))
    return model


INPUTS = [0.3, -1.2, 2.0, 0.7]
LABELS = [1, 0, 0, 1]


def test_fisher_of_a_logistic_regression_is_that_of_each_sample():
    """By hand: ∂ log p(y) / ∂(w_c x + b_c) = 1[y = c] − p_c; squares within a batch must not mix samples."""
    x = torch.tensor(INPUTS, dtype=torch.float64)[:, None]
    batches = [(x[:3], torch.tensor(LABELS[:3])), (x[3:], torch.tensor(LABELS[3:]))]
    true = observe(logistic(), batches, ("fisher",), "enumerated").tensors
    empirical = observe(logistic(), batches, ("fisher",), "labels").tensors
    weight, bias, seen = 0.0, 0.0, 0.0
    for value, label in zip(INPUTS, LABELS, strict=True):
        p = 1 / (1 + math.exp(-(0.5 * value - 1.0)))
        variance = p * (1 - p) ** 2 + (1 - p) * p**2
        weight += variance * value**2 / 4
        bias += variance / 4
        seen += (label - p) ** 2 * value**2 / 4
    assert_close(true["fisher/weight"], torch.full((2, 1), weight, dtype=torch.float64))
    assert_close(true["fisher/bias"], torch.full((2,), bias, dtype=torch.float64))
    assert_close(empirical["fisher/weight"], torch.full((2, 1), seen, dtype=torch.float64))


def test_sampled_fisher_tends_to_the_true_one_and_belongs_to_its_seed():
    x = torch.tensor(INPUTS, dtype=torch.float64)[:, None].repeat(150, 1)
    true = observe(logistic(), [x], ("fisher",), "enumerated").tensors["fisher/weight"]
    sampled = [observe(logistic(), [x], ("fisher",), seed=seed).tensors["fisher/weight"] for seed in (1, 1, 2)]
    assert_close(sampled[0], true, rtol=0.15, atol=0)
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])


def test_output_gram_of_a_logistic_regression():
    x = torch.tensor(INPUTS, dtype=torch.float64)[:, None]
    found = observe(logistic(), [x[:3], x[3:]], ("output_gram",), "enumerated").tensors["output_gram/weight"]
    variance = sum((p := 1 / (1 + math.exp(-(0.5 * v - 1.0)))) * (1 - p) for v in INPUTS) / 4
    assert_close(found, variance * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))


def test_gram_and_magnitude_are_means_over_tokens(model):
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    found = observe(model, [x[:2], x[2:]], ("gram", "magnitude"))
    gram, magnitude, before = torch.zeros(4, 4).double(), torch.zeros(4).double(), torch.zeros(4).double()
    for token in x.flatten(0, 1):
        seen = model.norm(token)
        gram += torch.outer(seen, seen) / 15
        magnitude += seen.abs() / 15
        before += token.abs() / 15
    assert_close(found.find("gram", "q.weight"), gram)
    assert_close(found.find("magnitude", "v.weight"), magnitude)
    assert_close(found.find("magnitude", "norm.weight"), before)
    assert not found.has("gram", "norm.weight")


def test_queries_keys_and_values_share_one_gram(model):
    found = observe(model, [torch.randn(2, 3, 4, dtype=torch.float64)])
    assert found.shared == {"k.weight": "q.weight", "v.weight": "q.weight"}
    assert set(found.tensors) == {"gram/q.weight", "gram/head.weight"}
    assert found.find("gram", "v.weight") is found.find("gram", "q.weight")


@pytest.mark.parametrize("measure", ["gram", "magnitude", "output_gram", "fisher"])
def test_padding_does_not_count(model, measure):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    padded = observe(model, [{"x": x, "attention_mask": mask}], (measure,), "enumerated")
    short = observe(model, [{"x": x[:, :2]}], (measure,), "enumerated")
    assert padded.tensors.keys() == short.tensors.keys()
    for key, value in padded.tensors.items():
        assert_close(value, short.tensors[key])


def test_classes_of_tokens_are_drawn_or_given_token_by_token():
    model = nn.Linear(2, 3).double()
    x, labels = torch.randn(2, 4, 2, dtype=torch.float64), torch.randint(3, (2, 4))
    labels[0, 1] = -100
    found = observe(model, [(x, labels)], ("fisher",), "labels").tensors["fisher/bias"]
    expected = torch.zeros(3, dtype=torch.float64)
    for n in range(2):
        gradient = torch.zeros(3, dtype=torch.float64)
        for t in range(4):
            if labels[n, t] >= 0:
                gradient += torch.eye(3, dtype=torch.float64)[labels[n, t]] - model(x[n, t]).softmax(-1).detach()
        expected += gradient**2 / 2
    assert_close(found, expected)
    with pytest.raises(InputError, match="targets='sampled'"):
        observe(model, [x], ("fisher",), "enumerated")


def test_transposed_layers_are_known():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return x @ self.weight

    found = observe(nn.Sequential(Conv1D(), nn.Linear(5, 2)), [torch.randn(4, 3)])
    assert found.transposed == {"0.weight"}
    assert found.find("gram", "0.weight").shape == (3, 3)


def test_the_model_is_not_changed(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    observe(model, [torch.randn(2, 3, 4, dtype=torch.float64)], ("gram", "magnitude", "output_gram", "fisher"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_measured_is_said(model):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    with pytest.raises(InputError, match="no batch"):
        observe(model, [])
    with pytest.raises(InputError, match="'grams'"):
        observe(model, [x], ("grams",))
    with pytest.raises(InputError, match="needs labels of shape \\[1\\], got none"):
        observe(model, [x], ("fisher",), "labels")


def test_layers_that_share_inputs_at_times_only_are_refused():
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x) + self.b(x if len(x) == 2 else x + 1)

    with pytest.raises(InputError, match=r"b\.weight has the inputs of a\.weight in some calls"):
        observe(Fickle(), [torch.randn(2, 2), torch.randn(3, 2)])


class Attending(nn.Module):
    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.norm, self.attn, self.cross = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True), cross

    def forward(self, x):
        x = self.norm(x)
        return self.attn(x, x.flip(1) if self.cross else x, x, need_weights=False)[0].mean(1)


def heads(model, x):
    """What the output projection takes, head by head, [B, T, 4]."""
    attn = model.attn
    q, k, v = (x @ w.T + b for w, b in zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True))
    parts = zip(*(part.chunk(2, -1) for part in (q, k, v)), strict=True)
    return torch.cat([(q @ k.mT / 2**0.5).softmax(-1) @ v for q, k, v in parts], -1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_attention_puts_out_is_projected_without_a_call_and_measured(batch_first):
    torch.manual_seed(0)
    model, x = Attending().double().eval(), torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    rows = heads(model, model.norm(x)).detach()

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, attention_mask):
            model.attn.batch_first = batch_first
            x = model.norm(x)
            x = x if batch_first else x.transpose(0, 1)
            return model.attn(x, x, x)[0].sum((0 if not batch_first else 1,))

    batch = {"x": x, "attention_mask": mask if batch_first else mask.T}
    found = observe(Masked(), [batch], ("gram", "magnitude", "output_gram"), "enumerated")
    kept = rows[mask]
    torch.testing.assert_close(found.find("gram", "inner.attn.out_proj.weight"), kept.T @ kept / 11)
    torch.testing.assert_close(found.find("magnitude", "inner.attn.out_proj.weight"), kept.abs().mean(0))
    answers = (rows @ model.attn.out_proj.weight.T + model.attn.out_proj.bias).detach().requires_grad_()
    log_p, expected = answers.sum(1).log_softmax(-1), torch.zeros(4, 4, dtype=torch.float64)
    for column in range(4):
        weighted = (log_p[:, column] * (log_p[:, column].detach() / 2).exp()).sum()
        gradient = torch.autograd.grad(weighted, answers, retain_graph=True)[0].flatten(0, 1)
        expected += gradient.T @ gradient / 3
    torch.testing.assert_close(found.find("output_gram", "inner.attn.out_proj.weight"), expected)


def test_fused_attention_is_measured_by_its_inputs():
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(3, 5, 4)
    found = observe(model, x.split(2), ("gram", "magnitude", "output_gram"))
    rows = model.norm(x).flatten(0, 1).detach()
    torch.testing.assert_close(found.find("gram", "attn.in_proj_weight"), rows.T @ rows / 15)
    torch.testing.assert_close(found.find("magnitude", "attn.in_proj_weight"), rows.abs().mean(0))
    torch.testing.assert_close(found.find("gram", "attn.in_proj_weight.query"), rows.T @ rows / 15)
    assert found.find("output_gram", "attn.in_proj_weight") is None
    assert observe(Attending(cross=True).eval(), [x]).find("gram", "attn.in_proj_weight") is None
