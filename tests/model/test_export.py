"""Exported retrievers: the scores of the evaluation, loaded with torch alone."""

import io

import pytest
import torch

from config import MODEL_CODES
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories
from evaluation.retrieval import score_catalogue
from model.export import export_retriever
from tests.helpers import make_data, small_model


@pytest.mark.parametrize("code", MODEL_CODES)
@pytest.mark.parametrize("mask_history", [True, False])
def test_exported_scores_are_those_of_the_evaluation(code: str, mask_history: bool):
    data = make_data([5, 3, 9, 10, 11, 40], seed=1)
    model = small_model(code, max_len=10).eval()
    file = io.BytesIO()
    torch.export.save(export_retriever(model, mask_history=mask_history), file)
    program = torch.export.load(io.BytesIO(file.getvalue())).module()
    histories = Histories(data, "test", 10, 31 if code == "bert" else None)
    (batch,) = evaluation_loader(histories, 6, 0)
    with torch.no_grad():
        expected = score_catalogue(model, batch, mask_history)
    ends = data.history_ends("test")
    rows = [[0] * 10 + data.item_ids[a:b].tolist() for a, b in zip(data.offsets, ends)]
    padded = torch.tensor([row[-10:] for row in rows])
    short = range(5)  # the last history is longer than what the program is given
    torch.testing.assert_close(program(padded)[short], expected[short])
    torch.testing.assert_close(program(padded[:1]), expected[:1])
