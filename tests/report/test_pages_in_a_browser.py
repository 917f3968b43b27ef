"""Pages in headless Chromium: a clean console, no request, figures with a size, sorted tables, a phone's width."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import ABSENT, Page, browser, chromium
from finished_run import REFUSED, in_units, make_run
from many_runs import FORMULA, MARKUP, SCRIPT, configure, evaluations_of, make_many, results_of_setting
from PIL import Image

from lit_recon.report.checkpoint_page import write_checkpoint_report
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


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a checkpoint of another tool that was evaluated twice, with markup where text comes from outside."""
    folder = tmp_path_factory.mktemp("foreign")
    content = evaluations_of(MARKUP + SCRIPT)
    content["evaluations"] *= 2
    (folder / "evaluations.json").write_text(json.dumps(content), encoding="utf-8")
    return write_checkpoint_report(folder, folder)


def opened(page: Page, path: Path, width: int, *, dark: bool = False) -> Page:
    """A file that the browser shows; what it logged and requested is of this file alone."""
    page.logged.clear()
    page.requested.clear()
    page.open(path, width=width, dark=dark)
    return page


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("which", ["one", "many", "foreign"])
def test_a_page_logs_nothing_requests_nothing_and_fits_its_window(
    page: Page, which: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(which)
    opened(page, path, width, dark=which == "foreign")
    assert page.logged == []
    assert [url for url in page.requested if not url.startswith("data:image/png")] == [path.resolve().as_uri()]
    sizes = page.value("[...document.images].map((image) => [image.naturalWidth, image.clientWidth])")
    assert len(sizes) >= (3 if which == "foreign" else 6) and all(
        natural >= 700 and shown >= 250 for natural, shown in sizes
    ), sizes
    assert page.value("document.documentElement.scrollWidth") <= width, "what is wide scrolls by itself"
    assert page.value("document.querySelectorAll('[onerror], [onmouseover]').length") == 0
    assert page.value("document.scripts.length") == 1
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


@pytest.mark.parametrize("which", ["one", "many", "foreign"])
def test_dark_pages_have_dark_cards_light_text_and_figures_without_a_white_box(
    page: Page, which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    opened(page, request.getfixturevalue(which), 1200, dark=True)
    page.value(OPEN)
    contrasts = page.value(CONTRASTS)
    assert len(contrasts) > 100 and min(contrast for contrast, _ in contrasts) >= 4.5, min(contrasts)
    card = page.value("getComputedStyle(document.querySelector('section')).backgroundColor")
    assert sum(map(int, card.removeprefix("rgb(").removesuffix(")").split(","))) < 150
    boxes = page.value(BOXES)
    page.screenshot(tmp_path / "dark.png")
    with Image.open(tmp_path / "dark.png") as image:
        corners = [image.convert("RGB").getpixel((int(x) + 2, int(y) + 2)) for x, y in boxes]
    assert len(corners) >= 3 and all(sum(corner) < 150 for corner in corners), corners
    assert page.logged == []


OPEN = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
BOXES = (
    "[...document.images].map((one) => one.getBoundingClientRect()).map((one) => [one.x + scrollX, one.y + scrollY])"
)
# of each text: its contrast with what it stands on (WCAG 2.2, relative luminance), and its beginning
CONTRASTS = """(() => {
  const light = (color) => {
    const parts = color.match(/[0-9.]+/g).slice(0, 3).map((one) => one / 255);
    const [red, green, blue] = parts.map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const below = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return /, 0\\)$/.test(color) && element.parentElement ? below(element.parentElement) : color;
  };
  const found = [];
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    if (!text) continue;
    const element = walker.currentNode.parentElement;
    const [one, other] = [light(getComputedStyle(element).color), light(below(element))].sort((a, b) => b - a);
    found.push([(one + 0.05) / (other + 0.05), text.slice(0, 20)]);
  }
  return found;
})()"""


def test_the_windows_of_a_run_sort_by_every_column_with_the_keyboard_and_numbers_by_size(page: Page, one: Path) -> None:
    opened(page, one, 1200)
    page.value(OPEN)
    table = "[...document.querySelectorAll('h2')].find((one) => one.innerText === 'Every window').parentElement"
    table += ".querySelector('table')"
    heads = page.value(f"[...{table}.tHead.rows[0].cells].map((cell) => cell.innerText)")
    assert "held-out before" in heads and "time" in heads
    names = f"[...{table}.tBodies[0].rows].map((row) => row.cells[0].innerText)"
    before = page.value(names)
    column = f"[...{table}.tBodies[0].rows].map((row) => Number(row.cells[{heads.index('held-out before')}].innerText))"
    button = f"{table}.tHead.rows[0].cells[{heads.index('held-out before')}].querySelector('button')"
    page.value(f"{button}.focus()")
    for reverse in (False, True):
        page.press("Enter")
        numbers = page.value(column)
        assert numbers == sorted(numbers, reverse=reverse) and len(set(numbers)) == 30
    assert page.value(names) == before[::-1], "errors grow with depth"
    assert page.value(f"{button}.parentElement.getAttribute('aria-sort')") == "descending"
    assert page.value("document.activeElement === " + button)
    refused = page.value(f"[...{table}.querySelectorAll('tr.refused')].map((row) => row.cells[0].innerText)")
    assert refused == [before[3]], "a mark goes with its row"
    for number in range(len(heads)):
        page.value(f"{table}.tHead.rows[0].cells[{number}].querySelector('button').click()")
        assert sorted(page.value(names)) == sorted(before), heads[number]
    assert page.logged == []
