"""Item embeddings initialized from the items' titles."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import ArgumentError
from model.hub import BaseModel
from progress import ProgressBar
from storage import atomic_path, describe

BATCH_SIZE = 64
MAX_TOKENS = 64


@torch.inference_mode()
def encode_titles(encoder: BaseModel, titles: list[str], device: torch.device | str) -> np.ndarray:
    """Encode titles by the mean of a text encoder's last hidden states, scaled to unit length.

    Args:
        encoder: a model that ``transformers.AutoModel`` can load.
        titles: title of each item; item 0 is padding.
        device: device of the computation.

    Returns:
        (V + 1, E) float32; zeros for item 0.

    Raises:
        ArgumentError: ``encoder`` cannot be loaded.
    """
    model, tokenizer = _load_encoder(encoder.folder)
    model = model.to(device).eval()
    order = sorted(range(1, len(titles)), key=lambda item: len(titles[item]))
    encodings = np.zeros((len(titles), model.config.hidden_size), dtype=np.float32)
    with ProgressBar(total=len(order), desc="titles", unit="title") as bar:
        for start in range(0, len(order), BATCH_SIZE):
            items = order[start : start + BATCH_SIZE]
            text = tokenizer(
                [titles[item] for item in items],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(device)
            states = model(**text).last_hidden_state  # (B, L, E)
            sums = (states * text["attention_mask"].unsqueeze(-1)).sum(1)
            encodings[items] = torch.nn.functional.normalize(sums).cpu().numpy()
            bar.update(len(items))
    return encodings


def _load_encoder(folder: Path) -> tuple[Any, Any]:
    """Load a text encoder and its tokenizer, with a padding token.

    Raises:
        ArgumentError: ``encoder`` cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers does not document what it raises
        raise ArgumentError("encoder", folder, f"cannot be loaded ({describe(error)})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def cached_title_encodings(
    encoder: BaseModel, titles: list[str], device: torch.device | str, cache_root: Path
) -> np.ndarray:
    """Return ``encode_titles`` from the cache, or compute and cache it.

    Nothing is cached for an encoder without a revision, because its files can change.

    Raises:
        ArgumentError: ``encoder`` cannot be loaded.
        UserError: the cache cannot be written.
    """
    if encoder.revision is None:
        return encode_titles(encoder, titles, device)
    key = hashlib.sha256(json.dumps([titles, encoder.name, encoder.revision]).encode()).hexdigest()
    path = cache_root / f"titles-{key[:16]}.npy"
    try:
        encodings: np.ndarray = np.load(path, allow_pickle=False)
        if len(encodings) == len(titles):
            return encodings
    except (OSError, ValueError, EOFError, MemoryError):
        pass  # missing or damaged
    encodings = encode_titles(encoder, titles, device)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, encodings)
    return encodings


@torch.no_grad()
def init_item_embeddings_(weight: Tensor, encodings: np.ndarray, std: float = 0.05) -> None:
    """Initialize item embeddings in place with rotated principal components of encodings.

    With X the centered encodings and A the eigenvectors of X^T X by decreasing eigenvalue, the
    embeddings are c (X A_D) R: A_D has the first D eigenvectors, or zeros if there are fewer, R is
    a random orthogonal matrix, and c sets the standard deviation. R preserves all inner products
    and spreads the variance over the dimensions, which would otherwise be ordered by it.

    Args:
        weight: (V + 1 or more, D) embeddings; row 0 and rows after V do not change.
        encodings: (V + 1, E), row 0 is ignored.
        std: standard deviation of the new values.
    """
    x = torch.from_numpy(encodings[1:]).double()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)  # in ascending order before
    hidden_units = weight.shape[1]
    components = torch.zeros(len(x), hidden_units, dtype=x.dtype)
    num_axes = min(hidden_units, axes.shape[1])
    components[:, :num_axes] = x @ axes[:, :num_axes]
    rotation = torch.linalg.qr(torch.randn(hidden_units, hidden_units, dtype=x.dtype)).Q
    rotated = components @ rotation
    weight[1 : len(encodings)] = (std * rotated / rotated.std()).to(weight)
