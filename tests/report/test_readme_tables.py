"""Tables of the README, made again from the folders of the runs that they tell of."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from finished_run import results_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that makes tables again from the folders of runs."""
    monkeypatch.syspath_prepend(str(ROOT / ".github"))
    return importlib.import_module("readme_tables")


def test_tables_are_made_again_from_the_folders_of_their_runs(tables: ModuleType, tmp_path: Path) -> None:
    for criterion, pruned, reconstructed in (("Wanda", 40.0, 30.0), ("Random", None, 400.0)):
        results = results_of(2)
        results["perplexity"] = {"dense": 20.0, "pruned": pruned, "reconstructed": reconstructed}
        results["recipe"] |= {"criterion": criterion}
        folder = tmp_path / "criteria" / criterion.lower()
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    other = "<!-- runs: models other/* -->\nb\n<!-- /runs -->\n"
    text = f"a\n<!-- runs: criteria criteria/* -->\nold\n<!-- /runs -->\n{other}"
    assert tables.renewed(text, tmp_path) == (
        "a\n<!-- runs: criteria criteria/* -->\n"
        "| criterion | pruned | reconstructed | nats over dense, pruned | reconstructed |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| Random | – | 400.00 | nan | 3.00 |\n"
        "| Wanda | 40.00 | 30.00 | 0.69 | 0.41 |\n"
        f"<!-- /runs -->\n{other}"
    )
    with pytest.raises(ValueError, match="expected one of criteria, windows, models"):
        tables.renewed("<!-- runs: colours x/* -->\n<!-- /runs -->", tmp_path)


def test_the_tables_of_the_readme_are_of_kinds_that_can_be_made_again(tables: ModuleType) -> None:
    kinds = re.findall(r"<!-- runs: (\w+) \S+ -->\n\|.+?\|\n<!-- /runs -->", README, re.DOTALL)
    assert {*kinds} == {*tables.TABLES}
    assert README.count("<!-- runs: ") == README.count("<!-- /runs -->") == len(kinds)
