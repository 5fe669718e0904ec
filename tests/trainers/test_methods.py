"""The first step of overlays in configs/methods/ in closed form: where it begins, what it minimises, how it moves."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

from modules.bounds import project
from trainers import Adaptation, Stream

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
THIRD = torch.tensor(1 / 3)


def build(name: str) -> tuple[Adaptation, Stream]:
    """An overlay on the base configuration, on the tiny suite."""
    parser = ArgumentParser(exit_on_error=False, default_config_files=[str(METHODS.parent / "base.yaml")])
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Adaptation, "model")
    parser.add_subclass_arguments(Stream, "data")
    parser.add_argument("--trainer", type=dict)
    suite = ["--model.init_args.suite=tiny_suite.TinySuite", "--model.init_args.suite.init_args.vit=true"]
    made = parser.instantiate(parser.parse_args([f"--config={METHODS / name}.yaml", *suite]))
    return made.model, made.data


def cross_entropy(logits: Tensor, _: Tensor, labels: Tensor | None) -> Tensor:
    return F.cross_entropy(logits, labels)


def entropy(logits: Tensor, *_: Tensor | None) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy().mean()


def warm_kl(logits: Tensor, teacher: Tensor, _: Tensor | None) -> Tensor:
    """KL(expert ‖ merge) at temperature 2, times its square."""
    return 4 * F.kl_div((logits / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")


def jensen_shannon(logits: Tensor, teacher: Tensor, _: Tensor | None) -> Tensor:
    """H(½ (p + q)) − ½ H(p) − ½ H(q)."""
    p, q = logits.softmax(1), teacher.softmax(1)
    h = [torch.distributions.Categorical(probs=x).entropy() for x in ((p + q) / 2, p, q)]
    return (h[0] - (h[1] + h[2]) / 2).mean()


def along(grad: Tensor) -> Tensor:
    """Its part within the simplex, at the mean."""
    return grad - grad.mean(-1, keepdim=True)


def adam(grad: Tensor) -> Tensor:
    """The first step of Adam at 1e-3 goes by 1e-3 against the sign, whatever the size."""
    return -1e-3 * grad.sign()


#: By overlay: where all coefficients begin, the loss, and where a gradient of the coefficients takes them.
STEPS = {
    "dam": (THIRD, warm_kl, lambda g: THIRD + adam(g)),
    "divmerge": (torch.tensor(0.3), jensen_shannon, lambda g: 0.3 + adam(g)),
    "fw_merging": (THIRD, cross_entropy, lambda g: F.one_hot(g.argmin(-1), 3).float()),
    "fw_merging_soft": (THIRD, cross_entropy, lambda g: project((THIRD + adam(along(g)))[None])[0]),
    "attention_merging": (THIRD, entropy, lambda g: adam(along(g)).softmax(-1)),
    "self_positioning": (torch.tensor(0.3), cross_entropy, lambda g: 0.3 - 1e-3 * g),
    "supermerge": (torch.tensor(0.3), cross_entropy, lambda g: (torch.tensor(0.3).atanh() + adam(g)).tanh()),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_first_step(adapt, name):
    start, loss, update = STEPS[name]
    module, stream = build(name)
    adapt(1, module=module, stream=stream)
    suite = module.suite
    vectors, network = suite.task_vectors(), suite.backbone()
    weights = {n: (base + start * vectors.deltas[n].sum(0)).requires_grad_() for n, base in vectors.base.items()}
    total = torch.zeros(())
    for task, part in stream.steps()[0].items():
        head = suite.head(task)
        teacher, logits = (
            F.linear(functional_call(network, state, (part["images"],)), head.weight, head.bias)
            for state in (vectors.expert(task), weights)
        )
        total = total + loss(logits, teacher.detach(), part.get("labels"))
    grads = dict(zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True))
    products = {n: torch.einsum("o...,ko...->k", grad, vectors.deltas[n]) for n, grad in grads.items()}
    if module.coefficients.grain == "model":
        products = dict.fromkeys(products, torch.stack(list(products.values())).sum(0))
    if module.coefficients.grain == "column":
        more = {n: grad for n, grad in grads.items() if grad.dim() > 1 and grad.shape[1] > 1}
        products |= {n: torch.einsum("oj...,koj...->jk", grad, vectors.deltas[n]) for n, grad in more.items()}
    for n, value in module.coefficients.by_tensor().items():
        learns = name != "attention_merging" or "attn" in n
        expected = update(products[n]) if learns else start.expand(3)
        assert_close(value.detach(), expected, rtol=0, atol=2e-5)
    assert sum("attn" in n for n in products) in range(1, len(products))


def test_labels_are_those_of_training_images_and_few_where_the_paper_has_few():
    for name in STEPS:
        module, stream = build(name)
        labels = any("labels" in phase.objective.needs for phase in module.phases)
        assert module.allow_labels == labels
        assert stream.train_split == ("train" if labels or name == "dam" else "test")
        assert stream.per_task == (100 if name in ("fw_merging", "fw_merging_soft", "self_positioning") else None)
