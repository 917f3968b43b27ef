"""A Hugging Face decoder as embeddings and layers with recorded calls (its head: head.py).

Facts instead of family names: the layers are found by their count, their arguments by recording one cheap pass in which
every layer is replaced by a recorder that returns its hidden states unchanged. A layer replayed with its own recorded
arguments computes exactly what it computes inside the model, also where layers differ (sliding windows, several masks).

What this cannot do is refused: layers that a pass leaves out or calls twice, and layers that hand each other more than
hidden states (keys and values of another layer, indices that another layer chose).

Positions that hold no text (PADDING, at the end of a sample) are masked out, as the model does it itself.

Shapes: B samples, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from lit_recon.data.packing import PADDING
from lit_recon.system import transfer

_KEPT_SHAPES = 8  # of batches whose calls are kept; samples of all lengths would fill the memory


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to one layer besides its hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device, moved: dict[int, tuple[Tensor, Tensor]]) -> "LayerCall":
        """The same call with its tensors on `device`, floating point ones in float32 like the chain.

        Args:
            device: Where they go.
            moved: Tensors that are there already, by the identity of the original: layers share masks and positions.
        """

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) not in moved:
                there = transfer.moved(leaf, device)
                there = there.to(torch.float32) if leaf.is_floating_point() else there
                moved[id(leaf)] = (leaf, there)  # with the original, so that no other gets its identity
            return moved[id(leaf)][1]

        return LayerCall(tree_map(move, self.args), tree_map(move, self.kwargs))


def text_part(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of `model` that reads text, and its qualified name: the whole, unless it also sees or hears.

    It is the outermost module whose configuration is the text's.
    """
    text = model.config.get_text_config()
    parts = ((name, part) for name, part in model.named_modules() if getattr(part, "config", None) is text)
    return next(parts, ("", model))


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers of `model` and the qualified name of their list.

    Raises:
        ValueError: No outermost ModuleList has `num_hidden_layers` entries, or several have.
    """
    root, part = text_part(model)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if depth == 0:
        raise ValueError(f"{type(model).__name__}: config.num_hidden_layers=0: it has no layers to prune.")
    lists = {name: module for name, module in part.named_modules(prefix=root) if isinstance(module, nn.ModuleList)}
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    fitting = [name for name in outermost if len(lists[name]) == depth]
    if len(fitting) != 1:
        found = ", ".join(f"{name} ({len(lists[name])} entries)" for name in outermost) or "none"
        raise ValueError(
            f"{type(model).__name__}: cannot tell which modules are its {depth} decoder layers "
            f"(config.num_hidden_layers); expected exactly one list of {depth}, lists found: {found}. "
            "Encoder-decoder and non-decoder models are not supported."
        )
    return fitting[0], lists[fitting[0]]


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output, which is a tensor or a tuple that starts with it."""
    return output if isinstance(output, Tensor) else output[0]


def call_layer(layer: nn.Module, hidden_BTD: Tensor, call: LayerCall) -> Tensor:
    """The layer's output hidden states, (B, T, D), when the model calls it with `hidden_BTD`."""
    return first_tensor(layer(hidden_BTD, *call.args, **call.kwargs))


def _same(calls: Sequence[LayerCall], others: Sequence[LayerCall]) -> bool:
    """Whether two batches led to the same arguments, by value."""
    ones, twos = (tree_leaves([(call.args, call.kwargs) for call in both]) for both in (calls, others))
    return len(ones) == len(twos) and all(map(_equal, ones, twos))


def _equal(one: Any, other: Any) -> bool:
    """Whether two arguments are equal; of objects that cannot tell it, whether they are of one kind."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if type(one) is not type(other):
        return False
    return type(one).__eq__ is object.__eq__ or (one == other) is True


@contextmanager
def examining(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Turn whatever a model's code raises while it is examined into a refusal with the cause.

    Args:
        model: The model.
        what: What cannot be done with it, if something is raised.

    Raises:
        ValueError: The refusal.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{type(model).__name__}: {what}: {cause(error)}.") from error


def cause(error: Exception) -> str:
    """An error on one line, with its kind where its words alone would not be understood."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split()).rstrip(".")


@contextmanager
def patched_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace `forward` on this instance only; its attributes stay, and an earlier instance-level one comes back."""
    earlier = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier


@contextmanager
def tensors_returned(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which modules' own parameters and buffers may be moved; the tensors of before return afterwards."""
    owners = list(modules)
    homes = [(parameter, parameter.data) for owner in owners for parameter in owner.parameters(recurse=False)]
    buffers = [(owner, name, buffer) for owner in owners for name, buffer in owner._buffers.items()]
    try:
        yield
    finally:
        for parameter, home in homes:
            parameter.data = home
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


@contextmanager
def moved_to(model: nn.Module, device: torch.device) -> Iterator[None]:
    """All of a model on `device`; its own tensors, which may be mapped from files, return afterwards."""
    with tensors_returned(model.modules()):
        model.to(device)
        yield


class Decoder:
    """A Hugging Face decoder, seen as embeddings and layers with recorded calls.

    Args:
        model: The model; its embeddings and head stay on the device that they are on.
        device: Where recorded calls are put: the device on which the layers will be called.

    Attributes:
        model: The model, or its text part where that has a head of its own.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        _, part = text_part(model)
        has_head = isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None
        self.model: PreTrainedModel = part if has_head else model  # type: ignore[assignment]
        self.device = device
        self.prefix, self.layers = decoder_layers(model)
        self._rests: dict[type, list | tuple | None] = {}  # what follows the hidden states in a layer's own answer
        self._calls: dict[tuple[int, ...], list[LayerCall]] = {}
        self._by_token = False

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """What reaches layer 0, (B, T, D) in float32, and every layer's own arguments, for these tokens.

        Raises:
            ValueError: Not every layer is called once, in order, with hidden states and nothing else of another layer.
        """
        received: list[Tensor] = []
        called: list[int] = []
        calls: list[LayerCall] = []
        moved: dict[int, tuple[Tensor, Tensor]] = {}

        def record(index: int, layer: nn.Module) -> Callable[..., Any]:
            original = layer.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden_BTD, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                self._check_own(index, (args, kwargs))
                received.append(hidden_BTD)
                called.append(index)
                calls.append(LayerCall(args, kwargs).to(self.device, moved))
                if type(layer) not in self._rests:  # a tuple where the model expects one, or it unpacks samples
                    self._rests[type(layer)] = _rest(original(hidden_BTD, *args, **kwargs))
                return self.answer(layer, hidden_BTD)

            return forward

        tokens_BT = tokens_BT.to(self._embedding_device)
        is_text_BT = tokens_BT != PADDING
        mask = {} if is_text_BT.all() else {"attention_mask": is_text_BT.long()}
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(patched_forward(layer, record(index, layer)))
            self.model.base_model(input_ids=tokens_BT.where(is_text_BT, 0), use_cache=False, **mask)
        _check_order(called, len(self.layers))
        if received[0].dim() != 3 or received[0].shape[:2] != tokens_BT.shape:
            shapes = f"{tuple(received[0].shape)} for {tuple(tokens_BT.shape)} tokens"
            raise ValueError(f"its layers are given hidden states of shape {shapes}; expected one vector per token")
        return received[0].float(), calls

    def _check_own(self, index: int, given: Any) -> None:
        """Refuse arguments of a layer that another layer has made."""
        handed = {id(leaf) for rest in self._rests.values() for leaf in rest or () if isinstance(leaf, Tensor)}
        if any(id(leaf) in handed for leaf in tree_leaves(given)):
            raise ValueError(
                f"layer {index} is given more than hidden states by an earlier layer, such as indices that it chose, "
                "which is not supported"
            )

    def calls(self, tokens_BT: Tensor) -> list[LayerCall]:
        """Every layer's arguments for a batch.

        Without padding they depend on the batch's shape alone in most models, so that they are kept by shape; whether
        they do is tried out. Masks of padded samples are made anew from the tokens each time.
        """
        if self._by_token or (tokens_BT == PADDING).any():
            return self.embed(tokens_BT)[1]
        shape = tuple(tokens_BT.shape)
        if shape not in self._calls:
            calls, others = (self.embed(tokens)[1] for tokens in (tokens_BT, torch.zeros_like(tokens_BT)))
            if not _same(calls, others):
                self._by_token = True
                return calls
            if len(self._calls) >= _KEPT_SHAPES:
                del self._calls[next(iter(self._calls))]
            self._calls[shape] = calls
        return self._calls[shape]

    @property
    def _embedding_device(self) -> torch.device:
        return next(self.model.get_input_embeddings().parameters()).device

    def answer(self, layer: nn.Module, hidden_BTD: Tensor) -> Any:
        """Hidden states in the form in which a layer returns its own: a tensor, a tuple or a list."""
        if not self._rests:
            self.embed(torch.zeros(1, 1, dtype=torch.long))
        rest = self._rests[type(layer)]
        return hidden_BTD if rest is None else type(rest)([hidden_BTD, *rest])


def _rest(output: Any) -> list | tuple | None:
    """What follows the hidden states in a layer's output, with empty tensors for tensors; None: it is a tensor."""
    if isinstance(output, Tensor):
        return None
    kind = list if isinstance(output, list) else tuple
    return kind(entry.new_empty(0) if isinstance(entry, Tensor) else entry for entry in output[1:])


def _check_order(called: Sequence[int], depth: int) -> None:
    """Refuse a pass that did not call every layer once, in order."""
    if list(called) == list(range(depth)):
        return
    missing = sorted(set(range(depth)) - set(called))
    left_out = (
        f"without layers {', '.join(map(str, missing))}" if missing else "some more than once or in another order"
    )
    raise ValueError(
        f"a pass over text makes {len(called)} calls of its {depth} layers, {left_out}; expected each once, from the "
        "first to the last"
    )
