"""A sweep as TensorBoard's own server shows it: names, numbers, charts, columns, order, and no markup of anybody's."""

import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_recon.reconstruction.tensorboard import MOST, LoggedWindows, RunLogger, layout

HALVES = [f"half_{layer:02}_{side}" for layer in range(80) for side in ("attention", "mlp")]
EVIL = "<script>alert(1)</script> ![x](http://a/b.png) [y](javascript:alert(2)) | z"


def results_of(run: int, names: list[str]) -> dict[str, Any]:
    """Of a results.json what is logged; runs differ in what their recipes have."""
    measures = ("relative_error", "held_out", "typical")
    errors = {f"{name}_{when}": 0.5 for name in measures for when in ("before", "after")}
    return {
        "perplexity": {"dense": 10.0, "pruned": 20.0, "reconstructed": 15.0 - run},
        "gap_recovered": 0.5 + run / 10,
        "gap_recovered_nats": 0.25 + run / 10,
        "model": {"name": EVIL},
        "recipe": {"criterion": "Wanda", "learning_rate": "0.001"} | ({"loss": EVIL, "keep": "best"} if run else {}),
        "protocol": {"dataset": "a_b|c", "context": 32},
        "sparsity": {"prunable": 0.5},
        "seconds": {"total": 12.5 + run},
        "tokens": {"calibration": 256},
        "windows": [dict(errors) for _ in names],
        "seed": run,
    }


def log_run(folder: Path, run: int, names: list[str], every: int | str = "auto") -> None:
    """A run of two steps per window, as Trainers log them."""
    log = RunLogger(folder, hidden=LoggedWindows(every).hidden(names))
    log.log_plan({"model": EVIL, "by window": "half 1.0 GB"}, names)
    for name in names:
        log.start_window(name)
        for step in range(2):
            log.log_metrics({"loss/held_out": 1.0 - step / 10, "loss/train": 2.0, "lr": 1e-3}, step)
        log.end_window()
    log.log_results(results_of(run, names))
    log.close()


class Server:
    """A TensorBoard of its own over a folder.

    Args:
        folder: The folder of runs.
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
        command += ["--load_fast=false", "--reload_interval=0", "--host", "127.0.0.1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.address = f"http://127.0.0.1:{port}/data"

    def get(self, path: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        """The answer to a request."""
        url = f"{self.address}/{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read())

    def wait(self, runs: int) -> None:
        """Until it has read so many runs as a whole: their last event is the end of a session."""
        for _ in range(600):
            try:
                found = self.get("plugin/scalars/tags")
                if sum("seconds" in tags for tags in found.values()) == runs:
                    return
            except OSError:  # it has not started yet
                assert self.process.poll() is None, "it ended"
            time.sleep(0.2)
        raise AssertionError("TensorBoard has not read the runs")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """TensorBoard over three runs: of 80 layers in halves twice, and of four blocks."""
    folder = tmp_path_factory.mktemp("sweep")
    log_run(folder / "a", 0, HALVES)
    log_run(folder / "b", 1, HALVES, every=80)
    log_run(folder / "c", 2, [f"block_{layer}" for layer in range(4)])
    made = Server(folder)
    try:
        made.wait(3)
        yield made
    finally:
        made.process.terminate()
        made.process.wait()


def test_a_run_of_80_layers_in_halves_has_few_names_from_all_depths(server: Server) -> None:
    tags = server.get("plugin/scalars/tags")
    assert tags.keys() == {"a/tensorboard", "b/tensorboard", "c/tensorboard"}
    curves = {run: {tag.partition("/")[0] for tag in found if tag.endswith("/lr")} for run, found in tags.items()}
    shown = curves["a/tensorboard"]
    assert len(shown) == MOST and {HALVES[0], HALVES[-1]} <= shown
    assert len(tags["a/tensorboard"]) == 3 * MOST + 6 + 6  # curves, depth, final numbers
    attention = [name for name in shown if name.endswith("attention")]
    assert MOST / 4 < len(attention) < 3 * MOST / 4, "of both kinds"
    assert curves["b/tensorboard"] == {HALVES[0], HALVES[80]}
    assert curves["c/tensorboard"] == {"block_0", "block_1", "block_2", "block_3"}


def test_errors_over_depth_have_a_point_for_every_window_and_curves_follow_each_other(server: Server) -> None:
    points = server.get("plugin/scalars/scalars", run="a/tensorboard", tag="depth/relative_error_before")
    assert [step for _, step, _ in points] == list(range(len(HALVES)))
    last = server.get("plugin/scalars/scalars", run="b/tensorboard", tag=f"{HALVES[80]}/loss/held_out")
    assert [step for _, step, _ in last] == [160, 161], "also after windows without curves"


def test_one_chart_for_each_kind_of_window_and_one_over_depth(server: Server) -> None:
    charts = {
        category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        for category in server.get("plugin/custom_scalars/layout")["category"]
    }
    assert {*charts["windows"]} == {"loss of half_N_attention", "loss of half_N_mlp", "loss of block_N"}
    assert {*charts["depth"]} == {"error over depth"}
    regex = charts["windows"]["loss of half_N_mlp"][0]
    found = server.get("plugin/custom_scalars/scalars", run="b/tensorboard", tag=regex)
    assert found["regex_valid"] and not found["tag_to_events"], "both that are shown are of the attention"
    regex = charts["windows"]["loss of half_N_attention"][0]
    found = server.get("plugin/custom_scalars/scalars", run="b/tensorboard", tag=regex)["tag_to_events"]
    assert {*found} == {f"{HALVES[0]}/loss/held_out", f"{HALVES[80]}/loss/held_out"}
    depth = [
        server.get("plugin/custom_scalars/scalars", run="c/tensorboard", tag=tag)["tag_to_events"]
        for tag in charts["depth"]["error over depth"]
    ]
    assert len(depth) == 6 and all(len(one) == 1 for one in depth)


def test_the_table_of_a_sweep_has_each_run_with_every_setting_that_one_of_them_has(server: Server) -> None:
    experiment = server.get("plugin/hparams/experiment", {"experimentName": "", "hparamsLimit": 0})
    names = {one["name"] for one in experiment["hparamInfos"]}
    assert {"criterion", "learning_rate", "loss", "keep", "seed", "sparsity", "tokens"} <= names
    metrics = [one["name"] for one in experiment["metricInfos"]]
    wanted = {"perplexity/reconstructed", "gap_recovered_nats", "seconds"}
    assert wanted <= {one["tag"] for one in metrics}
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": one} for one in metrics] + [{"hparam": name} for name in sorted(names)],
        "startIndex": 0,
        "sliceSize": 10,
    }
    rows = server.get("plugin/hparams/session_groups", asked)["sessionGroups"]
    found = {row["hparams"]["seed"]: row for row in rows}
    assert {*found} == {0, 1, 2}
    assert [found[seed]["hparams"]["keep"] for seed in (0, 1, 2)] == ["-", "best", "best"]
    assert all(row["hparams"]["learning_rate"] == 0.001 for row in rows), "a number, by which a table sorts"
    perplexities = [
        value["value"]
        for seed in (0, 1, 2)
        for value in found[seed]["metricValues"]
        if value["name"]["tag"] == "perplexity/reconstructed"
    ]
    assert perplexities == [15.0, 14.0, 13.0]


def test_plan_protocol_and_summary_are_tables_without_anybodys_markup(server: Server) -> None:
    tags = server.get("plugin/text/tags")
    assert {f"{name}/text_summary" for name in ("plan", "protocol", "summary")} == {*tags["b/tensorboard"]}
    for name in ("plan", "summary"):
        (page,) = server.get("plugin/text/text", run="b/tensorboard", tag=f"{name}/text_summary")
        text = page["text"]
        assert "<table>" in text and "alert(1)" in text, "as text"
        assert not [mark for mark in ("<script", "<img", "<a ", 'javascript:alert(2)"') if mark in text]
        assert all(row.count("<td>") in (0, 2) for row in text.rpartition("<table>")[2].split("<tr>")), text
    (page,) = server.get("plugin/text/text", run="b/tensorboard", tag="protocol/text_summary")
    assert "<td>a_b|c</td>" in page["text"]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "all", None])
def test_what_is_no_number_of_windows_is_told(every: Any) -> None:
    with pytest.raises(ValueError, match="logger.every="):
        LoggedWindows(every)


@pytest.mark.parametrize(
    ("number", "every", "shown"),
    [(0, "auto", []), (1, "auto", [0]), (40, "auto", [*range(40)]), (5, 2, [0, 2, 4]), (5, 9, [0]), (3, 1, [0, 1, 2])],
)
def test_which_windows_are_shown(number: int, every: int | str, shown: list[int]) -> None:
    names = [str(index) for index in range(number)]
    assert {*names} - LoggedWindows(every).hidden(names) == {str(index) for index in shown}


def test_windows_that_differ_in_numbers_only_are_of_one_kind() -> None:
    names = ["block_00.mlp.experts.3.w1", "block_11.mlp.experts.0.w1", "blocks_00_03", "blocks_02_05"]
    charts = layout(names)["windows"]
    assert charts == {
        "loss of block_N.mlp.experts.N.w1": [
            "Multiline",
            [rf"^block_\d+\.mlp\.experts\.\d+\.w1/loss/{part}$" for part in ("held_out", "train")],
        ],
        "loss of blocks_N_N": ["Multiline", [rf"^blocks_\d+_\d+/loss/{part}$" for part in ("held_out", "train")]],
    }
