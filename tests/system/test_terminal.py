"""Control characters of names, paths and values: no command prints them as they are, at one place for all."""

import io
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from rich.logging import RichHandler
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lit_recon.report.__main__ import main as report
from lit_recon.system.console import Console
from lit_recon.system.terminal import printable, say
from lit_recon.verify.__main__ import main as verify

PACKAGE = Path(__file__).parents[2] / "lit_recon"
RED = "x\x1b[31mred"
SHOWN = r"x\x1b[31mred"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (RED, SHOWN),
        ("a\rb\x00\x7f\x9bc\x07", r"a\x0db\x00\x7f\x9bc\x07"),
        ("é 日本\ttab\nline", "é 日本\ttab\nline"),
        ("x\\x1b", "x\\x1b"),
    ],
)
def test_control_characters_are_escapes_and_all_else_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_go_to_their_stream_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{RED}\n")
    say(f"{RED}!\n", error=True)
    assert capsys.readouterr() == (f"{SHOWN}\n", f"{SHOWN}!\n")


def shown(show: Callable[[Console], object], **settings: object) -> str:
    """What a console writes."""
    said = io.StringIO()
    show(Console(**{"file": said, "width": 40} | settings))
    return said.getvalue()


def table(cell: object) -> Table:
    made = Table(box=None)
    made.add_column(overflow="fold")
    made.add_row(cell)
    return made


@pytest.mark.parametrize(
    "what", [RED, Text(RED, "bold"), table(RED), table(Text(RED))], ids=["str", "Text", "cell", "-"]
)
def test_a_console_shows_texts_wherever_they_stand_and_cuts_nothing_off(what: object) -> None:
    assert SHOWN in "".join(shown(lambda console: console.print(what)).split())


def test_a_console_keeps_its_own_codes_and_the_markup_of_others() -> None:
    said = shown(lambda console: console.print(f"[bold]{RED}[/bold]", highlight=False), force_terminal=True)
    assert said == f"\x1b[1m{SHOWN}\x1b[0m\n"


def test_lines_of_the_log_and_bars_show_no_code() -> None:
    def log(console: Console) -> None:
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        handler.handle(handler_record(f"{RED}: a line that is longer than the forty columns of this console"))

    def bar(console: Console) -> None:
        with Progress(TextColumn("{task.description}", markup=False), console=console) as progress:
            progress.add_task(RED)

    said = "".join(shown(log).split())
    assert said == f"{SHOWN}:alinethatislongerthanthefortycolumnsofthisconsole"
    said = shown(bar, force_terminal=True)
    assert r"x\x1b[3" in said and "\x1b[31m" not in said  # bars are as wide as they are


def handler_record(message: str) -> logging.LogRecord:
    """A line of a log."""
    return logging.LogRecord("lit_recon", logging.INFO, "", 0, message, None, None)


def test_nothing_else_of_the_package_writes_to_the_terminal() -> None:
    other = re.compile(
        r"sys\.std(out|err)\.write|(?<![\w.])print\(|rich\.console import Console|print_exception|ArgumentParser\("
    )
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "system" or path.name not in ("terminal.py", "console.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if other.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("argument", [RED, "--nope=" + RED])
@pytest.mark.parametrize("main", [report, verify], ids=["report", "verify"])
def test_report_and_verify_escape_what_they_refuse(
    main: Callable[..., int], argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["nowhere", argument])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    assert status == 2 and SHOWN in said.err and "\x1b" not in said.err + said.out


@pytest.mark.parametrize(
    "word", [f"{RED}=1", f"criterion={RED}", f"model.name={RED}", f"data.paths=[{RED}]", f"seed={RED}"]
)
def test_fit_escapes_what_it_refuses(tiny_run: Callable[..., Ended], word: str) -> None:
    ended = tiny_run(word)
    assert ended.status == 2 and SHOWN in ended.err and "\x1b" not in ended.err + ended.out


def test_a_run_in_a_folder_of_such_a_name_shows_it_in_all_commands(
    tiny_run: Callable[..., Ended], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = tiny_run(f"output_dir={RED}", "module=none")
    assert ended.status == 0 and SHOWN in ended.out and "\x1b" not in ended.err + ended.out
    monkeypatch.setattr(sys, "argv", ["report"])
    Path(RED, "results.json").rename(Path(RED, "results.json.away"))
    assert report([RED]) == 2 and verify([RED, "--pattern", "2:4"]) == 1
    said = capfd.readouterr()
    assert SHOWN in said.err and SHOWN in said.out and "\x1b" not in said.err + said.out
