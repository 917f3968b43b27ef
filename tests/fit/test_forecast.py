"""Forecasts of how long the runs of a sweep take: one plan for those that take equally long, and no text generated."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CPU, letter_tokenizer, tiny_settings
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from lit_recon.data.files import Files
from lit_recon.data.mixture import Mixture
from lit_recon.data.self_generated import SelfGenerated
from lit_recon.fit import forecast as module
from lit_recon.fit.forecast import Forecast, forecast, forecasts, stand_in
from lit_recon.settings.conf import CONF
from lit_recon.settings.sweep import Member

SETTINGS: dict[str, Any] = {
    "output_dir": "runs/x",
    "seed": 0,
    "sparsity": 0.5,
    "pattern": {"sparsity": 0.5},
    "module": {"optimizer": {"lr": 1e-3}},
    "windows": {"by": "block"},
}


def member(name: str, **changed: Any) -> Member:
    """A run of a sweep."""
    return Member(name, [name], ["hydra.mode=RUN"], SETTINGS | changed, named_by_time=False)


class Planner:
    """A process that answers with a second for each command line that it was sent, after 5 s."""

    asked: Sequence[Sequence[str]] = ()
    answers = -1  # how many; all

    def __init__(self, command: Sequence[str], **_: Any) -> None:
        self.stdin, self.stdout = io.StringIO(), self.answer()
        self.stdin.close = self.take  # type: ignore[method-assign]

    def take(self) -> None:
        type(self).asked = json.loads(self.stdin.getvalue())

    def answer(self) -> Iterator[str]:
        yield "{}\n"
        for number in range(len(self.asked)):
            if number != self.answers:
                yield json.dumps({"seconds": number + 1, "load": 2}) + "\n"

    def __enter__(self) -> "Planner":
        return self

    def __exit__(self, *error: object) -> None:
        """It has ended."""


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> type[Planner]:
    now = iter([0.0, 5.0])
    fake = SimpleNamespace(Popen=Planner, PIPE=None)
    monkeypatch.setattr(module, "subprocess", fake)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    return Planner


def test_runs_that_differ_in_nothing_that_takes_time_share_a_plan(planner: type[Planner]) -> None:
    found = forecasts(
        [
            member("a"),
            member("seed", seed=1, output_dir="runs/y"),
            member("sparsity", sparsity=0.8, pattern={"sparsity": 0.8}),
            member("rate", module={"optimizer": {"lr": 1e-4}}),
            member("probe", module={"optimizer": {"lr": "probe"}}),
            member("half", windows={"by": "half"}),
            Member("unknown", ["unknown"], [], None, named_by_time=False),
        ]
    )
    assert [words[0] for words in planner.asked] == ["a", "probe", "half", "unknown"]
    assert {one.load for one in found.values()} == {7.0}, "with the start of the process"
    assert [found[name].seconds for name in ("a", "seed", "sparsity", "rate", "probe", "half", "unknown")] == [
        *(1, 1, 1, 1),
        *(2, 3, 4),
    ]


def test_what_stands_in_the_output_folder_does_not_count(planner: type[Planner]) -> None:
    forecasts([member("a")])
    name, folder, mode = planner.asked[0]
    assert (name, mode) == ("a", "hydra.mode=RUN")
    assert folder.startswith("output_dir=runs/.forecast-")


def test_a_forecast_that_is_missing_is_left_out(planner: type[Planner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "answers", 1)
    assert set(forecasts([member("a"), member("b", windows=1)])) == {"a"}


def test_a_forecast_is_the_plan_of_the_run_and_leaves_nothing_behind(
    model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # is set back after the test
    words = tiny_settings(model_folder, text_file)
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        found = forecast([*words, "hydra.mode=RUN", "hydra.job.num=3"])
        refused = forecast([*words, "data.length=1"])
    assert (found.windows, found.refused) == (3, "") and found.seconds > 0 and found.load > 0
    assert "data.length=1" in refused.refused and refused == Forecast(refused=refused.refused)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [SelfGenerated, Mixture])
def test_text_that_the_model_would_generate_is_replaced_by_as_much_other_text(kind: type, text_file: Path) -> None:
    own: dict[str, Any] = {"evaluation": Files(paths=[str(text_file)])}
    if kind is Mixture:
        own |= {"sources": {"generated": SelfGenerated()}, "weights": {"generated": 1}}
    counts = {"num_samples": 7, "length": 16, "num_held_out": 3, "evaluation_samples": 5, "evaluation_length": 24}
    execution: Any = SimpleNamespace(compute=CPU, seed=0)
    source = kind(**own, **counts, num_retraining=300)
    samples = stand_in(source, letter_tokenizer(), None, execution)  # type: ignore[arg-type]
    assert samples.retraining_ST is not None and samples.retraining_ST.shape == (300, 16)
    assert samples.calibration_ST.shape == (7, 16) and samples.held_out_ST.shape == (3, 16)
    assert samples.evaluation_ST.shape == (5, 24)
