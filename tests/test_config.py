"""Flags: what the user passes wins, everything is understood."""

from pathlib import Path

import pytest

from config import RankerConfig, RetrieverConfig, UserError, parse, retriever_preset
from tests.conftest import run_script

# Every flag of the published code that does something there, with a value it understands.
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


def retriever(*flags: str) -> RetrieverConfig:
    return parse(RetrieverConfig, flags, "", preset=retriever_preset)


def ranker(*flags: str) -> RankerConfig:
    return parse(RankerConfig, flags, "")


def test_presets_of_the_paper():
    config = retriever("--dataset_code", "ml-100k")
    assert (config.max_len, config.train_batch_size) == (200, 16)
    config = retriever("--dataset_code", "games")
    assert (config.max_len, config.train_batch_size) == (50, 64)
    assert (config.dropout, config.weight_decay, config.lr) == (0.5, 0.01, 0.001)


def test_presets_of_the_models():
    flags = ["--dataset_code", "beauty", "--model_code"]
    assert retriever(*flags, "narm").num_blocks == 1 and retriever(*flags, "narm").dropout == 0.5
    assert retriever(*flags, "narm", "--preset", "tuned").dropout == 0.1
    assert retriever(*flags, "narm", "--num_blocks", "2").num_blocks == 2
    assert retriever(*flags, "bert").dropout == 0.2 and retriever(*flags, "sas").dropout == 0.5
    tuned = retriever(*flags, "bert", "--preset", "tuned")
    assert (tuned.max_steps, tuned.dropout, tuned.hidden_units) == (6000, 0.1, 128)
    tuned = retriever(*flags, "sas", "--preset", "tuned")
    assert (tuned.max_steps, tuned.dropout, tuned.attn_dropout) == (5000, 0.3, 0.3)


def test_tuned_presets_of_data_sets_and_models():
    flags = ["--preset", "tuned", "--dataset_code"]
    for dataset, dropouts in (("games", (0.5, 0.3, 0.1, 0.1)), ("ml-100k", (0.6, 0.3, 0.1, 0.4))):
        for model, dropout in zip(("lru", "sas", "bert", "narm"), dropouts):
            config = retriever(*flags, dataset, "--model_code", model)
            assert (config.dropout, config.attn_dropout) == (dropout, dropout)
            titles = (dataset, model) != ("ml-100k", "lru")
            assert config.title_encoder == ("minilm-l6" if titles else "none")


def test_tuned_preset_keeps_the_data_sets_sizes():
    config = retriever("--dataset_code", "ml-100k", "--preset", "tuned")
    assert (config.max_len, config.train_batch_size, config.ema_decay) == (200, 16, 0.999)
    config = retriever("--dataset_code", "games", "--preset", "tuned", "--ema_decay", "0")
    assert (config.max_len, config.ema_decay, config.lr_decay) == (50, 0, "cosine")


def test_flags_win_over_presets():
    flags = "--dataset_code ml-100k --weight_decay 0 --lr 3e-4 --max_len 7 --train_batch_size 3"
    config = retriever(*flags.split())
    assert (config.weight_decay, config.lr) == (0, 3e-4)
    assert (config.max_len, config.train_batch_size) == (7, 3)


def test_booleans_are_read():
    for text, value in (("false", False), ("False", False), ("0", False), ("TRUE", True)):
        assert retriever("--dataset_code", "games", "--use_wandb", text).use_wandb is value


def test_names_of_the_reference_are_aliases():
    config = retriever("--dataset_code", "games", "--bert_max_len", "9", "--bert_dropout", "0.1")
    assert (config.max_len, config.dropout) == (9, 0.1)


def test_both_stages_understand_every_flag(capsys: pytest.CaptureFixture):
    assert retriever(*REFERENCE_FLAGS).dropout == 0.2
    notes = capsys.readouterr().err
    assert "--lora_r" in notes and "--mask_prob" in notes and "--max_len" not in notes
    assert ranker(*REFERENCE_FLAGS).lora_target_modules == ("q_proj", "v_proj")
    notes = capsys.readouterr().err
    assert notes.count("\n") == 1 and "--num_epochs" in notes and "--weight_decay" not in notes


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        retriever("--dataset_code", "games").lr = 1


def test_dataset_is_asked_for_at_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, code in (("1", "ml-100k"), ("b", "beauty"), ("g ", "games"), ("beauty", "beauty")):
        monkeypatch.setattr("builtins.input", lambda prompt, answer=answer: answer)
        assert retriever().dataset_code == code
    monkeypatch.setattr("builtins.input", lambda prompt: "x")
    with pytest.raises(UserError, match="type 1, b or g"):
        retriever()

    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)  # Ctrl-D
    with pytest.raises(UserError, match="pass --dataset_code"):
        retriever()


@pytest.mark.parametrize("script", ["train_retriever.py", "train_ranker.py"])
def test_help_and_flags_need_no_torch(script: str, tmp_path: Path):
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise SystemExit('torch was imported')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    done = run_script(script, "--help", env=env)
    assert done.returncode == 0 and "--dataset_code" in done.stdout, done.stderr
    done = run_script(script, env=env)
    assert done.returncode == 2 and "--dataset_code is missing" in done.stderr
