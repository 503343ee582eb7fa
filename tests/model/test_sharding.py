from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from errors import ArgumentError
from model.language_model import activation_bytes_per_token, add_lora, load_causal_lm
from model.sharding import shard_weights

CPU = torch.device("cpu")


@pytest.fixture()
def group() -> Iterator[None]:
    """A group of this process alone; ``tests/test_distributed.py`` has two."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def adapted(folder: Path, in_4bit: bool) -> PeftModel:
    torch.manual_seed(0)
    causal_lm = load_causal_lm(folder, device=CPU, in_4bit=in_4bit, on_host=True)
    model = add_lora(causal_lm, rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "up_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def results(model: PeftModel) -> list[Tensor]:
    """Memory of activations, logits and gradients."""
    memory = torch.tensor(activation_bytes_per_token(model))
    logits = model.train()(input_ids=torch.arange(30).view(2, 15)).logits
    logits.float().sin().sum().backward()
    return [memory, logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_sharded_model_computes_the_same(tiny_llama: Path, in_4bit: bool, group: None):
    expected = results(adapted(tiny_llama, in_4bit))
    model = adapted(tiny_llama, in_4bit)
    shard_weights(model, CPU)
    assert all(torch.equal(*pair) for pair in zip(results(model), expected, strict=True))
    for name, parameter in model.named_parameters():
        in_a_layer = ".layers." in name and "lora" not in name
        assert isinstance(parameter, DTensor) == in_a_layer


def test_a_model_without_layers_is_refused(group: None):
    model = nn.Module()
    model.base_model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="shard_weights true: Linear has no layers"):
        shard_weights(model, CPU)
