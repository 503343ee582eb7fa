"""Both stages on CUDA with NF4, and Liger's kernels; skipped without a CUDA device."""

import json
from pathlib import Path

import pytest
import torch

from model.language_model import add_lora, load_causal_lm
from model.verbalizer import candidate_scores, response_loss
from tests.helpers import run_script

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


def test_liger_changes_neither_scores_nor_gradients(tiny_llama: Path):
    pytest.importorskip("liger_kernel")
    cuda = torch.device("cuda")
    ids = torch.randint(0, 100, (4, 60), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    results = []
    for fused in (False, True):  # last, because Liger patches rotary embeddings for all models
        torch.manual_seed(0)
        model = load_causal_lm(tiny_llama, device=cuda, in_4bit=False, fused_kernels=fused)
        model = add_lora(model, rank=4, alpha=8, dropout=0.0, target_modules=("q_proj", "v_proj"))
        model = model.float().train()
        response_loss(model, batch | {"targets": ids[:, -2:]}).backward()
        with torch.no_grad():
            scores = candidate_scores(model, batch, torch.arange(20, device=cuda))
        results.append([scores, *(p.grad for p in model.parameters() if p.requires_grad)])
    for stock, fused in zip(*results):
        torch.testing.assert_close(fused, stock, rtol=1e-3, atol=1e-4)
