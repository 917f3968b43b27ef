"""The page over many runs: one table of all, groups, rates, Pareto fronts, criteria and windows, and the same as files.

One file that opens without network; next to it the figures as PNG and all tables as CSV and Markdown. overview.html.j2
is its text and layout.
"""

import base64
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lit_recon.report.comparison import by_short_name, common_folder, settings, shared_and_different
from lit_recon.report.figures import STYLE, png
from lit_recon.report.group_figure import MOST, group_figure
from lit_recon.report.groups import differing_keys, granularity, grouped, label_of, rate_sweeps, value_of
from lit_recon.report.measures import PERPLEXITY, measures
from lit_recon.report.pareto import pareto_figures
from lit_recon.report.runs import EVALUATED, NONE, Run, protocol_of
from lit_recon.report.setting_figure import curves, setting_figure
from lit_recon.report.study import studies
from lit_recon.report.study_figure import criteria
from lit_recon.report.tables import GROUPED, Table, criteria_table, groups_table, rates_table, runs_table
from lit_recon.report.templates import relative_link, render
from lit_recon.system.atomic_files import make_folder, replaced

FOLDER = "report"  # next to the runs, where no other is asked for
ABOUT = {  # the tables by their names, or the beginnings of these
    "runs": "every run, numbers as they are",
    "groups": "means and standard deviations of groups of runs",
    "rates": "the learning rates that two rules choose",
    "criteria": "how far criteria are apart before and after reconstruction",
    "windows": "means and standard deviations by the size of the windows",
}


def write_overview(runs: Sequence[Run], out: Path | None = None, keys: Sequence[str] = ()) -> Path:
    """Write the page over many runs, its figures and its tables.

    Args:
        runs: Runs in any state, at least one of them finished or evaluated; those that are no runs are named by their
            message.
        out: The folder to write to; None: `report` next to the runs.
        keys: Keys of config.yaml to group by, as config.yaml has them; none: those in which runs differ.

    Returns:
        The page.

    Raises:
        OSError: It cannot be written.
        ValueError: The folder to write to is that of a run.
    """
    listed = [run for run in runs if run.state != NONE]
    out = common_folder([run.folder for run in listed]) / FOLDER if out is None else out
    if (out / "config.yaml").exists() or (out / "results.json").exists():
        raise ValueError(f"--out {out}: this is the folder of a run; choose another one for the report over all.")
    with matplotlib.rc_context(STYLE):
        content, figures, tables = _content(listed, list(keys))
        images = {name: png(figure) for name, figure in figures.items()}
    make_folder(out / "figures")
    files = {f"figures/{name}.png": image for name, image in images.items()}
    about: dict[str, str] = {}
    for name, table in tables.items():
        files |= {f"{name}.csv": table.as_csv(), f"{name}.md": table.as_markdown()}
        about |= {f"{name}.csv": ABOUT[name.partition("_")[0]], f"{name}.md": "the same in Markdown"}
    about["figures/"] = "the figures of this page"
    links = {name: _link(run, out) for name, run in by_short_name({run.folder: run for run in listed}).items()}
    shown = tables | {"runs": _linked(tables["runs"], links)}
    inside = {name: base64.b64encode(image).decode() for name, image in images.items()}
    messages = [message for run in runs for message in (run.message, *run.remarks) if message]
    page = render("overview.html.j2", images=inside, files=about, messages=messages, tables=shown, **content)
    for name, text in (files | {"report.html": page}).items():
        with replaced(out / name) as file:
            file.write(text)
    return out / "report.html"


def _content(runs: Sequence[Run], keys: Sequence[str]) -> tuple[dict[str, Any], dict[str, Figure], dict[str, Table]]:
    """What the page says, its figures and its tables."""
    names = by_short_name({run.folder: run for run in runs})
    different = differing_keys(runs)
    chosen = keys or different
    with_settings = [run for run in runs if run.state != EVALUATED]
    groups = grouped(with_settings, chosen)
    groups = groups if keys or len(groups) < len(with_settings) else []  # else each run would be a group
    shown = measures(runs)
    tables = {"runs": runs_table(names, list(dict.fromkeys([*chosen, *different])), shown)}
    means = [one for one in shown if one in GROUPED or one not in shown[:15]]
    if groups:
        tables["groups"] = groups_table(groups, means)
    colored = label_of(chosen[0]) if chosen else ""
    alike, others = _that_compare(runs)
    figures = pareto_figures(alike, [value_of(run, chosen[0]) if chosen else "" for run in runs])
    pareto = list(figures)
    figures |= {"groups": group_figure(groups)} if 1 < len(groups) <= MOST else {}
    over = {f"over_{re.sub(r'[^a-zA-Z0-9]', '_', one.key)}": one for one in curves(alike)}
    figures |= {name: setting_figure(one) for name, one in over.items()}
    by_windows = granularity(alike)
    figures |= {"windows": group_figure(by_windows)} if by_windows else {}
    if by_windows:
        tables["windows"] = groups_table(by_windows, means)
    if sweeps := rate_sweeps(runs):
        tables["rates"] = rates_table(sweeps)
    found = studies({run.folder: run.results for run in runs if run.results is not None})
    named = {f"criteria_{number}": study for number, study in enumerate(found, start=1)}
    figures |= {name: criteria(study) for name, study in named.items()}
    tables |= {name: criteria_table(study) for name, study in named.items()}
    content: dict[str, Any] = {
        **_header(names),
        "others": others,
        "keys": ", ".join(map(label_of, chosen)) or "nothing",
        "pareto": pareto,
        "colored": colored,
        "over": {name: label_of(one.key) for name, one in over.items()},
        "studies": {name: study.about for name, study in named.items()},
    }
    return content, figures, tables


def _that_compare(runs: Sequence[Run]) -> tuple[list[Run], int]:
    """Runs of the model and evaluation text that most runs are of, the others without results; how many those are.

    Perplexities of several models or texts have no best one, and no front.
    """
    kinds = [(run.results["model"]["name"], protocol_of(run)) if run.results is not None else None for run in runs]
    most = Counter(kind for kind in kinds if kind is not None).most_common(1)
    other = [kind is not None and kind != most[0][0] for kind in kinds]
    pairs = zip(runs, other, strict=True)
    return [replace(run, results=None, evaluations=()) if is_other else run for run, is_other in pairs], sum(other)


def _header(names: Mapping[str, Run]) -> dict[str, Any]:
    """Title, states, what all share, and the best run."""
    folder = common_folder([run.folder for run in names.values()])
    states = Counter(run.state for run in names.values())
    results = {name: run.results for name, run in names.items() if run.results is not None}
    shared = shared_and_different({name: settings(found) for name, found in results.items()})[0]
    alike = dict(zip(names, _that_compare(list(names.values()))[0], strict=True))
    perplexities = [(PERPLEXITY.of(run), name) for name, run in alike.items() if run.results is not None]
    finite = [pair for pair in perplexities if math.isfinite(pair[0])]
    return {
        "title": f"{len(names)} run{'s' if len(names) != 1 else ''} in {folder.name or folder}",
        "evaluated": states[EVALUATED],
        "states": ", ".join(f"{number} {state}" for state, number in states.most_common()),
        "shared": shared,
        "best": min(finite)[::-1] if finite else None,
    }


def _link(run: Run, out: Path) -> str:
    """The page of a run as seen from the folder of the overview; empty where there is none."""
    return relative_link(run.page, out) if run.page.is_file() else ""


def _linked(table: Table, links: Mapping[str, str]) -> Table:
    """The table of all runs with a link to each page."""
    rows = [[row[0], row[1]._replace(link=links[row[1].text]), *row[2:]] for row in table.rows]
    return Table(table.columns, rows)
