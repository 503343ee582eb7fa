"""Generate further interactions for every user with a language model, to train retrievers on.

This is LLM4IDRec with a recipe of this project; --preset published selects the one in its code.

Example:
    python augment_data.py --dataset_code ml-100k
    python train_retriever.py --dataset_code ml-100k --augmented experiments/llm4idrec/ml-100k
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cli import parse, run_main
from config import AugmentationConfig, augmentation_preset
from datasets import SequenceDataset
from errors import UserError, advice
from flags import flags_of
from model.hub import CHAT_MODEL, LARGE_MODEL
from process import check_device
from recipes.language_model import LanguageModel, find_language_model
from recipes.runs import (
    check_examples,
    check_replaceable,
    describe_data,
    load_data,
    locked,
    run_fingerprint,
)
from storage import read_json, reading
from trainer.run_folder import CHECKPOINT, CONFIG, RunFolder

OUTPUTS = ("adapter", "generated.jsonl", "augmented.npz", "augmentation.json", "exports")
STAGES = ("tuning", "generation", "filter")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and inputs, check them, then run the stages."""
    config = parse(AugmentationConfig, argv, __doc__, preset=augmentation_preset)
    check_device(config.device)
    data = load_data(config)
    describe_data(data, config.ties)
    check_examples(data)
    retriever = read_retriever(config, data)
    run_dir = config.run_dir(data.code)
    earlier = earlier_stages(config, run_dir)
    language_model = find_language_model(
        config, CHAT_MODEL if config.preset == "published" else LARGE_MODEL
    )
    stages = stage_fingerprints(config, data, language_model, retriever)
    details = language_model.details() | {
        "data_code": data.code, "data_fingerprint": data.fingerprint, "stages": stages,
    }  # fmt: skip
    run = RunFolder(run_dir, OUTPUTS, stages["filter"])
    check_replaceable(run, config)
    with locked(run):
        # torch and transformers take seconds to import, so this comes after all checks.
        from recipes.augment import augment

        augment(config, data, run, language_model, details, earlier)


def read_retriever(config: AugmentationConfig, data: SequenceDataset) -> bytes:
    """The weights of the retriever that filters implausible items, for the fingerprint.

    Raises:
        UserError: they are missing or belong to other data.
    """
    if config.retriever_path is None:
        return b""
    run_dir = Path(config.retriever_path)
    weights = run_dir / "model.safetensors"
    if not weights.is_file() or not (run_dir / CONFIG).is_file():
        raise UserError(
            f"--retriever_path {run_dir}: no finished run of train_retriever.py there; name one, "
            "e.g. experiments/lru/ml-100k"
        )
    with advice("name another run of train_retriever.py with --retriever_path"):
        settings = read_json(run_dir / CONFIG)
    if settings.get("data_fingerprint") != data.fingerprint:
        raise UserError(
            f"--retriever_path {run_dir}: belongs to other data than {data.code}; name a retriever "
            "trained with the same --dataset_code, --data_root and --min_* flags"
        )
    return weights.read_bytes()


def earlier_stages(config: AugmentationConfig, run_dir: Path) -> dict[str, str]:
    """Fingerprints of the stages of the run to reuse.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    if config.reuse is None:
        return {}
    earlier = Path(config.reuse)
    if earlier.resolve() == run_dir.resolve():
        raise UserError(f"--reuse {earlier} is the folder of this run; use another --export_root")
    if not all((earlier / name).exists() for name in (CONFIG, *OUTPUTS)):
        raise UserError(f"--reuse {earlier}: no finished run of augment_data.py there")
    if (earlier / CHECKPOINT).exists():
        raise UserError(
            f"--reuse {earlier}: that run is not finished; continue it with --resume first"
        )
    path = earlier / CONFIG
    with advice("name another run with --reuse"), reading(path):
        return dict(read_json(path).get("stages", {}))


def stage_fingerprints(
    config: AugmentationConfig,
    data: SequenceDataset,
    language_model: LanguageModel,
    retriever: bytes,
) -> dict[str, str]:
    """Hash what determines the results of each stage, including those of the stages before it."""
    first_stage = {
        name: spec.metadata.get("stage", STAGES[0])
        for name, spec in flags_of(AugmentationConfig).items()
    }
    fingerprints = {}
    for number, stage in enumerate(STAGES):
        later = {name for name, first in first_stage.items() if STAGES.index(first) > number}
        inputs = [hashlib.sha256(retriever).digest()] if stage == "filter" else []
        fingerprints[stage] = run_fingerprint(
            config, language_model.details(), data, *inputs, exclude=later
        )
    return fingerprints


if __name__ == "__main__":
    run_main(main)
