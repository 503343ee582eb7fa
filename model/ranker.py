"""The ranker's language model: stock Hugging Face causal LM, NF4 weights, LoRA adapters.

T. Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023
(https://arxiv.org/abs/2305.14314); E. Hu et al., LoRA: Low-Rank Adaptation of Large Language
Models, ICLR 2022 (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from config import UserError
from model.attention import speed_up_on_cpu
from model.layers import Dropout
from storage import reason

PROBE_TOKENS = 64
MEMORY_SHARE = 0.8  # of what is free; the rest is for gradients, temporaries and fragmentation


def load_causal_lm(
    folder: Path, *, device: torch.device, in_4bit: bool, fused_kernels: bool = False
) -> PreTrainedModel:
    """Load a causal LM with bfloat16 weights, or NF4 with double quantisation (QLoRA).

    Args:
        folder: the model's files.
        device: where the weights go.
        in_4bit: quantise the linear layers to NF4, computing in bfloat16.
        fused_kernels: norms, rotary positions and gated layers by Liger, on CUDA (P. Hsu et al.,
            Liger Kernel: Efficient Triton Kernels for LLM Training, 2024,
            https://arxiv.org/abs/2410.10989).

    Raises:
        UserError: the folder holds no causal LM that can be loaded.
    """
    if device.type == "cuda":  # cuDNN's attention plans anew for every shape, and most are new
        torch.backends.cuda.enable_cudnn_sdp(False)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map={"": device},
            quantization_config=quantisation if in_4bit else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers does not say what it raises
        raise UserError(f"--llm_base_model: cannot load {folder}: {reason(error)}") from error
    # On CPUs with AVX512-BF16, bitsandbytes repacks NF4 weights at the first evaluation into a
    # layout that has no backward pass: training that goes on would silently lose gradients.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # The output layer reads the last positions, a slice. From what is not contiguous torch would
    # make a product by prompt, with a copy of all the frozen weights for each.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(),)
    )
    speed_up_on_cpu(model)
    if fused_kernels:
        use_fused_kernels(model)
    return model


def use_fused_kernels(model: PreTrainedModel) -> None:
    """Let Liger's kernels compute norms, rotary positions and gated layers.

    Raises:
        UserError: it has none for this model.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"--use_liger_kernel true: liger-kernel has none for {model.config.model_type}; "
            "leave the flag out"
        )
    # Its losses would replace the model's forward pass; ours read few positions anyway.
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def activation_bytes_per_token(model: PeftModel) -> float:
    """Memory that a forward pass keeps for the backward pass, measured on a short prompt."""
    causal_lm = model.get_base_model()
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    input_ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=model.device)
    model.train()  # dropout keeps a mask
    with (
        torch.random.fork_rng([model.device] if model.device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        output = causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    model.eval()
    total = sum(kept.values())
    del output  # until here no storage was freed, so that none was counted under another's address
    return total / PROBE_TOKENS


def free_bytes(device: torch.device) -> int:
    """Memory that is left on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def needs_checkpointing(model: PeftModel, max_tokens: int) -> bool:
    """Whether activations must be recomputed to fit in memory; says so in one line.

    Args:
        model: causal LM on its device, with adapters.
        max_tokens: most tokens that pass through it at once in training.
    """
    each = activation_bytes_per_token(model)
    free = free_bytes(model.device)
    needed = each * max_tokens > MEMORY_SHARE * free
    print(
        f"activations: {each / 2**20:.2f} MiB a token, {each * max_tokens / 2**30:.1f} GiB for "
        f"{max_tokens:,} tokens, {free / 2**30:.1f} GiB are free: "
        f"{'gradient checkpointing' if needed else 'no gradient checkpointing'}"
    )
    return needed


def recompute_activations(model: PeftModel) -> None:
    """Keep no activations of a layer but its input, to save memory (gradient checkpointing)."""
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
) -> PeftModel:
    """Freeze the model and put trainable low-rank adapters beside its projections.

    Args:
        model: causal LM.
        rank: rank of the adapters.
        alpha: their scale is alpha / rank.
        dropout: on the adapters' input.
        target_modules: names of the projections.

    Raises:
        UserError: these modules cannot have adapters.
    """
    adapters = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(model, adapters)
    except ValueError as error:
        raise UserError(
            f"--lora_target_modules {' '.join(target_modules)}: {reason(error)}"
        ) from error
    # PEFT keeps a set, whose order in adapter_config.json changes from process to process.
    model.peft_config["default"].target_modules = list(target_modules)
    for module in model.modules():
        for name in getattr(module, "lora_dropout", ()):
            if isinstance(module.lora_dropout[name], nn.Dropout):
                module.lora_dropout[name] = Dropout(dropout)
    return model
