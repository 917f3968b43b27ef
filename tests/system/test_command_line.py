"""Settings go through a shell's and Hydra's grammar and come out as they were; what is raised becomes words."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from lit_recon.system.command_line import Problems, as_argument, concerning, in_hydras_grammar

NAMES = (
    "run",
    "a b",
    "a=b",
    "it's",
    'a"b',
    "[x]",
    "null",
    "true",
    "nan",
    "2024",
    "5e10123",
    "007",
    "~/x",
    "zoë",
    "a,b",
)
NAMES += ("'q'", "\\", "a\\", "a'\\'", "$HOME", "a\nb", "{x}", " a ", "run[1]", "a(b", "#", "a;b", "range(3)", "")


def read(word: str, *, sweep: bool = False) -> object:
    """The value that Hydra reads in a word of the command line."""
    grammatical = in_hydras_grammar(word, texts=["output_dir", "data.paths"], sweep=sweep)
    assert in_hydras_grammar(grammatical, texts=["output_dir", "data.paths"], sweep=sweep) == grammatical
    value = OverridesParser.create().parse_override(grammatical)._value
    plain = [
        one.text if isinstance(one, QuotedString) else one for one in (value if isinstance(value, list) else [value])
    ]
    return plain if isinstance(value, list) else plain[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_setting_gives_the_same_text_again(name: str) -> None:
    (word,) = shlex.split(as_argument("output_dir", name))
    assert read(word) == name


@pytest.mark.parametrize(
    "value", ["a=b", "/home/zoë/x", "~/x", "2024", "5e10123", "run[1]", "a,b", "it's", "x(1)", "a#b"]
)
def test_a_path_needs_no_quotes(value: str) -> None:
    assert read(f"output_dir={value}") == value


def test_what_is_no_text_stays_what_it_is() -> None:
    assert read("output_dir=null") is None and read("output_dir=true") is True
    assert read("seed=3") == 3 and read("sparsity=0.5)") == "0.5)"
    assert read("data.paths=[a=b.txt,2024,'x,y',zoë]") == ["a=b.txt", "2024", "x,y", "zoë"]
    assert read("module.retry_rates=[0.5]") == [0.5]


def test_several_values_are_a_sweep_where_one_was_asked_for() -> None:
    assert in_hydras_grammar("output_dir=a,b", texts=["output_dir"], sweep=True) == "output_dir=a,b"
    assert in_hydras_grammar("seed=1,2", texts=["output_dir"]) == "seed=1,2"


def test_whatever_is_raised_names_the_settings_and_is_the_cause() -> None:
    with pytest.raises(ValueError, match=r"^output_dir=x: File name too long") as told, concerning("output_dir=x"):
        Path("x" * 5000).stat()
    assert isinstance(told.value.__cause__, OSError)
    with pytest.raises(ValueError, match=r"^a=1: KeyError: 'b'$"), concerning("a=1"):
        raise KeyError("b")
    with pytest.raises(ValueError, match="^said already$"), concerning("a=1"):
        raise ValueError("said already")
    problems = Problems()
    assert problems.check(lambda: 1 / 0, about="a=0: ") is None
    with pytest.raises(ValueError, match="^a=0: ZeroDivisionError: division by zero$"):
        problems.raise_all()
