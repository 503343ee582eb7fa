"""Checkpoints: one safetensors file, written atomically and read without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from errors import InputError
from storage import atomic_path, reading


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of nested dicts and lists to ``tensors`` and return the rest for JSON."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _restore(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of ``_flatten``."""
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _restore(v, tensors) for k, v in content}
    if kind == "list":
        return [_restore(v, tensors) for v in content]
    return content


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(path: Path, state: Any, fingerprint: str) -> None:
    """Write nested dicts and lists of tensors and plain values.

    Args:
        path: the file.
        state: what to save.
        fingerprint: identifies the run that may resume from it.

    Raises:
        UserError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    # safetensors refuses tensors that share memory. The copies are made on the host, as a GPU may
    # have no room for them.
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    metadata = {"state": json.dumps(skeleton), "fingerprint": fingerprint}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_checkpoint(path: Path, fingerprint: str) -> Any | None:
    """Read what ``save_checkpoint`` wrote, or return None if there is no file.

    Raises:
        InputError: the file is damaged or belongs to another run.
    """
    if not path.exists():
        return None
    with reading(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        owner = metadata["fingerprint"]
        state = _restore(json.loads(metadata["state"]), tensors)
    if owner != fingerprint:
        raise InputError(f"{path} belongs to a run with other settings or data")
    return state


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's random number generators, on the CPU and on ``device``."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
