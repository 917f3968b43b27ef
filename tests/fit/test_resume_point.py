"""Whatever commit a walk is resumed from, all that it goes on with is as it was when that commit was made."""

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CPU, chain_of, fitter, module
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_recon.activations.propagation import Propagation
from lit_recon.fit.resume_point import ResumePoint
from lit_recon.fit.session import Session
from lit_recon.model.architectures import tiny_model
from lit_recon.model.mapped_files import DenseFiles
from lit_recon.model.matrices import find_matrices
from lit_recon.model.offload import WeightOffloader
from lit_recon.model.partition import layer_windows, partition
from lit_recon.model.windows import Window
from lit_recon.pruning.criteria.wanda import Wanda
from lit_recon.pruning.patterns import Unstructured
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.driver import WalkCallback, walk
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_result import WindowResult
from lit_recon.system.clock import Clock
from lit_recon.system.commits import Commits

SPARSE = Propagation(inputs="sparse", statistics="sparse")
MIX = Propagation(inputs="mix", statistics="sparse")
CASES = {
    "llama, block": ("llama", {}, Propagation(inputs="dense"), None),
    "llama, block, sparse": ("llama", {}, SPARSE, None),
    "llama, half of a layer that is pruned at once": ("llama", {"by": "half"}, SPARSE, "block"),
    "llama, half of a model that is pruned at once": ("llama", {"by": "half"}, MIX, "model"),
    "llama, matrix": ("llama", {"by": "matrix"}, Propagation(inputs="dense"), None),
    "llama, overlapping": ("llama", {"by": "blocks", "size": 2, "stride": 1}, MIX, None),
    "phi, half, side by side": ("phi", {"by": "half"}, MIX, None),
    "gpt2, half": ("gpt2", {"by": "half"}, Propagation(inputs="dense"), None),
    "mixtral, block": ("mixtral", {}, SPARSE, "model"),
    "mixtral, half": ("mixtral", {"by": "half"}, Propagation(inputs="dense"), None),
}
EXACTING = (  # the others keep no more
    "llama, half of a model that is pruned at once",
    "llama, matrix",
    "llama, overlapping",
    "phi, half, side by side",
    "mixtral, half",
)


class Walk(WalkCallback):
    """A walk with its resume point; as a callback, it remembers what each commit finds.

    Args:
        case: One of CASES.
        folder: The dense model.
        tokens_ST: Samples.
        run: The run's folder.
        streamed: Whether the model is.
    """

    def __init__(self, case: str, folder: Path, tokens_ST: Tensor, run: Path, *, streamed: bool) -> None:
        _, settings, propagation, prune_by = CASES[case]
        self.model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
        files = DenseFiles.from_model(self.model, [folder / "model.safetensors"]) if streamed else None
        assert not isinstance(files, str)
        self.run, self.windows = run, partition(self.model, **settings)
        pruning_windows = layer_windows(self.model, by=prune_by) if prune_by else []
        self.chain = chain_of(self.model, tokens_ST, 4, propagation=propagation)
        self.pruner = Pruner(Wanda(), Unstructured(sparsity=0.5), self.chain, pruning_windows=pruning_windows)
        self.weights = WeightOffloader(self.model, CPU.device, files=files)
        self.logger = RunLogger(run)
        session = Session(
            self.model,
            find_matrices(self.model),
            self.windows,
            self.chain,
            self.pruner,
            self.weights,
            Clock(),
        )
        self.resume_point = ResumePoint(Commits(run / "commits"), session, self.logger, {"fact": "of all commits"})
        self.states: dict[int, dict] = {}  # at each commit
        self.layers: list[list[int]] = []

    def on_window_end(self, window: Window, masks: Mapping[str, Tensor], results: Sequence[WindowResult]) -> None:
        shutil.copytree(self.run / "commits", self.run / str(len(results)) / "commits")
        self.states[len(results)] = self.state()
        files = self.resume_point.layer_files()
        self.layers.append([index for index, path in files.items() if f".{len(results):05}." in path.name])

    def state(self) -> dict:
        """All that the walk goes on with."""
        pending = self.pruner.pending
        return {
            "weights": {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            "chain": {name: tensor.clone() for name, tensor in self.chain.state().items()},
            "masks": self.resume_point.masks.unpack(),
            "pending": {} if pending is None else dict(pending[1]),
            "pruning window": None if pending is None else pending[0],
            "instead": dict(self.pruner.instead),
            "step": self.logger.last_step,
            "done": list(self.resume_point.done),
        }

    def go(self) -> None:
        made = fitter(self.run, module(), max_epochs=1)
        made.logger = self.logger
        walk(
            self.windows,
            chain=self.chain,
            pruner=self.pruner,
            fitter=made,
            weights=self.weights,
            callbacks=[self.resume_point, self],
        )


def assert_same(found: dict, expected: dict) -> None:
    for key, value in expected.items():
        if key in ("weights", "chain", "masks", "pending"):
            assert found[key].keys() == value.keys(), key
            for name, tensor in value.items():
                assert found[key][name].dtype == tensor.dtype and torch.equal(found[key][name], tensor), (key, name)
        else:
            assert found[key] == value, key


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in EXACTING else pytest.mark.slow) for case in CASES]
)
def test_a_walk_is_resumed_from_each_of_its_commits_as_it_was(case: str, tokens_ST: Tensor, tmp_path: Path) -> None:
    kind = CASES[case][0]
    tiny_model(kind).save_pretrained(tmp_path / "model")
    start = partial(Walk, case, tmp_path / "model", tokens_ST, streamed=kind != "mixtral")
    first = start(run=tmp_path / "run")
    first.go()
    spans = {id(window.enclosing): window.enclosing for window in first.windows}.values()
    assert len(first.states) == len(spans) and max(first.states) == len(first.windows)
    assert first.layers == [list(span.indices[: span.num_kept]) for span in spans]
    assert any(state["pending"] for state in first.states.values()) == (CASES[case][3] is not None)
    for commits, (number, expected) in enumerate(first.states.items(), start=1):
        folder = tmp_path / "run" / str(number)
        again = start(run=folder)
        commit = again.resume_point.commits.newest()
        assert commit is not None and commit.number == number and commit.state["fact"] == "of all commits"
        again.resume_point.restore(commit)
        is_over = number == len(first.windows)  # then nothing is trained on what is made anew
        is_made_anew = CASES[case][2].independent
        assert_same(again.state(), expected | ({"chain": {}} if is_over and is_made_anew else {}))
        names = {path.name for path in (folder / "commits").iterdir()}
        assert any(name.startswith("chain.") for name in names) != is_made_anew
        assert sum(name.startswith("masks.") for name in names) == commits
        assert sum(name.startswith("chain.") for name in names) <= 2
        assert sum(name.startswith("unit.") for name in names) <= 2
