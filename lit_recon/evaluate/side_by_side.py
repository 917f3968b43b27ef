"""Several states of a model on the same windows: dense, pruned and checkpoint step through the layers side by side.

One layer of one of them is on the device at a time, in float32, and the hidden states of as many windows in memory as
fit: a round. So a checkpoint of any size, mapped from its files, takes little memory; each round reads it once.

Shapes: S windows, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_recon.data.packing import PADDING
from lit_recon.evaluate.agreement import Agreement, PredictionAgreement, StateAgreement
from lit_recon.evaluate.perplexity import NegativeLogLikelihood, logits, num_logits, spans
from lit_recon.evaluate.windows import TextWindows
from lit_recon.model.decoder import Decoder
from lit_recon.model.head import Head
from lit_recon.model.layerwise import LayerContext, embedded, step, unchanged
from lit_recon.system.device import Compute

Tick = Callable[[str], None]  # is told of each piece of work that is done


@dataclass(frozen=True)
class State:
    """A model in a state that is measured.

    Attributes:
        decoder: The model.
        around: Makes a context around each of its layers, such as one in which it is pruned.
    """

    decoder: Decoder
    around: LayerContext = unchanged


@dataclass(frozen=True)
class Measured:
    """What states were measured at.

    Attributes:
        nats: Mean negative log-likelihood of the predicted tokens, in nats, by state.
        agreement: Of the checkpoint with the dense model, where that was asked for.
    """

    nats: dict[str, float]
    agreement: Agreement | None = None


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """Measures states of a model on windows of a text.

    Attributes:
        states: By name: "dense", "pruned", "checkpoint".
        compute: Device and precision.
        batch_size: Windows per pass of a layer.
        round_size: Windows whose hidden states are in memory at once.
        agrees: Whether the checkpoint is compared with the dense model.
        tick: Is told of each piece of work that is done, `num_ticks` in all.
    """

    states: Mapping[str, State]
    compute: Compute
    batch_size: int
    round_size: int
    agrees: bool = False
    tick: Tick = field(default=lambda what: None)

    def num_ticks(self, windows: TextWindows) -> int:
        """Pieces of work: the layers of each state, and their logits, in each round."""
        rounds = -(-len(windows.tokens_ST) // self.round_size)
        return rounds * (sum(len(state.decoder.layers) for state in self.states.values()) + 1)

    @torch.no_grad()
    def measure(self, windows: TextWindows) -> Measured:
        """Perplexity of all states, and the agreement of the checkpoint with the dense model."""
        likelihoods = {
            name: NegativeLogLikelihood(len(windows.tokens_ST)).to(self.compute.device) for name in self.states
        }
        decoder = self.states["checkpoint"].decoder
        vocabulary = decoder.model.config.get_text_config().vocab_size
        predictions = PredictionAgreement(vocabulary, self.compute.device) if self.agrees else None
        layers = StateAgreement(len(decoder.layers) if self._has_same_layers() else 0)
        for start in range(0, len(windows.tokens_ST), self.round_size):
            some = windows[start : start + self.round_size]
            hidden = self._through_layers(some.tokens_ST, layers)
            for row, logits_by_state, targets_C in self._logits(hidden, some):
                for name, logits_CV in logits_by_state.items():
                    likelihoods[name].update(start + row, logits_CV, targets_C)
                if predictions is not None:
                    predictions.update(logits_by_state["checkpoint"], logits_by_state["dense"])
            self.tick("logits")
        nats = {name: (one.nats_S.sum() / one.tokens_S.sum()).item() for name, one in likelihoods.items()}
        return Measured(nats, predictions.result(layers.result()) if predictions is not None else None)

    def _has_same_layers(self) -> bool:
        """Whether hidden states of the checkpoint and of the dense model can be compared."""
        if not self.agrees:
            return False
        shapes = [
            (len(state.decoder.layers), state.decoder.model.config.get_text_config().hidden_size)
            for state in (self.states["checkpoint"], self.states["dense"])
        ]
        return shapes[0] == shapes[1]

    def _through_layers(self, tokens_ST: Tensor, layers: StateAgreement) -> dict[str, Tensor]:
        """Final hidden states of each state, (S, T, D)."""
        text_ST = tokens_ST != PADDING
        hidden = {
            name: embedded(state.decoder, tokens_ST, batch_size=self.batch_size) for name, state in self.states.items()
        }
        for index in range(max(len(state.decoder.layers) for state in self.states.values())):
            for name, state in self.states.items():
                if index < len(state.decoder.layers):
                    step(
                        state.decoder,
                        index,
                        hidden[name],
                        tokens_ST,
                        batch_size=self.batch_size,
                        compute=self.compute,
                        around=state.around,
                    )
                    self.tick(f"layer {index + 1} of {len(state.decoder.layers)}, {name}")
            if self._has_same_layers():
                layers.update(index, hidden["checkpoint"], hidden["dense"], text_ST)
        return hidden

    def _logits(
        self, hidden: Mapping[str, Tensor], windows: TextWindows
    ) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
        """A window, logits (C, V) of each state, and the tokens (C) that they predict, slice by slice."""
        decoders = {name: state.decoder for name, state in self.states.items()}
        heads = {id(decoder): Head(decoder) for decoder in decoders.values()}
        width = min(num_logits(decoder) for decoder in decoders.values())
        with ExitStack() as stack:
            for head in heads.values():
                stack.enter_context(head.on(self.compute.device))
            for row, start, stop in spans(windows.tokens_ST, windows.first_S, width):
                made = {
                    name: logits(heads[id(decoder)], hidden[name][row, start:stop], self.compute)
                    for name, decoder in decoders.items()
                }
                yield row, made, windows.tokens_ST[row, start + 1 : stop + 1].to(self.compute.device)
