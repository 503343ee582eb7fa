import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from errors import InputError
from trainer.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
    trainable_state,
)


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


def test_nested_state_round_trip(path: Path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "model": {"a": torch.randn(2, 3, generator=generator), "b": torch.tensor(1.5)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(7.0)}, 1: {}},  # keys that are not text
            "groups": [{"lr": 0.1 + 0.2, "betas": [0.9, 0.999], "fused": True}],
        },
        "random": torch.get_rng_state(),
        "bfloat16": torch.ones(3, dtype=torch.bfloat16),
        "losses": [torch.tensor(1.0), torch.tensor(2.0)],
        "nothing": None, "empty": [], "best": float("-inf"), "path/with": {"slash": 1},
    }  # fmt: skip
    save_checkpoint(path, state, "mine")
    loaded = load_checkpoint(path, "mine")

    def assert_equal(ours: object, expected: object) -> None:
        assert type(ours) is type(expected)
        if isinstance(expected, dict):
            assert list(ours) == list(expected)
            for key, value in expected.items():
                assert_equal(ours[key], value)
        elif isinstance(expected, list):
            assert len(ours) == len(expected)
            for pair in zip(ours, expected):
                assert_equal(*pair)
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(ours, expected) and ours.dtype == expected.dtype
        else:
            assert ours == expected

    assert_equal(loaded, state)


def test_tensors_that_share_memory_or_are_not_contiguous(path: Path):
    x = torch.arange(6.0).view(2, 3)
    save_checkpoint(path, {"whole": x, "part": x[0], "turned": x.T}, "mine")
    loaded = load_checkpoint(path, "mine")
    assert torch.equal(loaded["whole"], x) and torch.equal(loaded["part"], x[0])
    assert torch.equal(loaded["turned"], x.T)


def test_gradients_are_not_kept(path: Path):
    save_checkpoint(path, [nn.Parameter(torch.ones(2))], "mine")
    assert not load_checkpoint(path, "mine")[0].requires_grad


def test_no_checkpoint(path: Path):
    assert load_checkpoint(path, "mine") is None


def test_checkpoint_of_another_run(path: Path):
    save_checkpoint(path, {"x": torch.ones(1)}, "another")
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, "mine")
    assert str(caught.value) == f"{path} belongs to a run with other settings or data"


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "no state", "another skeleton"])
def test_damaged_checkpoints(damage: str, path: Path):
    save_checkpoint(path, {"x": torch.ones(100)}, "mine")
    if damage == "no state":
        save_file({"/x": torch.ones(1)}, path, metadata={"fingerprint": "mine"})
    elif damage == "another skeleton":
        metadata = {"fingerprint": "mine", "state": json.dumps({"tensor": "/y"})}
        save_file({"/x": torch.ones(1)}, path, metadata=metadata)
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[:-9], "noise": b"x" * 99, "empty": b""}[damage])
    with pytest.raises(InputError) as caught:
        load_checkpoint(path, "mine")
    assert str(caught.value).startswith(f"{path} is damaged (")


def test_trainable_state():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    state = trainable_state(model)
    assert list(state) == ["weight"] and not state["weight"].requires_grad
    assert state["weight"].data_ptr() == model.weight.data_ptr()


def test_random_state():
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    state = random_state(cpu)
    expected = torch.rand(5)
    torch.rand(3)
    set_random_state(state, cpu)
    assert torch.equal(torch.rand(5), expected)
