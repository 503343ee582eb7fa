"""The command line: which value a flag gets, the question for the data set, exit statuses."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import process
from cli import parse, run_main
from config import (
    AugmentationConfig,
    CommonConfig,
    RankerConfig,
    RetrieverConfig,
    retriever_preset,
)
from errors import ArgumentError, UserError
from flags import result_flag
from tests.helpers import run_script

# Every flag of the published code that has an effect there, with a value that it takes.
REFERENCE_FLAGS = """
--dataset_code beauty --min_rating 0 --min_uc 5 --min_sc 5 --seed 42 --train_batch_size 64
--val_batch_size 64 --test_batch_size 64 --num_workers 8 --sliding_window_size 1.0 --device cpu
--num_epochs 500 --optimizer AdamW --weight_decay 0.01 --adam_epsilon 1e-9 --lr 0.001
--max_grad_norm 5.0 --enable_lr_schedule true --enable_lr_warmup true --warmup_steps 100
--val_strategy iteration --val_iterations 500 --early_stopping true --early_stopping_patience 20
--metric_ks 1 5 10 20 50 --rerank_metric_ks 1 5 10 --best_metric Recall@10
--rerank_best_metric NDCG@10 --use_wandb false --model_code lru --bert_max_len 50
--bert_hidden_units 64 --bert_num_blocks 2 --bert_num_heads 2 --bert_dropout 0.2
--bert_attn_dropout 0.2 --bert_mask_prob 0.25 --llm_base_model meta-llama/Llama-2-7b-hf
--llm_base_tokenizer meta-llama/Llama-2-7b-hf --llm_max_title_len 32 --llm_max_text_len 1536
--llm_max_history 20 --llm_train_on_inputs false --llm_negative_sample_size 19
--llm_system_template Rank. --llm_input_template {}{} --llm_load_in_4bit true
--llm_retrieved_path experiments/lru/beauty --llm_cache_dir cache --lora_r 8 --lora_alpha 32
--lora_dropout 0.05 --lora_target_modules q_proj v_proj --lora_num_epochs 1
--lora_val_iterations 100 --lora_early_stopping_patience 20 --lora_lr 1e-4
--lora_micro_batch_size 16
""".split()
SCRIPTS = ("train_retriever.py", "train_ranker.py", "augment_data.py")


def retriever(*flags: str) -> RetrieverConfig:
    return parse(RetrieverConfig, flags, "", preset=retriever_preset)


def ranker(*flags: str) -> RankerConfig:
    return parse(RankerConfig, flags, "")


# Values -----------------------------------------------------------------------------------------


def test_flags_win_over_presets():
    flags = "--dataset_code ml-100k --weight_decay 0 --lr 3e-4 --max_len 7 --train_batch_size 3"
    config = retriever(*flags.split())
    assert (config.weight_decay, config.lr) == (0, 3e-4)
    assert (config.max_len, config.train_batch_size) == (7, 3)
    assert retriever("--dataset_code", "ml-100k").train_batch_size == 16


def test_inherited_values_win_over_presets_and_lose_to_flags():
    def config(*flags: str) -> RetrieverConfig:
        return parse(
            RetrieverConfig,
            flags,
            "",
            preset=lambda given: {"lr": 0.1, "dropout": 0.1, "max_len": len(given)},
            inherit=lambda given: {"dataset_code": "games", "lr": 0.2, "dropout": 0.2},
        )

    inherited = config("--dropout", "0.3")
    assert (inherited.dataset_code, inherited.lr, inherited.dropout) == ("games", 0.2, 0.3)
    assert inherited.max_len == 3  # the preset is chosen by inherited values as well
    assert config("--dataset_code", "beauty").dataset_code == "beauty"


@pytest.mark.parametrize(
    ("words", "value"),
    [("", True), ("true", True), ("TRUE", True), ("false", False), ("False", False), ("0", False)],
)
def test_booleans(words: str, value: bool):
    config = retriever("--dataset_code", "games", "--use_wandb", *words.split(), "--lr", "1")
    assert config.use_wandb is value and config.lr == 1


def test_the_last_of_repeated_flags_wins():
    config = retriever("--dataset_code", "games", "--resume", "--lr", "1", "--resume", "false")
    assert config.resume is False


def test_lists():
    config = retriever("--dataset_code", "games", "--metric_ks", "3", "10", "--lr", "1")
    assert config.metric_ks == (3, 10)


def test_names_of_the_reference_are_aliases():
    config = retriever("--dataset_code", "games", "--bert_max_len", "9", "--bert_dropout", "0.1")
    assert (config.max_len, config.dropout) == (9, 0.1)


def test_all_scripts_take_every_flag_of_the_reference(capsys: pytest.CaptureFixture):
    assert retriever(*REFERENCE_FLAGS).dropout == 0.2
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and note.startswith("note: no effect on this run: --")
    assert "--lora_r" in note and "--mask_prob" in note and "--max_len" not in note
    assert ranker(*REFERENCE_FLAGS).lora_target_modules == ("q_proj", "v_proj")
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "--num_epochs" in note and "--weight_decay" not in note
    assert parse(AugmentationConfig, REFERENCE_FLAGS, "").lora_lr == 1e-4
    note = capsys.readouterr().err
    assert "--num_epochs" in note and "--llm_max_history" in note and "--lora_r " not in note


def test_published_flags_without_an_effect_are_noted(capsys: pytest.CaptureFixture):
    flags = ["--dataset_code", "games", "--negative_sample_size", "10", "--bert_head_size", "8"]
    flags += ["--momentum", "0.9", "--decay_step", "50", "--gamma", "0.1"]
    note = "note: no effect on this run: --negative_sample_size --bert_head_size"
    assert retriever(*flags).decay_step == 50
    assert capsys.readouterr().err == f"{note} --momentum --decay_step --gamma\n"
    assert retriever(*flags, "--optimizer", "SGD", "--enable_lr_schedule").momentum == 0.9
    assert capsys.readouterr().err == f"{note}\n"
    assert ranker(*flags).gamma == 0.1  # which warms up
    assert "--decay_step --gamma" in capsys.readouterr().err


def test_flags_that_a_model_does_not_use_are_noted(capsys: pytest.CaptureFixture):
    flags = ["--dataset_code", "games", "--mask_prob", "0.2", "--num_heads", "4", "--model_code"]
    notes = {}
    for model in ("lru", "sas", "bert", "narm"):
        retriever(*flags, model)
        notes[model] = capsys.readouterr().err.strip().removeprefix("note: no effect on this run: ")
    both = "--mask_prob --num_heads"
    assert notes == {"lru": both, "sas": "--mask_prob", "bert": "", "narm": both}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rate 0.1", "unrecognized arguments: --learning_rate 0.1"),
        ("--dataset games", "unrecognized arguments: --dataset games"),  # no abbreviations
        ("games", "unrecognized arguments: games"),
        ("--lr", "--lr: expected one argument"),
        ("--metric_ks", "--metric_ks: expected at least one argument"),
        ("--lr fast", "--lr: 'fast' is not a number"),
        ("--max_len 0", "--max_len/--bert_max_len: 0 is out of range; it must be at least 1"),
        ("--use_wandb perhaps", "--use_wandb: 'perhaps' is neither true nor false"),
        ("--lora_r 0", "--lora_r: 0 is out of range; it must be at least 1"),  # another script's
    ],
)
def test_malformed_flags(words: str, message: str):
    with pytest.raises(UserError) as caught:
        retriever("--dataset_code", "games", *words.split())
    assert str(caught.value) == message


def test_wrong_choices_are_listed():
    with pytest.raises(UserError, match=r"--model_code: invalid choice: 'gru' .*lru.*narm"):
        retriever("--dataset_code", "games", "--model_code", "gru")


# The question for the data set ------------------------------------------------------------------


def test_dataset_is_asked_for_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, code in (("1", "ml-100k"), ("b", "beauty"), ("g ", "games"), ("beauty", "beauty")):
        monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer)
        assert retriever().dataset_code == code
    monkeypatch.setattr("builtins.input", lambda prompt: "1")
    assert retriever().max_len == 200  # the preset of the data set that was chosen
    monkeypatch.setattr("builtins.input", lambda prompt: "x")
    with pytest.raises(UserError, match="type 1, b or g"):
        retriever()

    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)  # Ctrl-D
    with pytest.raises(UserError, match="pass --dataset_code"):
        retriever()

    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)  # Ctrl-C: no run that could be resumed
    with pytest.raises(SystemExit) as caught:
        retriever()
    assert caught.value.code == 130 and capsys.readouterr().err == "\n"


def test_dataset_is_not_asked_for_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(UserError, match="--dataset_code is missing: choose one of ml-100k, beauty"):
        retriever()


# Help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_flags_need_no_torch(script: str, tmp_path: Path):
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise SystemExit('torch was imported')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    done = run_script(script, "--help", env=env)
    assert done.returncode == 0 and "--dataset_code" in done.stdout, done.stderr
    done = run_script(script, env=env)
    assert done.returncode == 2 and "--dataset_code is missing" in done.stderr


def test_help_shows_defaults_and_own_flags_only(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        parse(RetrieverConfig, ["--help"], "What it does.")
    shown = capsys.readouterr().out
    text = " ".join(shown.split())
    assert caught.value.code == 0 and "What it does." in text
    assert "--lr LR learning rate (default: 0.001)" in text
    assert "(default: 1 5 10 20 50)" in text and "--max_len LEN, --bert_max_len LEN" in text
    assert "--lora_r" not in text


def test_help_may_contain_percent_signs(capsys: pytest.CaptureFixture):
    @dataclass(frozen=True)
    class Toy(CommonConfig):
        share: str = result_flag("50%", "share, e.g. 100%")

    with pytest.raises(SystemExit):
        parse(Toy, ["--help"], "")
    assert "share, e.g. 100% (default: 50%)" in capsys.readouterr().out


# Exit status ------------------------------------------------------------------------------------


@pytest.fixture()
def _undo_set_up() -> Iterator[None]:
    """Restore what ``run_main`` changes in its process."""
    handler, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    environment = dict(os.environ)
    yield
    signal.signal(signal.SIGTERM, handler)
    sys.unraisablehook = hook
    os.environ.clear()
    os.environ.update(environment)


def raising(error: BaseException):
    def main(argv: object) -> None:
        raise error

    return main


@pytest.mark.usefixtures("_undo_set_up")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such\nfile"), r"error: no such\nfile"),
        (ArgumentError("lr", 2, "too high"), "error: --lr 2: too high"),
        (FileNotFoundError(2, "No such file", "a.csv"), "error: a.csv: No such file"),
        (MemoryError(), "error: out of memory: use a smaller model"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "error: out of memory: use a"),
    ],
)
def test_mistakes_exit_with_status_2(error: Exception, line: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        run_main(raising(error))
    shown = capsys.readouterr().err
    assert caught.value.code == 2 and shown.startswith(line) and shown.count("\n") == 1


@pytest.mark.usefixtures("_undo_set_up")
@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(5, "I/O"), KeyError("x")])
def test_bugs_keep_their_traceback(error: Exception):
    with pytest.raises(type(error)) as caught:
        run_main(raising(error))
    assert caught.value is error


@pytest.mark.usefixtures("_undo_set_up")
@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (process.Terminated(), 143)]
)
def test_interruptions(error: BaseException, status: int, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        run_main(raising(error))
    assert caught.value.code == status
    advised = "run the same command with --resume and without --overwrite"
    assert capsys.readouterr().err == f"interrupted: to continue, {advised}\n"


@pytest.mark.usefixtures("_undo_set_up")
def test_a_script_that_succeeds():
    handlers = []
    run_main(lambda argv: handlers.append((argv, signal.getsignal(signal.SIGTERM))))
    ((argv, handler),) = handlers
    assert argv is None  # argparse reads sys.argv
    with pytest.raises(process.Terminated):
        handler(signal.SIGTERM, None)
