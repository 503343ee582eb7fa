"""Both stages on CUDA, with NF4 and paged AdamW; skipped where there is no CUDA device."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import run_script

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_both_stages(toy_flags: list, tiny_llama: Path, tmp_path: Path):
    retriever, ranker = tmp_path / "retriever", tmp_path / "ranker"
    done = run_script(
        "train_retriever.py", *toy_flags, "--export_root", retriever, "--max_steps", 60,
        "--val_iterations", 30, "--train_batch_size", 16, "--device", "cuda",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_script(
        "train_ranker.py", "--llm_retrieved_path", retriever, "--llm_base_model", tiny_llama,
        "--export_root", ranker, "--max_steps", 4, "--lora_val_iterations", 2, "--device", "cuda",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((ranker / "config.json").read_text())
    assert config["llm_load_in_4bit"] and config["device"].startswith("cuda")
    assert (ranker / "overall_metrics.json").exists()
