"""Fixtures for all tests: toy data, a tiny Llama with its tokenizer, a retriever run, a server."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from datasets import SequenceDataset

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers import (  # noqa: E402
    ROOT,
    Handler,
    copy_run,
    downloaded,
    load_custom,
    run_script,
    toy_interactions,
)

SHARED = ROOT.parent / "shared"
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest-xdist runs one process per core
SHORT = ["--device", "cpu", "--max_steps", 2, "--warmup_steps", 0, "--lora_val_iterations", 2]
RANKERS = {
    "letters": ["--llm_max_history", 5],
    "titles": ["--verbalizer", "titles", "--llm_max_history", 5, "--title_prior", "none"],
    "guided": ["--verbalizer", "titles", "--llm_max_history", 5, "--folds", 2],
    "popularity": ["--verbalizer", "titles", "--llm_max_history", 5, "--title_prior", "popularity"],
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the paper's data and tokenizers, which are not in the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder ../shared with the paper's data is absent")
    return SHARED


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a small custom data set, ``interactions`` and ``items``."""
    folder = tmp_path_factory.mktemp("toy")
    rows = toy_interactions()
    interactions, items = folder / "interactions.csv", folder / "items.csv"
    interactions.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    names = sorted({i for _, i, _ in rows})
    titles = "".join(f'{i},"The {i} Story, part {i[1:]}"\n' for i in names)
    items.write_text("item,title\n" + titles)
    return {"interactions": interactions, "items": items}


@pytest.fixture(scope="session")
def toy_flags(toy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Flags that select the toy data."""
    return [
        "--dataset_code", "custom", "--interactions", toy["interactions"], "--items", toy["items"],
        "--cache_root", tmp_path_factory.mktemp("cache"),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def toy_data(toy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """The toy data as the scripts load it."""
    return load_custom(toy, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama and a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The Story, part of the User history"] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the default model without CUDA, downloaded once and then cached."""
    from model.hub import SMALL_MODEL, find_model

    cache = str(ROOT / "data" / "cache")
    return downloaded(lambda: find_model(SMALL_MODEL, cache_root=cache, hub_cache=None)).folder


@pytest.fixture(scope="session")
def retrieved(toy_flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished retriever run on the toy data."""
    folder = tmp_path_factory.mktemp("retriever") / "run"
    done = run_script(
        "train_retriever.py", *toy_flags, "--export_root", folder, "--max_steps", 60,
        "--val_iterations", 30, "--train_batch_size", 16, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session", params=list(RANKERS))
def ranker(
    request: pytest.FixtureRequest,
    retrieved: Path,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of a finished run of the ranker, one for each verbalizer."""
    root = tmp_path_factory.mktemp("ranker")
    run, retriever = root / "run", copy_run(retrieved, root / "retriever")
    done = run_script(
        "train_ranker.py", "--llm_retrieved_path", retriever, "--llm_base_model", tiny_llama,
        *SHORT, *RANKERS[request.param], "--export_root", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture()
def server() -> Iterator[str]:
    """Address of a server that answers with ``Handler.files``."""
    Handler.files, Handler.cut, Handler.ranges = {}, None, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
