"""SASRec and BERT4Rec: masks, positions, and what each of them sees."""

import numpy as np
import pytest
import torch

from dataloader.sequences import MaskedWindows
from jagged import JaggedBatch
from tests.helpers import make_data, small_model


def test_masked_items_do_not_leak():
    data, other = make_data([12, 12]), make_data([12, 12])
    model = small_model("bert").eval()
    batch = MaskedWindows(data, 20, 1.0, 0.4, 0).__getitems__([0, 1])[0]
    item_ids, positions, max_length, scored = batch["sequences"]
    indices = np.arange(24).reshape(2, 12)[:, :10].reshape(-1)[scored.numpy()]
    other.item_ids[indices] = other.item_ids[indices] % 30 + 1  # the masked items alone
    changed = MaskedWindows(other, 20, 1.0, 0.4, 0).__getitems__([0, 1])[0]
    assert not torch.equal(batch["labels"], changed["labels"])
    for ours, theirs in zip(batch["sequences"], changed["sequences"]):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
    scores = model(JaggedBatch(item_ids, positions, max_length))
    everywhere = torch.arange(len(scores))
    visible = everywhere[~torch.isin(everywhere, scored)]
    moved_ids = item_ids.clone()
    moved_ids[visible[-1]] = moved_ids[visible[-1]] % 30 + 1
    moved = model(JaggedBatch(moved_ids, positions, max_length))
    in_second = scored[scored >= 10]  # attention goes both ways, within the sequence
    assert (in_second < visible[-1]).any()
    assert not torch.isclose(moved[in_second], scores[in_second]).all(1).any()
    torch.testing.assert_close(moved[:10], scores[:10])


@pytest.mark.parametrize("code", ["sas", "bert"])
def test_positions_count_from_the_end(code: str):
    """A history has the same scores whether or not there is room before it."""
    model = small_model(code, max_len=20).eval()
    items = torch.randint(1, 31, (4,))
    scores = model(JaggedBatch(items, torch.arange(4), 4, torch.tensor([3])))
    model.position_embedding.weight.data[:16] = torch.nan
    again = model(JaggedBatch(items, torch.arange(4), 4, torch.tensor([3])))
    torch.testing.assert_close(again, scores)
    model.position_embedding.weight.data[16] += torch.randn(16)
    moved = model(JaggedBatch(items, torch.arange(4), 4, torch.tensor([3])))
    assert not torch.allclose(moved, scores)


def test_the_mask_token_has_an_embedding_but_no_score():
    sas, bert = small_model("sas"), small_model("bert")
    assert sas.embedding.weight.shape == (31, 16) and bert.embedding.weight.shape == (32, 16)
    assert bert.item_embeddings.shape == (31, 16)
    assert bert.item_embeddings.data_ptr() == bert.embedding.weight.data_ptr()  # tied
