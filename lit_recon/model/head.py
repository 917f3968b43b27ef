"""The head of a decoder: logits of the last layer's hidden states, their divergence from the dense model's, likelihood.

Shapes: B samples, T tokens, D hidden size, V vocabulary, N tokens of a slice.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lit_recon.model.decoder import Decoder, patched_forward, tensors_returned

SLICE = 64  # tokens at least whose logits are there at once: 67 MB of them for a vocabulary of 260,000
SLICE_BYTES = {"cuda": 2**28}  # of logits in float32 at once, where small slices would leave most of a device idle


class Head:
    """A model's own final norm, head and scaling, as a function of the last layer's output.

    Args:
        decoder: The decoder of the model; its layers are called once, if they have not been, to see what they return.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        for layer in decoder.layers:
            decoder.answer(layer, torch.empty(0))

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of hidden states after the last layer."""
        model = self.decoder.model
        tokens_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device)  # not looked at
        with ExitStack() as stack:
            for layer in self.decoder.layers:
                answer = self.decoder.answer(layer, hidden_BTD.to(model.dtype))
                stack.enter_context(patched_forward(layer, lambda *_, _answer=answer, **__: _answer))
            return model(input_ids=tokens_BT, use_cache=False).logits

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        return len(self.decoder.model.get_output_embeddings().weight)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """All of the model but its layers on `device`; what may be mapped from a file returns afterwards."""
        model, layers = self.decoder.model, self.decoder.layers
        inside = {id(module) for module in layers.modules()}
        with tensors_returned(module for module in model.modules() if id(module) not in inside):
            self._move(device)
            yield

    def _move(self, device: torch.device) -> None:
        layers = list(self.decoder.layers)
        del self.decoder.layers[:]  # Module.to walks the tree: the layers are taken out of it for the time
        try:
            self.decoder.model.to(device)  # type: ignore[arg-type]
        finally:
            self.decoder.layers.extend(layers)


def kl_divergences(outputs_ND: Tensor, targets_ND: Tensor, *, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Kullback-Leibler divergences (N) of the logits of each token from the dense model's, in nats.

    A slice of tokens at a time, so that a large vocabulary fits; backward computes each slice's logits again rather
    than keep them.

    Args:
        outputs_ND: Hidden states after the last layer.
        targets_ND: The dense model's.
        head: Makes logits (1, N, V) of hidden states (1, N, D).
    """

    def divergences(outputs_ND: Tensor, targets_ND: Tensor) -> Tensor:
        with torch.no_grad():
            expected_NV = head(targets_ND[None])[0].float().log_softmax(-1)
        logits_NV = head(outputs_ND[None])[0].float().log_softmax(-1)
        return functional.kl_div(logits_NV, expected_NV, reduction="none", log_target=True).sum(-1)

    return _in_slices(divergences, head, outputs_ND, targets_ND)


def cross_entropies(outputs_ND: Tensor, next_N: Tensor, *, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Negative log-likelihoods (N) of next tokens in nats, a slice of tokens at a time like the divergences.

    Args:
        outputs_ND: Hidden states after the last layer.
        next_N: The token that follows each.
        head: Makes logits (1, N, V) of hidden states (1, N, D).
    """

    def likelihoods(outputs_ND: Tensor, next_N: Tensor) -> Tensor:
        return functional.cross_entropy(head(outputs_ND[None])[0].float(), next_N, reduction="none")

    return _in_slices(likelihoods, head, outputs_ND, next_N)


def slice_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are there at once."""
    return max(SLICE, SLICE_BYTES.get(device.type, 0) // (4 * vocabulary))


def _in_slices(
    measure: Callable[[Tensor, Tensor], Tensor], head: Callable[[Tensor], Tensor], *by_token: Tensor
) -> Tensor:
    """A measure of some tokens at a time, computed again by backward."""
    width = slice_tokens(head.vocabulary, by_token[0].device) if isinstance(head, Head) else SLICE
    pairs = zip(*(one.split(width) for one in by_token), strict=True)
    return torch.cat([checkpoint(measure, *pair, use_reentrant=False) for pair in pairs])
