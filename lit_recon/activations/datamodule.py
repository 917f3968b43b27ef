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
from lit_recon.activations.store import on_device
from lit_recon.model.decoder import LayerCall
from lit_recon.model.errors import Errors, unit_of
from lit_recon.model.head import kl_divergences
from lit_recon.model.windows import AnyWindow


class Batch(NamedTuple):
    """What a LightningModule gets.

    Attributes:
        inputs_BTD: What stands at the window's start.
        targets_BTD: What the window shall output.
        calls: The arguments of every layer of the model.
        energies_BT: Energy of the dense window's update of each token: the mean over features of (output - input)^2;
            of a matrix, of its product.
        valid_BT: Where samples hold text; None if all do everywhere.
        weight: Its tokens over those of a full batch of calibration samples of mean length. A mean over its tokens
            times this is their sum over a constant, so that steps do not depend on how tokens fall into batches.
    """

    inputs_BTD: Tensor
    targets_BTD: Tensor
    calls: list[LayerCall]
    energies_BT: Tensor
    valid_BT: Tensor | None = None
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.inputs_BTD[..., 0].numel() if self.valid_BT is None else int(self.valid_BT.sum())

    def text(self, by_token: Tensor) -> Tensor:
        """What this batch has for each token, (B, T, ...), without padding: (N, ...)."""
        return by_token.flatten(0, 1) if self.valid_BT is None else by_token[self.valid_BT]


@dataclass
class Activations:
    """Inputs and targets of one window, (S, T, D) on the CPU; batches are in float32.

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
        """Some samples, on a device."""
        return self.join(rows_B, *self.read(rows_B.tolist()), device)

    def prefetch(self, rows: Sequence[int]) -> None:
        """Tell the store that these samples come next."""
        for array_STD in (self.inputs_STD, self.sources_STD):
            self.batching.store.prefetch(array_STD, rows)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of inputs and sources of some samples, as they are stored; where both are the same, one copy."""
        inputs_BTD = self.inputs_STD[rows]
        self.batching.store.release(self.inputs_STD, rows)
        if self.sources_STD is self.inputs_STD:
            return inputs_BTD, inputs_BTD
        sources_BTD = self.sources_STD[rows]
        self.batching.store.release(self.sources_STD, rows)
        return inputs_BTD, sources_BTD

    def join(self, rows_B: Tensor, inputs_BTD: Tensor, sources_BTD: Tensor, device: torch.device) -> Batch:
        """A batch on a device, with what is not stored for each sample: the layers' arguments and what is padding."""
        same = self.sources_STD is self.inputs_STD
        valid_BT = None if self.batching.valid_ST is None else self.batching.valid_ST[rows_B]
        calls = self.batching.calls(rows_B)
        inputs_BTD = on_device(inputs_BTD, device)
        targets_BTD = inputs_BTD if same else on_device(sources_BTD, device)
        if self.teacher:
            starts_BTD, targets_BTD = targets_BTD, self.teacher(targets_BTD, calls)
            energies_BT = (targets_BTD - starts_BTD).square().mean(-1)
        else:
            assert self.energies_ST is not None
            energies_BT = self.energies_ST[rows_B].to(device)
        tokens = inputs_BTD[..., 0].numel() if valid_BT is None else int(valid_BT.sum())
        valid_BT = None if valid_BT is None or valid_BT.all() else valid_BT.to(device)
        return Batch(inputs_BTD, targets_BTD, calls, energies_BT, valid_BT, tokens / self.tokens_per_batch)

    @cached_property
    def tokens_per_batch(self) -> float:
        """Tokens of a full batch of calibration samples of mean length, without padding."""
        split, valid_ST = self.batching.num_samples, self.batching.valid_ST
        tokens = self.inputs_STD.shape[1] if valid_ST is None else int(valid_ST[:split].sum()) / split
        return self.batching.batch_size * tokens

    def data_module(self, seed: int) -> "ActivationDataModule":
        """Serves them to a Trainer."""
        return ActivationDataModule(self, seed=seed)


class _BatchDataset(Dataset):
    """Batches by their row indices: one fancy index per batch rather than one item per sample."""

    def __init__(self, activations: Activations) -> None:
        self.activations = activations

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tensor(rows), *self.activations.read(rows)


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

    def transfer_batch_to_device(self, batch: tuple, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch and join the layers' arguments to it, which are on the device already."""
        rows_B, inputs_BTD, sources_BTD = batch
        return self.activations.join(rows_B, inputs_BTD, sources_BTD, device)

    def _loader(self, order: Iterable[int]) -> DataLoader:
        batching = self.activations.batching
        batches = BatchSampler(order, batching.batch_size, drop_last=False)
        ahead = _Prefetching(batches, self.activations.prefetch)
        pin = batching.compute.device.type == "cuda"
        return DataLoader(_BatchDataset(self.activations), sampler=ahead, batch_size=None, pin_memory=pin)
