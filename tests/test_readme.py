"""The README tells the truth: its examples run as they stand, its tree and tables are those of the project."""

import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, pairs
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTENSIONS = re.findall(
    r"### (.+?)\n+```python\n# (\w+\.py)\n(.+?)```\n+```bash\npython -m lit_recon\.fit (.+?)\n```", README, re.DOTALL
)


def test_the_readme_shows_a_criterion_a_module_and_a_data_set_in_at_most_15_lines_each() -> None:
    assert [title for title, *_ in EXTENSIONS] == ["A criterion", "A LightningModule", "A data set"]
    for title, _, code, _ in EXTENSIONS:
        assert len(code.strip().splitlines()) <= 15, title


@pytest.mark.parametrize(
    ("extension", "packing"),
    pairs(EXTENSIONS, ("fixed", "documents"), EXTENSIONS[1:2], ("fixed",)),  # padding is a module's concern
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_an_extension_runs_from_a_file_in_the_working_directory(
    tiny_run: Callable[..., Ended], text_file: Path, extension: tuple[str, str, str, str], packing: str
) -> None:
    _, name, code, arguments = extension
    Path(name).write_text(code)
    Path("poems.txt").write_text(text_file.read_text())
    overrides = shlex.split(arguments)
    ended = tiny_run(*overrides, f"data.packing={packing}", "chain.inputs=dense")
    assert ended.status == 0, ended.err
    results = json.loads(Path("run/results.json").read_text())
    target = next(argument for argument in overrides if "_target_" in argument)
    used = target.rpartition(".")[2]
    said = [*results["recipe"].values(), results["protocol"]["dataset"]]
    assert used in said, f"{used} was not used: {said}"
    assert all(window["held_out_after"] < window["held_out_before"] for window in results["windows"])


def test_the_example_of_the_library_runs_as_it_stands(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"## From Python\n+```python\n(.+?)```", README, re.DOTALL)
    assert code.count('load("smollm2")') == 1 and code.count("num_samples=32, length=256") == 1
    code = code.replace('load("smollm2")', f"load({str(model_folder)!r})")
    code = code.replace("num_samples=32, length=256", "num_samples=8, length=32")  # or it takes a minute
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), found)
    said = capsys.readouterr().out
    assert re.match(r"\d+\.\d+ WindowResult\(name='half_00_attention'", said), said
    name = "model.layers.0.mlp.up_proj.weight"
    saved = AutoModelForCausalLM.from_pretrained("half-empty").get_parameter(name)
    assert found["mask"].dtype == torch.bool and torch.equal(saved != 0, found["mask"])
    assert found["mask"].float().mean() == 0.5 and torch.equal(saved, found["model"].get_parameter(name))


def test_the_two_commands_are_those_that_ci_runs() -> None:
    assert "pip install -c constraints.txt -e . && python -m lit_recon.fit" in README
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in README
    script = (ROOT / ".ci" / "run").read_text()
    assert '-c constraints.txt -e ".[test]"' in script
    assert any(line.split()[:1] == ["pytest"] and "-m" not in line for line in script.splitlines())


def test_the_tree_has_one_line_for_each_folder_of_the_package_and_names_files_that_are_there() -> None:
    tree = re.search(r"```text\nlit_recon/\n(.+?)```", README, re.DOTALL)
    assert tree
    package = ROOT / "lit_recon"
    lines = {line.split()[0].rstrip("/"): line for line in tree[1].splitlines() if line.startswith("  ")}
    folders = {path.name for path in package.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert lines.keys() == folders
    for folder, line in lines.items():
        for name in re.findall(r"\w+\.py|\w+/(?=[),])", line.split(maxsplit=1)[1]):
            assert (package / folder / name).exists(), (
                f"{folder}/{name} is in the README's tree, but not in the package"
            )
    groups = re.search(r"one group per folder: ([\w ]+)", tree[1])
    assert groups and set(groups[1].split()) == {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in (ROOT / "lit_recon").glob("*/**/__init__.py")), ids=str
)
def test_each_folder_of_the_package_says_what_its_files_are(folder: Path) -> None:
    listed = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = set(re.findall(r"\b\w+\.py\b|\b\w+/", listed))
    files = {path.name for path in folder.glob("*.py") if path.name != "__init__.py"}
    files |= {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    assert named >= files, f"missing in {folder}/__init__.py: {files - named}"
    assert {name for name in named if name.endswith(".py")} <= files


def test_settings_in_the_readmes_commands_exist(tiny_run: Callable[..., Ended]) -> None:
    commands = [line for line in re.findall(r"python -m lit_recon\.fit (.+)", README) if "custom" not in line]
    commands = [line for line in commands if not re.search(r"^-m |experiment=", line)]  # test_experiments has these
    for line in commands:
        overrides = [word for word in shlex.split(line.split("`")[0]) if word != "--help"]
        ended = tiny_run(*overrides, "--cfg", "job")
        assert ended.status == 0, f"{line}: {ended.err}"
