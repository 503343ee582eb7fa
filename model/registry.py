"""Retrievers by code: build one from a specification, or load one from a run."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from errors import InputError
from model.base import Retriever, RetrieverSpec
from model.lru import LRURec
from model.narm import NARM
from model.transformer import BERT4Rec, SASRec
from storage import describe, read_json

RETRIEVERS: dict[str, type[Retriever]] = {
    "lru": LRURec,
    "sas": SASRec,
    "bert": BERT4Rec,
    "narm": NARM,
}


def build_retriever(spec: RetrieverSpec) -> Retriever:
    """Build the retriever of a specification, with random weights."""
    return RETRIEVERS[spec.model_code](spec)


def load_retriever(run_dir: Path, num_items: int) -> Retriever:
    """Load the model of a finished run of ``train_retriever.py``.

    Args:
        run_dir: the run's folder.
        num_items: size of the catalogue.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        InputError: the run's files are missing or do not belong together.
    """
    settings = read_json(run_dir / "config.json")
    try:
        model = build_retriever(RetrieverSpec.from_settings(settings | {"num_items": num_items}))
        model.load_state_dict(load_file(run_dir / "model.safetensors"))
    except Exception as error:  # settings and weights may hold anything
        raise InputError(f"{run_dir}: cannot load the retriever ({describe(error)})") from error
    return model.eval()
