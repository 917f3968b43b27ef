"""The chain: hidden states of all calibration samples at the current window boundary, and the DataModule over them.

The chain starts behind the embeddings. One dense pass of a window gives its targets and what the criterion gathers;
with dense inputs the targets are the next window's inputs, so that nothing is computed twice and no window depends on
another one's result.

Shapes: S samples (calibration first, then held-out), B samples of a batch, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from lit_recon.blocks import Decoder, LayerCall
from lit_recon.compute import Compute
from lit_recon.windows import Window


class Batch(NamedTuple):
    """What a LightningModule gets: hidden states (B, T, D) at the window's start and dense ones at its end."""

    inputs_BTD: Tensor
    targets_BTD: Tensor
    calls: list[LayerCall]


class Chain:
    """Dense hidden states of all samples at the current boundary, on the CPU, and the way to the next one.

    Args:
        decoder: Embeds the tokens and knows every layer's arguments.
        tokens_ST: Calibration samples, then held-out samples.
        num_samples: How many of them are for calibration.
        batch_size: Samples per pass.
        compute: Device and precision.
    """

    def __init__(
        self, decoder: Decoder, tokens_ST: Tensor, *, num_samples: int, batch_size: int, compute: Compute
    ) -> None:
        self.decoder = decoder
        self.tokens_ST = tokens_ST
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.compute = compute
        pin = compute.device.type == "cuda"  # copies to a GPU are asynchronous from pinned memory only
        inputs_STD = torch.cat([decoder.embed(batch_BT)[0].cpu() for batch_BT in tokens_ST.split(batch_size)])
        self.inputs_STD = inputs_STD.pin_memory() if pin else inputs_STD
        self.targets_STD = torch.empty_like(self.inputs_STD, pin_memory=pin)

    @property
    def num_held_out(self) -> int:
        """Samples that are never trained on."""
        return len(self.tokens_ST) - self.num_samples

    def batches(self, first: int, last: int) -> Iterator[slice]:
        """Consecutive batches of the samples from `first` up to `last`."""
        for start in range(first, last, self.batch_size):
            yield slice(start, min(start + self.batch_size, last))

    @torch.no_grad()  # not inference_mode: its tensors cannot be inputs or targets of training
    def outputs(self, window: Window, rows: slice) -> Tensor:
        """The window's outputs, (B, T, D), for these rows of the chain."""
        inputs_BTD = self.inputs_STD[rows].to(self.compute.device, non_blocking=True)
        with self.compute.autocast():
            return window(inputs_BTD, self.decoder.calls(self.tokens_ST[rows])).float()

    def dense_pass(self, window: Window, observing: AbstractContextManager) -> None:
        """Run the dense window over all samples: the targets.

        Args:
            window: The window with its dense weights.
            observing: Held open while calibration samples pass, and only then: statistics never see held-out ones.
        """
        with observing:
            for rows in self.batches(0, self.num_samples):
                self.targets_STD[rows] = self.outputs(window, rows)
        for rows in self.batches(self.num_samples, len(self.tokens_ST)):
            self.targets_STD[rows] = self.outputs(window, rows)

    def advance(self) -> None:
        """Step over the window: its targets become the next one's inputs, its inputs' memory the next one's targets."""
        self.inputs_STD, self.targets_STD = self.targets_STD, self.inputs_STD

    def target_variance(self) -> float:
        """Variance of the calibration targets around their mean per feature: the unit of relative errors."""
        targets_STD = self.targets_STD[: self.num_samples]
        return targets_STD.flatten(0, 1).var(0, correction=0).mean().item()


class _Rows(Dataset):
    """Batches of a chain by their row indices: one fancy index per batch rather than one item per sample."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return self.chain.tokens_ST[rows], self.chain.inputs_STD[rows], self.chain.targets_STD[rows]


class ActivationDataModule(LightningDataModule):
    """The cached activations of one window.

    Args:
        chain: The chain at the window's start, with the window's targets.
        batch_size: Samples per training batch.
        seed: Seed of the order of the training samples.
    """

    def __init__(self, chain: Chain, *, batch_size: int, seed: int) -> None:
        super().__init__()
        self.chain = chain
        self.batch_size = batch_size
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        """Calibration samples, in an order of their own each epoch."""
        order = RandomSampler(range(self.chain.num_samples), generator=torch.Generator().manual_seed(self.seed))
        return self._loader(order)

    def val_dataloader(self) -> DataLoader:
        """Held-out samples, in order."""
        return self._loader(range(self.chain.num_samples, len(self.chain.tokens_ST)))

    def transfer_batch_to_device(self, batch: tuple, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch and join the layers' arguments to it, which are on the device already."""
        tokens_BT, inputs_BTD, targets_BTD = batch
        return Batch(
            inputs_BTD.to(device, non_blocking=True),
            targets_BTD.to(device, non_blocking=True),
            self.chain.decoder.calls(tokens_BT),
        )

    def _loader(self, order: Iterable[int]) -> DataLoader:
        batches = BatchSampler(order, self.batch_size, drop_last=False)
        pin = self.chain.compute.device.type == "cuda"
        return DataLoader(_Rows(self.chain), sampler=batches, batch_size=None, pin_memory=pin)
