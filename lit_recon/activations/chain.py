"""The chain: hidden states of all samples at the current window boundary, and the way over a window to the next one.

Which chains are kept, and what for, is told by a Regime (regime.py), where they are kept by a Store (store.py). The
halves of a parallel layer need one array of hidden states more for each chain meanwhile, windows that overlap one for
the dense chain. Where targets are recomputed for each batch (targets.py), the dense chain steps like the sparse one.

Shapes: S samples (calibration first, then held-out), B samples of a batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from lit_recon.activations.boundary import Boundary, check_state, correct, state_of
from lit_recon.activations.propagation import Regime
from lit_recon.activations.store import MemoryStore, Store, on_device
from lit_recon.activations.teacher import DenseWindow
from lit_recon.data.packing import PADDING
from lit_recon.model.decoder import Decoder, LayerCall
from lit_recon.model.windows import Window
from lit_recon.system.device import Compute

PARTS = ("calibration", "held_out")  # of the samples
CALIBRATION = PARTS[:1]
Watching = Callable[[str], AbstractContextManager]  # makes a context for the part of the samples that passes
Forward = Callable[..., Tensor]  # of hidden states and calls


def watching_nothing(part: str) -> AbstractContextManager:
    """A pass that nothing watches."""
    return nullcontext()


class Chain:
    """Hidden states at the current boundary, and what the window that starts there is trained on.

    Args:
        decoder: Embeds the tokens and knows every layer's arguments.
        tokens_ST: Calibration samples, then held-out samples; PADDING where a sample holds no text.
        num_samples: How many of them are for calibration.
        batch_size: Samples per pass.
        compute: Device and precision.
        regime: Which chains are kept and what they serve for.
        store: Where they are kept; None for memory.
        recompute: Whether targets are recomputed for each batch rather than kept.

    Attributes:
        valid_ST: Where samples hold text; None if all do everywhere.
        teacher: Where targets are recomputed, from `dense_pass` to `advance`: the dense window, which makes them.
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
        store: Store | None = None,
        recompute: bool = False,
    ) -> None:
        self.decoder = decoder
        self.tokens_ST = tokens_ST
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.compute = compute
        self.regime = regime or Regime()
        self.store = store or MemoryStore()
        self.recompute = recompute
        is_text_ST = tokens_ST != PADDING
        self.valid_ST = None if is_text_ST.all() else is_text_ST
        embedded_STD = self._embedded()
        self._shape = embedded_STD.shape
        self.dense = Boundary(embedded_STD) if self.regime.needs_dense else None
        self.sparse = (
            Boundary(self.copy(embedded_STD) if self.dense else embedded_STD) if self.regime.needs_sparse else None
        )
        # The dense chain's next value if there is one, else targets.
        self._outputs_STD = None if recompute else self.store.zeros(self._shape)
        self._own_targets_STD: Tensor | None = None  # where they are not these outputs
        self._targets_STD = self._outputs_STD
        self._mixed_STD = self.store.zeros(self._shape) if self.regime.inputs == "mix" else None
        self.teacher: DenseWindow | None = None

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

    @property
    def targets_STD(self) -> Tensor:
        """What the window shall output, after `dense_pass`, (S, T, D); not there where targets are recomputed."""
        assert self._targets_STD is not None, "targets are recomputed"
        return self._targets_STD

    @property
    def sources_STD(self) -> Tensor:
        """What the dense window makes targets of, (S, T, D)."""
        if self.regime.targets == "local":
            return self.inputs_STD
        assert self.dense
        return self.dense.states_STD

    def state(self) -> dict[str, Tensor]:
        """The arrays that the walk goes on from at a window boundary, by name; not copied."""
        return state_of(self._boundaries)

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Go on from where `state` was taken, of a chain with the same samples, regime and type of the store.

        Raises:
            ValueError: It was another chain's.
        """
        check_state(arrays, self._boundaries)
        for name, boundary in self._boundaries.items():
            self._each_batch(Tensor.copy_, boundary.states_STD, arrays[name])
            aside_STD = arrays.get(f"{name}_aside")
            boundary.aside_STD = None if aside_STD is None else self.copy(aside_STD)

    @property
    def _boundaries(self) -> dict[str, Boundary]:
        """Those that are there, by name."""
        return {name: one for name, one in (("dense", self.dense), ("sparse", self.sparse)) if one}

    def batches(self, first: int, last: int) -> Iterator[slice]:
        """Consecutive batches of the samples from `first` up to `last`."""
        for start in range(first, last, self.batch_size):
            yield slice(start, min(start + self.batch_size, last))

    def calls(self, rows_B: Tensor) -> list[LayerCall]:
        """Every layer's arguments for some samples, masks of padded ones included."""
        return self.decoder.calls(self.tokens_ST[rows_B])

    def copy(self, array_STD: Tensor) -> Tensor:
        """A copy in the store."""
        copy_STD = self.store.zeros(self._shape)
        self._each_batch(Tensor.copy_, copy_STD, array_STD)
        return copy_STD

    def dense_pass(self, window: Window, watching: Watching = watching_nothing) -> None:
        """Run the window, before it is pruned, over all samples: targets, the dense chain's next value, statistics.

        Args:
            window: The window with its dense weights.
            watching: Opened for the passes that the criterion shall look at.
        """
        regime = self.regime
        if self._mixed_STD is not None:
            assert self.dense and self.sparse
            self._each_batch(self._mix, self._mixed_STD, self.sparse.states_STD, self.dense.states_STD)
        # The pass for local targets on sparse inputs serves sparse statistics too; but not where an earlier window has
        # changed what this one uses: targets are of the dense window, statistics of the window as it is now.
        on_the_way = regime.targets == "local" and regime.inputs == "sparse" and not window.borrows
        on_the_way = on_the_way and not self.recompute
        with window.dense():
            if self.recompute:
                self.teacher = DenseWindow(window, self.compute)
                if regime.statistics == "dense":
                    assert self.dense
                    self.run(window, self.dense.states_STD, None, watching, CALIBRATION)
            else:
                if self.dense:
                    self._dense_outputs(window, watching if regime.statistics == "dense" else watching_nothing)
                if regime.targets == "local":
                    watched = regime.statistics == "sparse" and on_the_way
                    self.run(window, self.inputs_STD, self._own_targets(), watching if watched else watching_nothing)
        if regime.statistics == "sparse" and not on_the_way:
            assert self.sparse
            self.run(window, self.sparse.states_STD, None, watching, CALIBRATION)

    def _mix(self, mixed_BTD: Tensor, sparse_BTD: Tensor, dense_BTD: Tensor) -> None:
        """Mixed inputs."""
        torch.lerp(sparse_BTD, dense_BTD, self.regime.mix, out=mixed_BTD)

    def _dense_outputs(self, window: Window, watching: Watching) -> None:
        """The dense chain's next value, behind the layers that are kept, and the dense targets, at the window's end."""
        assert self.dense and self._outputs_STD is not None
        kept, rest = slice(0, window.kept), slice(window.kept, None)
        self.run(partial(window, layers=kept), self.dense.states_STD, self._outputs_STD, watching)
        self._targets_STD = self._outputs_STD
        if window.kept < len(window.indices):
            self.run(partial(window, layers=rest), self._outputs_STD, self._own_targets(), watching)
        elif window.branch == "second" and self.regime.corrects:
            self._correct()

    def _correct(self) -> None:
        """Have a parallel layer's second half make up for what the first one has left of the chains' difference."""
        assert self.dense and self.sparse and self._outputs_STD is not None
        assert self.dense.aside_STD is not None and self.sparse.aside_STD is not None
        share = 1 - (self.regime.mix if self.regime.inputs == "mix" else 0)
        arrays_STD = (self._own_targets(), self._outputs_STD, self.dense.aside_STD, self.sparse.aside_STD)
        self._each_batch(partial(correct, share=share), *arrays_STD)

    def _own_targets(self) -> Tensor:
        """Memory for targets that are not the dense chain's next value."""
        if self._own_targets_STD is None:
            self._own_targets_STD = self.store.zeros(self._shape) if self.dense else self._outputs_STD
        self._targets_STD = self._own_targets_STD
        return self.targets_STD

    def advance(self, window: Window) -> None:
        """Step over the window, which is reconstructed now, to the end of the layers that it keeps."""
        if self.teacher:
            if self.dense:
                with self.teacher.installed():
                    self.step_over(self.dense, window)
            self.teacher = None
        elif self.dense:
            assert self._outputs_STD is not None
            free_STD = self.dense.step(window.branch, self._outputs_STD, self._each_batch)
            self._outputs_STD = self.store.zeros(self._shape) if free_STD is None else free_STD
        if self.sparse:
            self.step_over(self.sparse, window)

    def step_over(self, boundary: Boundary, window: Window) -> None:
        """Run a window as it is now from a boundary, and put the boundary at the end of the layers that it keeps."""
        inputs_STD = boundary.states_STD
        outputs_STD = self.store.zeros(self._shape) if window.branch == "first" else inputs_STD
        self.run(partial(window, layers=slice(0, window.kept)), inputs_STD, outputs_STD)
        boundary.step(window.branch, outputs_STD, self._each_batch)

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
                    self.store.prefetch(inputs_STD, slice(rows.stop, rows.stop + self.batch_size))
                    self._run_rows(forward, inputs_STD, outputs_STD, rows)
                    self.store.release(inputs_STD, rows)
                    if outputs_STD is not None:
                        self.store.release(outputs_STD, rows)

    def _run_rows(self, forward: Forward, inputs_STD: Tensor, outputs_STD: Tensor | None, rows: slice) -> None:
        """One batch; padded samples one by one and cut to their text, so that no observer ever sees a pad position."""
        for part, length in self._unpadded(rows):
            inputs_BTD = on_device(inputs_STD[part, :length], self.compute.device)
            with self.compute.autocast():
                outputs_BTD = forward(inputs_BTD, self.decoder.calls(self.tokens_ST[part, :length])).float()
            if outputs_STD is not None:
                outputs_STD[part, :length] = outputs_BTD
                outputs_STD[part, length:] = 0  # not what happened to be there: a resumed walk has other memory

    def _unpadded(self, rows: slice) -> Iterator[tuple[slice, int]]:
        """The batch as it is; or, where it holds padding, each of its samples and its length."""
        if self.valid_ST is None or self.valid_ST[rows].all():
            yield rows, self.tokens_ST.shape[1]
            return
        for row in range(rows.start, rows.stop):
            yield slice(row, row + 1), int(self.valid_ST[row].sum())

    def _embedded(self) -> Tensor:
        """The embeddings of all samples, in the store."""
        embedded_STD: Tensor | None = None
        for rows in self.batches(0, len(self.tokens_ST)):
            embedded_BTD = self.decoder.embed(self.tokens_ST[rows])[0]
            if embedded_STD is None:
                embedded_STD = self.store.zeros((len(self.tokens_ST), *embedded_BTD.shape[1:]))
            embedded_STD[rows] = embedded_BTD
            self.store.release(embedded_STD, rows)
        assert embedded_STD is not None
        return embedded_STD

    def _each_batch(self, change: Callable[..., object], *arrays_STD: Tensor) -> None:
        """Change the first array by the others, batch after batch."""
        for rows in self.batches(0, len(self.tokens_ST)):
            change(*(array_STD[rows] for array_STD in arrays_STD))
            for array_STD in arrays_STD:
                self.store.release(array_STD, rows)
