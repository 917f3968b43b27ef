"""The notebooks run from top to bottom on a run of the tiny model, and show what that run found."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import Ended
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRUNED = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) // 2  # half of q, o; k, v; gate, up, down of the tiny Llama


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NotebookNode]:
    """Run the first cells of a notebook with this Python and this package, in the folder `elsewhere`."""
    # Found before every other kernel of this name, which may start any Python of this machine.
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the user's start-up files
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    (tmp_path / "elsewhere").mkdir()

    def run(path: Path, num_cells: int | None = None) -> NotebookNode:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells = notebook.cells[:num_cells]
        resources = {"metadata": {"path": str(tmp_path / "elsewhere")}}
        return NotebookClient(notebook, kernel_name="python3", timeout=120, resources=resources).execute()

    return run


def shown(notebook: NotebookNode) -> dict[str, str]:
    """What a person reads below each code cell, by the cell's id; a figure reads <Figure ...>."""
    return {
        cell.id: "".join(output.get("text") or output.data["text/plain"] for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_has_no_outputs(path: Path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_what_the_run_found(
    path: Path,
    execute: Callable[..., NotebookNode],
    tiny_run: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    assert tiny_run().status == 0
    monkeypatch.setenv("LIT_RECON_RUN", str(tmp_path / "run"))
    notebook = execute(path)
    text = shown(notebook)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for perplexity in results["perplexity"].values():
        assert f"{perplexity:,.2f}" in text["result"]
    assert f"{results['gap_recovered']:.1%}" in text["result"]
    assert "mlp.down_proj" in text["sparsity"]
    assert text["zeros"] == f"0 of {PRUNED:,} pruned weights are not zero\n"
    prompt = " ".join("the for statement is used to")  # how the tokenizer of letters spells it
    assert prompt in text["generate"] and text["generate"].partition(prompt)[2].strip()
    figures = [
        cell.id
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert figures == ["depth", "curves"]


def test_without_a_choice_the_notebook_takes_the_newest_finished_run(
    execute: Callable[..., NotebookNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LIT_RECON_RUN", raising=False)
    for age, name in enumerate(("runs/newest", "elsewhere/runs/older", "runs/oldest")):
        results = tmp_path / name / "results.json"
        results.parent.mkdir(parents=True)
        results.touch()
        os.utime(results, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "unfinished").mkdir()
    text = shown(execute(ROOT / "notebooks" / "inspect_a_run.ipynb", 2))
    assert str(tmp_path.resolve() / "runs" / "newest") in text["setup"]
