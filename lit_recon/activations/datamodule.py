"""The cached activations that one window is trained on, and the LightningDataModule over them.

For most windows they are hidden states of the chain (chain.py); for a single matrix they are what it is multiplied by,
observed in a pass of its layer (matrix_inputs.py). Targets may be recomputed for each batch (teacher.py).

Shapes: S samples (calibration first, then held-out), B samples of a batch, T positions, D features, N rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

from lit_recon.activations.chain import Chain
from lit_recon.activations.passes import Batching
from lit_recon.model.decoder import LayerCall
from lit_recon.model.errors import Errors, unit_of
from lit_recon.model.head import kl_divergences
from lit_recon.model.windows import AnyWindow
from lit_recon.system.transfer import moved, rows_to


class Batch(NamedTuple):
    """What a LightningModule gets.

    Attributes:
        inputs_BTD: What stands at the window's start.
        targets_BTD: What the window shall output.
        calls: The arguments of every layer of the model.
        energies_BT: Energy of the dense window's update of each token: the mean over features of (output - input)^2;
            of a matrix, of its product.
        valid_BT: Where samples hold text; None if all do everywhere.
        places_N: Where text stands among all B T positions; None if `valid_BT` is, or tells it.
        weight: Its tokens over those of a full batch of calibration samples of mean length. A mean over its tokens
            times this is their sum over a constant, so that steps do not depend on how tokens fall into batches.
    """

    inputs_BTD: Tensor
    targets_BTD: Tensor
    calls: list[LayerCall]
    energies_BT: Tensor
    valid_BT: Tensor | None = None
    weight: float = 1.0
    places_N: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        if self.places_N is not None:  # else a GPU would be asked
            return len(self.places_N)
        return self.inputs_BTD[..., 0].numel() if self.valid_BT is None else int(self.valid_BT.sum())

    def text(self, by_token: Tensor) -> Tensor:
        """What this batch has for each token, (B, T, ...), without padding: (N, ...)."""
        if self.places_N is not None:
            return by_token.flatten(0, 1).index_select(0, self.places_N)
        return by_token.flatten(0, 1) if self.valid_BT is None else by_token[self.valid_BT]


@dataclass
class Activations:
    """Inputs and targets of one window, (S, T, D) where the store keeps them; batches are in float32.

    Attributes:
        inputs_STD: Inputs.
        sources_STD: Targets; their number of features may be another one. Or what `teacher` makes targets of.
        batching: How they are read.
        energies_ST: Energy of the dense update of each token, of calibration samples at least; None where only the
            teacher shows it.
        teacher: Recomputes targets of sources and calls; None where they are kept.
    """

    inputs_STD: Tensor
    sources_STD: Tensor
    batching: Batching
    energies_ST: Tensor | None
    teacher: Callable[[Tensor, list[LayerCall]], Tensor] | None = None

    trainer_settings: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_chain(cls, chain: Chain) -> "Activations":
        """Those of the window at which the chain stands, after its dense pass; no copies."""
        sources_STD = chain.sources_STD if chain.teacher else chain.targets_STD
        return cls(chain.inputs_STD, sources_STD, chain.passes.batching, chain.energies_ST, chain.teacher)

    @property
    def targets_STD(self) -> Tensor:
        """Targets that are kept."""
        assert self.teacher is None, "targets are recomputed"
        return self.sources_STD

    def unit(self) -> float:
        """Median over calibration tokens of the energy of the window's dense update: the unit of errors."""
        split, valid_ST = self.batching.num_samples, self.batching.valid_ST
        if self.energies_ST is None:
            return unit_of(torch.cat([batch.text(batch.energies_BT).cpu() for batch in self.batches(0, split)]))
        energies_ST = self.energies_ST[:split]
        return unit_of(energies_ST.flatten() if valid_ST is None else energies_ST[valid_ST[:split]])

    def rows(self, hidden_STD: Tensor, samples: slice) -> Tensor:
        """Inputs or targets of some samples as rows without padding, (N, D) in float32."""
        chosen_STD = hidden_STD[samples].float()
        valid_ST = self.batching.valid_ST
        return chosen_STD.flatten(0, 1) if valid_ST is None else chosen_STD[valid_ST[samples]]

    def errors(self, window: AnyWindow, unit: float) -> tuple[Errors, Errors]:
        """Errors of the window on as many calibration samples as there are held-out ones, and on those.

        Of each token: the squared error, a mean over features, over `unit`. For a window whose loss is on the logits:
        the Kullback-Leibler divergence from the dense model's, in nats.
        """
        return self.calibration_errors(window, unit), self.held_out_errors(window, unit)

    def calibration_errors(self, window: AnyWindow, unit: float) -> Errors:
        """The first of `errors`."""
        return self._errors(window, 0, min(self.batching.num_samples, self.num_held_out), unit)

    def held_out_errors(self, window: AnyWindow, unit: float) -> Errors:
        """The second of `errors`."""
        return self._errors(window, self.batching.num_samples, len(self.inputs_STD), unit)

    @property
    def num_held_out(self) -> int:
        """Samples that are never trained on."""
        return len(self.inputs_STD) - self.batching.num_samples

    @torch.no_grad()
    def _errors(self, window: AnyWindow, first: int, last: int, unit: float) -> Errors:
        """Errors of the window on the samples from `first` up to `last`."""
        found = []
        for batch in self.batches(first, last):
            with self.batching.compute.autocast():
                outputs_BTD = window(batch.inputs_BTD, batch.calls)
            found.append(self.by_token(window, batch, outputs_BTD, unit))
        return Errors.from_tokens(torch.cat(found))

    def by_token(self, window: AnyWindow, batch: Batch, outputs_BTD: Tensor, unit: float) -> Tensor:
        """Error of each token of a batch, (N), given what the window outputs for it, as `errors` says."""
        return self._by_token(window, batch, batch.text(outputs_BTD).float(), unit)

    def _by_token(self, window: AnyWindow, batch: Batch, outputs_ND: Tensor, unit: float) -> Tensor:
        """Error of each token of a batch, (N)."""
        targets_ND = batch.text(batch.targets_BTD)
        if window.head is None:
            return (outputs_ND - targets_ND).square().mean(-1) / unit
        return kl_divergences(outputs_ND, targets_ND, head=window.head)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The samples from `first` up to `last` in order, on the device."""
        for rows in self.batching.batches(first, last):
            self.prefetch(range(rows.stop, min(rows.stop + self.batching.batch_size, last)))
            yield self.batch(torch.arange(rows.start, rows.stop), self.batching.compute.device)

    def batch(self, rows_B: Tensor, device: torch.device) -> Batch:
        """Some samples on a device, with what is not stored for each: the layers' arguments and what is padding."""
        rows, valid_ST = rows_B.tolist(), self.batching.valid_ST
        valid_BT = None if valid_ST is None else valid_ST[rows_B]
        calls = self.batching.calls(rows_B)
        inputs_BTD = self._load(self.inputs_STD, rows, device)
        targets_BTD = inputs_BTD if self.sources_STD is self.inputs_STD else self._load(self.sources_STD, rows, device)
        if self.teacher:
            starts_BTD, targets_BTD = targets_BTD, self.teacher(targets_BTD, calls)
            energies_BT = (targets_BTD - starts_BTD).square().mean(-1)
        else:
            assert self.energies_ST is not None
            energies_BT = rows_to(self.energies_ST, rows, device)
        tokens = inputs_BTD[..., 0].numel() if valid_BT is None else int(valid_BT.sum())
        places_N = places_of(valid_BT, device)
        valid_BT = None if places_N is None or valid_BT is None else moved(valid_BT, device)
        return Batch(inputs_BTD, targets_BTD, calls, energies_BT, valid_BT, tokens / self.tokens_per_batch, places_N)

    def _load(self, array_STD: Tensor, rows: list[int], device: torch.device) -> Tensor:
        """Some samples of an array in float32, which are not needed again soon."""
        loaded_BTD = self.batching.store.load(array_STD, rows, device)
        self.batching.store.release(array_STD, rows)
        return loaded_BTD

    def prefetch(self, rows: Sequence[int]) -> None:
        """Tell the store that these samples come next."""
        for array_STD in (self.inputs_STD, self.sources_STD):
            self.batching.store.prefetch(array_STD, rows)

    @cached_property
    def tokens_per_batch(self) -> float:
        """Tokens of a full batch of calibration samples of mean length, without padding."""
        split, valid_ST = self.batching.num_samples, self.batching.valid_ST
        tokens = self.inputs_STD.shape[1] if valid_ST is None else int(valid_ST[:split].sum()) / split
        return self.batching.batch_size * tokens

    def data_module(self, seed: int) -> "ActivationDataModule":
        """Serves them to a Trainer."""
        return ActivationDataModule(self, seed=seed)


def places_of(valid_BT: Tensor | None, device: torch.device) -> Tensor | None:
    """Where text stands among all positions, (N) on a device; None where it stands everywhere.

    Args:
        valid_BT: Where that is, on the CPU: a GPU would be waited for to learn how many there are.
        device: Where the places go.
    """
    if valid_BT is None or bool(valid_BT.all()):
        return None
    return moved(valid_BT.flatten().nonzero().flatten(), device)


class _Rows(Dataset):
    """Row indices of batches: what they hold is read when it is moved to the device."""

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows)


class _Prefetching(Sampler[list[int]]):
    """Batches of an order, each of them prefetched while the batch before it is in use."""

    def __init__(self, batches: BatchSampler, prefetch: Callable[[list[int]], None]) -> None:
        self.batches, self.prefetch = batches, prefetch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        now: list[int] | None = None
        for following in self.batches:
            self.prefetch(following)
            if now is not None:
                yield now
            now = following
        if now is not None:
            yield now


class ActivationDataModule(LightningDataModule):
    """The cached activations of one window.

    Args:
        activations: The activations.
        seed: Seed of the order of the training samples.
    """

    def __init__(self, activations: Activations, *, seed: int) -> None:
        super().__init__()
        self.activations = activations
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        """Calibration samples, in an order of their own each epoch."""
        samples = range(self.activations.batching.num_samples)
        order = RandomSampler(samples, generator=torch.Generator().manual_seed(self.seed))
        return self._loader(order)

    def val_dataloader(self) -> DataLoader:
        """Held-out samples, in order."""
        return self._loader(range(self.activations.batching.num_samples, len(self.activations.inputs_STD)))

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Batch:
        """The samples with some indices, on the device."""
        return self.activations.batch(batch, device)

    def teardown(self, stage: str) -> None:
        """Forget what was prefetched of samples that a fit did not come to."""
        self.activations.batching.store.settle()

    def _loader(self, order: Iterable[int]) -> DataLoader:
        batching = self.activations.batching
        batches = BatchSampler(order, batching.batch_size, drop_last=False)
        ahead = _Prefetching(batches, self.activations.prefetch)
        return DataLoader(_Rows(), sampler=ahead, batch_size=None)
