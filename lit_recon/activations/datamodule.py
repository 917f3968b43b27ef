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
from lit_recon.model.head import kl_divergence_sum
from lit_recon.model.windows import AnyWindow


class Batch(NamedTuple):
    """What a LightningModule gets.

    Attributes:
        inputs_BTD: What stands at the window's start.
        targets_BTD: What the window shall output.
        calls: The arguments of every layer of the model.
        valid_BT: Where samples hold text; None if all do everywhere.
        weight: Its tokens over those of a full batch of calibration samples of mean length. A mean over its tokens
            times this is their sum over a constant, so that steps do not depend on how tokens fall into batches.
    """

    inputs_BTD: Tensor
    targets_BTD: Tensor
    calls: list[LayerCall]
    valid_BT: Tensor | None = None
    weight: float = 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.inputs_BTD[..., 0].numel() if self.valid_BT is None else int(self.valid_BT.sum())

    def text(self, hidden_BTD: Tensor) -> Tensor:
        """Outputs or targets of this batch without padding: (N, D) where there is any, otherwise as they are."""
        return hidden_BTD if self.valid_BT is None else hidden_BTD[self.valid_BT]


@dataclass
class Activations:
    """Inputs and targets of one window, (S, T, D) on the CPU; batches are in float32.

    Attributes:
        inputs_STD: Inputs.
        sources_STD: Targets; their number of features may be another one. Or what `teacher` makes targets of.
        batching: How they are read.
        teacher: Recomputes targets of sources and calls; None where they are kept.
    """

    inputs_STD: Tensor
    sources_STD: Tensor
    batching: Batching
    teacher: Callable[[Tensor, list[LayerCall]], Tensor] | None = None

    trainer_settings: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_chain(cls, chain: Chain) -> "Activations":
        """Those of the window at which the chain stands, after its dense pass; no copies."""
        sources_STD = chain.sources_STD if chain.teacher else chain.targets_STD
        return cls(chain.inputs_STD, sources_STD, chain.passes.batching, chain.teacher)

    @property
    def targets_STD(self) -> Tensor:
        """Targets that are kept."""
        assert self.teacher is None, "targets are recomputed"
        return self.sources_STD

    def variance(self) -> float:
        """Variance of the calibration targets around their mean per feature: the unit of relative errors.

        Batches are joined by the pairwise update of Chan, Golub and LeVeque (1979), since not all targets may be there
        at once.
        """
        count, mean_D, squares_D = 0, torch.zeros(()), torch.zeros(())  # squares of distances to the mean
        for targets_ND in self._target_rows(0, self.batching.num_samples):
            added = len(targets_ND)
            variance_D, other_D = (one.double().cpu() for one in torch.var_mean(targets_ND, 0, correction=0))
            total, distance_D = count + added, other_D - mean_D
            mean_D = mean_D + distance_D * (added / total)
            squares_D = squares_D + variance_D * added + distance_D.square() * (count * added / total)
            count = total
        return squares_D.mean().item() / count

    def _target_rows(self, first: int, last: int) -> Iterator[Tensor]:
        """Targets of the samples from `first` up to `last` without padding, (N, D), batch after batch."""
        if self.teacher:
            for batch in self.batches(first, last):
                yield batch.text(batch.targets_BTD).flatten(0, -2)
            return
        for samples in self.batching.batches(first, last):
            yield self.rows(self.sources_STD, samples)
            self.batching.store.release(self.sources_STD, samples)

    def rows(self, hidden_STD: Tensor, samples: slice) -> Tensor:
        """Inputs or targets of some samples as rows without padding, (N, D) in float32."""
        chosen_STD = hidden_STD[samples].float()
        valid_ST = self.batching.valid_ST
        return chosen_STD.flatten(0, 1) if valid_ST is None else chosen_STD[valid_ST[samples]]

    def errors(self, window: AnyWindow, variance: float) -> tuple[float, float]:
        """Errors of the window on as many calibration samples as there are held-out ones, and on those.

        Relative errors: mean squared error over `variance`. For a window whose loss is on the logits: the Kullback-
        Leibler divergence from the dense model's, in nats per token.
        """
        total = len(self.inputs_STD)
        some = min(self.batching.num_samples, total - self.batching.num_samples)
        return self.error(window, 0, some, variance), self.error(window, self.batching.num_samples, total, variance)

    @torch.no_grad()
    def error(self, window: AnyWindow, first: int, last: int, variance: float) -> float:
        """The error on the samples from `first` up to `last`."""
        total = torch.zeros((), dtype=torch.float64, device=self.batching.compute.device)
        count = 0
        for batch in self.batches(first, last):
            with self.batching.compute.autocast():
                outputs_BTD = window(batch.inputs_BTD, batch.calls)
            outputs, targets = batch.text(outputs_BTD).float(), batch.text(batch.targets_BTD)
            if window.head is None:
                total += (outputs - targets).square().sum(dtype=torch.float64)
                count += targets.numel()
            else:
                total += kl_divergence_sum(outputs, targets, head=window.head)
                count += targets.numel() // targets.shape[-1]
        return total.item() / count / (variance if window.head is None else 1)

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
            targets_BTD = self.teacher(targets_BTD, calls)
        tokens = inputs_BTD[..., 0].numel() if valid_BT is None else int(valid_BT.sum())
        valid_BT = None if valid_BT is None or valid_BT.all() else valid_BT.to(device)
        return Batch(inputs_BTD, targets_BTD, calls, valid_BT, tokens / self.tokens_per_batch)

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
