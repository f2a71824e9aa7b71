"""The notebooks run from top to bottom, on a tiny model in place of their own, and show what they promise.

Their cell ``parameters`` is what is replaced; nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install 'pmpd[dev]'")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'pmpd[dev]'")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'pmpd[dev]'")

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def run(name: str, parameters: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Execute a notebook in ``folder``; returns the data of everything that it shows."""
    notebook = nbformat.read(REPOSITORY / "notebooks" / name, as_version=4)
    (cell,) = [c for c in notebook.cells if c["id"] == "parameters"]
    cell.source = parameters
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for c in notebook.cells if c.cell_type == "code" for output in c.outputs]
    return [output["data"] for output in outputs if "data" in output]


@pytest.fixture
def overrides(tiny_llama: Path, tmp_path: Path) -> list[str]:
    return [
        "experiment=quickstart",
        "model=hf",
        f"model.path={tiny_llama}",
        "model.dtype=float32",
        "model.high_bits=4",
        "model.low_bits=2",
        "data=samples",
        "budget=tiny",
        "task.overlong=truncate",
        "task.max_new_tokens=9",
        "task.metrics=[rouge_l]",
        "tracking=disabled",
        f"store={tmp_path / 'store'}",
    ]


def test_every_notebook_has_its_parameters_and_no_stored_output():
    assert len(NOTEBOOKS) >= 2
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        assert not [c for c in cells if c.get("outputs") or c.get("execution_count")], path


@pytest.mark.slow
def test_the_method_in_pictures(overrides, tiny_llama, tmp_path, monkeypatch):
    parameters = (
        f"overrides = {overrides!r}\n"
        f"model, high_bits, low_bits = {str(tiny_llama)!r}, 4, 2\n"
        f"model_store = {str(tmp_path / 'models')!r}\n"
        "request, tokens = 'The fox', 9"
    )
    shown = run("method.ipynb", parameters, tmp_path, monkeypatch)
    assert sum("image/png" in data for data in shown) == 3  # perplexity, switch step, quality
    html = "".join(data["text/html"] for data in shown if "text/html" in data)
    assert 'title="4 bits"' in html
    assert 'title="2 bits"' in html
    assert any("learned" in data.get("text/markdown", "") for data in shown)


@pytest.mark.slow
def test_the_papers_figures(overrides, tmp_path, monkeypatch):
    parameters = f"experiments = {{'npu': [], 'quickstart': {overrides[1:]!r}}}"
    shown = run("paper_figures.ipynb", parameters, tmp_path, monkeypatch)
    assert sum("image/png" in data for data in shown) >= 5
    text = "".join(data.get("text/markdown", "") for data in shown)
    assert "missing" in text
    assert "python pipelines/run.py" in text
    for name in ("table.md", "index.html", "results.csv"):
        assert (tmp_path / "outputs" / "paper" / "npu" / name).exists()
