"""The training loop on a small regression: steps, selection, stopping, interruption, failures."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from dataloader.sampler import ShuffledBatches, training_loader
from errors import InputError, UserError
from model.layers import Dropout
from process import Terminated
from trainer.average import WeightAverage
from trainer.checkpoint import load_checkpoint
from trainer.loop import Advice, LoopSettings, Metrics, Progress, Trainer
from trainer.optimization import build_schedule
from trainer.run_log import RunLog

NUM_EXAMPLES, BATCH_SIZE = 22, 4  # 6 batches per epoch
ADVICE = Advice(diverged="lower lr", out_of_memory="smaller", out_of_memory_in_validation="fewer")


class Examples(Dataset):
    """Random inputs and outputs; a batch has two micro-batches.

    Args:
        before_batch: called with 1, 2, ... before each batch is built.
    """

    def __init__(self, before_batch: Callable[[int], None] = lambda number: None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(NUM_EXAMPLES, 3, generator=generator)
        self.y = torch.randn(NUM_EXAMPLES, 1, generator=generator)
        self.before_batch, self.num_batches = before_batch, 0

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        self.num_batches += 1
        self.before_batch(self.num_batches)
        indices = [number % NUM_EXAMPLES for number in numbers]
        parts = (part for part in (indices[:1], indices[1:]) if part)
        return [
            {
                "x": self.x[part], "y": self.y[part], "users": part,
                "num_targets": len(part),
            }
            for part in parts
        ]  # fmt: skip


def squared_error(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


@dataclass
class Run:
    """A run in a folder; every call of ``trainer`` stands for a new process.

    Attributes:
        folder: folder of its files.
        settings: settings of the loop that differ from the defaults.
        loss: the loss.
        scores: scores of the validations in order; computed from the weights if None.
        decay: decay of the moving average of the weights, 0 for none.
        best: weights that were kept as the best, one entry per call of ``save_best``.
        num_validations: calls of ``validate``.
        num_losses: micro-batches that were trained on.
        progress: progress of the finished run.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[Any, dict[str, Any]], Tensor] = squared_error
    scores: list[float] | None = None
    decay: float = 0.0
    best: list[Tensor] = field(default_factory=list)
    num_validations: int = 0
    num_losses: int = 0
    progress: Progress | None = None

    def trainer(self, examples: Examples | None = None, fingerprint: str = "mine") -> Trainer:
        arguments: dict[str, Any] = {
            "num_epochs": 100, "max_steps": 30, "val_steps": 10, "patience": None,
            "best_metric": "score", "max_grad_norm": 1.0, "save_seconds": 3600, "advice": ADVICE,
        }  # fmt: skip
        settings = LoopSettings(**(arguments | self.settings))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), Dropout(0.3), nn.Linear(4, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        schedule = build_schedule(optimizer, warmup=3, total=30, decay="cosine")
        sampler = ShuffledBatches(NUM_EXAMPLES, BATCH_SIZE, seed=1)
        accelerator = Accelerator(cpu=True)
        loader = training_loader(examples or Examples(), sampler, 0)
        self.model = model
        return Trainer(
            accelerator=accelerator, model=model, optimizer=optimizer, scheduler=schedule,
            loader=loader, sampler=sampler, loss=self.counted_loss, validate=self.validate,
            save_best=self.save_best, settings=settings,
            checkpoint=self.folder / "checkpoint.safetensors", fingerprint=fingerprint,
            log=RunLog(self.folder / "log.jsonl"),
            user_names=[f"u{n}" for n in range(NUM_EXAMPLES)],
            average=WeightAverage(model, self.decay) if self.decay else None,
        )  # fmt: skip

    def counted_loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        self.num_losses += 1
        return self.loss(model, batch)

    @property
    def num_steps(self) -> int:
        """Steps taken in all processes; every batch has two micro-batches."""
        assert self.num_losses % 2 == 0
        return self.num_losses // 2

    def weights(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach().clone()

    def validate(self) -> Metrics:
        assert not self.model.training
        self.num_validations += 1
        if self.scores is not None:
            return {"score": self.scores[self.num_validations - 1]}
        return {"score": -self.weights().norm().item(), "other": 1.0}

    def save_best(self) -> None:
        self.best.append(self.weights())

    def log(self) -> list[dict[str, Any]]:
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture()
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture()
def make_run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Make runs in folders of their own."""
    folders = iter(range(99))

    def make(**options: Any) -> Run:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        return Run(folder, **options)

    return make


# Steps ------------------------------------------------------------------------------------------


def test_total_steps():
    def total(**changes: Any) -> int:
        defaults = {"num_epochs": 3, "max_steps": None, "val_steps": None, "patience": None}
        settings = LoopSettings(
            **(defaults | changes), best_metric="", max_grad_norm=0, save_seconds=0, advice=ADVICE
        )
        return settings.total_steps(7)

    assert total() == 21 and total(max_steps=5) == 5 and total(max_steps=99) == 21


def test_a_step_is_the_same_in_micro_batches(make_run: Callable[..., Run]):
    """The gradient of a batch is that of its mean loss; it is clipped, and the rate warms up."""
    run = make_run(settings={"max_grad_norm": 0.05, "max_steps": 3})
    run.loss = lambda model, batch: squared_error(model.eval(), batch)  # without dropout
    trainer = run.trainer()
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 1))
    model.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    examples = Examples()
    order = ShuffledBatches(NUM_EXAMPLES, BATCH_SIZE, seed=1)
    for step, numbers in enumerate([*order][:3]):
        loss = nn.functional.mse_loss(model(examples.x[numbers]), examples.y[numbers])
        loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05
        optimizer.param_groups[0]["lr"] = 0.05 * step / 3
        optimizer.step()
        optimizer.zero_grad()
    trainer.fit(resume=False)
    expected = nn.utils.parameters_to_vector(model.parameters())
    torch.testing.assert_close(run.weights(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_not_clipped_without_a_norm(make_run: Callable[..., Run]):
    weights = []
    for norm in (0.0, 1e9, 1e-3):
        run = make_run(settings={"max_grad_norm": norm, "max_steps": 6})
        run.trainer().fit(resume=False)
        weights.append(run.weights())
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_every_epoch_has_every_example(make_run: Callable[..., Run]):
    users: list[int] = []

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        users.extend(batch["users"])
        return squared_error(model, batch)

    progress = make_run(loss=loss, settings={"max_steps": 12}).trainer().fit(resume=False)
    assert progress.step == 12 and len(users) == 2 * NUM_EXAMPLES
    assert sorted(users[:NUM_EXAMPLES]) == sorted(users[NUM_EXAMPLES:]) == list(range(NUM_EXAMPLES))
    assert users[:NUM_EXAMPLES] != users[NUM_EXAMPLES:]


# Validation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [
        ({"val_steps": 10, "max_steps": 25}, [10, 20, 25], [1, 3, 4]),
        ({"val_steps": None, "max_steps": 15}, [6, 12, 15], [0, 1, 2]),
        ({"val_steps": None, "max_steps": None, "num_epochs": 2}, [6, 12], [0, 1]),
        ({"val_steps": 100, "max_steps": 8}, [8], [1]),
    ],
)
def test_steps_of_validations(
    settings: dict, steps: list[int], epochs: list[int], make_run: Callable[..., Run]
):
    run = make_run(settings=settings)
    progress = run.trainer().fit(resume=False)
    log = run.log()
    assert [record["step"] for record in log] == steps
    assert [record["epoch"] for record in log] == epochs
    assert progress.done and progress.step == steps[-1]


def test_the_log(run: Run):
    losses: list[float] = []

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        value = squared_error(model, batch)
        losses.append(value.item() * batch["num_targets"])
        return value

    run.loss = loss
    run.trainer().fit(resume=False)
    first, second, _ = run.log()
    assert list(first) == ["step", "epoch", "loss", "lr", "val_score", "val_other"]
    # Batches have two micro-batches, of 4 targets or, at the end of an epoch, of 2.
    sums = np.array(losses).reshape(-1, 2).sum(1)
    means = sums / np.where(np.arange(len(sums)) % 6 == 5, 2, 4)
    assert first["loss"] == pytest.approx(means[:10].mean(), rel=1e-5)
    assert second["loss"] == pytest.approx(means[10:20].mean(), rel=1e-5)
    assert 0.05 > first["lr"] > second["lr"] > 0


def test_the_best_weights_are_kept(run: Run):
    run.scores = [0.1, 0.3, 0.2, 0.3, 0.4]
    run.settings = {"val_steps": 2, "max_steps": 10}
    progress = run.trainer().fit(resume=False)
    assert (progress.best, progress.best_step, progress.rounds_without_gain) == (0.4, 10, 0)
    assert len(run.best) == 3  # an equal score is no improvement
    assert torch.equal(run.best[-1], run.weights())
    assert not torch.equal(run.best[0], run.best[1])


def test_early_stopping(run: Run):
    run.scores = [0.1, 0.3, 0.2, 0.3, 0.1, 0.9]
    run.settings = {"val_steps": 2, "patience": 3}
    progress = run.trainer().fit(resume=False)
    assert (progress.step, progress.best_step, progress.done) == (10, 4, True)
    assert len(run.best) == 2 and len(run.log()) == 5


def test_a_moving_average_is_validated_and_kept(make_run: Callable[..., Run]):
    settings = {"val_steps": 5, "max_steps": 5}
    plain, averaged = make_run(settings=settings), make_run(settings=settings, decay=0.9)
    plain.trainer().fit(resume=False)
    averaged.trainer().fit(resume=False)
    assert torch.equal(averaged.weights(), plain.weights())  # training goes on with the weights
    assert not torch.allclose(averaged.best[0], plain.best[0])
    assert averaged.log()[0]["val_score"] == -averaged.best[0].norm().item()


# Interruption -----------------------------------------------------------------------------------

EVENTFUL = {"val_steps": 4, "max_steps": 27, "patience": 9}


def whole(make_run: Callable[..., Run], **options: Any) -> Run:
    """A run without interruption."""
    run = make_run(**options)
    run.progress = run.trainer().fit(resume=False)
    return run


def assert_same(run: Run, expected: Run) -> None:
    assert torch.equal(run.weights(), expected.weights())
    assert torch.equal(run.best[-1], expected.best[-1])
    assert run.log() == expected.log() and run.progress == expected.progress


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize(
    ("how", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_an_interruption_while_a_batch_is_built_loses_no_step(
    how: signal.Signals,
    error: type[BaseException],
    decay: float,
    make_run: Callable[..., Run],
    capsys: pytest.CaptureFixture,
):
    expected = whole(make_run, settings=EVENTFUL, decay=decay)
    for when in (1, 2, 6, 7, 12, 26):  # within epochs and at their ends
        run = make_run(settings=EVENTFUL, decay=decay)

        def interrupt(number: int, when: int = when) -> None:
            if number == when:
                signal.raise_signal(how)

        with pytest.raises(error) as caught:
            run.trainer(Examples(interrupt)).fit(resume=False)
        assert type(caught.value) is error and 0 < run.num_steps < 27
        step = run.num_steps
        run.progress = run.trainer().fit(resume=True)
        assert f"resuming at step {step}\n" in capsys.readouterr().out
        assert run.num_steps == 27
        assert_same(run, expected)


def test_an_interrupted_validation_is_repeated(make_run: Callable[..., Run]):
    expected = whole(make_run, settings=EVENTFUL)
    run = make_run(settings=EVENTFUL)
    trainer = run.trainer()
    usual = trainer.validate

    def interrupted() -> Metrics:
        if trainer.progress.step == 12:
            raise KeyboardInterrupt
        return usual()

    trainer.validate = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(resume=False)
    run.progress = run.trainer().fit(resume=True)
    assert run.num_steps == 27  # no step was lost
    assert_same(run, expected)


def test_an_interruption_between_a_validation_and_its_checkpoint(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
):
    """The log already has that validation, and must not have it twice when it is repeated."""
    expected = whole(make_run, settings=EVENTFUL)
    run = make_run(settings=EVENTFUL)
    save = Trainer._save

    def stop(trainer: Trainer) -> None:
        if trainer.progress.validated_step == 20:
            raise KeyboardInterrupt
        save(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_save", stop)
        run.trainer().fit(resume=False)
    assert [record["step"] for record in run.log()] == [4, 8, 12, 16, 20]
    run.progress = run.trainer().fit(resume=True)
    assert [record["step"] for record in run.log()] == [4, 8, 12, 16, 20, 24, 27]
    assert_same(run, expected)


def test_a_finished_run_has_nothing_to_resume(make_run: Callable[..., Run]):
    run = whole(make_run, settings=EVENTFUL)
    weights, validations = run.weights(), run.num_validations
    assert run.trainer().fit(resume=True) == run.progress
    assert run.num_steps == 27 and run.num_validations == validations
    assert torch.equal(run.weights(), weights)


def test_the_share_of_validation_is_printed(
    make_run: Callable[..., Run], capsys: pytest.CaptureFixture
):
    run = make_run()
    run.trainer().fit(resume=False)
    printed = capsys.readouterr().out
    assert re.search(r"^training took \d+ s, \d+% of it for validation$", printed, re.M)
    run.trainer().fit(resume=True)  # it is finished
    assert "training took" not in capsys.readouterr().out


def test_nothing_to_resume(make_run: Callable[..., Run], capsys: pytest.CaptureFixture):
    expected = whole(make_run, settings=EVENTFUL)
    run = make_run(settings=EVENTFUL)
    run.progress = run.trainer().fit(resume=True)
    assert f"nothing to resume in {run.folder}: starting from scratch" in capsys.readouterr().out
    assert_same(run, expected)


def test_no_run_resumes_from_the_checkpoint_of_another(run: Run):
    run.trainer().fit(resume=False)
    with pytest.raises(InputError, match="belongs to a run with other settings or data"):
        run.trainer(fingerprint="other").fit(resume=True)
    run.trainer(fingerprint="other").fit(resume=False)  # replaces it


@pytest.mark.parametrize("seconds", [0, 3600])
def test_time_between_checkpoints(seconds: float, run: Run, monkeypatch: pytest.MonkeyPatch):
    saved = []
    save = Trainer._save

    def record(trainer: Trainer) -> None:
        saved.append(trainer.progress.step)
        save(trainer)

    monkeypatch.setattr(Trainer, "_save", record)
    run.settings = {"save_seconds": seconds, "max_steps": 4, "val_steps": 3}
    run.trainer().fit(resume=False)
    # Before and after each validation in any case.
    assert saved == ([1, 2, 3, 3, 3, 4, 4, 4] if seconds == 0 else [3, 3, 4, 4])


# Failures ---------------------------------------------------------------------------------------


def broken_at(step: int, value: float) -> Callable[[nn.Module, dict[str, Any]], Tensor]:
    """A loss that is infinite or NaN at one step; every batch has two micro-batches."""
    calls = 0

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        nonlocal calls
        calls += 1
        return squared_error(model, batch) * (value if calls == 2 * step else 1)

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_loss_names_its_step_and_users(value: float, run: Run):
    run.loss = broken_at(3, value)
    numbers = [*ShuffledBatches(NUM_EXAMPLES, BATCH_SIZE, seed=1)][2]
    users = ", ".join(sorted(f"u{number}" for number in numbers))
    with pytest.raises(UserError) as caught:
        run.trainer().fit(resume=False)
    assert str(caught.value) == f"the loss is {value} at step 3 with users {users}: lower lr"
    assert not list(run.folder.iterdir())  # weights that diverged are never saved


def test_a_diverged_loss_is_found_before_validation(run: Run):
    run.loss = broken_at(13, float("nan"))
    run.settings = {"val_steps": 14}
    with pytest.raises(UserError, match="the loss is nan at step 13 with users"):
        run.trainer().fit(resume=False)
    assert run.num_validations == 0 and not run.best


def test_a_diverged_loss_is_found_before_an_interruption_saves_it(run: Run):
    run.loss = broken_at(12, float("nan"))

    def interrupt(number: int) -> None:
        if number == 13:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        run.trainer(Examples(interrupt)).fit(resume=False)
    assert "the loss is nan at step 12" in str(caught.value)
    state = load_checkpoint(run.folder / "checkpoint.safetensors", "mine")
    assert state["progress"]["step"] == 10


def test_many_users_are_abbreviated(run: Run):
    trainer = run.trainer()
    assert trainer._shown([3, 1, 3]) == "u1, u3"
    assert trainer._shown(range(11)) == "u0, u1, u10, u2, u3, u4, u5, u6 and 3 more"


def full(*_: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_in_training(run: Run):
    run.loss = full
    with pytest.raises(UserError) as caught:
        run.trainer().fit(resume=False)
    assert str(caught.value) == "the GPU is out of memory after step 0: smaller"


def test_out_of_memory_in_validation(make_run: Callable[..., Run]):
    expected = whole(make_run, settings=EVENTFUL)
    run = make_run(settings=EVENTFUL)
    trainer = run.trainer()
    trainer.validate = full
    with pytest.raises(UserError) as caught:
        trainer.fit(resume=False)
    assert str(caught.value) == "the GPU is out of memory after step 4: fewer"
    run.progress = run.trainer().fit(resume=True)
    assert run.num_steps == 27  # no step was lost
    assert_same(run, expected)
