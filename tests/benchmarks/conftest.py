"""Fixtures for the benchmarks' smoke tests: a small ``ml-100k`` and a tiny language model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import language_models
from model.hub import BaseModel
from tests.helpers import toy_interactions


@pytest.fixture(scope="session")
def data_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that select a data root with a small ``ml-100k``."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "ml-100k"
    folder.mkdir()
    rows = toy_interactions()
    items = sorted({item for _, item, _ in rows})
    ratings = "".join(f"{user[1:]},{item[1:]},4.0,{time}\n" for user, item, time in rows)
    movies = "".join(f"{item[1:]},The {item} Story (1995),Drama\n" for item in items)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    (folder / "movies.csv").write_text("movieId,title,genres\n" + movies)
    return ["--data_root", str(root), "--cache_root", str(root / "cache")]


@pytest.fixture()
def tiny_model(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the tiny Llama in place of SmolLM2."""
    model = BaseModel("smollm2-135m", tiny_llama, None)
    monkeypatch.setattr(language_models, "find_model", lambda name, **options: model)
