"""Write a plain model for use elsewhere."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from adamerge.errors import InputError
from adamerge.files import replacing


def export(model: nn.Module, path: Path) -> Path:
    """Write a model's weights: to one safetensors file, or to a Hugging Face folder where `path` has no suffix.

    Tied tensors are written once, under their first name, as `from_pretrained` expects them. Raises InputError for a
    folder if the model is not a Hugging Face one, and for another suffix.
    """
    if path.suffix == ".safetensors":
        state, seen = {}, set()
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in seen or not tensor.numel():
                state[name] = tensor.contiguous()
                seen.add(tensor.data_ptr())
        with replacing(path) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(f"{path}: export writes .safetensors files, or a folder for a Hugging Face model")
    elif callable(save := getattr(model, "save_pretrained", None)):
        save(path)
    else:
        raise InputError(f"{type(model).__name__} is no Hugging Face model: give a file such as {path}.safetensors")
    return path
