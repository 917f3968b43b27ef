"""The chain: hidden states of all samples at the current window boundary, and the way over a window to the next one.

Which chains are kept, and what for, is told by a Regime (regime.py). The halves of a parallel layer need one array of
hidden states more for each chain meanwhile, windows that overlap one for the dense chain.

Shapes: S samples (calibration first, then held-out), B samples of a batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from lit_recon.blocks import Decoder, LayerCall
from lit_recon.compute import Compute
from lit_recon.data.packing import PADDING
from lit_recon.regime import Regime
from lit_recon.windows import Window

PARTS = ("calibration", "held_out")  # of the samples
CALIBRATION = PARTS[:1]
Watching = Callable[[str], AbstractContextManager]  # makes a context for the part of the samples that passes
Forward = Callable[..., Tensor]  # of hidden states and calls


def watching_nothing(part: str) -> AbstractContextManager:
    """A pass that nothing watches."""
    return nullcontext()


class Boundary:
    """Hidden states of all samples at a window boundary, (S, T, D) in float32 on the CPU.

    Attributes:
        states_STD: The states.
        aside_STD: Between the halves of a parallel layer: what the first one adds; None otherwise.
    """

    def __init__(self, states_STD: Tensor) -> None:
        self.states_STD = states_STD
        self.aside_STD: Tensor | None = None

    def step(self, branch: str | None, outputs_STD: Tensor) -> Tensor | None:
        """Step over a window whose outputs these are; the memory that is free now, if any.

        Args:
            branch: The window's branch.
            outputs_STD: Its outputs for `states_STD`; their memory is taken over.
        """
        if branch == "first":
            self.aside_STD = outputs_STD.sub_(self.states_STD)
            return None
        if branch == "second":
            assert self.aside_STD is not None
            outputs_STD.add_(self.aside_STD)
            self.aside_STD = None
        free_STD, self.states_STD = self.states_STD, outputs_STD
        return free_STD


class Chain:
    """Hidden states at the current boundary, and what the window that starts there is trained on.

    Args:
        decoder: Embeds the tokens and knows every layer's arguments.
        tokens_ST: Calibration samples, then held-out samples; PADDING where a sample holds no text.
        num_samples: How many of them are for calibration.
        batch_size: Samples per pass.
        compute: Device and precision.
        regime: Which chains are kept and what they serve for.

    Attributes:
        targets_STD: After `dense_pass`: what the window shall output.
        valid_ST: Where samples hold text; None if all do everywhere.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens_ST: Tensor,
        *,
        num_samples: int,
        batch_size: int,
        compute: Compute,
        regime: Regime | None = None,
    ) -> None:
        self.decoder = decoder
        self.tokens_ST = tokens_ST
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.compute = compute
        self.regime = regime or Regime()
        is_text_ST = tokens_ST != PADDING
        self.valid_ST = None if is_text_ST.all() else is_text_ST
        embedded_STD = self._pinned(
            torch.cat([decoder.embed(batch_BT)[0].cpu() for batch_BT in tokens_ST.split(batch_size)])
        )
        self.dense = Boundary(embedded_STD) if self.regime.needs_dense else None
        self.sparse = (
            Boundary(embedded_STD.clone() if self.dense else embedded_STD) if self.regime.needs_sparse else None
        )
        self._outputs_STD = self._pinned(torch.zeros_like(embedded_STD))  # of the dense chain, if there is one
        self._targets_STD: Tensor | None = None  # where they are not these outputs
        self.targets_STD = self._outputs_STD
        self._mixed_STD = torch.zeros_like(embedded_STD) if self.regime.inputs == "mix" else None

    @property
    def num_held_out(self) -> int:
        """Samples that are never trained on."""
        return len(self.tokens_ST) - self.num_samples

    @property
    def inputs_STD(self) -> Tensor:
        """What the window is trained on, (S, T, D)."""
        if self._mixed_STD is not None:
            return self._mixed_STD
        boundary = self.sparse if self.regime.inputs == "sparse" else self.dense
        assert boundary is not None
        return boundary.states_STD

    def batches(self, first: int, last: int) -> Iterator[slice]:
        """Consecutive batches of the samples from `first` up to `last`."""
        for start in range(first, last, self.batch_size):
            yield slice(start, min(start + self.batch_size, last))

    def calls(self, rows_B: Tensor) -> list[LayerCall]:
        """Every layer's arguments for some samples, masks of padded ones included."""
        return self.decoder.calls(self.tokens_ST[rows_B])

    def dense_pass(self, window: Window, watching: Watching = watching_nothing) -> None:
        """Run the window, before it is pruned, over all samples: targets, the dense chain's next value, statistics.

        Args:
            window: The window with its dense weights.
            watching: Opened for the passes that the criterion shall look at.
        """
        regime = self.regime
        if self._mixed_STD is not None:
            assert self.dense and self.sparse
            torch.lerp(self.sparse.states_STD, self.dense.states_STD, regime.mix, out=self._mixed_STD)
        # The pass for local targets on sparse inputs serves sparse statistics too; but not where an earlier window has
        # changed what this one uses: targets are of the dense window, statistics of the window as it is now.
        on_the_way = regime.targets == "local" and regime.inputs == "sparse" and not window.borrows
        with window.dense():
            if self.dense:
                self._dense_outputs(window, watching if regime.statistics == "dense" else watching_nothing)
            if regime.targets == "local":
                watched = regime.statistics == "sparse" and on_the_way
                self.run(window, self.inputs_STD, self._own_targets(), watching if watched else watching_nothing)
        if regime.statistics == "sparse" and not on_the_way:
            assert self.sparse
            self.run(window, self.sparse.states_STD, None, watching, CALIBRATION)

    def _dense_outputs(self, window: Window, watching: Watching) -> None:
        """The dense chain's next value, behind the layers that are kept, and the dense targets, at the window's end."""
        assert self.dense
        kept, rest = slice(0, window.kept), slice(window.kept, None)
        self.run(partial(window, layers=kept), self.dense.states_STD, self._outputs_STD, watching)
        self.targets_STD = self._outputs_STD
        if window.kept < len(window.indices):
            self.run(partial(window, layers=rest), self._outputs_STD, self._own_targets(), watching)

    def _own_targets(self) -> Tensor:
        """Memory for targets that are not the dense chain's next value."""
        if self._targets_STD is None:
            self._targets_STD = self._pinned(torch.zeros_like(self._outputs_STD)) if self.dense else self._outputs_STD
        self.targets_STD = self._targets_STD
        return self.targets_STD

    def advance(self, window: Window) -> None:
        """Step over the window, which is reconstructed now, to the end of the layers that it keeps."""
        if self.dense:
            free_STD = self.dense.step(window.branch, self._outputs_STD)
            self._outputs_STD = self._pinned(torch.zeros_like(self._outputs_STD)) if free_STD is None else free_STD
        if self.sparse:
            self.step_over(self.sparse, window)

    def step_over(self, boundary: Boundary, window: Window) -> None:
        """Run a window as it is now from a boundary, and put the boundary at the end of the layers that it keeps."""
        inputs_STD = boundary.states_STD
        outputs_STD = torch.zeros_like(inputs_STD) if window.branch == "first" else inputs_STD
        self.run(partial(window, layers=slice(0, window.kept)), inputs_STD, outputs_STD)
        boundary.step(window.branch, outputs_STD)

    @torch.no_grad()  # not inference_mode: its tensors cannot be inputs or targets of training
    def run(
        self,
        forward: Forward,
        inputs_STD: Tensor,
        outputs_STD: Tensor | None,
        watching: Watching = watching_nothing,
        parts: Sequence[str] = PARTS,
    ) -> None:
        """Run a window, or some layers of it, over all samples.

        Args:
            forward: Makes outputs of hidden states and calls.
            inputs_STD: What it is run on.
            outputs_STD: Where the outputs go; may be `inputs_STD`, and None drops them.
            watching: Opened around the calibration samples, and around the held-out ones.
            parts: Which of them to run.
        """
        ranges = {"calibration": (0, self.num_samples), "held_out": (self.num_samples, len(self.tokens_ST))}
        for part in parts:
            with watching(part):
                for rows in self.batches(*ranges[part]):
                    self._run_rows(forward, inputs_STD, outputs_STD, rows)

    def _run_rows(self, forward: Forward, inputs_STD: Tensor, outputs_STD: Tensor | None, rows: slice) -> None:
        """One batch; padded samples one by one and cut to their text, so that no observer ever sees a pad position."""
        for part, length in self._unpadded(rows):
            inputs_BTD = inputs_STD[part, :length].to(self.compute.device, non_blocking=True)
            with self.compute.autocast():
                outputs_BTD = forward(inputs_BTD, self.decoder.calls(self.tokens_ST[part, :length])).float()
            if outputs_STD is not None:
                outputs_STD[part, :length] = outputs_BTD

    def _unpadded(self, rows: slice) -> Iterator[tuple[slice, int]]:
        """The batch as it is; or, where it holds padding, each of its samples and its length."""
        if self.valid_ST is None or self.valid_ST[rows].all():
            yield rows, self.tokens_ST.shape[1]
            return
        for row in range(rows.start, rows.stop):
            yield slice(row, row + 1), int(self.valid_ST[row].sum())

    def _pinned(self, tensor: Tensor) -> Tensor:
        """`tensor` in pinned memory if there is a GPU: only from there copies are asynchronous."""
        return tensor.pin_memory() if self.compute.device.type == "cuda" else tensor
