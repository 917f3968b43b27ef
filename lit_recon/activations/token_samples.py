"""Token samples on which all layers of a model are trained at once: embeddings and targets are made for each batch.

No hidden states of all samples are kept, so that memory does not grow with the text.

Shapes: S samples (calibration first, then held-out), B samples of a batch, T positions, D features, N tokens, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lit_recon.activations.datamodule import Activations, Batch, places_of
from lit_recon.activations.passes import Passes
from lit_recon.activations.store import MemoryStore
from lit_recon.activations.teacher import TeacherLayers
from lit_recon.data.packing import PADDING
from lit_recon.model.errors import unit_of
from lit_recon.model.windows import DecoderWindow, side_by_side


class TokenSamples(Activations):
    """Samples of tokens, (S, T); what is trained on them starts at the embeddings.

    Args:
        passes: Knows the samples and embeds them.
        window: All layers.
        teacher: The dense layers.
        targets: What the outputs are compared with: "tokens" (the next ones), "logits" or "states" (both made of the
            states after the last layer), or "all states".
        losses: The loss of each token (N), given outputs (N, D), targets, energies and unit: the error by which it is
            judged as well; None: squared errors in the window's unit.
        max_epochs: Passes over the samples; None: as the Trainer says.
        retraining_ST: What is trained on; None: the calibration samples of the passes.
    """

    def __init__(
        self,
        passes: Passes,
        window: DecoderWindow,
        teacher: TeacherLayers,
        *,
        targets: str,
        losses: Callable[..., Tensor] | None,
        max_epochs: int | None = None,
        retraining_ST: Tensor | None = None,
    ) -> None:
        tokens_ST, batching = passes.tokens_ST, replace(passes.batching, store=MemoryStore())
        if retraining_ST is not None:
            tokens_ST = torch.cat([retraining_ST, tokens_ST[batching.num_samples :]])
            is_text_ST = tokens_ST != PADDING
            batching.num_samples, batching.valid_ST = len(retraining_ST), None if is_text_ST.all() else is_text_ST
        if targets == "tokens":  # the last token of a sample has no next one
            batching.valid_ST = _following(tokens_ST) != PADDING
        super().__init__(tokens_ST, tokens_ST, batching, None)
        self.decoder, self.window, self.dense = passes.decoder, window, teacher
        self.targets, self.losses = targets, losses
        self.max_epochs = max_epochs
        self.idle = False  # whether batches are only counted, of a fit that is resumed

    @property
    def trainer_settings(self) -> dict[str, Any]:  # type: ignore[override]
        """What the Trainer is given besides the settings of every window's."""
        return {} if self.max_epochs is None else {"max_epochs": self.max_epochs}

    def unit(self) -> float:
        """Median energy of the whole model's update; 1 for losses in nats, or with a unit for each layer."""
        if self.targets == "states":
            return super().unit()
        if self.targets == "all states":
            self.window.units = self._units()
        return 1.0

    def _units(self) -> list[float]:
        """The unit of each layer's error: the median energy of its dense update."""
        by_layer: list[list[Tensor]] = []
        for rows in self.batching.batches(0, self.batching.num_samples):
            rows_B = torch.arange(rows.start, rows.stop)
            before_BTD, calls, valid_BT = self._embedded(rows_B, self.batching.compute.device)
            found = []
            for after_BTD in self.dense.states(before_BTD, calls):
                energies_BT = (after_BTD - before_BTD).square().mean(-1)
                found.append((energies_BT.flatten() if valid_BT is None else energies_BT[valid_BT]).cpu())
                before_BTD = after_BTD
            by_layer.append(found)
        return [unit_of(torch.cat(energies)) or 1.0 for energies in zip(*by_layer, strict=True)]

    def _by_token(self, window: Any, batch: Batch, outputs_ND: Tensor, unit: float) -> Tensor:
        """Error of each token of a batch, (N)."""
        if self.losses is None:
            return super()._by_token(window, batch, outputs_ND, unit)
        targets, energies_N = batch.text(batch.targets_BTD), batch.text(batch.energies_BT)
        return self.losses(outputs_ND, targets, energies_N=energies_N, unit=unit)

    def batch(self, rows_B: Tensor, device: torch.device) -> Batch:
        """Some samples on a device: embeddings, and targets of the dense model, or the next tokens."""
        embedded_BTD, calls, valid_BT = self._embedded(rows_B, device)
        energies_BT = torch.ones(embedded_BTD.shape[:2], device=device)
        if self.targets == "tokens":
            targets = _following(self.inputs_STD[rows_B]).to(device)
        elif self.targets == "all states":
            assert self.window.units is not None
            targets = side_by_side(list(self.dense.states(embedded_BTD, calls)), self.window.units)
        else:
            targets = self.dense(embedded_BTD, calls)
            energies_BT = (targets - embedded_BTD).square().mean(-1)
        valid_ST = self.batching.valid_ST
        places_N = None if valid_ST is None else places_of(valid_ST[rows_B], device)
        tokens = energies_BT.numel() if places_N is None else len(places_N)
        return Batch(embedded_BTD, targets, calls, energies_BT, valid_BT, tokens / self.tokens_per_batch, places_N)

    def _embedded(self, rows_B: Tensor, device: torch.device) -> tuple[Tensor, list, Tensor | None]:
        """Embeddings of some samples, every layer's arguments, and where samples hold what counts; None: everywhere."""
        hidden_BTD, calls = self.decoder.embed(self.inputs_STD[rows_B])
        valid_BT = None if self.batching.valid_ST is None else self.batching.valid_ST[rows_B]
        valid_BT = None if valid_BT is None or valid_BT.all() else valid_BT.to(device)
        return hidden_BTD.to(device), calls, valid_BT

    def data_module(self, seed: int) -> "TokenDataModule":  # type: ignore[override]
        """Serves them to a Trainer."""
        return TokenDataModule(self, seed=seed)


def _following(tokens_BT: Tensor) -> Tensor:
    """The token after each; PADDING after the last."""
    return torch.cat([tokens_BT[:, 1:], torch.full_like(tokens_BT[:, :1], PADDING)], dim=1)


class TokenDataModule(LightningDataModule):
    """Token samples for a Trainer, in plain DataLoaders, which strategies over several processes can divide.

    Args:
        samples: The samples.
        seed: Seed of the order of the training samples.
    """

    def __init__(self, samples: TokenSamples, *, seed: int) -> None:
        super().__init__()
        self.samples, self.seed = samples, seed

    def train_dataloader(self) -> DataLoader:
        """Calibration samples, in an order of their own each epoch."""
        return self._loader(range(self.samples.batching.num_samples), shuffled=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out samples, in order."""
        return self._loader(range(self.samples.batching.num_samples, len(self.samples.inputs_STD)))

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Batch | Tensor:
        """Make a batch of the samples with some indices; only their indices while batches are counted."""
        return batch if self.samples.idle else self.samples.batch(batch, device)

    def _loader(self, rows: Sequence[int], *, shuffled: bool = False) -> DataLoader:
        order = RandomSampler(rows, generator=torch.Generator().manual_seed(self.seed)) if shuffled else None
        return DataLoader(rows, self.samples.batching.batch_size, sampler=order)  # type: ignore[arg-type]
