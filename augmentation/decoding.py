"""Constrained decoding of several texts at once, of item numbers only.

It saves time in comparison with ``generate`` of transformers:

- Prompts of equal length are read together. Without padding they need no mask, and causality
  halves attention.
- The output layer computes only the logits of the catalogue's tokens, so that temperature, top-k
  and top-p act on tens or hundreds of tokens instead of the whole vocabulary.
- Keys and values are written into memory that has room for the whole response, and those of texts
  that have ended are dropped.

Each text has its own random numbers, so that, except for rounding, it does not depend on the other
texts in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from augmentation.constraints import ItemText
from dataloader.prompt_batches import BatchLimits, micro_batches
from model.cpu_attention import NAME as CPU_ATTENTION
from model.language_model import base_causal_lm, free_bytes
from model.verbalizer import token_logits

KEPT_SHARE = 0.75  # ended texts are dropped once at most this share of the texts is unfinished
CUDA_SHARE = 0.5  # of the free memory for keys and values; reading prompts needs the rest
READ_TOKENS = 4096  # of prompts that are read together
CPU_BYTES = 2 << 30  # fixed: rounding must not depend on what else the machine does


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, padded on the left, with room for more tokens on the right.

    Args:
        keys: (1, G, L, D) keys of each text; L differs between texts.
        values: (1, G, L, D) values of each text.
        room: number of further tokens.
        key_dtype: dtype in which the keys are kept.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        room: int,
        key_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.length = max(x.shape[2] for x in keys)
        self.keys = self._join(keys, room, key_dtype)
        self.values = self._join(values, room, values[0].dtype)
        self.dtype, self.device = values[0].dtype, values[0].device
        self.is_initialized = True

    def _join(self, states: Sequence[Tensor], room: int, dtype: torch.dtype) -> Tensor:
        _, groups, _, width = states[0].shape
        shape = (len(states), groups, self.length + room, width)
        store = states[0].new_zeros(shape, dtype=dtype)
        for row, state in zip(store, states):
            row[:, self.length - state.shape[2] : self.length] = state[0]
        return store

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, G, 1, D), and return those of all positions.

        These include empty positions, because a part of the memory would not be contiguous.
        """
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.length] = key_states[:, :, 0]
        self.values[:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        """Positions written so far."""
        return self.length

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        """Number and offset of the positions that ``update`` returns."""
        assert self.keys is not None
        return self.keys.shape[2], 0


def fitting_tokens(model: nn.Module) -> int:
    """Number of tokens whose keys and values fit in half of the free memory on CUDA, else 2 GiB."""
    causal_lm = base_causal_lm(model)
    config, on_cuda = causal_lm.config, causal_lm.device.type == "cuda"
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_number = key_dtype(causal_lm).itemsize + causal_lm.dtype.itemsize
    available = CUDA_SHARE * free_bytes(causal_lm.device) if on_cuda else CPU_BYTES
    return int(available / (config.num_hidden_layers * heads * width * bytes_per_number))


def key_dtype(causal_lm: Any) -> torch.dtype:
    """The dtype of the keys: float32 if the attention is ``model.cpu_attention``'s."""
    is_ours = causal_lm.config._attn_implementation == CPU_ATTENTION
    return torch.float32 if is_ours else causal_lm.dtype


def read(causal_lm: Any, prompts: Sequence[Tensor], room: int) -> tuple[Tensor, Cache]:
    """Read the prompts, those of equal length together.

    Args:
        causal_lm: the model.
        prompts: token ids (1, L) of each, on the model's device.
        room: tokens that will follow.

    Returns:
        The last hidden state (B, D) of each prompt, and the keys and values of all.
    """
    # With a fixed cost of one token, a group that avoids any padding pays off.
    limits = BatchLimits(len(prompts), READ_TOKENS, fixed_tokens=1)
    groups = micro_batches(np.array([prompt.shape[1] for prompt in prompts]), limits)
    hidden, caches = [], []
    for group in groups:
        cache = DynamicCache(config=causal_lm.config)
        input_ids = torch.cat([prompts[index] for index in group])
        hidden.append(_hidden(causal_lm, input_ids, None, None, cache))
        caches.append(cache)
    back = np.argsort(np.concatenate(groups))  # to the order of the prompts
    layers: list[Any] = []
    while caches[0].layers:  # layer by layer, so that only one layer is in memory twice
        same: list[Any] = [cache.layers.pop() for cache in caches]
        keys = [text for x in same for text in x.keys.split(1)]
        values = [text for x in same for text in x.values.split(1)]
        keys, values = [keys[index] for index in back], [values[index] for index in back]
        layers.append(RoomyLayer(keys, values, room, key_dtype(causal_lm)))
    return torch.cat(hidden)[back], Cache(layers=layers[::-1])


def _hidden(
    causal_lm: Any, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache
) -> Tensor:
    """The hidden state (B, D) of the last tokens.

    Arguments are positional because the cache's name differs between versions of transformers.
    """
    output = causal_lm.base_model(input_ids, mask, positions, cache, use_cache=True)
    hidden: Tensor = output.last_hidden_state[:, -1]
    return hidden


def decode(
    model: PeftModel | nn.Module,
    prompts: Sequence[np.ndarray],
    texts: Sequence[ItemText],
    uniforms: np.ndarray,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    """Write texts after their prompts, until all have ended or have T tokens.

    Args:
        model: causal language model, with or without adapters.
        prompts: token ids (length,) of each prompt.
        texts: the B texts, of one catalogue and still empty; they are written in place.
        uniforms: (B, T) a random number from 0 to 1 for each text and token.
        temperature: softmax temperature.
        top_p: probability mass of nucleus sampling.
        top_k: number of tokens to sample from; 0 for no limit.
    """
    causal_lm, catalogue = base_causal_lm(model), texts[0].catalogue
    device, max_tokens = causal_lm.device, uniforms.shape[1]
    tokens = torch.from_numpy(catalogue.tokens).to(device)
    columns = {token: column for column, token in enumerate(catalogue.tokens.tolist())}
    hidden, cache = read(
        causal_lm, [torch.from_numpy(x)[None].to(device) for x in prompts], max_tokens
    )
    lengths = torch.tensor([len(x) for x in prompts], device=device)
    longest = int(lengths.max())
    positions = torch.arange(longest + max_tokens, device=device)
    mask = positions >= (longest - lengths)[:, None]
    rows = list(range(len(texts)))  # the texts that are in the cache
    for step in range(max_tokens):
        allowed = allowed_tokens([texts[text] for text in rows], columns)
        chosen = sample(
            token_logits(causal_lm, hidden, tokens),
            torch.from_numpy(allowed).to(device),
            torch.from_numpy(uniforms[rows, step]).to(device),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        written = tokens[chosen]
        for text, token in zip(rows, written.tolist()):
            texts[text].append(token)
        going = np.array([not texts[text].ended for text in rows])
        if not going.any() or step == max_tokens - 1:
            return
        if going.mean() <= KEPT_SHARE:
            kept = torch.from_numpy(np.flatnonzero(going)).to(device)
            rows, written = [rows[row] for row in kept.tolist()], written[kept]
            mask, lengths = mask[kept], lengths[kept]
            cache.batch_select_indices(kept)
        hidden = _hidden(
            causal_lm,
            written[:, None],
            mask & (positions <= longest + step),
            (lengths + step)[:, None],
            cache,
        )


def allowed_tokens(texts: Sequence[ItemText], columns: Mapping[int, int]) -> np.ndarray:
    """Which tokens can follow each text; only EOS if the text has ended.

    Args:
        texts: the texts.
        columns: column by token.

    Returns:
        (B, C) bool.
    """
    allowed = np.zeros((len(texts), len(columns)), dtype=bool)
    for row, text in zip(allowed, texts):
        following = [text.catalogue.eos_id] if text.ended else text.allowed()
        row[[columns[token] for token in following]] = True
    return allowed


def sample(
    logits: Tensor,
    allowed: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
) -> Tensor:
    """Draw from the most likely of the allowed tokens, as transformers does.

    The ``top_k`` most likely tokens are kept. Their probabilities are renormalized, and the fewest
    that add up to ``top_p`` are kept. Of equally likely tokens, the first counts as more likely.

    Args:
        logits: (B, C).
        allowed: (B, C) bool.
        uniforms: (B,) random numbers from 0 to 1.
        temperature: softmax temperature.
        top_p: probability mass.
        top_k: number of tokens; 0 for no limit.

    Returns:
        (B,) column of the token drawn in each row.
    """
    scores = (logits.double() / temperature).masked_fill(~allowed, -torch.inf)
    scores, order = scores.sort(descending=True, stable=True)
    if top_k:
        scores = scores[:, :top_k]
    probabilities = scores.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    sums = probabilities.cumsum(-1)
    index = (sums <= uniforms[:, None] * sums[:, -1:]).sum(-1)
    return order.gather(1, index[:, None])[:, 0]
