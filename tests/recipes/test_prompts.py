import pytest

from config import RankerConfig
from recipes.prompts import note_few_items
from tests.helpers import make_data


def test_fewer_negatives_than_asked_for_are_pointed_out(capsys: pytest.CaptureFixture[str]):
    data = make_data([6, 60], num_items=30)
    note_few_items(RankerConfig(dataset_code="games", llm_negative_sample_size=25), data)
    printed = capsys.readouterr().err
    assert printed.startswith("note: 1 users have training prompts with fewer than 25 negatives")
    note_few_items(RankerConfig(dataset_code="games", llm_negative_sample_size=1), make_data([6]))
    assert capsys.readouterr().err == ""
