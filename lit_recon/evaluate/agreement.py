"""Agreement of a model with its dense original on the same text: of predictions, and of states layer by layer.

    KL(dense || model)    sum over the vocabulary of p (log p - log q), per predicted token, in nats
    top-1 agreement       share of predicted tokens for which both find the same one likeliest
    error of a layer      mean over features of (state - dense state)^2, in units of the dense states' median energy

The divergence is 0 for the same predictions, whatever the text says, so that it tells models apart that have one
perplexity.

Shapes: S windows, T tokens, D hidden size, N tokens, C positions of a slice, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import KLDivergence
from torchmetrics.classification import MulticlassAccuracy

from lit_recon.model.errors import Errors, unit_of


@dataclass(frozen=True)
class Agreement:
    """How far a model agrees with the dense one.

    Attributes:
        kl: KL(dense || model) in nats per token.
        top1: Share of tokens for which both find the same one likeliest.
        tokens: Predicted tokens.
        hidden: Errors of the hidden states after each layer; none where the models have other layers.
    """

    kl: float
    top1: float
    tokens: int
    hidden: list[Errors]

    def as_json(self) -> dict[str, object]:
        """As a record has it."""
        hidden = [{"layer": index, **errors._asdict()} for index, errors in enumerate(self.hidden)]
        return {"kl": self.kl, "top1": self.top1, "tokens": self.tokens, "hidden": hidden}


class PredictionAgreement:
    """Agreement of predictions, gathered slice by slice by two metrics of torchmetrics.

    Args:
        vocabulary: V.
        device: Where logits are.
    """

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.divergence = KLDivergence(log_prob=True).set_dtype(torch.float64).to(device)  # of the sum
        self.accuracy = MulticlassAccuracy(vocabulary, average="micro", validate_args=False).to(device)
        self.tokens = 0

    def update(self, logits_CV: Tensor, dense_CV: Tensor) -> None:
        """Add C predictions: the model's logits and the dense model's."""
        self.divergence.update(dense_CV.log_softmax(-1), logits_CV.log_softmax(-1))
        self.accuracy.update(logits_CV.argmax(-1), dense_CV.argmax(-1))
        self.tokens += len(logits_CV)

    def result(self, hidden: list[Errors]) -> Agreement:
        """The agreement, with that of hidden states."""
        return Agreement(self.divergence.compute().item(), self.accuracy.compute().item(), self.tokens, hidden)


class StateAgreement:
    """Errors of hidden states layer by layer, gathered window by window; the unit is known when all are there.

    Args:
        num_layers: Layers of both models.
    """

    def __init__(self, num_layers: int) -> None:
        self._errors: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._energies: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def update(self, layer: int, states_STD: Tensor, dense_STD: Tensor, text_ST: Tensor) -> None:
        """Add what leaves a layer of the model and of the dense one, where there is text."""
        for states_TD, dense_TD, text_T in zip(states_STD, dense_STD, text_ST, strict=True):  # one at a time: no copy
            self._errors[layer].append((states_TD - dense_TD).square().mean(-1)[text_T])
            self._energies[layer].append(dense_TD.square().mean(-1)[text_T])

    def result(self) -> list[Errors]:
        """Errors of each layer."""
        pairs = zip(self._errors, self._energies, strict=True)
        return [Errors.from_tokens(torch.cat(errors) / unit_of(torch.cat(energies))) for errors, energies in pairs]
