"""Settings: defaults, presets, combinations that are refused, and what each flag affects."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from config import (
    ALL_CONFIGS,
    DATASET_CODES,
    IMMATERIAL_FLAGS,
    LATER_FLAGS,
    MODEL_CODES,
    AugmentationConfig,
    RankerConfig,
    RetrieverConfig,
    augmentation_preset,
    retriever_preset,
)
from errors import UserError
from flags import flags_of

# Presets ----------------------------------------------------------------------------------------


def retriever(**given: Any) -> RetrieverConfig:
    """A retriever's settings: the given ones, else the preset's, else the defaults."""
    return RetrieverConfig(**(retriever_preset(given) | given))


def test_presets_of_the_paper():
    config = retriever(dataset_code="ml-100k")
    assert (config.max_len, config.train_batch_size) == (200, 16)
    config = retriever(dataset_code="games")
    assert (config.max_len, config.train_batch_size) == (50, 64)
    assert (config.dropout, config.weight_decay, config.lr) == (0.5, 0.01, 0.001)


def test_presets_of_the_models():
    def beauty(model: str, **given: Any) -> RetrieverConfig:
        return retriever(dataset_code="beauty", model_code=model, **given)

    assert beauty("narm").num_blocks == 1 and beauty("narm").dropout == 0.5
    assert beauty("narm", preset="tuned").dropout == 0.1
    assert beauty("narm", num_blocks=2).num_blocks == 2
    assert beauty("bert").dropout == 0.2 and beauty("sas").dropout == 0.5
    tuned = beauty("bert", preset="tuned")
    assert (tuned.max_steps, tuned.dropout, tuned.hidden_units) == (6000, 0.1, 128)
    tuned = beauty("sas", preset="tuned")
    assert (tuned.max_steps, tuned.dropout, tuned.attn_dropout) == (5000, 0.3, 0.3)


def test_tuned_presets_of_data_sets_and_models():
    for dataset, dropouts in (("games", (0.5, 0.3, 0.1, 0.1)), ("ml-100k", (0.6, 0.3, 0.1, 0.4))):
        for model, dropout in zip(("lru", "sas", "bert", "narm"), dropouts):
            config = retriever(dataset_code=dataset, model_code=model, preset="tuned")
            assert (config.dropout, config.attn_dropout) == (dropout, dropout)
            has_titles = (dataset, model) != ("ml-100k", "lru")
            assert config.title_encoder == ("minilm-l6" if has_titles else "none")


def test_tuned_preset_keeps_the_data_sets_sizes():
    config = retriever(dataset_code="ml-100k", preset="tuned")
    assert (config.max_len, config.train_batch_size, config.ema_decay) == (200, 16, 0.999)
    config = retriever(dataset_code="games", preset="tuned", ema_decay=0.0)
    assert (config.max_len, config.ema_decay, config.lr_decay) == (50, 0, "cosine")


@pytest.mark.parametrize("dataset", [code for code in DATASET_CODES if code != "custom"])
@pytest.mark.parametrize("model", MODEL_CODES)
@pytest.mark.parametrize("preset", ["paper", "tuned"])
def test_every_preset_is_valid(dataset: str, model: str, preset: str):
    settings = retriever_preset({"dataset_code": dataset, "model_code": model, "preset": preset})
    assert settings.keys() <= flags_of(RetrieverConfig).keys()
    retriever(dataset_code=dataset, model_code=model, preset=preset)


def test_published_preset_of_the_augmentation():
    default = AugmentationConfig(dataset_code="games", **augmentation_preset({}))
    assert default == AugmentationConfig(dataset_code="games")
    settings = augmentation_preset({"preset": "published"})
    published = AugmentationConfig(dataset_code="games", preset="published", **settings)
    assert (published.top_k, published.llm_max_text_len, published.global_examples) == (
        50,
        2048,
        20,
    )
    assert settings.keys() <= flags_of(AugmentationConfig).keys()
    same = [name for name, value in settings.items() if getattr(default, name) == value]
    assert not same, "a preset names what differs"


# Settings ---------------------------------------------------------------------------------------


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        retriever(dataset_code="games").lr = 1


def test_run_folders():
    sas = retriever(dataset_code="games", model_code="sas")
    assert sas.run_dir("games") == Path("experiments/sas/games")
    assert retriever(dataset_code="games", export_root="a/b").run_dir("games") == Path("a/b")
    ranker = RankerConfig(dataset_code="beauty", experiment_root="runs").with_retriever("beauty")
    assert ranker.run_dir("llama", "beauty") == Path("runs/llama/beauty")
    assert ranker.retrieved_dir == Path("runs/lru/beauty")
    ranker = RankerConfig(dataset_code="beauty", llm_retrieved_path="here", export_root="there")
    assert ranker.run_dir("llama", "beauty") == Path("there")
    assert ranker.with_retriever("beauty").retrieved_dir == Path("here")
    augmentation = AugmentationConfig(dataset_code="beauty")
    assert augmentation.run_dir("beauty") == Path("experiments/llm4idrec/beauty")


@pytest.mark.parametrize("config", ALL_CONFIGS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resume": True, "overwrite": True}, "--resume .* --overwrite"),
        ({"min_uc": 2}, "--min_uc 2: a user needs at least 3 interactions"),
        ({"dataset_code": "custom", "items": "i.csv"}, "needs both --interactions and --items"),
        ({"interactions": "log.csv"}, "--dataset_code custom needs both"),
    ],
)
def test_refused_by_all_scripts(config: type, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(**{"dataset_code": "games", **settings})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (RetrieverConfig, {"best_metric": "Accuracy@10"}, "--best_metric Accuracy@10: use Recall"),
        (RetrieverConfig, {"best_metric": "NDCG@7"}, "NDCG@7: 7 is not among --metric_ks"),
        (RetrieverConfig, {"model_code": "sas", "num_heads": 5}, "--num_heads 5 does not divide"),
        (RetrieverConfig, {"model_code": "bert", "num_heads": 3}, "--num_heads 3 does not divide"),
        (RetrieverConfig, {"sliding_window_size": 0.01}, "less than one item at --max_len 50"),
        (RankerConfig, {"rerank_metric_ks": (5,)}, "NDCG@10: 10 is not among --rerank_metric_ks"),
        (
            RankerConfig,
            {"response_loss": "letters", "llm_train_on_inputs": True},
            "--response_loss letters .* --llm_train_on_inputs",
        ),
        (RankerConfig, {"llm_input_template": "{}"}, "--llm_input_template needs {} twice"),
        (RankerConfig, {"llm_input_template": "{} {} {}"}, "--llm_input_template needs {} twice"),
        (AugmentationConfig, {"local_items": 1}, "--local_items 1: at least 2"),
        (
            AugmentationConfig,
            {"global_examples": 0, "local_examples": 0},
            "--global_examples 0 --local_examples 0 leave nothing to train on",
        ),
        (AugmentationConfig, {"top_p": 0.0}, "--top_p must be above 0 to sample"),
        (AugmentationConfig, {"max_new_tokens": 1536}, "leaves no room .* --llm_max_text_len 1536"),
        (AugmentationConfig, {"plausible_rank": 3}, "--plausible_rank needs --retriever_path"),
    ],
)
def test_refused_by_one_script(config: type, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        config(dataset_code="games", **settings)


def test_tensorboard_needs_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("config.find_spec", lambda name: None)
    RetrieverConfig(dataset_code="games")
    with pytest.raises(UserError, match="--use_tensorboard needs a package: pip install tensor"):
        RetrieverConfig(dataset_code="games", use_tensorboard=True)


@pytest.mark.parametrize("model", ["lru", "narm"])
def test_heads_do_not_matter_to_recurrent_models(model: str):
    assert RetrieverConfig(dataset_code="games", model_code=model, num_heads=5).num_heads == 5


def test_later_flags_leave_earlier_runs_their_fingerprint():
    settings = retriever(dataset_code="games").as_dict()
    assert settings["negatives"] is None and not {*LATER_FLAGS} & settings.keys()
    assert retriever(dataset_code="games", gamma=0.5).as_dict() == settings | {"gamma": 0.5}


# What a flag affects ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_every_flag_is_declared_in_full(config: type):
    for name, spec in flags_of(config).items():
        meta = spec.metadata
        assert meta["affects"] in ("results", "rounding", "handling"), name
        assert meta["help"] and callable(meta["type"]), name
        if meta.get("many"):
            assert isinstance(spec.default, tuple), name
        if "choices" in meta and spec.default is not None:
            assert spec.default in meta["choices"], name
        if "stage" in meta:
            assert meta["affects"] == "results" and meta["stage"] in ("generation", "filter"), name


def test_flags_that_do_not_change_results():
    """Written out: a wrong declaration would let a run resume with other settings."""
    handling = {
        "augmented", "cache_root", "data_root", "dry_run", "experiment_root", "export_root",
        "interactions", "items", "llm_cache_dir", "llm_retrieved_path", "num_workers", "overwrite",
        "resume", "retriever_path", "reuse", "save_seconds", "search", "search_dropout",
        "search_jobs", "search_weight_decay", "use_tensorboard", "use_wandb",
    }  # fmt: skip
    rounding = {
        "gradient_checkpointing", "llm_dequantize", "llm_shard_weights", "lora_micro_batch_size",
        "test_batch_size", "tokens_per_batch", "val_batch_size",
    }  # fmt: skip
    assert handling | rounding == IMMATERIAL_FLAGS


def test_a_flag_affects_the_same_in_all_scripts():
    kinds: dict[str, set[str]] = {}
    for config in ALL_CONFIGS:
        for name, spec in flags_of(config).items():
            kinds.setdefault(name, set()).add(spec.metadata["affects"])
    assert {name for name, kind in kinds.items() if len(kind) > 1} == set()
