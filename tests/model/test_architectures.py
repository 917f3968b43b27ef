"""The README's table of architectures is what the trial of all shapes finds out; this test writes it."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from lit_recon.model import architectures
from lit_recon.model.architectures import COLUMNS, SHAPES, TESTED, UNKNOWN, main, support
from lit_recon.model.windows import MatrixWindow

README = Path(__file__).parents[2] / "README.md"
BETWEEN = re.compile(r"(<!-- architectures -->\n)(.*?)(<!-- /architectures -->)", re.DOTALL)
KINDS = ("matrix", "half", "block", "blocks", "model")
REFUSED = {  # their halves
    "BLOOM",
    "MPT",
    "MiniMax",
    "OPT, norms after the residual, with projections",
    "Gemma 4 (text), mixture of experts",
}
MIXTURES = {
    "Mixtral",
    "Qwen3-MoE",
    "gpt-oss",
    "DeepSeek V3",
    "Llama 4 (text)",
    "Gemma 4 (text), mixture of experts",
    "Qwen3-Next",
    "Granite 4, hybrid",
    "MiniMax",
    "OLMoE",
    "Phi-3.5-MoE",
    "Granite MoE",
    "GLM-4.5",
    "ERNIE 4.5",
}
PARALLEL = {"Phi", "GPT-NeoX", "GPT-J", "Falcon", "Cohere 2", "Cohere, norms per head"}


@pytest.fixture(scope="module")
def printed() -> tuple[int, str]:
    """Exit status and output of `python -m lit_recon.model.architectures --markdown`."""
    with redirect_stdout(io.StringIO()) as written:
        status = main(["--markdown"])
    return status, written.getvalue()


def cells(line: str) -> list[str]:
    """The cells of a row."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text: str) -> list[str]:
    """The lines of a table, without the version below it."""
    return text.partition(TESTED)[0].strip().splitlines()


def test_every_shape_computes_what_its_model_does(printed: tuple[int, str]) -> None:
    assert printed[0] == 0


@pytest.mark.skipif(bool(UNKNOWN), reason=f"the installed transformers does not know {UNKNOWN}")
def test_the_readmes_table_is_the_one_that_is_printed(printed: tuple[int, str]) -> None:
    text = README.read_text(encoding="utf-8")
    found = BETWEEN.search(text)
    assert found, "README.md has no markers <!-- architectures --> and <!-- /architectures -->"
    expected, present = table(printed[1]), table(found[2])
    differing = [line for line in expected if line not in present] or [line for line in present if line not in expected]
    if found[2] != printed[1]:  # if by the version alone, it is written down and that is all
        README.write_text(BETWEEN.sub(lambda match: match[1] + printed[1] + match[3], text), encoding="utf-8")
    if present != expected:
        pytest.fail(f"README.md had another table, and has the right one now; rows that differ: {differing}")


def test_every_shape_has_a_row_and_works_but_for_halves_that_are_refused(printed: tuple[int, str]) -> None:
    header, _, *lines = table(printed[1])
    assert cells(header) == list(COLUMNS)
    rows = {row["architecture"]: row for row in (dict(zip(COLUMNS, cells(line), strict=True)) for line in lines)}
    assert list(rows) == [shape.title for shape in SHAPES.values()]
    for title, row in rows.items():
        refused = {"half"} if title in REFUSED else set()
        assert {kind: row[kind] for kind in KINDS} == {
            kind: "refused" if kind in refused else "yes" for kind in KINDS
        }, title
        assert row["halves"] == ("" if refused else "parallel" if title in PARALLEL else "sequential"), title
        assert ("routers stay dense" in row["remarks"]) == (title in MIXTURES), title
        assert not refused or row["remarks"], f"{title}: refused without a reason"
        assert 90 < float(row["covered"].rstrip("%")) < 100, title


@pytest.mark.parametrize(("value", "status"), [("yes", 0), ("refused", 0), ("no: off by 3e-01", 1)])
@pytest.mark.parametrize("arguments", [[], ["--markdown"]], ids=["table", "markdown"])
def test_the_exit_status_says_whether_a_shape_computes_something_else_than_its_model(
    value: str, status: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(architectures, "support", lambda name: dict.fromkeys(COLUMNS, name) | {"blocks": value})
    assert main(arguments) == status
    printed = capsys.readouterr().out
    assert printed.count("llama4") and value.split()[0] in printed


def test_a_window_that_computes_something_else_is_told_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    compose = architectures.compose

    def wrong(model: object, tokens_BT: object, **settings: object) -> object:
        return compose(model, tokens_BT, **settings) * (1.5 if settings["by"] == "blocks" else 1)

    monkeypatch.setattr(architectures, "compose", wrong)
    row = architectures.support("llama")
    assert row["blocks"].startswith("no: off by ") and row["model"] == "yes"


def test_a_matrix_that_is_multiplied_otherwise_than_in_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MatrixWindow.forward
    monkeypatch.setattr(
        MatrixWindow, "forward", lambda self, *given: forward(self, *given) * (2 if "mlp" in self.name else 1)
    )
    row = architectures.support("mixtral")
    assert row["matrix"] == "no: off by 1e+00" and row["block"] == "yes"


def test_the_support_row_of_a_mixture_says_that_its_routers_stay_dense() -> None:
    row = support("mixtral")
    found = row["halves"], row["matrix"], row["half"], row["remarks"]
    assert found == ("sequential", "yes", "yes", "routers stay dense")
