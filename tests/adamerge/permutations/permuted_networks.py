"""Small networks of many kinds, and the same ones with their units in another order."""

import torch
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTForImageClassification

from adamerge.permutations import apply, chain, symmetry_of

SIZES = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"hidden_size": 24, "intermediate_size": 20}
IMAGES = (7, 3, 16, 16)


def mlp() -> nn.Module:
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.LayerNorm(10), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(10, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 14 * 14, 8), nn.ReLU(), nn.Linear(8, 2)
    )


class SmallResNet(ResNet):
    """With an eighth of the channels."""

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.conv1, self.bn1, self.inplanes = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), 8
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def small(block) -> nn.Module:
    model = SmallResNet(block, [1, 2, 1, 1], num_classes=4)
    model.fc = nn.Linear(64 * block.expansion, 4)
    return model


def timm() -> nn.Module:
    return TimmTransformer(16, 8, num_classes=5, embed_dim=24, depth=2, num_heads=4, mlp_ratio=2, init_values=0.1)


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZES))


def clip() -> nn.Module:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=6, **SIZES))


MODELS = {
    "mlp": (mlp, (7, 6)),
    "cnn": (cnn, IMAGES),
    "basic": (lambda: small(BasicBlock), (7, 3, 32, 32)),
    "bottleneck": (lambda: small(Bottleneck), (7, 3, 32, 32)),
    "torchvision": (lambda: VisionTransformer(16, 8, 2, 4, 24, 20, num_classes=5), IMAGES),
    "timm": (timm, IMAGES),
    "transformers": (vit, IMAGES),
    "clip": (clip, IMAGES),
}


def build(kind: str, seed: int = 0) -> nn.Module:
    """In float64, with norms, biases and statistics that tell units apart."""
    torch.manual_seed(seed)
    model = MODELS[kind][0]().double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand_like(tensor) if "var" in name else 0.1 * torch.randn_like(tensor)
    return model


def symmetry(kind: str, state):
    return chain(state) if kind in ("mlp", "cnn") else symmetry_of(state, heads=4)


def drawn(found, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {label: torch.randperm(size, generator=generator) for label, size in found.sizes.items()}


def inputs(kind: str) -> torch.Tensor:
    return torch.randn(MODELS[kind][1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def outputs(model: nn.Module, state, x: torch.Tensor) -> torch.Tensor:
    found = torch.func.functional_call(model, dict(state), (x,))
    return found if isinstance(found, torch.Tensor) else found[0]


def planted(kind: str) -> tuple[nn.Module, nn.Module, object, dict[str, torch.Tensor]]:
    """A network, the same with its units in another order, their symmetry and the order that undoes it."""
    model, other = build(kind), build(kind)
    found = symmetry(kind, model.state_dict())
    order = drawn(found)
    other.load_state_dict(apply(model.state_dict(), found, order))
    return model, other, found, {label: indices.argsort() for label, indices in order.items()}
