"""The wheel holds what its commands need, also what is beside the package in a checkout; they run from any folder."""

import os
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import tiny_settings

ROOT = Path(__file__).parents[1]
COMMANDS = ("fit", "evaluate", "report", "verify")
SEVERAL = """
import runpy, sys
import lit_recon
print(lit_recon.__file__)
for module, *arguments in {commands!r}:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"lit_recon.{{module}}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (module, end.code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("lit_recon-*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    """What an installer would put on Python's path."""
    folder = wheel.parent / "unpacked"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_the_wheel_holds_package_configuration_and_templates_and_nothing_else(wheel: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "lit_recon", "conf"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout")
    expected = {f"lit_recon/{name}" if name.startswith("conf/") else name for name in listed.stdout.splitlines()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert expected <= held, expected - held
    assert {Path(name).parts[0] for name in held} == {"lit_recon"}
    assert {Path(name).suffix for name in held} <= {".py", ".yaml", ".j2", ".typed", ".js", ".css"}


def test_each_command_has_a_console_script_that_is_there(unpacked: Path) -> None:
    scripts = ConfigParser()
    scripts.read(next(unpacked.glob("*.dist-info")) / "entry_points.txt")
    named = dict(scripts["console_scripts"])
    assert named == {f"lit-recon-{name}": f"lit_recon.{name}.__main__:main" for name in COMMANDS}
    for target in named.values():
        module, _, function = target.partition(":")
        if find_spec(module) is None:
            pytest.skip(f"{module} is not written yet")
        assert callable(getattr(import_module(module), function)), target


def test_what_is_unpacked_from_it_explains_itself_and_plans_a_run_in_any_folder(
    unpacked: Path, tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    commands = [["fit", "--help"], ["fit", *tiny_settings(model_folder, text_file), "plan=true"]]
    environment = os.environ | {"PYTHONPATH": str(unpacked), "LIT_RECON_CACHE": str(tmp_path / "cache")}
    script = SEVERAL.format(commands=commands)
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(unpacked / "lit_recon")), "not the checkout"
    assert "Groups: what a run is made of" in ended.stdout and "python_docs" in ended.stdout
    assert "predicted   about" in ended.stdout


@pytest.mark.slow
def test_installed_into_a_fresh_environment_its_scripts_run_from_any_folder(
    wheel: Path, tmp_path: Path, model_folder: Path, text_file: Path
) -> None:
    scripts = tmp_path / "environment" / "bin"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "environment")], check=True)
    install = [str(scripts / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    here = tmp_path / "any folder"
    here.mkdir()
    (here / "mine.py").write_text("from lit_recon.pruning.criteria.wanda import Wanda as Mine\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["LIT_RECON_CACHE"] = str(tmp_path / "cache")

    def run(*command: str) -> str:
        ended = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    settings = tiny_settings(model_folder, text_file)
    own = ["criterion=custom", "criterion._target_=mine.Mine"]  # a file of the folder in which the script is called
    assert "gap recovered" in run(str(scripts / "lit-recon-fit"), *settings, *own)
    assert (here / "run" / "report.html").is_file()
    run(str(scripts / "lit-recon-report"), "run")
    run(str(scripts / "lit-recon-verify"), "run")
    assert "predicted" in run(str(scripts / "python"), "-m", "lit_recon.fit", *settings, "plan=true", "output_dir=b")
