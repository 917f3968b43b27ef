"""The notebooks run from top to bottom on a run of the tiny model, and show what that run found."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import Ended
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode
from transformers import AutoModelForCausalLM

from lit_recon import Masks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CPU_SECONDS = 60  # of a notebook, the ten for imports included; seconds of a clock would be those of other tests, too
PRUNED = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) // 2  # half of q, o; k, v; gate, up, down of the tiny Llama


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., NotebookNode]:
    """Run the first cells of a notebook with this Python and package, in the folder `elsewhere`, within a minute."""
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
        before = cpu_seconds()
        done = NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute()
        assert 0 < cpu_seconds() - before < CPU_SECONDS, "processor seconds"
        return done

    return run


def cpu_seconds() -> float:
    """Seconds of all processors in processes that this one has started and that have ended, such as kernels."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shown(notebook: NotebookNode) -> dict[str, str]:
    """What a person reads below each code cell, by the cell's id; a figure reads <Figure ...>."""
    return {
        cell.id: "".join(output.get("text") or output.data["text/plain"] for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def figures(notebook: NotebookNode) -> list[str]:
    """The cells, by their ids, below which there is a figure."""
    outputs = [(cell.id, output) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [name for name, output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_has_no_outputs(path: Path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_read_a_study_shows_its_runs_and_groups(
    execute: Callable[..., NotebookNode],
    tiny_run: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tiny_run().status == 0
    other = shutil.copytree(tmp_path / "run", tmp_path / "study" / "other")
    (tmp_path / "run").rename(tmp_path / "study" / "first")
    results, config = json.loads((other / "results.json").read_text()), (other / "config.yaml").read_text()
    found = dict(results["perplexity"])
    results["perplexity"]["reconstructed"] = 1.1 * found["reconstructed"]
    (other / "results.json").write_text(json.dumps(results))
    (other / "config.yaml").write_text(re.sub(r"(?m)^prune_by: window$", "prune_by: model", config))
    monkeypatch.setenv("LIT_RECON_STUDY", str(tmp_path / "study"))
    notebook = execute(ROOT / "notebooks" / "03_read_a_study.ipynb")
    text = shown(notebook)
    for value in (found["dense"], found["pruned"], found["reconstructed"], 1.1 * found["reconstructed"]):
        assert f"{value:,.2f}" in text["runs"]
    (table,) = [one.outputs[0].data["text/markdown"] for one in notebook.cells if one.id == "groups"]
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == ["model", "window"]  # by prune_by
    assert figures(notebook) == ["figure", "depth", "curves"]


def test_one_run_prunes_reconstructs_reports_and_saves(
    execute: Callable[..., NotebookNode], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_RECON_MODEL", str(model_folder))
    notebook = execute(ROOT / "notebooks" / "01_one_run.ipynb")
    text = shown(notebook)
    numbers = re.findall(r"[\d,]+\.\d+", text["reconstructed"].splitlines()[-1])
    dense, pruned, reconstructed = (float(number.replace(",", "")) for number in numbers)
    assert f"{dense:,.2f}" in text["dense"] and f"{pruned:,.2f}" in text["pruned"]
    assert len({dense, pruned, reconstructed}) == 3
    assert figures(notebook) == ["windows"]
    assert text["masks"] == f"{PRUNED:,} weights were removed, and 0 of them are not zero\n"
    run = tmp_path / "elsewhere" / "one-run"
    assert f"{reconstructed:,.2f}" in (run / "report.html").read_text()
    saved, masks = AutoModelForCausalLM.from_pretrained(run / "checkpoint"), Masks.load(run / "masks.safetensors")
    assert sum(int((~masks[name]).sum()) for name in masks) == PRUNED
    assert all(not saved.get_parameter(name)[~masks[name]].any() for name in masks)
    prompt = " ".join("the for statement is used to")  # how the tokenizer of letters spells it
    assert prompt in text["generate"] and text["generate"].partition(prompt)[2].strip()


def test_your_own_module_is_trained_and_compared(
    execute: Callable[..., NotebookNode], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_RECON_MODEL", str(model_folder))
    notebook = execute(ROOT / "notebooks" / "02_your_own_module.ipynb")
    lines = [line.split() for line in shown(notebook)["runs"].splitlines() if "perplexity" in line]
    assert [words[0] for words in lines] == ["MaskedWeights", "FocusedWeights"]
    assert lines[0][-1] != lines[1][-1]
    assert figures(notebook) == ["errors"]


def test_without_a_choice_the_study_is_that_of_the_newest_finished_run(
    execute: Callable[..., NotebookNode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LIT_RECON_STUDY", raising=False)
    for age, name in enumerate(("runs/newest/one", "elsewhere/runs/older/one", "runs/oldest/one")):
        results = tmp_path / name / "results.json"
        results.parent.mkdir(parents=True)
        results.touch()
        os.utime(results, (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "unfinished").mkdir()
    text = shown(execute(ROOT / "notebooks" / "03_read_a_study.ipynb", 2))
    assert str(tmp_path.resolve() / "runs" / "newest") in text["setup"]


def test_the_three_findings_are_shown_of_the_studies_that_are_there(
    execute: Callable[..., NotebookNode],
    tiny_run: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tiny_run().status == 0
    results, config = (
        json.loads((tmp_path / "run/results.json").read_text()),
        (tmp_path / "run/config.yaml").read_text(),
    )

    def write(place: str, share: float, words: dict[str, str], **recipe: str) -> None:
        """A run with another part of the gap recovered, other settings, and another recipe."""
        folder, changed = tmp_path / "studies" / place, json.loads(json.dumps(results))
        folder.mkdir(parents=True)
        pruned, dense = changed["perplexity"]["pruned"], changed["perplexity"]["dense"]
        changed["perplexity"]["reconstructed"] = pruned ** (1 - share) * dense**share
        changed["recipe"] |= recipe
        (folder / "results.json").write_text(json.dumps(changed))
        text = config
        for old, new in words.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "config.yaml").write_text(text)

    for epochs, share in ((1, 0.5), (4, 0.625)):
        for by in ("half", "block"):
            words = {"by: block\n": f"by: {by}\n", "max_epochs: 1\n": f"max_epochs: {epochs}\n"}
            write(f"granularity/{epochs}_epochs/{by}", share, words, windows=by)
    for criterion, share in (("Wanda", 0.5), ("Magnitude", 0.25)):
        write(f"criteria/tiny/{criterion}", share, {}, criterion=criterion)
    monkeypatch.setenv("LIT_RECON_RUNS", str(tmp_path / "studies"))
    notebook = execute(ROOT / "notebooks" / "04_three_findings.ipynb")
    text = shown(notebook)
    assert "retraining: no run; python -m lit_recon.fit experiment=retraining\n" in text["setup"]
    assert "granularity: 4 runs\ncriteria: 2 runs\n" in text["setup"] and "has drift;" in text["drift"]
    assert figures(notebook) == ["granularity", "criteria"]
    (table,) = [
        output.data["text/markdown"]
        for one in notebook.cells
        if one.id == "granularity"
        for output in one.outputs
        if "text/markdown" in output.get("data", {})
    ]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    assert rows == [["half", "1"], ["half", "4"], ["block", "1"], ["block", "4"]]
    assert table.count("| 50.0% |") == table.count("| 62.5% |") == 2, "in nats, as the runs were made"
