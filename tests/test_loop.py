"""Parts of the training loop: schedule and moving average."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import train_retriever
from config import MODEL_CODES
from dataloader.retriever import TrainingWindows
from model.retriever import build_retriever
from trainer.average import WeightAverage
from trainer.loop import Trainer, build_optimizer, build_schedule


@pytest.mark.parametrize(("decay", "halfway"), [(None, 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedule(decay: str | None, halfway: float):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(optimizer, warmup=10, total=110, decay=decay)
    rates = []
    for _ in range(110):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0 and rates[5] == pytest.approx(1.0) and rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2 * halfway)
    quarter = {None: 1.0, "linear": 0.75, "cosine": 0.5 + 0.5 * math.cos(math.pi / 4)}[decay]
    assert rates[35] == pytest.approx(2 * quarter)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 if decay is None else 0.0)


def test_average_of_the_weights():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    frozen = model.bias.clone()
    average = WeightAverage(model, decay=0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 8):
        model.weight.data += torch.randn(2, 3)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    last, storage = model.weight.detach().clone(), model.weight
    with average.applied():
        torch.testing.assert_close(model.weight.data, expected)
        kept = average.state_dict()
    assert torch.equal(model.weight, last) and model.weight is storage
    assert torch.equal(model.bias, frozen) and kept["steps"] == 7
    other = WeightAverage(model, decay=0.5)
    other.load_state_dict(average.state_dict())
    with other.applied():
        torch.testing.assert_close(model.weight.data, expected)
    assert torch.equal(model.weight, last)


def test_an_interruption_while_a_batch_is_made_loses_no_step(
    toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    flags = [*toy_flags, "--device", "cpu", "--max_steps", 30, "--save_seconds", 3600]
    words = [str(flag) for flag in (*flags, "--export_root", tmp_path)]
    make, batches = TrainingWindows.__getitems__, []

    def interrupted(windows: TrainingWindows, numbers: list[int]) -> list[dict]:
        batches.append(numbers)
        if len(batches) == 7:
            signal.raise_signal(signal.SIGINT)
        return make(windows, numbers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingWindows, "__getitems__", interrupted)
        train_retriever.main(words)
    train_retriever.main([*words, "--resume", "true"])
    assert "resuming at step 7" in capsys.readouterr().out


def test_biases_and_layer_norms_do_not_decay():
    for code in MODEL_CODES:
        model = build_retriever(
            code, num_items=9, max_len=5, hidden_dim=8, num_blocks=2, num_heads=2, dropout=0.1,
            attn_dropout=0.1,
        )  # fmt: skip
        optimizer = build_optimizer(
            model, "AdamW", lr=1e-3, weight_decay=0.3, epsilon=1e-8, paged=False
        )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decay = {
            names[id(parameter)]: group["weight_decay"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        assert decay.keys() == set(names.values()) and decay["embedding.weight"] == 0.3
        exempt = {name for name in decay if "bias" in name or "layer_norm" in name}
        assert exempt and {name for name in decay if not decay[name]} == exempt


def test_stop_between_a_validation_and_its_checkpoint(
    toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The log has that validation already, and must not have it twice once it is repeated."""
    flags = [*toy_flags, "--device", "cpu", "--max_steps", 30, "--val_iterations", 10]
    words = [str(flag) for flag in (*flags, "--export_root", tmp_path)]
    save = Trainer._save

    def stop(trainer: Trainer) -> None:
        if trainer.progress.validated_step == 20:
            raise KeyboardInterrupt
        save(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save", stop)
        train_retriever.main(words)
    train_retriever.main([*words, "--resume", "true"])
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]
