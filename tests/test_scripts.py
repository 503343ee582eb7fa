"""Both scripts as a user runs them: files, reproducibility, resuming."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import augment_data
import train_ranker
import train_retriever
from config import RankerConfig, UserError
from dataloader.retriever import Histories
from dataloader.sampler import evaluation_loader
from datasets import SequenceDataset
from model.retriever import build_retriever
from tests.conftest import ROOT, run_script
from tests.test_models import make_data
from trainer import folder
from trainer.retriever import retrieve

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


def test_candidates_where_fewer_items_are_left_than_are_asked_for():
    data = make_data([12, 7, 16], num_items=20)
    loader = evaluation_loader(Histories(data, "test", 20, None), 3, 0)
    torch.manual_seed(0)
    model = build_retriever(
        "lru", num_items=20, max_len=20, hidden_dim=8, num_blocks=1, num_heads=1, dropout=0.0,
        attn_dropout=0.0,
    )  # fmt: skip
    options = {"num_candidates": 20, "description": ""}
    found = retrieve(model.eval(), loader, mask_history=True, **options)
    free = retrieve(model, loader, mask_history=False, **options)
    for user, items in enumerate(found.items):
        assert sorted(items.tolist()) == list(range(1, 21))
        had = data.item_ids[data.offsets[user] : data.history_ends("test")[user]]
        left = [item for item in free.items[user] if item not in had]
        assert items[: len(left)].tolist() == left
        assert (np.isfinite(found.scores[user]) == (np.arange(20) < len(left))).all()


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
        # Where the tests are a shell's background job, Ctrl-C is ignored from birth.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
        "--negatives", 8, "--loss_precision", "bfloat16",
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


def test_an_earlier_run_is_replaced_on_request(toy_flags: list, tmp_path: Path):
    run = tmp_path / "run"
    flags = [*toy_flags, "--device", "cpu", "--export_root", run, "--max_steps"]
    assert run_script("train_retriever.py", *flags, 1).returncode == 0
    (run / "log.jsonl").write_text("")
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
        tmp_path / "run", "--use_wandb", "true",
        env={"WANDB_MODE": "offline", "WANDB_API_KEY": "5ec2e7" * 7},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    files = (path for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert not [path for path in files if b"5ec2e75ec2e7" in path.read_bytes()]


def test_optimizer_holds_what_the_flags_say(
    toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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


@pytest.mark.parametrize("code", ["sas", "bert", "narm"])
def test_baselines_feed_the_ranker(code: str, toy_flags: list, tiny_llama: Path, tmp_path: Path):
    done = run_script(
        "train_retriever.py", *toy_flags, "--device", "cpu", "--model_code", code, "--max_steps",
        250, "--train_batch_size", 16, "--experiment_root", tmp_path, "--dropout", 0.1,
        "--max_len", 10, "--lr", 3e-3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / code / "custom") == RETRIEVER_FILES
    assert read(tmp_path / code / "custom" / "test_metrics.json")["Recall@10"] > 0.7  # chance: .34
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


def test_hard_negatives_of_the_examples_that_are_seen(toy_data: SequenceDataset, retrieved: Path):
    flags = {"dataset_code": "custom", "interactions": "-", "items": "-"}
    config = RankerConfig(
        **flags, llm_retrieved_path=str(retrieved), train_candidates="mixed", device="cpu"
    )
    every = np.arange(len(toy_data.training_prefixes()[0]))
    accelerator = Accelerator(cpu=True)
    found = train_ranker.hard_negatives_of(config, toy_data, every, accelerator)
    some = train_ranker.hard_negatives_of(config, toy_data, every[1::3], accelerator)
    assert found.shape == (len(every), 9) and (found > 0).any(1).all()
    assert np.array_equal(some[1::3], found[1::3])
    assert not np.delete(some, every[1::3], axis=0).any()


def test_full_memory_and_loss_that_is_no_number(
    toy_flags: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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
    with pytest.raises(UserError, match=r"memory is full after step 0: .*--train_batch_size"):
        train_retriever.main([str(flag) for flag in flags])
    monkeypatch.setattr(retriever_training, "catalogue_loss", usual)
    monkeypatch.setattr(retriever_training, "retrieve", full)
    some_steps = [*flags, "--max_steps", 3]
    with pytest.raises(UserError, match=r"memory is full after step 3: .*--val_batch_size"):
        train_retriever.main([str(flag) for flag in some_steps])
    monkeypatch.undo()
    smaller = [*some_steps, "--val_batch_size", 8, "--resume", "true"]
    train_retriever.main([str(flag) for flag in smaller])
    flags += ["--overwrite", "true"]
    monkeypatch.setattr(retriever_training, "catalogue_loss", broken_once)
    with pytest.raises(UserError, match=r"nan at step 3 with users u\d+, u\d+: .*--lr$"):
        train_retriever.main([str(flag) for flag in flags])
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_users_with_a_single_training_item(toy: dict, tiny_llama: Path, tmp_path: Path):
    """A retriever learns from them; there is no history for a prompt."""
    log, run = tmp_path / "log.csv", tmp_path / "run"
    rows = "".join(f"u{n},i{n + m},{m}\n" for n in range(9) for m in range(3))
    log.write_text("user,item,timestamp\n" + rows)
    data = [
        "--dataset_code", "custom", "--interactions", log, "--items", toy["items"],
        "--cache_root", tmp_path, "--min_uc", 3, "--min_sc", 1, "--device", "cpu",
    ]  # fmt: skip
    words = [*data, "--export_root", run, "--max_steps", 2, "--num_candidates", 11]
    train_retriever.main(list(map(str, words)))
    assert names(run) == RETRIEVER_FILES
    model = ["--llm_base_model", str(tiny_llama), "--export_root", str(tmp_path / "other")]
    with pytest.raises(UserError, match="no user has two training items"):
        train_ranker.main(["--llm_retrieved_path", str(run), *model])
    with pytest.raises(UserError, match="no user has two training items"):
        augment_data.main([*map(str, data), *model])


def test_stale_and_damaged_cache(toy_flags: list, tmp_path: Path):
    flags = [*toy_flags, *RETRIEVER_FLAGS, "--max_steps", 1, "--export_root", tmp_path / "run"]
    flags += ["--overwrite", "true"]
    flags[flags.index("--cache_root") + 1] = tmp_path / "cache"
    cache = tmp_path / "cache" / "custom.npz"
    cache.parent.mkdir()
    cache.write_bytes(b"PK damaged")
    done = run_script("train_retriever.py", *flags)
    assert done.returncode == 0 and f"note: {cache} is damaged" in done.stderr
    done = run_script("train_retriever.py", *flags, "--min_uc", 9)
    assert done.returncode == 0 and "made from other files or flags" in done.stderr
