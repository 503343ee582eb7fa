"""Item embeddings that begin at what the items' titles mean."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from model.hub import BaseModel
from storage import atomic_path, reason

BATCH_SIZE = 64
MAX_TOKENS = 64


@torch.inference_mode()
def encode_titles(encoder: BaseModel, titles: list[str], device: torch.device | str) -> np.ndarray:
    """(V + 1, E) mean of a text encoder's last hidden states over each title, of length 1.

    Args:
        encoder: any model that ``transformers.AutoModel`` loads.
        titles: title by item; item 0 is padding and gets zeros.
        device: where to compute.
    """
    from transformers import AutoModel, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = AutoModel.from_pretrained(
            encoder.folder, dtype=torch.float32, use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(encoder.folder, **options)
    except Exception as error:  # transformers does not say what it raises
        raise UserError(
            f"--title_encoder: cannot load {encoder.folder}: {reason(error)}"
        ) from error
    model = model.to(device).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    order = sorted(range(1, len(titles)), key=lambda item: len(titles[item]))
    encodings = np.zeros((len(titles), model.config.hidden_size), dtype=np.float32)
    with tqdm(total=len(order), desc="titles", unit="title", dynamic_ncols=True) as bar:
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


def cached_title_encodings(
    encoder: BaseModel, titles: list[str], device: torch.device | str, cache_root: Path
) -> np.ndarray:
    """``encode_titles``, kept in the cache for an encoder that cannot change under its name."""
    if encoder.revision is None:
        return encode_titles(encoder, titles, device)
    key = hashlib.sha256(json.dumps([titles, encoder.name, encoder.revision]).encode()).hexdigest()
    path = cache_root / f"titles-{key[:16]}.npy"
    try:
        encodings = np.load(path, allow_pickle=False)
        if len(encodings) == len(titles):
            return encodings
    except (OSError, ValueError, EOFError, MemoryError):
        pass  # absent or damaged
    encodings = encode_titles(encoder, titles, device)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, encodings)
    return encodings


@torch.no_grad()
def set_item_embeddings(weight: Tensor, encodings: np.ndarray, std: float = 0.05) -> None:
    """Begin item embeddings at the principal components of encodings.

    The components are turned at random, so that no dimension of the embeddings matters more than
    another at first.

    Args:
        weight: (V + 1 or more, D) embeddings; row 0 and rows past V stay as they are.
        encodings: (V + 1, E), row 0 of no use.
        std: standard deviation of all new values.
    """
    x = torch.from_numpy(encodings[1:]).double()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)  # greatest variance first
    dim = weight.shape[1]
    components = torch.zeros(len(x), dim, dtype=x.dtype)
    kept = min(dim, axes.shape[1])
    components[:, :kept] = x @ axes[:, :kept]
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=x.dtype)).Q
    turned = components @ rotation
    weight[1 : len(encodings)] = (std * turned / turned.std()).to(weight)
