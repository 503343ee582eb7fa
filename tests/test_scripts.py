"""Both scripts as a user runs them: files, reproducibility, resuming, mistakes."""

import gzip
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT, run_script
from trainer import folder

RANKER_FLAGS = [
    "--device", "cpu", "--max_steps", 4, "--lora_val_iterations", 2, "--train_batch_size", 8,
    "--rerank_metric_ks", 1, 5, 10,
]  # fmt: skip
RETRIEVER_FLAGS = ["--device", "cpu", "--val_iterations", 10, "--train_batch_size", 16]
RETRIEVER_FILES = [
    "candidates.npz", "config.json", "log.jsonl", "model.safetensors", "test_metrics.json",
    "val_metrics.json",
]  # fmt: skip
RANKER_FILES = [
    "adapter", "config.json", "fused_metrics.json", "log.jsonl", "overall_metrics.json",
    "rankings.npz", "retrieval_metrics.json", "subset_metrics.json",
]  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def ranked(retrieved: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ranker run on the toy data."""
    root = tmp_path_factory.mktemp("ranker")
    done = run_script(
        "train_ranker.py", "--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama,
        "--experiment_root", root, *RANKER_FLAGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "two stages" in done.stdout and "train: 100%" in done.stderr
    return root / "tiny-llama" / "custom"


def test_retriever_writes_the_contract(retrieved: Path):
    assert names(retrieved) == RETRIEVER_FILES
    config = read(retrieved / "config.json")
    assert config["seed"] == 42 and config["max_steps"] == 60 and "commit" in config
    metrics = read(retrieved / "test_metrics.json")
    keys = [f"{m}@{k}" for k in (1, 5, 10, 20, 50) for m in ("Recall", "MRR", "NDCG")]
    assert list(metrics) == [*keys, "num_users"] and metrics["num_users"] == 60
    with np.load(retrieved / "candidates.npz", allow_pickle=False) as file:
        for split in ("val", "test"):
            items, ranks = file[f"{split}_items"], file[f"{split}_label_ranks"]
            assert items.shape == (60, 20) and items.dtype == np.int32
            assert file[f"{split}_scores"].dtype == np.float32
            assert file[f"{split}_labels"].dtype == ranks.dtype == np.int32
            found = (items == file[f"{split}_labels"][:, None]).argmax(1)
            assert (found[ranks <= 20] + 1 == ranks[ranks <= 20]).all()
        recall = (file["test_label_ranks"] <= 10).mean()
    assert metrics["Recall@10"] == recall > 0.5  # toy users are easy
    log = [json.loads(line) for line in (retrieved / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [30, 60]
    with safe_open(retrieved / "model.safetensors", "pt") as file:
        assert "embedding.weight" in file.keys()  # noqa: SIM118


def test_candidates_leave_the_history_out(retrieved: Path, toy: dict[str, Path], tmp_path: Path):
    from tests.test_datasets import load_custom

    data = load_custom(toy, tmp_path)
    with np.load(retrieved / "candidates.npz") as file:
        for split in ("val", "test"):
            for user, items in enumerate(file[f"{split}_items"]):
                history = data.item_ids[data.offsets[user] : data.history_ends(split)[user]]
                scored = np.isfinite(file[f"{split}_scores"][user])
                assert not set(history.tolist()) & set(items[scored].tolist())


def test_ranker_writes_the_contract(ranked: Path, retrieved: Path):
    assert names(ranked) == RANKER_FILES
    with np.load(retrieved / "candidates.npz") as file:
        labels, ranks = file["test_labels"], file["test_label_ranks"]
        subset = (file["test_items"] == labels[:, None]).any(1)
    overall, retrieval = (read(ranked / f"{x}_metrics.json") for x in ("overall", "retrieval"))
    metrics = read(ranked / "subset_metrics.json")
    assert metrics["num_users"] == subset.sum() and overall["num_users"] == 60
    assert retrieval["Recall@5"] == (ranks <= 5).mean()
    with np.load(ranked / "rankings.npz", allow_pickle=False) as file:
        assert file["users"].tolist() == np.flatnonzero(subset).tolist()
        assert (np.diff(file["scores"], axis=1) <= 0).all()
        places = (file["items"] == labels[subset][:, None]).argmax(1) + 1
        assert (file["label_ranks"][subset] == places).all()
        assert (file["label_ranks"][~subset] == ranks[~subset]).all()
        assert overall["MRR@10"] == pytest.approx(
            np.where(file["label_ranks"] <= 10, 1 / file["label_ranks"], 0).mean(), abs=1e-15
        )
    assert overall["Recall@5"] == pytest.approx(metrics["Recall@5"] * subset.mean())
    fused = read(ranked / "fused_metrics.json")
    assert 0 <= fused.pop("weight") <= 1 and list(fused) == list(overall)


def test_adapter_loads_with_peft_and_scores_the_same(
    ranked: Path, retrieved: Path, tiny_llama: Path, toy: dict[str, Path], tmp_path: Path
):
    from tests.test_datasets import load_custom
    from tests.test_prompt import make_builder, read_tokenizer

    data = load_custom(toy, tmp_path)
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
                logits = model(prompt).logits[0, -1, torch.from_numpy(builder.label_ids)]
            stored = dict(zip(file["items"][row].tolist(), file["scores"][row].tolist()))
            stored = torch.tensor([stored[item] for item in candidates[user].tolist()])
            torch.testing.assert_close(logits.float(), stored, rtol=0.02, atol=0.1)


def test_same_seed_gives_the_same_bytes(
    toy_flags: list, retrieved: Path, ranked: Path, tiny_llama: Path, tmp_path: Path
):
    env = {"PYTHONHASHSEED": "123"}
    again = tmp_path / "again"
    done = run_script(
        "train_retriever.py", *toy_flags, "--export_root", again, "--max_steps", 60,
        "--val_iterations", 30, "--train_batch_size", 16, "--device", "cpu", env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("test_metrics.json", "val_metrics.json", "candidates.npz", "model.safetensors"):
        assert (again / name).read_bytes() == (retrieved / name).read_bytes(), name
    done = run_script(
        "train_ranker.py", "--llm_retrieved_path", again, "--llm_base_model", tiny_llama,
        "--export_root", tmp_path / "ranker", *RANKER_FLAGS, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in RANKER_FILES:
        if name.endswith(("_metrics.json", ".npz")):
            assert (tmp_path / "ranker" / name).read_bytes() == (ranked / name).read_bytes(), name
    other = tmp_path / "other"
    done = run_script(
        "train_retriever.py", *toy_flags, "--export_root", other, "--max_steps", 60, "--seed", 1,
        "--val_iterations", 30, "--train_batch_size", 16, "--device", "cpu",
    )  # fmt: skip
    assert (other / "candidates.npz").read_bytes() != (retrieved / "candidates.npz").read_bytes()


def interrupt(
    script: str, *flags: object, when: Path, how: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """Start a script and signal it once it has written the file ``when``; status and last line."""

    def written() -> int | None:
        return when.stat().st_mtime_ns if when.exists() else None

    before = written()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    limit = time.monotonic() + 120
    while written() == before and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate()
    assert written() != before, "the run ended before it could be interrupted"
    return process.returncode, errors.splitlines()[-1]


def test_interrupted_retriever_resumes_to_the_same_bytes(toy_flags: list, tmp_path: Path):
    recipe = [
        "--ema_decay", 0.9, "--enable_lr_schedule", "true", "--lr_decay", "cosine",
        "--negatives", 8,
    ]  # fmt: skip
    flags = [*toy_flags, *RETRIEVER_FLAGS, *recipe, "--max_steps", 400]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run_script("train_retriever.py", *flags, "--export_root", whole)
    assert done.returncode == 0, done.stderr
    checkpoint = broken / "checkpoint.safetensors"
    flags += ["--save_seconds", 0.5, "--export_root"]
    interrupt("train_retriever.py", *flags, broken, when=checkpoint)
    assert not (broken / "test_metrics.json").exists()
    for how, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        resumed = [*flags, broken, "--resume", "true"]
        found = interrupt("train_retriever.py", *resumed, when=checkpoint, how=how)
        says = "interrupted: the same command with --resume true goes on"
        assert found == (status, says) and checkpoint.exists()
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    done = run_script("train_retriever.py", *flags, broken)
    assert done.returncode == 2 and "--resume true goes on" in done.stderr
    other = run_script("train_retriever.py", *flags, broken, "--lr", 0.1, "--resume", "true")
    assert other.returncode == 2 and "other flags" in other.stderr
    assert before == {path.name: path.read_bytes() for path in broken.iterdir()}
    done = run_script("train_retriever.py", *flags, broken, "--resume", "true")
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    assert names(broken) == RETRIEVER_FILES
    for name in RETRIEVER_FILES:
        if name != "config.json":
            assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    before = (broken / "config.json").stat().st_mtime_ns
    done = run_script("train_retriever.py", *flags, broken, "--resume", "true")
    assert done.returncode == 0 and "nothing to resume" in done.stdout
    assert (broken / "config.json").stat().st_mtime_ns == before
    other = run_script("train_retriever.py", *flags, broken, "--lr", 0.1, "--resume", "true")
    assert other.returncode == 2 and "other flags" in other.stderr


def test_earlier_runs_and_runs_at_work_are_left_alone(toy_flags: list, tmp_path: Path):
    run = tmp_path / "run"
    flags = [*toy_flags, "--device", "cpu", "--export_root", run, "--max_steps"]
    assert run_script("train_retriever.py", *flags, 1).returncode == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    done = run_script("train_retriever.py", *flags, 2)
    assert done.returncode == 2 and "--overwrite true" in done.stderr
    done = run_script("train_retriever.py", *flags, 2, "--overwrite", "true", "--resume", "true")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    with folder.locked(run):
        done = run_script("train_retriever.py", *flags, 2, "--overwrite", "true")
        assert done.returncode == 2 and "in use by another run" in done.stderr
        assert before == {p.name: p.read_bytes() for p in run.iterdir() if p.name != ".lock"}
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    done = run_script("train_retriever.py", *flags, 2, "--overwrite", "true")
    assert done.returncode == 0 and names(run) == RETRIEVER_FILES
    assert read(run / "config.json")["max_steps"] == 2


def test_a_folder_made_for_a_run_that_fails_goes_again(tmp_path: Path):
    run = tmp_path / "a" / "b"
    (run / ".adapter.1.tmp").mkdir(parents=True)
    (run / ".model.safetensors.1.tmp").write_text("half")
    (run / ".tmpfatfbU").write_text("half")
    with folder.locked(run):  # what a killed process left
        assert names(run) == [".lock"]
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(ZeroDivisionError), folder.locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_interrupted_ranker_resumes_to_the_same_bytes(
    retrieved: Path, tiny_llama: Path, ranked: Path, tmp_path: Path
):
    flags = ["--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama, *RANKER_FLAGS]
    broken = tmp_path / "broken"
    interrupt(
        "train_ranker.py", *flags, "--export_root", broken, when=broken / "checkpoint.safetensors"
    )
    done = run_script("train_ranker.py", *flags, "--export_root", broken, "--resume", "true")
    assert done.returncode == 0 and "resuming at step" in done.stdout, done.stderr
    for name in RANKER_FILES:
        if name.endswith(("_metrics.json", ".npz")):
            assert (broken / name).read_bytes() == (ranked / name).read_bytes(), name


def test_ranker_in_4_bits_on_a_cpu(retrieved: Path, tiny_llama: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = run_script(
        "train_ranker.py", "--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama,
        "--llm_load_in_4bit", "true", "--export_root", run, *RANKER_FLAGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert names(run) == RANKER_FILES and read(run / "config.json")["llm_load_in_4bit"] is True
    adapter = read(run / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (8, 32, 0.05)
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}


def test_resume_without_a_checkpoint_says_so(toy_flags: list, tmp_path: Path):
    done = run_script(
        "train_retriever.py", *toy_flags, *RETRIEVER_FLAGS, "--max_steps", 2, "--export_root",
        tmp_path / "run", "--resume", "true",
    )  # fmt: skip
    assert done.returncode == 0 and "nothing to resume" in done.stdout, done.stderr


def test_hugging_face_datasets_is_installed_beside_ours(retrieved: Path):
    """The runs above passed with the library whose name our folder shares installed."""
    from importlib.metadata import version

    assert int(version("datasets").split(".")[0]) >= 4
    import datasets

    assert Path(datasets.__file__).parent == ROOT / "datasets"


def test_wandb_offline(toy_flags: list, tmp_path: Path):
    done = run_script(
        "train_retriever.py", *toy_flags, *RETRIEVER_FLAGS, "--max_steps", 2, "--export_root",
        tmp_path / "run", "--use_wandb", "true", env={"WANDB_MODE": "offline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_optimizer_holds_what_the_flags_say(
    toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import train_retriever

    held = []

    class Recorder(torch.optim.AdamW):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            held.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    flags = [*toy_flags, "--device", "cpu", "--max_steps", 1, "--export_root", tmp_path / "run"]
    changed = ["--weight_decay", 0.3, "--lr", 3e-4, "--adam_epsilon", 1e-7]
    train_retriever.main([str(flag) for flag in (*flags, *changed)])
    again = ["--weight_decay", 0, "--lr", 3e-4, "--overwrite", "true"]
    train_retriever.main([str(flag) for flag in (*flags, *again)])
    decays = [{group["weight_decay"] for group in x.param_groups} for x in held]
    assert decays == [{0.3, 0.0}, {0.0}]
    assert {group["lr"] for x in held for group in x.param_groups} == {3e-4}
    assert held[0].defaults["eps"] == 1e-7
    for group in held[0].param_groups:
        assert all((p.ndim == 1) for p in group["params"]) or group["weight_decay"] == 0.3


@pytest.mark.parametrize("code", ["sas", "bert", "narm"])
def test_baselines_feed_the_ranker(code: str, toy_flags: list, tiny_llama: Path, tmp_path: Path):
    done = run_script(
        "train_retriever.py", *toy_flags, "--device", "cpu", "--model_code", code, "--max_steps",
        40, "--train_batch_size", 16, "--experiment_root", tmp_path, "--dropout", 0.1,
        "--max_len", 10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / code / "custom") == RETRIEVER_FILES
    assert read(tmp_path / code / "custom" / "test_metrics.json")["Recall@20"] > 0.5
    if code == "bert":
        done = run_script(
            "train_ranker.py", "--llm_retrieved_path", tmp_path / code / "custom",
            "--llm_base_model", tiny_llama, "--experiment_root", tmp_path, "--max_steps", 1,
            "--device", "cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_validation_by_epoch(toy_flags: list, tmp_path: Path):
    run = tmp_path / "run"
    done = run_script(
        "train_retriever.py", *toy_flags, "--device", "cpu", "--train_batch_size", 32,
        "--val_strategy", "epoch", "--num_epochs", 3, "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 4, 6]


def test_ranker_with_every_option(retrieved: Path, tiny_llama: Path, tmp_path: Path):
    run = tmp_path / "run"
    done = run_script(
        "train_ranker.py", "--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama,
        "--export_root", run, *RANKER_FLAGS, "--train_candidates", "mixed", "--response_loss",
        "letters", "--permutations", 2, "--tokens_per_batch", 600, "--ema_decay", 0.5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert names(run) == RANKER_FILES and "no gradient checkpointing" in done.stdout
    assert read(run / "config.json")["gradient_checkpointing"] is False
    done = run_script(
        "train_ranker.py", "--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama,
        "--export_root", run, *RANKER_FLAGS, "--response_loss", "letters", "--llm_train_on_inputs",
        "true",
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_full_memory_and_loss_that_is_no_number(
    toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import train_retriever
    from config import UserError
    from trainer import retriever as retriever_training

    usual, calls = retriever_training.catalogue_loss, 0

    def full(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def broken_once(*args: object, **options: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return usual(*args, **options) * (float("nan") if calls == 3 else 1)

    flags = [*toy_flags, "--device", "cpu", "--export_root", tmp_path, "--train_batch_size", 2]
    monkeypatch.setattr(retriever_training, "catalogue_loss", full)
    with pytest.raises(UserError, match=r"memory is full at step 1: .*--train_batch_size"):
        train_retriever.main([str(flag) for flag in flags])
    monkeypatch.setattr(retriever_training, "catalogue_loss", broken_once)
    with pytest.raises(UserError, match=r"nan at step 3 with users u\d+, u\d+: .*--lr$"):
        train_retriever.main([str(flag) for flag in flags])
    assert not (tmp_path / "checkpoint.safetensors").exists()


# Mistakes -------------------------------------------------------------------------------------


def fails(script: str, *flags: object, says: str, env: dict | None = None) -> None:
    """The script exits with 2 and one line on stderr that holds ``says``, quickly."""
    started = time.monotonic()
    done = run_script(script, *flags, env=env)
    seconds = time.monotonic() - started
    lines = [x for x in done.stderr.splitlines() if x and "rebuilding it" not in x]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert says in lines[0], lines[0]
    assert seconds < 30  # a timed bound is no test on a shared machine; this one finds hangs


def test_unknown_dataset():
    fails("train_retriever.py", "--dataset_code", "netflix", says="beauty")


def test_metric_ks_0():
    fails("train_retriever.py", "--dataset_code", "games", "--metric_ks", 0, says="--metric_ks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", ["train_retriever.py", "train_ranker.py"])
def test_cuda_absent(script: str):
    fails(script, "--dataset_code", "games", "--device", "cuda", says="use --device cpu")


MOVIES = "movieId,title,genres\n" + "".join(f"{i},Film {i} (1999),Drama\n" for i in range(6))
RATINGS = "userId,movieId,rating,timestamp\n" + "".join(
    f"{u},{i},5,{u + i}\n" for u in range(6) for i in range(6)
)


@pytest.mark.parametrize(
    ("ratings", "movies", "says"),
    [
        (RATINGS.replace("timestamp", "when"), MOVIES, "ratings.csv lacks the column timestamp"),
        (RATINGS, MOVIES.replace("title", "name"), "movies.csv lacks the column title"),
        (RATINGS + "7,1,5,yesterday\n", MOVIES, "ratings.csv row 38: timestamp 'yesterday'"),
        (RATINGS + "7,1,good,1\n", MOVIES, "ratings.csv row 38: rating 'good'"),
        (RATINGS + "7,1,5,inf\n", MOVIES, "timestamp 'inf'"),
        (RATINGS + ",1,5,1\n", MOVIES, "ratings.csv row 38: user is empty"),
        ("", MOVIES, "ratings.csv is empty"),
        (RATINGS.splitlines()[0] + "\n", MOVIES, "ratings.csv is empty"),
        (RATINGS, "", "movies.csv is empty"),
        (RATINGS + "1,2,3,4,5,6,7\n", MOVIES, "cannot read"),
        (RATINGS[:200], MOVIES, "no user has 5 interactions"),
    ],
)
def test_bad_raw_files(ratings: str, movies: str, says: str, tmp_path: Path):
    folder = tmp_path / "data" / "ml-100k"
    folder.mkdir(parents=True)
    (folder / "ratings.csv").write_text(ratings)
    (folder / "movies.csv").write_text(movies)
    fails(
        "train_retriever.py", "--dataset_code", "ml-100k", "--data_root", tmp_path / "data",
        "--cache_root", tmp_path / "cache", "--experiment_root", tmp_path / "runs", says=says,
    )  # fmt: skip
    assert names(tmp_path) == ["data"] and names(folder) == ["movies.csv", "ratings.csv"]


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (gzip.compress(b"{'asin': 'i1', 'title': 'x'}\n" * 50)[:-12], "no whole gzip file"),
        (b"not gzip at all", "no whole gzip file"),
        (gzip.compress(b"{'asin': 'i1', 'title': 'x'}\n{'asin': 'i2', 't\n"), "row 2"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(b"\xff\xfe\x00\n"), "not UTF-8"),
    ],
)
def test_bad_metadata(meta: bytes, says: str, tmp_path: Path):
    folder = tmp_path / "data" / "beauty"
    folder.mkdir(parents=True)
    (folder / "ratings_Beauty.csv").write_text("u,i1,5.0,1\n")
    (folder / "meta_Beauty.json.gz").write_bytes(meta)
    fails(
        "train_retriever.py", "--dataset_code", "beauty", "--data_root", tmp_path / "data",
        "--cache_root", tmp_path / "cache", says=says,
    )  # fmt: skip
    assert names(tmp_path) == ["data"]


def custom_flags(tmp_path: Path, interactions: str, items: str) -> list[object]:
    (tmp_path / "x.csv").write_text(interactions)
    (tmp_path / "y.csv").write_text(items)
    return [
        "--dataset_code", "custom", "--interactions", tmp_path / "x.csv", "--items",
        tmp_path / "y.csv", "--cache_root", tmp_path / "cache", "--experiment_root",
        tmp_path / "runs",
    ]  # fmt: skip


def test_custom_without_a_core(tmp_path: Path):
    flags = custom_flags(tmp_path, "user,item,timestamp\na,1,1\n", "item,title\n1,One\n")
    fails("train_retriever.py", *flags, says="lower --min_uc")
    assert names(tmp_path) == ["x.csv", "y.csv"]


def test_custom_items_without_title(tmp_path: Path):
    flags = custom_flags(
        tmp_path, "user,item,timestamp\na,1,1\na,2,2\n", "item,title\n1,One\n2,  \n"
    )
    fails("train_retriever.py", *flags, says="has no title for 1 of the items")


def test_custom_files_absent_or_of_unknown_form(tmp_path: Path):
    flags = custom_flags(tmp_path, "", "")
    flags[3] = tmp_path / "none.csv"
    fails("train_retriever.py", *flags, says="cannot read")
    flags[3] = tmp_path / "x.xlsx"
    flags[3].write_text("x")
    fails("train_retriever.py", *flags, says="must end in")


def test_more_candidates_than_items(toy_flags: list):
    flags = [*toy_flags, "--num_candidates", 100]
    fails("train_retriever.py", *flags, says="has 40 items")


@pytest.fixture()
def damaged(retrieved: Path, tmp_path: Path) -> Path:
    """A copy of the retriever's run, to be damaged."""
    return Path(shutil.copytree(retrieved, tmp_path / "run"))


def edit(run: Path, **changes: np.ndarray | None) -> None:
    with np.load(run / "candidates.npz") as file:
        arrays = dict(file) | changes
    np.savez(run / "candidates.npz", **{k: v for k, v in arrays.items() if v is not None})


def edits() -> dict[str, tuple]:
    def out_of_range(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[3, 3] = 41
        return x

    def twice(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[5, 1] = x[5, 0]
        return x

    return {
        "cut short": ("test_items", lambda x: x[:50], "test items have shape (50, 20)"),
        "one column": ("val_items", lambda x: x[:, :1], "val items have shape (60, 1)"),
        "scores": ("val_scores", lambda x: x[:, :7], "val scores have shape (60, 7)"),
        "missing": ("val_labels", lambda x: None, "is damaged"),
        "range": ("test_items", out_of_range, "from 1 to 40"),
        "zero": ("test_items", lambda x: x * 0, "from 1 to 40"),
        "twice": ("test_items", twice, "one item twice"),
        "type": ("test_items", lambda x: x + 0.5, "must be integers"),
        "labels": ("test_labels", lambda x: x % 40 + 1, "not the held-out items"),
        "ranks": ("test_label_ranks", lambda x: x * 0 + 40, "disagree"),
        "order": ("test_scores", lambda x: x[:, ::-1], "do not descend"),
    }


@pytest.mark.parametrize("name", edits())
def test_edited_candidates(name: str, damaged: Path, toy_flags: list, tmp_path: Path):
    array, change, says = edits()[name]
    with np.load(damaged / "candidates.npz") as file:
        value = change(file[array])
    edit(damaged, **{array: value})
    fails(
        "train_ranker.py", "--llm_retrieved_path", damaged, "--experiment_root", tmp_path / "runs",
        says=says,
    )  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_retrieved_path_missing_empty_or_truncated(damaged: Path, tmp_path: Path):
    fails("train_ranker.py", "--llm_retrieved_path", tmp_path / "no", says="candidates.npz there")
    (tmp_path / "empty").mkdir()
    fails("train_ranker.py", "--llm_retrieved_path", tmp_path / "empty", says="no candidates.npz")
    content = (damaged / "candidates.npz").read_bytes()
    for cut in (content[:1000], b""):
        (damaged / "candidates.npz").write_bytes(cut)
        fails("train_ranker.py", "--llm_retrieved_path", damaged, says="is damaged")


def test_candidates_of_another_dataset(retrieved: Path, toy_flags: list, tmp_path: Path):
    flags = ["--llm_retrieved_path", retrieved, "--min_uc", 9, "--cache_root", tmp_path]
    fails("train_ranker.py", *flags, says="another data set")
    flags = ["--llm_retrieved_path", retrieved, "--dataset_code", "games"]
    fails("train_ranker.py", *flags, says="another data set, custom")


def test_more_candidates_than_labels(retrieved: Path, tiny_llama: Path):
    fails(
        "train_ranker.py", "--llm_retrieved_path", retrieved, "--llm_base_model", tiny_llama,
        "--llm_negative_sample_size", 62, says="63 candidates, but this tokenizer has 62 labels",
    )  # fmt: skip


def test_model_folder_without_weights(retrieved: Path, tiny_llama: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    flags = ["--llm_retrieved_path", retrieved, "--llm_base_model", folder]
    (folder / "model.safetensors").unlink()
    fails("train_ranker.py", *flags, says="no weights")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    fails("train_ranker.py", *flags, says="no weights")
    (folder / "config.json").unlink()
    fails("train_ranker.py", *flags, says="no config.json")
    fails("train_ranker.py", *flags[:3], tmp_path / "none", says="no such folder")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub: a gated model's card is public, its files are not."""

    def do_GET(self) -> None:
        card = b'{"id": "some/gated", "sha": "%s", "siblings": [{"rfilename": "config.json"}]}'
        card %= b"0" * 40
        files = b'[{"type": "file", "path": "config.json", "size": 9, "oid": "1"}]'
        if "gated" not in self.path:
            status, code, content = 404, "RepoNotFound", b""
        elif "/resolve/" in self.path:
            status, code, content = 403, "GatedRepo", b""
        else:
            status, code, content = 200, None, files if "/tree/" in self.path else card
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


def test_gated_unknown_and_unreachable_models(retrieved: Path, tmp_path: Path):
    flags = ["--llm_retrieved_path", retrieved, "--llm_cache_dir", tmp_path, "--llm_base_model"]
    env = {"HF_HUB_OFFLINE": "1"}
    fails("train_ranker.py", *flags, "someone/model", says="cannot be downloaded", env=env)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        fails("train_ranker.py", *flags, "some/gated", says="ask for access at", env=env)
        fails("train_ranker.py", *flags, "some/unknown", says="is not on the hub", env=env)
        server.shutdown()


def test_stale_and_damaged_cache(toy_flags: list, tmp_path: Path):
    flags = [*toy_flags, *RETRIEVER_FLAGS, "--max_steps", 1, "--export_root", tmp_path / "run"]
    flags += ["--overwrite", "true"]
    flags[flags.index("--cache_root") + 1] = tmp_path / "cache"
    cache = tmp_path / "cache" / "custom.npz"
    cache.parent.mkdir()
    cache.write_bytes(b"PK damaged")
    done = run_script("train_retriever.py", *flags)
    assert done.returncode == 0 and f"{cache} is damaged: rebuilding it" in done.stderr
    done = run_script("train_retriever.py", *flags, "--min_uc", 9)
    assert done.returncode == 0 and "made from other files or flags" in done.stderr
