"""The notebook: every cell runs, and what is committed of it is small and names no other place."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from datasets import SequenceDataset
from tests.helpers import ROOT

NOTEBOOK = ROOT / "examples" / "tour.ipynb"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
MAX_FIGURES = 100_000  # bytes


def cells(kind: str) -> list[dict[str, Any]]:
    """Cells of one type, as they are committed."""
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.parametrize("ranker", ["guided"], indirect=True)
def test_every_cell_runs(
    ranker: Path,
    toy_data: SequenceDataset,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    # Kernels and histories of whoever runs the tests do not matter: "python3" is this interpreter.
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, 4)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    parameters.source = (
        f"from pathlib import Path\nRUN, BASE_MODEL = Path({str(ranker)!r}), {str(tiny_llama)!r}\n"
        f"TITLES = {toy_data.titles[1:3]!r}"
    )
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=folder).execute()
    shown = [cell.get("outputs", []) for cell in notebook.cells]
    assert sum("image/png" in output.get("data", {}) for x in shown for output in x) == 3
    # What a cell prints can come in several pieces.
    printed = ["".join(output.get("text", "") for output in x) for x in shown]
    assert "\n".join(toy_data.titles[1:3]) + "\n" in printed


def test_links():
    links = [link for cell in cells("markdown") for link in LINK.findall("".join(cell["source"]))]
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link


def test_what_is_committed():
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in str(output)]
    assert 0 < sum(len(base64.b64decode(figure)) for figure in figures) < MAX_FIGURES
    texts = [output for output in outputs if "image/png" not in str(output)]
    assert not re.search(r"""["' ]/\w+/""", json.dumps(texts)), "a path of some machine"
    assert [cell["execution_count"] for cell in cells("code")] == [
        *range(1, len(cells("code")) + 1)
    ]
