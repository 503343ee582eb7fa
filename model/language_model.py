"""Causal language models with frozen weights, in bfloat16 or NF4, and LoRA adapters.

T. Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023
(https://arxiv.org/abs/2305.14314); E. Hu et al., LoRA: Low-Rank Adaptation of Large Language
Models, ICLR 2022 (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from distributed import is_sharded
from errors import ArgumentError, InputError
from model.cpu_attention import speed_up_on_cpu
from model.cpu_norm import speed_up_norms
from model.layers import Dropout
from model.lora import compute_in_input_dtype
from model.packing import pack_prompts
from storage import atomic_folder, describe, read_json, reading

OWN = "prior_weights.safetensors"
PROBE_TOKENS = 64
BFLOAT16_CAPABILITY = (8, 0)  # compute capability of the first GPUs that have it
# Share of the free memory for activations; gradients, temporaries and fragmentation need the rest.
MEMORY_SHARE = 0.8


def load_causal_lm(
    folder: Path,
    *,
    device: torch.device,
    in_4bit: bool,
    fused_kernels: bool = False,
    on_host: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in bfloat16, or in NF4 with double quantization (QLoRA).

    On GPUs without bfloat16, it computes in float32.

    Args:
        folder: folder of the model.
        device: device of the weights.
        in_4bit: quantize the linear layers to NF4.
        fused_kernels: use Liger's kernels on CUDA, see ``use_fused_kernels``.
        on_host: leave the weights on the host, for ``model.sharding``.

    Raises:
        ArgumentError: ``folder`` cannot be loaded, or there are no fused kernels for the model.
    """
    if device.type == "cuda":  # cuDNN plans its attention for each new shape, and most are new
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = computing_dtype(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with _load_explained(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": torch.device("cpu") if on_host else device},
            quantization_config=quantization if in_4bit else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    _keep_differentiable(model)
    _make_head_inputs_contiguous(model)
    if device.type == "cuda":
        pack_prompts(model)
    else:
        speed_up_on_cpu(model)
        speed_up_norms(model)
    if fused_kernels:
        use_fused_kernels(model)
    return cast(PreTrainedModel, model)


@contextmanager
def _load_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers does not document what it raises
        raise ArgumentError("folder", folder, f"cannot be loaded ({describe(error)})") from error


class Sizes(NamedTuple):
    """Sizes of a language model with adapters.

    Attributes:
        weights: number of weights without the adapters.
        adapters: number of weights of the adapters.
        inputs: elements per token in the inputs of all decoder layers with adapters. Training keeps
            at least these: gradient checkpointing recomputes the rest.
    """

    weights: int
    adapters: int
    inputs: int


@cache
def measure(folder: Path, *, rank: int, target_modules: tuple[str, ...]) -> Sizes:
    """Measure a model and its adapters without allocating either; results are cached.

    Args:
        folder: folder of the model.
        rank: see ``add_lora``.
        target_modules: see ``add_lora``.

    Raises:
        ArgumentError: ``folder`` cannot be loaded, or ``target_modules`` cannot have adapters.
    """
    with torch.random.fork_rng(), torch.device("meta"):
        with _load_explained(folder):
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        weights = model.num_parameters()
        adapted = add_lora(model, rank=rank, alpha=rank, dropout=0.0, target_modules=target_modules)
    trained = [name for name, x in adapted.named_parameters() if x.requires_grad]
    layers = {match[1] for name in trained if (match := re.search(r"\.(\d+)\.", name))}
    inputs = len(layers) * model.config.get_text_config().hidden_size
    return Sizes(weights, adapted.num_parameters(only_trainable=True), inputs)


def computing_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32, with a note, on GPUs that only emulate bfloat16."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY:
        return torch.bfloat16
    name = torch.cuda.get_device_name(device)
    print(f"note: {name} has no bfloat16: computing in float32, which takes twice the memory")
    return torch.float32


def dequantize(model: nn.Module) -> None:
    """Replace layers in NF4 by plain layers of the same values, in the dtype of their products.

    Every product with NF4 weights first computes these values, which takes as long as some hundred
    tokens of a 7B model. The layers may have adapters or not.

    Args:
        model: any model; only its layers in NF4 change.
    """
    from bitsandbytes.functional import dequantize_4bit

    for parent, name, layer in list(quantized_layers(model)):
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(weight.to(layer.compute_dtype), requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)


def dequantize_for_inference(model: PeftModel) -> None:
    """Call ``dequantize`` after training, on CUDA, if it needs less than half of the free memory.

    Sharded models stay as they are.
    """
    needed = sum(
        layer.in_features * layer.out_features * layer.compute_dtype.itemsize
        for _, _, layer in quantized_layers(model)
    )
    is_fast = model.device.type == "cuda" and not is_sharded(model)
    if is_fast and 0 < 2 * needed < free_bytes(model.device):
        dequantize(model)


def quantized_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield the parent module, name and module of every layer in NF4."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            # PEFT's layer around a quantized one has the same class name.
            if type(layer).__name__ == "Linear4bit" and not hasattr(layer, "lora_A"):
                yield parent, name, layer


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking NF4 weights into a layout without a backward pass.

    On a CPU with AVX512-BF16, it would do so in the first evaluation, and training would go on
    without an error but with gradients missing.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _make_head_inputs_contiguous(model: PreTrainedModel) -> None:
    """Copy the input of the output layer if it is not contiguous.

    The output layer gets a slice, the last positions. For a non-contiguous input, torch computes
    one product per prompt and copies all weights for each.
    """
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(),)
    )


def use_fused_kernels(model: PreTrainedModel) -> None:
    """Compute norms, rotary embeddings and gated layers with Liger's kernels.

    P. Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024
    (https://arxiv.org/abs/2410.10989).

    Raises:
        ArgumentError: Liger does not support the model.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ArgumentError(
            "fused_kernels", "true", f"liger-kernel does not support {model_type}; set it to false"
        )
    # Liger's losses would replace the forward pass, but here the output layer reads few positions.
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
) -> PeftModel:
    """Freeze a model and add trainable low-rank adapters to some of its linear layers.

    A layer with weights W then computes W x + alpha / rank * B A dropout(x), with A (rank, in) and
    B (out, rank).

    Args:
        model: causal language model.
        rank: rank of the adapters.
        alpha: numerator of their scale.
        dropout: dropout probability of their inputs.
        target_modules: names of the layers.

    Raises:
        ArgumentError: ``target_modules`` cannot have adapters.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ArgumentError("target_modules", " ".join(target_modules), describe(error)) from error
    # PEFT keeps a set, whose order in adapter_config.json would differ from process to process.
    cast(LoraConfig, adapted.peft_config["default"]).target_modules = list(target_modules)
    module: Any
    for module in adapted.modules():
        for name in getattr(module, "lora_dropout", ()):
            if isinstance(module.lora_dropout[name], nn.Dropout):
                module.lora_dropout[name] = Dropout(dropout)
    compute_in_input_dtype(adapted)
    return cast(PeftModel, adapted)


def base_causal_lm(model: nn.Module) -> Any:
    """The causal language model inside its adapters, or the model itself if it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save the adapters in PEFT's format, complete or not at all.

    Parameters of the model itself, such as ``log_prior_weights``, go to a file of their own.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        if own := dict(model.named_parameters(recurse=False)):
            save_file({name: value.detach() for name, value in own.items()}, temporary / OWN)


def check_adapter(folder: Path) -> None:
    """Refuse a damaged adapter, without loading it.

    Raises:
        InputError: its configuration is missing, or a file cannot be read.
    """
    read_json(folder / "adapter_config.json")
    for path in sorted(folder.glob("*.safetensors")):
        with reading(path), safe_open(path, framework="np"):
            pass


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load the weights saved by ``save_adapter``.

    Raises:
        InputError: they are missing, damaged or from an earlier version.
    """
    weights = folder / "adapter_model.safetensors"
    with reading(weights):
        set_peft_model_state_dict(model, load_file(weights, device=str(model.device)))
    if own := dict(model.named_parameters(recurse=False)):
        with reading(folder / OWN), torch.no_grad():
            values = load_file(folder / OWN)
            if own.keys() - values.keys():
                raise InputError(f"{folder / OWN} was written by an earlier version")
            for name, parameter in own.items():
                parameter.copy_(values[name])


def plan_activations(model: PeftModel, max_tokens: int, least_tokens: int) -> tuple[int, bool]:
    """Decide how many tokens to train on at once, and whether to recompute activations.

    Activations are only recomputed if those of ``least_tokens`` do not fit in memory. The decision
    is printed.

    Args:
        model: causal language model with adapters, on its device.
        max_tokens: number of tokens to train on at once if they fit, or if activations are
            recomputed.
        least_tokens: number of tokens that must fit, or else activations are recomputed; at most
            ``max_tokens`` counts.

    Returns:
        The maximum number of tokens in a micro-batch, and whether to recompute.
    """
    per_token, free = activation_bytes_per_token(model), free_bytes(model.device)
    fitting = int(MEMORY_SHARE * free / per_token)
    recompute = fitting < min(least_tokens, max_tokens)
    tokens = max_tokens if recompute else min(fitting, max_tokens)
    print(
        f"activations: {per_token / 2**20:.2f} MiB per token, {free / 2**30:.1f} GiB free: "
        f"at most {tokens:,} tokens at once, "
        f"{'gradient checkpointing' if recompute else 'no gradient checkpointing'}"
    )
    return tokens, recompute


def activation_bytes_per_token(model: PeftModel) -> float:
    """Measure the memory that a forward pass keeps for the backward pass, on a short prompt.

    It is the total size of the distinct storages that autograd saves, without the weights. The
    random state does not change; the model is left in eval mode.
    """
    causal_lm: Any = model.get_base_model()
    weights, gathered = _addresses(model), set[int]()
    saved: dict[int, int] = {}  # size by address

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in weights and address not in gathered:
            saved[address] = storage.nbytes()
        return tensor

    # Sharded weights are in memory only while their layer computes.
    hooks = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            note = module.register_forward_pre_hook(lambda x, _: gathered.update(_addresses(x)))
            hooks += [note, module.register_forward_hook(lambda *_: gathered.clear())]

    input_ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device=model.device)
    model.train()  # dropout saves a mask
    with (
        torch.random.fork_rng([model.device] if model.device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
    ):
        output = causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    model.eval()
    total = sum(saved.values())
    del output  # kept all storages alive up to here, so that no address was used twice
    return total / PROBE_TOKENS


def _addresses(module: nn.Module) -> set[int]:
    """Addresses of the weights and buffers of a module, except for sharded ones."""
    whole = (x for x in (*module.parameters(), *module.buffers()) if not isinstance(x, DTensor))
    return {x.untyped_storage().data_ptr() for x in whole}


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device, including what torch has reserved but does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available)


def recompute_activations(model: PeftModel) -> None:
    """Save only the input of each layer and recompute the rest (gradient checkpointing)."""
    cast(Any, model.get_base_model()).gradient_checkpointing_enable({"use_reentrant": False})
