"""The second stage of a finished run: scores of candidates after any history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import RankerConfig
from dataloader.candidates import Candidates
from dataloader.prompt import PromptBuilder
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from errors import advice
from evaluation.fusion import RETRIEVER, Fusion
from evaluation.reranking import retriever_log_probabilities
from flags import flags_of, reread
from model.language_model import dequantize_for_inference, load_adapter
from recipes.fit_ranker import ADAPTER, FUSION, load_model
from recipes.language_model import LanguageModel, find_language_model
from recipes.prompts import build_prompts
from recipes.verbalizers import build_verbalizer
from storage import read_json, reading
from trainer.optimization import make_accelerator
from trainer.run_folder import CONFIG


class FinishedRanker(NamedTuple):
    """What a finished run of ``train_ranker.py`` was made with.

    Attributes:
        config: its settings.
        language_model: the base model.
        prompts: builds the prompts.
    """

    config: RankerConfig
    language_model: LanguageModel
    prompts: PromptBuilder | TitlePrompts


def read_ranker(
    run_dir: Path,
    settings: dict[str, Any],
    data: SequenceDataset,
    device: str | None,
    base_model: str | None,
) -> FinishedRanker:
    """Find everything but the weights of a finished run.

    Args:
        run_dir: the run.
        settings: its ``config.json``.
        data: its data set.
        device: ``cpu``, ``cuda`` or None for CUDA if available.
        base_model: overrides the language model that the settings name.

    Raises:
        UserError: the run or its language model cannot be used.
    """
    with reading(run_dir / CONFIG):
        # config.json has resolved values: that of gradient_checkpointing is not a value of the
        # flag, and that of use_liger_kernel depends on the machine.
        settings = settings | {"gradient_checkpointing": "false", "use_liger_kernel": None}
        if "retriever_prior" in settings:  # runs before --title_prior
            settings["title_prior"] = "retriever" if settings["retriever_prior"] else "none"
        known = {name: settings[name] for name in flags_of(RankerConfig) if name in settings}
        config = RankerConfig(**reread(RankerConfig, known))
        num_candidates = int(settings["retriever"]["num_candidates"])
    config = replace(
        config,
        device=device,
        llm_base_model=base_model or config.llm_base_model,
        llm_retrieved_path=settings["retrieved_from"],
    )
    with advice("name the model's folder with --llm_base_model"):
        language_model = find_language_model(config)
    size = max(num_candidates, config.llm_negative_sample_size + 1)
    return FinishedRanker(config, language_model, build_prompts(config, data, size, language_model))


class Ranker:
    """The language model of a run and the fusion of both stages; see ``read_ranker``."""

    def __init__(
        self,
        run_dir: Path,
        settings: dict[str, Any],
        data: SequenceDataset,
        device: str | None,
        base_model: str | None,
    ) -> None:
        config, language_model, prompts = read_ranker(run_dir, settings, data, device, base_model)
        self.prompts, self.max_history = prompts, config.llm_max_history
        accelerator = make_accelerator(device, config.seed)
        self.device = accelerator.device
        self.model = load_model(language_model, config, accelerator)
        with advice("run train_ranker.py again"):
            load_adapter(self.model, run_dir / ADAPTER)
            with reading(run_dir / FUSION):
                self.fusion = Fusion(read_json(run_dir / FUSION)["weights"]["fused"])
        dequantize_for_inference(self.model)
        self.verbalizer = build_verbalizer(config, data, {}, language_model, self.device, prompts)

    def text(self, history: np.ndarray, candidates: np.ndarray) -> str:
        """What the language model reads of a history and its candidates (C,), best first.

        With titles, this is the text of the history alone.
        """
        if isinstance(self.prompts, TitlePrompts):
            return self.prompts.text(history)
        return self.prompts.text(history[-self.max_history :], candidates)

    def scores(self, data: SequenceDataset, candidates: Candidates) -> dict[str, np.ndarray]:
        """(n, C) scores of the candidates by name: the features of the fusion, then ``fused``."""
        self.verbalizer.set_users(data, {"test": candidates})
        users = np.arange(data.num_users)
        own = self.verbalizer.score(self.model, "test", users, "rank")
        features = {
            RETRIEVER: retriever_log_probabilities(candidates, users),
            **self.verbalizer.features(self.model, "test", users, own),
        }
        return features | {"fused": self.fusion.scores(features)}
