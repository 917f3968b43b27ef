"""Passes of any module over all samples, batch after batch: the hidden states in, the outputs into another array.

Padded samples run one by one, cut to their text, so that no observer ever sees a pad position.

Shapes: S samples (calibration first, then held-out), B samples of a batch, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lit_recon.activations.store import MemoryStore, Store
from lit_recon.data.packing import PADDING
from lit_recon.model.decoder import Decoder, LayerCall
from lit_recon.system.device import Compute
from lit_recon.system.finite import FiniteTokens, NotFinite, first_not_finite
from lit_recon.system.transfer import put

SAMPLE_PARTS = ("calibration", "held_out")  # of the samples
CALIBRATION = SAMPLE_PARTS[:1]
Forward = Callable[..., Tensor]  # of hidden states and calls


class Observer(Protocol):
    """Looks at what happens in a pass, for example at the inputs of matrices."""

    def observing(self, part: str) -> AbstractContextManager:
        """A context around the samples of a part, one of SAMPLE_PARTS."""


@dataclass
class Batching:
    """How samples are read: in which batches, with which arguments of the layers, to which device.

    Attributes:
        num_samples: How many samples, the first ones, are for calibration.
        batch_size: Samples per batch.
        compute: Device and precision.
        calls: The arguments of every layer for the samples with some indices.
        pass_size: Samples per batch of passes in which nothing is trained; None: as many.
        valid_ST: Where samples hold text; None if all do everywhere.
        store: Where arrays of samples are kept.
    """

    num_samples: int
    batch_size: int
    compute: Compute
    calls: Callable[[Tensor], list[LayerCall]]
    valid_ST: Tensor | None = None
    store: Store = field(default_factory=MemoryStore)
    pass_size: int | None = None

    def batches(self, first: int, last: int) -> Iterator[slice]:
        """Consecutive batches of the samples from `first` up to `last`."""
        yield from _slices(first, last, self.batch_size)

    def pass_batches(self, first: int, last: int) -> Iterator[slice]:
        """The same of a pass in which nothing is trained."""
        yield from _slices(first, last, self.samples_per_pass)

    @property
    def samples_per_pass(self) -> int:
        """Samples per batch of passes in which nothing is trained."""
        return self.pass_size or self.batch_size


def _slices(first: int, last: int, size: int) -> Iterator[slice]:
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


class TurnObserver(Observer, Protocol):
    """Looks at what happens in passes over several arrays in turn.

    Attributes:
        turn: Index of the array that is run now.
    """

    turn: int


class Energies(NamedTuple):
    """Energy of each token's update, gathered in a pass: the mean over features of (output - start)^2.

    Attributes:
        by_token_ST: Where they go, float32 on the device; zero at padding.
        starts_STD: Hidden states from which the update is counted; mostly the pass's inputs.
    """

    by_token_ST: Tensor
    starts_STD: Tensor


class Passes:
    """Passes over all samples.

    Args:
        decoder: Embeds the tokens and knows every layer's arguments.
        tokens_ST: Calibration samples, then held-out samples; PADDING where a sample holds no text.
        num_samples: How many of them are for calibration.
        batch_size: Samples per batch.
        compute: Device and precision.
        store: Where arrays are kept; None for memory.
        pass_size: Samples per batch of passes in which nothing is trained; None: as many.

    Attributes:
        batching: How samples are read.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokens_ST: Tensor,
        *,
        num_samples: int,
        batch_size: int,
        compute: Compute,
        store: Store | None = None,
        pass_size: int | None = None,
    ) -> None:
        is_text_ST = tokens_ST != PADDING
        self._finite = FiniteTokens(is_read_late=compute.device.type == "cuda")
        self.decoder, self.tokens_ST = decoder, tokens_ST
        self.batching = Batching(
            num_samples=num_samples,
            batch_size=batch_size,
            compute=compute,
            calls=self._calls,
            valid_ST=None if is_text_ST.all() else is_text_ST,
            store=store or MemoryStore(),
            pass_size=pass_size,
        )

    @property
    def compute(self) -> Compute:
        """Device and precision."""
        return self.batching.compute

    @property
    def store(self) -> Store:
        """Where arrays are kept."""
        return self.batching.store

    @property
    def num_held_out(self) -> int:
        """Samples that are never trained on."""
        return len(self.tokens_ST) - self.batching.num_samples

    def embedded(self) -> Tensor:
        """A new array with the embeddings of all samples, (S, T, D).

        Raises:
            NotFinite: An embedding is not finite.
        """
        embedded_STD: Tensor | None = None
        for rows in self.batching.batches(0, len(self.tokens_ST)):
            embedded_BTD = self.decoder.embed(self.tokens_ST[rows])[0]
            if found := first_not_finite(embedded_BTD):
                row, position = rows.start + found[0], found[1]
                raise NotFinite(
                    f"the embedding of token id {int(self.tokens_ST[row, position])} is not finite (first in "
                    f"{self.place(row, position)}): the model's weights are damaged, or too large for their dtype; use "
                    "another copy of the model, another model.dtype, or text without that token."
                )
            if embedded_STD is None:
                embedded_STD = self.store.zeros((len(self.tokens_ST), *embedded_BTD.shape[1:]))
            put(embedded_STD[rows], embedded_BTD)
            self.store.release(embedded_STD, rows)
        assert embedded_STD is not None
        self.store.settle()
        return embedded_STD

    def place(self, row: int, position: int) -> str:
        """A token in words, by the index of its sample among all and its position there."""
        split = self.batching.num_samples
        sample = f"calibration sample {row}" if row < split else f"held-out sample {row - split}"
        return f"{sample}, position {position} (token id {int(self.tokens_ST[row, position])})"

    def copy(self, array_STD: Tensor) -> Tensor:
        """A copy of an array in the store."""
        copy_STD = self.store.zeros(array_STD.shape)
        self.each_batch(Tensor.copy_, copy_STD, array_STD)
        return copy_STD

    def each_batch(self, change: Callable[..., object], *arrays_STD: Tensor) -> None:
        """Change the first array by the others, batch after batch."""
        self.store.settle()
        for rows in self.batching.batches(0, len(self.tokens_ST)):
            change(*(array_STD[rows] for array_STD in arrays_STD))
            for array_STD in arrays_STD:
                self.store.release(array_STD, rows)

    @torch.no_grad()  # not inference_mode: its tensors cannot be inputs or targets of training
    def run(
        self,
        forward: Forward,
        inputs_STD: Tensor,
        outputs_STD: Tensor | None,
        observers: Sequence[Observer] = (),
        parts: Sequence[str] = SAMPLE_PARTS,
        *,
        energies: Energies | None = None,
    ) -> None:
        """Run a window, or some layers of it, over all samples.

        Args:
            forward: Makes outputs of hidden states and calls.
            inputs_STD: What it is run on.
            outputs_STD: Where the outputs go; may be `inputs_STD`, and None drops them.
            observers: Look at the calibration samples, and at the held-out ones.
            parts: Which of them to run.
            energies: Takes the energy of each token's update.

        Raises:
            NotFinite: An output is not finite.
        """
        for part in parts:
            with ExitStack() as stack:
                for observer in observers:
                    stack.enter_context(observer.observing(part))
                for rows in self._batches_of(part):
                    self.store.prefetch(inputs_STD, slice(rows.stop, rows.stop + self.batching.samples_per_pass))
                    self._run_rows(forward, inputs_STD, outputs_STD, rows, energies)
                    self.store.release(inputs_STD, rows)
                    if outputs_STD is not None:
                        self.store.release(outputs_STD, rows)
                self._check_finite()
        self.store.settle()

    @torch.no_grad()
    def run_in_turn(self, forward: Forward, arrays_STD: Sequence[Tensor], observer: TurnObserver) -> None:
        """Run a window over several arrays of hidden states of the same samples, each batch of all before the next.

        Args:
            forward: Makes outputs, which are dropped, of hidden states and calls.
            arrays_STD: What it is run on.
            observer: Looks at all samples.

        Raises:
            NotFinite: An output is not finite.
        """
        for part in SAMPLE_PARTS:
            with observer.observing(part):
                for rows in self._batches_of(part):
                    for observer.turn, states_STD in enumerate(arrays_STD):
                        self.store.prefetch(states_STD, slice(rows.stop, rows.stop + self.batching.samples_per_pass))
                        self._run_rows(forward, states_STD, None, rows, None)
                        self.store.release(states_STD, rows)
                self._check_finite()
        self.store.settle()

    def _batches_of(self, part: str) -> Iterator[slice]:
        """The batches of a part of the samples."""
        split = self.batching.num_samples
        return self.batching.pass_batches(*((0, split) if part == "calibration" else (split, len(self.tokens_ST))))

    def _run_rows(
        self,
        forward: Forward,
        inputs_STD: Tensor,
        outputs_STD: Tensor | None,
        rows: slice,
        energies: Energies | None,
    ) -> None:
        """One batch, without its padding."""
        for part, length in self._unpadded(rows):
            inputs_BTD = self.store.load(inputs_STD, part, self.compute.device)[:, :length]
            with self.compute.autocast():
                outputs_BTD = forward(inputs_BTD, self.decoder.calls(self.tokens_ST[part, :length])).float()
            self._finite.look(outputs_BTD, part.start)
            if not self._finite.is_read_late:
                self._check_finite()
            if energies is not None:  # before the outputs may take the inputs' place
                starts_BTD = inputs_BTD
                if energies.starts_STD is not inputs_STD:
                    starts_BTD = self.store.load(energies.starts_STD, part, self.compute.device)[:, :length]
                energies.by_token_ST[part, :length] = (outputs_BTD - starts_BTD).square().mean(-1)
            if outputs_STD is not None:
                put(outputs_STD[part, :length], outputs_BTD)
                outputs_STD[part, length:] = 0  # not what happened to be there: a resumed walk has other memory

    def _check_finite(self) -> None:
        """Raise a NotFinite for the first output that is not finite, of those that were looked at."""
        if found := self._finite.first():
            raise NotFinite(f"outputs are not finite, first in {self.place(*found)}")

    def _unpadded(self, rows: slice) -> Iterator[tuple[slice, int]]:
        """The batch as it is; or, where it holds padding, each of its samples and its length."""
        valid_ST = self.batching.valid_ST
        if valid_ST is None or valid_ST[rows].all():
            yield rows, self.tokens_ST.shape[1]
            return
        for row in range(rows.start, rows.stop):
            yield slice(row, row + 1), int(valid_ST[row].sum())

    def _calls(self, rows_B: Tensor) -> list[LayerCall]:
        """Every layer's arguments for some samples, masks of padded ones included."""
        return self.decoder.calls(self.tokens_ST[rows_B])
