"""``train_ranker.py`` as a user runs it: its files, reproducibility, resuming, options."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import augment_data
import train_ranker
import train_retriever
from config import RankerConfig
from datasets import SequenceDataset
from errors import UserError
from recipes.verbalizers import retrieved_negatives
from storage import read_json
from tests.helpers import (
    ROOT,
    copy_run,
    file_names,
    interrupt,
    make_builder,
    read_tokenizer,
    run_script,
)

FLAGS = [
    "--device", "cpu", "--max_steps", 4, "--lora_val_iterations", 2, "--train_batch_size", 8,
    "--rerank_metric_ks", 1, 5, 10,
]  # fmt: skip
FILES = [
    "adapter", "config.json", "fused_metrics.json", "fusion.json", "log.jsonl",
    "overall_metrics.json", "rankings.npz", "retrieval_metrics.json", "subset_metrics.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def flags(retrieved: Path, tiny_llama: Path) -> list[object]:
    """Flags of a short run on the toy data."""
    return ["--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama, *FLAGS]


@pytest.fixture(scope="module")
def ranked(
    flags: list[object], toy_data: SequenceDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a finished run."""
    root = tmp_path_factory.mktemp("ranker")
    done = run_script("train_ranker.py", *flags, "--experiment_root", root)
    assert done.returncode == 0, done.stderr
    assert "two stages" in done.stdout and "step 4: loss" in done.stdout
    return root / "tiny-llama" / toy_data.code


def assert_same_results(run: Path, expected: Path) -> None:
    for name in FILES:
        if name.endswith(("_metrics.json", ".npz", "fusion.json")):
            assert (run / name).read_bytes() == (expected / name).read_bytes(), name


# Files ------------------------------------------------------------------------------------------


def test_files(ranked: Path, retrieved: Path):
    assert file_names(ranked) == FILES
    with np.load(retrieved / "candidates.npz") as file:
        targets, ranks = file["test_labels"], file["test_label_ranks"]
        subset = (file["test_items"] == targets[:, None]).any(1)
    overall, retrieval, metrics = (
        read_json(ranked / f"{name}_metrics.json") for name in ("overall", "retrieval", "subset")
    )
    assert metrics["num_users"] == subset.sum() and overall["num_users"] == 60
    assert retrieval["Recall@5"] == (ranks <= 5).mean()
    with np.load(ranked / "rankings.npz", allow_pickle=False) as file:
        assert file["users"].tolist() == np.flatnonzero(subset).tolist()
        assert (np.diff(file["scores"], axis=1) <= 0).all()
        positions = (file["items"] == targets[subset][:, None]).argmax(1)
        assert (file["label_ranks"][subset] == positions + 1).all()
        assert (file["label_ranks"][~subset] == ranks[~subset]).all()
        assert overall["MRR@10"] == pytest.approx(
            np.where(file["label_ranks"] <= 10, 1 / file["label_ranks"], 0).mean(), abs=1e-15
        )
    assert overall["Recall@5"] == pytest.approx(metrics["Recall@5"] * subset.mean())
    fused = read_json(ranked / "fused_metrics.json")
    assert list(fused) == list(overall)
    fusion = read_json(ranked / "fusion.json")
    assert list(fusion["weights"]["fused"]) == ["retriever_log_probability", "letter_logit"]
    losses = fusion["log_loss"]["val"]
    assert losses["fused"] <= losses["retriever"] + 1e-3 < losses["ranker"]


def test_adapter_loads_with_peft_and_gives_the_same_scores(
    ranked: Path, retrieved: Path, tiny_llama: Path, toy_data: SequenceDataset
):
    data = toy_data
    builder = make_builder(read_tokenizer(tiny_llama), data.titles)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, ranked / "adapter").eval()
    with np.load(retrieved / "candidates.npz") as file:
        candidates = file["test_items"]
    with np.load(ranked / "rankings.npz") as file:
        for row in range(5):
            user = file["users"][row]
            history = data.item_ids[data.offsets[user] : data.offsets[user + 1] - 1][-20:]
            prompt = torch.from_numpy(builder.encode(history, candidates[user]))[None]
            with torch.no_grad():
                logits = model(prompt).logits[0, -1, torch.from_numpy(builder.letter_ids)]
            score_of = dict(zip(file["items"][row].tolist(), file["scores"][row].tolist()))
            stored = torch.tensor([score_of[item] for item in candidates[user].tolist()])
            torch.testing.assert_close(logits.float(), stored, rtol=0.02, atol=0.1)


# Reproducibility and resuming -------------------------------------------------------------------


def test_same_seed_gives_the_same_bytes(flags: list[object], ranked: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = run_script(
        "train_ranker.py", *flags, "--export_root", run, env={"PYTHONHASHSEED": "123"}
    )
    assert done.returncode == 0, done.stderr
    assert_same_results(run, ranked)


def test_interrupted_run_resumes_to_the_same_bytes(
    flags: list[object], ranked: Path, tmp_path: Path
):
    run = tmp_path / "run"
    flags = [*flags, "--export_root", run]
    interrupt("train_ranker.py", *flags, when=run / "checkpoint.safetensors")
    done = run_script("train_ranker.py", *flags, "--resume")
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    assert_same_results(run, ranked)
    done = run_script("train_ranker.py", *flags, "--resume")
    assert done.returncode == 0 and "nothing to resume" in done.stdout, done.stderr
    assert "two stages" in done.stdout


# Options ----------------------------------------------------------------------------------------


def test_4_bits_on_the_cpu(flags: list[object], tmp_path: Path):
    run = tmp_path / "run"
    done = run_script("train_ranker.py", *flags, "--llm_load_in_4bit", "--export_root", run)
    assert done.returncode == 0, done.stderr
    assert file_names(run) == FILES
    assert read_json(run / "config.json")["llm_load_in_4bit"] is True
    adapter = read_json(run / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (8, 32, 0.05)
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}


def test_options_together(flags: list[object], tmp_path: Path):
    run = tmp_path / "run"
    done = run_script(
        "train_ranker.py", *flags, "--export_root", run, "--train_candidates", "mixed",
        "--response_loss", "letters", "--permutations", 2, "--tokens_per_batch", 600,
        "--ema_decay", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert file_names(run) == FILES and "no gradient checkpointing" in done.stdout
    assert read_json(run / "config.json")["gradient_checkpointing"] is False


def test_hard_negatives_of_the_examples_that_are_seen(toy_data: SequenceDataset, retrieved: Path):
    config = RankerConfig(
        dataset_code="custom", interactions="-", items="-", llm_retrieved_path=str(retrieved),
        train_candidates="mixed", device="cpu",
    )  # fmt: skip
    every = np.arange(len(toy_data.training_prefixes()[0]))
    cpu = torch.device("cpu")
    negatives = retrieved_negatives(config, toy_data, every, cpu)
    some = retrieved_negatives(config, toy_data, every[1::3], cpu)
    assert negatives.shape == (len(every), 9) and (negatives > 0).any(1).all()
    assert np.array_equal(some[1::3], negatives[1::3])
    assert not np.delete(some, every[1::3], axis=0).any()


# Data -------------------------------------------------------------------------------------------


def test_users_with_a_single_training_item(toy: dict[str, Path], tiny_llama: Path, tmp_path: Path):
    """The retriever learns from them; they give no prompt, as there is no history."""
    interactions, run = tmp_path / "log.csv", tmp_path / "run"
    rows = "".join(f"u{n},i{n + m},{m}\n" for n in range(9) for m in range(3))
    interactions.write_text("user,item,timestamp\n" + rows)
    data = [
        "--dataset_code", "custom", "--interactions", interactions, "--items", toy["items"],
        "--cache_root", tmp_path, "--min_uc", 3, "--min_sc", 1, "--device", "cpu",
    ]  # fmt: skip
    flags = [*data, "--export_root", run, "--max_steps", 2, "--num_candidates", 11]
    train_retriever.main(list(map(str, flags)))
    assert (run / "candidates.npz").exists()
    model = ["--llm_base_model", str(tiny_llama), "--export_root", str(tmp_path / "other")]
    with pytest.raises(UserError, match="no user has two training items"):
        train_ranker.main(["--llm_retrieved_path", str(run), *model])
    with pytest.raises(UserError, match="no user has two training items"):
        augment_data.main([*map(str, data), *model])


def test_hugging_face_datasets_is_installed_beside_ours(ranked: Path):
    """The run above passed although another library shares the name of our package."""
    from importlib.metadata import version

    import datasets

    assert int(version("datasets").split(".")[0]) >= 4
    assert Path(datasets.__file__).parent == ROOT / "datasets"


# Titles -----------------------------------------------------------------------------------------

TITLES = ["--verbalizer", "titles", "--llm_max_history", 6, "--val_users", 30]


def check_titles(run: Path, broken: Path, flags: list[object]) -> dict[str, Any]:
    """Finish a run, and an interrupted one with the same files; returns the weights."""
    done = run_script("train_ranker.py", *flags, "--permutations", 2, "--export_root", run)
    assert done.returncode == 0, done.stderr
    assert "note: no effect on this run: --permutations" in done.stderr
    assert file_names(run) == FILES
    settings = read_json(run / "config.json")
    assert settings["lora_r"] == 32 and "down_proj" in settings["lora_target_modules"]
    checkpoint = broken / "checkpoint.safetensors"
    interrupt("train_ranker.py", *flags, "--export_root", broken, when=checkpoint)
    done = run_script("train_ranker.py", *flags, "--export_root", broken, "--resume")
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    assert_same_results(broken, run)
    return read_json(run / "fusion.json")["weights"]


def test_titles(flags: list[object], tmp_path: Path):
    flags = [*flags, *TITLES, "--title_prior", "none"]
    weights = check_titles(tmp_path / "run", tmp_path / "broken", flags)
    own = ["title_log_likelihood", "title_log_likelihood_without_history", "title_tokens"]
    assert list(weights["ranker"]) == own
    assert list(weights["fused"]) == ["retriever_log_probability", *own]


def test_titles_with_popularity(flags: list[object], tmp_path: Path):
    flags = [*flags, *TITLES, "--title_prior", "popularity"]
    weights = check_titles(tmp_path / "run", tmp_path / "broken", flags)
    own = ["title_log_probability", "log_popularity"]
    assert list(weights["ranker"]) == own
    assert list(weights["fused"]) == ["retriever_log_probability", *own]
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "val_popularity_weight" in log and "val_retriever_weight" not in log


def test_titles_with_the_retrievers_prior(flags: list[object], tmp_path: Path, retrieved: Path):
    retriever = copy_run(retrieved, tmp_path / "retriever")
    flags = [*flags, *TITLES, "--llm_retrieved_path", retriever]
    weights = check_titles(tmp_path / "run", tmp_path / "broken", flags)
    assert weights["ranker"] == {"retriever_log_probability": 1.0, "title_log_ratio": 1.0}
    assert list(weights["fused"]) == ["retriever_log_probability", "title_log_ratio"]
    kept = load_file(tmp_path / "run" / "adapter" / "prior_weights.safetensors")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    names = ("val_language_model_weight", "val_retriever_weight")
    weights = kept["log_prior_weights"].exp().tolist()
    assert weights in [[record[name] for name in names] for record in log]
    folds = sorted(path.name for path in (retriever / "folds").iterdir())
    assert folds == ["1_of_3", "2_of_3", "3_of_3"]
