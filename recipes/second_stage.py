"""The second stage of a finished run: scores of candidates after any history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from config import RankerConfig
from dataloader.candidates import Candidates
from datasets import SequenceDataset
from errors import advice
from evaluation.fusion import RETRIEVER, Fusion
from evaluation.reranking import retriever_log_probabilities
from flags import flags_of, reread
from model.language_model import load_adapter
from recipes.fit_ranker import ADAPTER, FUSION, load_model
from recipes.language_model import LanguageModel, find_language_model
from recipes.prompts import build_prompts
from recipes.verbalizers import build_verbalizer
from storage import read_json, reading
from trainer.optimization import make_accelerator
from trainer.run_folder import CONFIG


class Ranker:
    """The language model of a run and the fusion of both stages.

    Args:
        run_dir: a finished run of ``train_ranker.py``.
        settings: its ``config.json``.
        data: its data set.
        num_candidates: candidates per history.
        device: ``cpu``, ``cuda`` or None for CUDA if available.
        base_model: overrides the language model that the settings name.

    Raises:
        UserError: the run or its language model cannot be used.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: dict[str, Any],
        data: SequenceDataset,
        num_candidates: int,
        device: str | None,
        base_model: str | None,
    ) -> None:
        with reading(run_dir / CONFIG):
            # config.json has the resolved value, which is no value of the flag.
            settings = settings | {"gradient_checkpointing": "false"}
            known = {name: settings[name] for name in flags_of(RankerConfig) if name in settings}
            config = RankerConfig(**reread(RankerConfig, known))
        self.config = replace(
            config,
            device=device,
            llm_base_model=base_model or config.llm_base_model,
            llm_retrieved_path=settings["retrieved_from"],
        )
        with advice("name the model's folder with --llm_base_model"):
            self.language_model: LanguageModel = find_language_model(self.config)
        size = max(num_candidates, self.config.llm_negative_sample_size + 1)
        self.prompts = build_prompts(self.config, data, size, self.language_model)
        accelerator = make_accelerator(device, self.config.seed)
        self.device = accelerator.device
        self.model = load_model(self.language_model, self.config, accelerator)
        with advice("run train_ranker.py again"):
            load_adapter(self.model, run_dir / ADAPTER)
        with reading(run_dir / FUSION):
            self.fusion = Fusion(read_json(run_dir / FUSION)["weights"]["fused"])

    def scores(self, data: SequenceDataset, candidates: Candidates) -> dict[str, np.ndarray]:
        """(n, C) scores of the candidates by name: the features of the fusion, and fused."""
        verbalizer = build_verbalizer(
            self.config, data, {"test": candidates}, self.language_model, self.device, self.prompts
        )
        users = np.arange(data.num_users)
        own = verbalizer.score(self.model, "test", users, "rank")
        features = {
            RETRIEVER: retriever_log_probabilities(candidates, users),
            **verbalizer.features(self.model, "test", users, own),
        }
        return features | {"fused": self.fusion.scores(features)}
