"""Pages in headless Chromium: a clean console, no request, figures with a size, sorted tables, a phone's width."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import ABSENT, Page, browser, chromium
from finished_run import REFUSED, in_units, make_run
from many_runs import FORMULA, MARKUP, SCRIPT, configure, evaluations_of, make_many, results_of_setting

from lit_recon.report.overview import write_overview
from lit_recon.report.page import write_report
from lit_recon.report.runs import read_runs
from lit_recon.system.lock import hold

pytestmark = pytest.mark.skipif(chromium() is None, reason=ABSENT)
NAME = 'a" onmouseover="alert(3)'


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests of this file."""
    with browser(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run of thirty windows, evaluated, with markup wherever text comes from outside."""
    results = in_units(30)
    results["windows"][3] |= REFUSED | {"note": MARKUP}
    results["model"]["name"] = results["recipe"]["pattern"] = SCRIPT
    run = make_run(tmp_path_factory.mktemp("one") / MARKUP, results)
    (run / "evaluations.json").write_text(json.dumps(evaluations_of(MARKUP + SCRIPT)), encoding="utf-8")
    return write_report(run)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page over forty runs: a failed and a running one among them, and three with odd names."""
    folder = tmp_path_factory.mktemp("many")
    runs = make_many(folder, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (8, 32, 128, 512, 1024, 2048, 4096), (0,))
    for samples, name in ((8, MARKUP), (32, NAME), (64, FORMULA.replace("/", ":"))):
        odd = make_run(folder / name, results_of_setting(1e-3, samples, 1), curves=False)
        configure(odd, samples=samples, seed=1)
        runs.append(odd)
    configure(folder / "failed")
    configure(folder / "running")
    with hold(folder / "running"):
        found = read_runs([*runs, folder / "failed", folder / "running"])
        assert len(found) == 40
        return write_overview(found)


def opened(page: Page, path: Path, width: int) -> Page:
    """A file that the browser shows; what it logged and requested is of this file alone."""
    page.logged.clear()
    page.requested.clear()
    page.open(path, width=width)
    return page


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("which", ["one", "many"])
def test_a_page_logs_nothing_requests_nothing_and_fits_its_window(
    page: Page, which: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(which)
    opened(page, path, width)
    assert page.logged == []
    assert [url for url in page.requested if not url.startswith("data:image/png")] == [path.resolve().as_uri()]
    sizes = page.value("[...document.images].map((image) => [image.naturalWidth, image.clientWidth])")
    assert len(sizes) > 5 and all(natural >= 700 and shown >= 250 for natural, shown in sizes), sizes
    assert page.value("document.documentElement.scrollWidth") <= width, "what is wide scrolls by itself"
    assert page.value("document.querySelectorAll('[onerror], [onmouseover]').length") == 0
    assert page.value("document.scripts.length") == (1 if which == "many" else 0)
    page.screenshot(tmp_path / f"{which}_{width}.png")
    assert (tmp_path / f"{which}_{width}.png").stat().st_size > 20_000


def test_what_is_smuggled_into_a_page_does_not_run(page: Page, many: Path) -> None:
    changed = many.with_name("changed.html")
    added = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><img src='https://example.org/x.png'>"
    changed.write_text(many.read_text(encoding="utf-8").replace("<main", f"{added}<main", 1), encoding="utf-8")
    opened(page, changed, 1200)
    assert page.value("window.ran === undefined")
    assert not [url for url in page.requested if "example.org" in url]
    assert any("Content Security Policy" in text for text in page.logged), "the console says that it was refused"


HEADS = "[...document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells].map((cell) => cell.innerText)"
COLUMN = """[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map((row) => row.cells[{}].innerText)"""
PRESS = """document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells[{}].querySelector('button').click()"""


def test_a_table_sorts_by_every_column_and_what_has_no_number_stays_at_the_end(page: Page, many: Path) -> None:
    opened(page, many, 1200)
    heads = page.value(
        "[...document.querySelectorAll('table.sortable')[0].tHead.rows[0].cells].map((c) => c.innerText)"
    )
    before = page.value(COLUMN.format(0))
    assert before == [str(number) for number in range(1, 41)]
    tokens = heads.index("calibration tokens")
    for press in (1, -1):
        page.value(PRESS.format(tokens))
        texts = page.value(COLUMN.format(tokens))
        numbers = [int(text.replace(",", "")) for text in texts[:38]]
        assert numbers == sorted(numbers, reverse=press < 0) and texts[38:] == ["–", "–"]
    for column in range(len(heads)):
        page.value(PRESS.format(column))
        assert len(set(page.value(COLUMN.format(0)))) == 40, heads[column]
    assert page.value("document.querySelectorAll('table.sortable')[0].querySelectorAll('[aria-sort]').length") == 1
    page.value(PRESS.format(0))
    assert page.value(COLUMN.format(0)) == before and page.logged == []


def test_dark_pages_have_dark_cards_and_light_figures_are_inverted(page: Page, many: Path) -> None:
    page.open(many, width=1200, dark=True)
    color = page.value("getComputedStyle(document.querySelector('section')).backgroundColor")
    assert sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) < 150
    assert "invert(1)" in page.value("getComputedStyle(document.images[0]).filter")
