"""A limit of memory picks the largest batch and window that fit, keeps the step's samples, and refuses with numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ended
from omegaconf import OmegaConf

from lit_recon.fit.plan import memory_limit
from lit_recon.fit.plan.estimate import Plan
from lit_recon.system.memory import parse_limit

GB = 10**9


@pytest.mark.parametrize(
    ("limit", "size"), [("6GiB", 6 * 2**30), ("500MB", 500 * 10**6), (1000, 1000), ("1.5GB", 15 * 10**8)]
)
def test_limits_are_read_in_the_usual_units(limit: str | int, size: int) -> None:
    assert parse_limit(limit) == size


@pytest.mark.parametrize("limit", ["much", "0", "-1GB", "6 apples"])
def test_what_is_no_size_is_refused_with_examples(limit: str) -> None:
    with pytest.raises(ValueError, match="6GiB"):
        parse_limit(limit)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of plans by hand: for each sample of a batch 1 GB per half, 2 per block, 6 for all; at once 10, and 5."""
    real = memory_limit.make_plan

    def plan(*arguments: object, **settings: object) -> Plan:
        made, batch = real(*arguments, **settings), settings["batch_size"]
        own = {"matrix": GB, "half": batch * GB, "block": 2 * batch * GB, "model": 6 * batch * GB}
        at_once = made.global_fit._replace(own_bytes=(10 + 5 * batch) * GB if made.global_fit.steps else 0)
        return Plan(**{**made.__dict__, "own_by_kind": own, "global_fit": at_once})

    monkeypatch.setattr(memory_limit, "make_plan", plan)


@pytest.mark.parametrize(
    ("windows", "limit", "kind", "batch", "accumulate", "count"),
    [
        ("model", "24GB", "model", 4, 1, 1),
        pytest.param("model", "12GB", "model", 2, 2, 1, marks=pytest.mark.slow),
        pytest.param("model", "6GB", "model", 1, 4, 1, marks=pytest.mark.slow),
        ("model", "5GB", "block", 2, 2, 3),
        pytest.param("block", "3GB", "block", 1, 4, 3, marks=pytest.mark.slow),
        ("block", "1.1GB", "half", 1, 4, 6),  # which need an array more
    ],
)
def test_the_batch_shrinks_before_the_window(
    tiny_run: Callable[..., Ended],
    planned: None,
    windows: str,
    limit: str,
    kind: str,
    batch: int,
    accumulate: int,
    count: int,
) -> None:
    ended = tiny_run(f"windows={windows}", f"memory_limit={limit}", "data.batch_size=4")
    assert ended.status == 0, ended.err
    results = json.loads(Path("run/results.json").read_text())
    assert results["recipe"]["windows"] == kind and len(results["windows"]) == count
    asked_for = "4" if batch == 4 else f"{batch}, {accumulate} per step"
    assert results["recipe"]["batch_size"] == asked_for
    assert {window["steps"] for window in results["windows"]} == {2}, "8 samples, 4 per step, as without a limit"


def test_what_never_fits_is_refused_with_numbers_and_without_a_trace(
    tiny_run: Callable[..., Ended], planned: None
) -> None:
    ended = tiny_run("memory_limit=900MB", "data.batch_size=4")
    assert ended.status == 2
    assert "0.90 GB" in ended.err and "windows=half" in ended.err and "1.00 GB" in ended.err and "8.00 GB" in ended.err
    assert not Path("run").exists()


def test_all_layers_at_once_take_a_smaller_batch_and_are_named_where_they_never_fit(
    tiny_run: Callable[..., Ended], planned: None
) -> None:
    settings = ("walk=local_then_global", "data.batch_size=4")
    ended = tiny_run(*settings, "memory_limit=14GB")
    assert ended.status == 2 and not Path("run").exists()
    said = "even all layers, trained at once, with data.batch_size=1 need 15.00 GB, as asked for it would be 30.00 GB"
    assert said in " ".join(ended.err.split()) and "or walk=local" in ended.err, ended
    ended = tiny_run(*settings, "memory_limit=16GB")
    assert ended.status == 0, ended
    recipe = json.loads(Path("run/results.json").read_text())["recipe"]
    assert recipe["windows"] == "block" and recipe["batch_size"] == "1, 4 per step"


def test_a_limit_leaves_out_the_same_windows_and_takes_no_smaller_ones(
    tiny_run: Callable[..., Ended], planned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_recon.fit.allocate.block_influence", lambda *_: [0.3, 0.1, 0.2])
    ended = tiny_run("memory_limit=3GB", "data.batch_size=4", "windows.skip=0.34")
    assert ended.status == 0, ended.err
    results = json.loads(Path("run/results.json").read_text())
    assert results["recipe"]["batch_size"] == "1, 4 per step" and "2 of 3 windows" in ended.out
    assert [one["name"] for one in results["windows"] if not one["held_out_before"]] == ["block_01"]
    ended = tiny_run("memory_limit=1.1GB", "data.batch_size=4", "windows.skip=0.34", "overwrite=true")
    assert ended.status == 2 and "even windows=block with data.batch_size=1 need 2.00 GB" in ended.err


def test_a_limit_is_kept_when_a_run_is_resumed(
    tiny_run: Callable[..., Ended], command: Callable[..., Ended], planned: None
) -> None:
    assert tiny_run("memory_limit=1.1GB", "data.batch_size=4", "stop_after=1").status == 0
    ended = command("resume=run")
    assert ended.status == 0, ended.err
    results = json.loads(Path("run/results.json").read_text())
    assert results["recipe"]["windows"] == "half" and len(results["windows"]) == 6
    assert OmegaConf.load("run/config.yaml").memory_limit == "1.1GB"
