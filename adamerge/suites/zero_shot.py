"""Zero-shot heads: class names × prompt templates -> a frozen classifier, through the text half of a CLIP model."""

import hashlib
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from adamerge.checkpoints import Renamed, meta, open_state
from adamerge.errors import InputError
from adamerge.files import cache_folder, replacing
from adamerge.fingerprint import fingerprint
from adamerge.suites.base import HeadWeights

#: Goes into the cache key: raise it when the same model and words would give another head.
VERSION = 1
#: Prompts -> features [N, D], not normalised.
Encode = Callable[[list[str]], Tensor]
#: A tensor's name -> the names that checkpoints may have for it, one per kind of checkpoint.
Spell = Callable[[str], list[str]]
_BATCH = 64
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class TextModel:
    """The text half of a contrastive model.

    Attributes:
        encode: prompts -> features [N, D]; may read the weights at its first call.
        scale: exp of the model's logit scale.
        fingerprint: a digest of everything that decides the features: weights and settings.
    """

    encode: Encode
    scale: float
    fingerprint: str


def zero_shot_head(text: TextModel, names: Sequence[str], templates: Sequence[str], task: str = "task") -> HeadWeights:
    """The zero-shot head of a task, from the user's cache if this text model has met these very words before."""
    _check_words(names, templates, task)
    key = json.dumps([VERSION, text.fingerprint, list(names), list(templates)])
    path = cache_folder() / "zero_shot" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if not path.is_file():
        weight = zero_shot_weights(text.encode, names, templates, f"Zero-shot head of {task}")
        with replacing(path) as temporary:
            save_file({"weight": weight}, temporary)
    return HeadWeights(open_state(path)["weight"], normalize=True, scale=text.scale)


@torch.no_grad()
def zero_shot_weights(encode: Encode, names: Sequence[str], templates: Sequence[str], label: str = "") -> Tensor:
    """[C, D]: w_c = unit(mean_t unit(encode(template t with name c))), prompts encoded in batches."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    starts = range(0, len(prompts), _BATCH)
    bar = tqdm(starts, label, unit="batch", leave=False, disable=len(starts) < 8)
    features = torch.cat([encode(prompts[start : start + _BATCH]).float() for start in bar])
    per_prompt = F.normalize(features, dim=-1).view(len(names), len(templates), -1)
    return F.normalize(per_prompt.mean(dim=1), dim=-1)


def text_model(
    where: Path,
    build: Callable[[], nn.Module],
    encoder: Callable[[nn.Module], Encode],
    settings: Mapping[str, Any],
    spellings: Spell,
) -> TextModel:
    """A text model over a checkpoint that is hashed now and loaded for the first prompt.

    `build` makes the module with fresh weights, `encoder` turns the loaded one into a function of prompts, and
    `settings` are what besides the weights decides its features.
    """
    with torch.device("meta"):
        shapes = {"logit_scale": torch.empty(()), **build().state_dict()}
    state = open_state(where)
    weights = Renamed(state, locate(f"text model {where}", state, shapes, spellings))

    @cache
    def loaded() -> Encode:
        with torch.random.fork_rng(devices=[]):
            model = build()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        return encoder(model.eval())

    digest = hashlib.sha256(json.dumps([fingerprint(weights), settings], sort_keys=True).encode()).hexdigest()
    return TextModel(lambda prompts: loaded()(prompts), float(weights["logit_scale"].double().exp()), digest)


def locate(
    owner: str, state: Mapping[str, Tensor], shapes: Mapping[str, Tensor], spellings: Spell, spare: Container[str] = ()
) -> dict[str, str]:
    """Find a module's tensors in a checkpoint: their names there, by the spelling that finds most of them.

    Raises InputError for tensors that are missing and not in `spare`, of another shape, or of further layers.
    """
    own = set(state)
    kinds = [dict(zip(shapes, olds, strict=True)) for olds in zip(*map(spellings, shapes), strict=True)]
    names = max(kinds, key=lambda kind: len(own.intersection(kind.values())))
    if missing := [old for name, old in names.items() if old not in own and name not in spare]:
        raise InputError(
            f"{owner} lacks {len(missing)} of the {len(shapes)} tensors that the model needs, such as {missing[0]}; "
            f"its own begin with {', '.join(sorted({name.split('.')[0] for name in own})[:5])}"
        )
    found = {name: old for name, old in names.items() if old in own}
    for name, old in found.items():
        shape, wanted = list(meta(state, old).shape), list(shapes[name].shape)
        if shape != wanted:
            raise InputError(f"{owner}: {old} has shape {shape}, the model has {wanted}")
    layers = {_NUMBER.sub("#", old) for old in found.values()}
    if deeper := sorted(old for old in own.difference(found.values()) if _NUMBER.sub("#", old) in layers):
        raise InputError(f"{owner} has more layers than the model: {deeper[0]}")
    return found


def _check_words(names: Sequence[str], templates: Sequence[str], task: str) -> None:
    if not names or not templates:
        raise InputError(f"task {task!r} has no {'prompt templates' if names else 'classes'}")
    if twice := [name for k, name in enumerate(names) if name in names[:k]]:
        raise InputError(f"task {task!r}: two classes are both named {twice[0]!r}; give class_names")
    if bare := [template for template in templates if "{}" not in template]:
        raise InputError(f"task {task!r}: template {bare[0]!r} has no {{}} for the class name")
