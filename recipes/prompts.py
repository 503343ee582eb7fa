"""The prompts of the ranker. This module does not import torch."""

from __future__ import annotations

import sys

import numpy as np

from config import RankerConfig
from dataloader.prompt import PromptBuilder
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from errors import ArgumentError, UserError
from recipes.language_model import LanguageModel


def build_prompts(
    config: RankerConfig,
    data: SequenceDataset,
    num_candidates: int,
    language_model: LanguageModel,
) -> PromptBuilder | TitlePrompts:
    """Build the prompt builder for training and evaluation.

    Args:
        config: all settings.
        data: the data set.
        num_candidates: maximum number of candidates in a prompt with letters.
        language_model: the base model.

    Raises:
        UserError: a prompt is too long, or the tokenizer has too few letters.
    """
    try:
        if config.verbalizer == "titles":
            if not config.is_guided:
                note_equal_titles(data)
            return TitlePrompts(
                language_model.tokenizer,
                data.titles,
                max_history=config.llm_max_history,
                max_title_len=config.llm_max_title_len,
                max_text_len=config.llm_max_text_len,
            )
        return PromptBuilder(
            language_model.tokenizer,
            data.titles,
            instruction=config.llm_system_template,
            input_template=config.llm_input_template,
            num_candidates=num_candidates,
            max_title_len=config.llm_max_title_len,
            max_text_len=config.llm_max_text_len,
        )
    except ArgumentError as error:
        if error.argument == "max_text_len":
            advised = "raise it or lower --llm_max_title_len or --llm_max_history"
            raise UserError(f"--llm_{error}; {advised}") from error
        advised = "lower --llm_negative_sample_size and the retriever's --num_candidates"
        raise UserError(f"{error.value} candidates: {error.problem}; {advised}") from error


def note_few_items(config: RankerConfig, data: SequenceDataset) -> None:
    """Point out training prompts with fewer negatives than the flags ask for."""
    asked, starts = config.llm_negative_sample_size, data.offsets
    sequences = (data.item_ids[s:e] for s, e in zip(starts, data.history_ends("train")))
    short = sum(len(np.unique(items)) > data.num_items - asked for items in sequences)
    if short:
        print(
            f"note: {short:,} users have training prompts with fewer than {asked:,} negatives "
            f"(--llm_negative_sample_size): too few of {data.num_items:,} items are new to them",
            file=sys.stderr,
        )


def note_equal_titles(data: SequenceDataset) -> None:
    """Point out items that the likelihood of titles cannot tell apart."""
    num_equal = data.num_items - len(set(data.titles[1:]))
    if num_equal:
        print(
            f"note: {num_equal:,} of {data.num_items:,} items have the title of another item, so "
            "their scores are equal",
            file=sys.stderr,
        )
