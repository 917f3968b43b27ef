"""A walk with all that keeps it: its commits, the checkpoint that grows with it, its curves, its progress, its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console

from lit_recon.fit.job import Job, Loaded
from lit_recon.fit.output.checkpoint import ShardedFolder
from lit_recon.fit.output.results import model_card
from lit_recon.fit.plan.estimate import Plan
from lit_recon.fit.progress import WalkProgress
from lit_recon.fit.resume_point import Journal
from lit_recon.model.windows import AnyWindow
from lit_recon.pruning.pruner import Pruner
from lit_recon.reconstruction.driver import walk
from lit_recon.reconstruction.tensorboard import RunLogger
from lit_recon.reconstruction.window_fit import Reconstructor, WindowResult
from lit_recon.system.clock import WALK, Clock
from lit_recon.system.commits import Commit, Commits
from lit_recon.system.signals import protected
from lit_recon.system.units import duration


@dataclass(frozen=True)
class Setting:
    """What a course has beside its job: the loaded model, what was planned, where it is kept, shown and counted."""

    job: Job
    loaded: Loaded
    plan: Plan
    commits: Commits
    console: Console
    clock: Clock


class Course:
    """A walk from a commit, or from the start, to the end or to where it is stopped.

    Args:
        setting: The run.
        facts: What each of its commits says beside its own.
        commit: Where an earlier run is taken up.
    """

    def __init__(self, setting: Setting, *, facts: Mapping[str, Any], commit: Commit | None) -> None:
        job, loaded = setting.job, setting.loaded
        self.setting = setting
        self.logger = RunLogger(job.output, last_step=commit.state["step"] if commit else None)
        self.pruner = Pruner(job.criterion, job.pattern, loaded.chain, units=loaded.units)
        self.journal = Journal(
            setting.commits,
            chain=loaded.chain,
            pruner=self.pruner,
            checkpoint=loaded.checkpoint,
            logger=self.logger,
            clock=setting.clock,
            facts=facts,
            published=self._publish,
        )
        files = loaded.checkpoint.files
        self.shards = ShardedFolder(job.output / "checkpoint", loaded.model, files) if files else None
        if commit:
            self.journal.restore(commit)
        self.progress = WalkProgress(setting.console, len(loaded.windows), done=self.journal.done)

    def run(self) -> list[WindowResult]:
        """Walk; the results of all windows that are done.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the message says what is kept.
        """
        job, loaded, clock = self.setting.job, self.setting.loaded, self.setting.clock
        reconstructor = Reconstructor(
            job.module,
            job.trainer,
            logger=self.logger,
            device=job.compute.device,
            seed=job.seed,
            callbacks=[self.progress],
        )
        with clock.phase("commit"):
            self._open_checkpoint()
        done = list(self.journal.done)
        try:
            with self.progress:
                walk(
                    self._left(len(done)),
                    chain=loaded.chain,
                    pruner=self.pruner,
                    reconstructor=reconstructor,
                    checkpoint=loaded.checkpoint,
                    clock=clock,
                    listeners=[self.progress],
                    done=done,
                    commit=self.journal.commit,
                )
        except KeyboardInterrupt as stop:
            loaded.checkpoint.put_back()
            self._leave()
            raise type(stop)(f"{self.stopped()}") from stop
        self._leave()
        return self.journal.done

    def stopped(self) -> str:
        """What is kept of a walk that did not come to its end, and how to go on."""
        done, output = self.journal.done, self.setting.job.output
        if not done:
            return f"no window was done yet; start again with resume={output}"
        total = len(self.setting.loaded.windows)
        phases = self.setting.clock.seconds
        seconds = sum(phases[name] for name in WALK) / len(done) * (total - len(done))
        return (
            f"{len(done)} of {total} windows are done ({done[0].name} to {done[-1].name}); {output}/checkpoint holds "
            f"them and is dense from there. Go on with: python -m lit_recon.fit resume={output}"
            f" (about {duration(seconds)} more)"
        )

    def _left(self, done: int) -> Sequence[AnyWindow]:
        """The windows to walk over: up to `stop_after`, but all that the chain steps over at once."""
        windows, stop = self.setting.loaded.windows, self.setting.job.stop_after
        end = 0
        for _, group in groupby(windows, key=lambda window: window.span):
            if stop is not None and end >= stop:
                break
            end += len(list(group))
        return windows[done : max(done, end)]

    def _open_checkpoint(self) -> None:
        """Have checkpoint/ hold what is committed, and dense weights else."""
        if self.shards is None:
            return
        done = self.journal.done
        if not done or not self.shards.is_there():
            self.shards.start(self.setting.job.tokenizer, self._card(done))
        for index, path in self.journal.layer_files().items():
            self.shards.put(index, path)
        if done and len(done) < len(self.setting.loaded.windows):  # a window of which the commit was damaged
            for index in self.setting.loaded.windows[len(done)].indices:
                if index not in self.journal.layer_files():
                    self.shards.put_back(index)
        self.shards.describe(self._card(done))

    def _publish(self, indices: Sequence[int], results: Sequence[WindowResult]) -> None:
        """A commit is whole: have its layers in the checkpoint."""
        if self.shards is not None:
            files = self.journal.layer_files()
            for index in indices:
                self.shards.put(index, files[index])
            self.shards.describe(self._card(results))

    def _leave(self) -> None:
        """Write what belongs to the checkpoint as far as the walk came."""
        done, output = self.journal.done, self.setting.job.output
        self.logger.experiment.flush()
        if not done:
            return
        with protected(), self.setting.clock.phase("commit"):
            self.setting.loaded.checkpoint.masks.save(output / "masks.safetensors")
            if self.shards is None:
                self.setting.loaded.checkpoint.save(output / "checkpoint", self.setting.job.tokenizer, self._card(done))

    def _card(self, results: Sequence[WindowResult]) -> str:
        job, plan = self.setting.job, self.setting.plan
        return model_card(job.model.describe(), job.recipe, plan, results)
