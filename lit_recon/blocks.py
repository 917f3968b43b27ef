"""All knowledge of how Hugging Face decoders are built: layers, their calls, their prunable matrices, the head.

Facts instead of family names: the layers are found by their count, their arguments by recording one cheap pass in which
every layer is replaced by a recorder that returns its hidden states unchanged. A layer replayed with its own recorded
arguments computes exactly what it computes inside the model, also where layers differ (sliding windows, several masks).

Shapes: B samples, T tokens, D hidden size, V vocabulary, N = B * T rows, I inputs and O outputs of a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to one layer besides its hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> "LayerCall":
        """The same call with its tensors on `device`, floating point ones in float32 like the chain."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device, torch.float32 if leaf.is_floating_point() else leaf.dtype)

        return LayerCall(tree_map(move, self.args), tree_map(move, self.kwargs))


@dataclass(frozen=True)
class Matrix:
    """One weight of a layer with two or more dimensions.

    Attributes:
        name: Qualified name in the model, for example "model.layers.3.mlp.up_proj.weight".
        weight: The parameter itself.
        owner: The module that multiplies its inputs by this weight.
        input_dim: The dimension of `weight` that runs over the inputs; None where it is not known how `owner` uses it.
    """

    name: str
    weight: nn.Parameter
    owner: nn.Module
    input_dim: int | None

    def rows(self, tensor: Tensor) -> Tensor:
        """`tensor` (shaped like the weight) as an (outputs, inputs) view."""
        return tensor.T if self.input_dim == 0 else tensor


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder layers of `model` and the qualified name of their list.

    Raises:
        ValueError: No outermost ModuleList has `num_hidden_layers` entries, or several have.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
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


def matrices(layer: nn.Module, prefix: str) -> list[Matrix]:
    """The weights of a layer with two or more dimensions, in the order of its parameters, named below `prefix`."""
    found = []
    for path, owner in layer.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            is_weight = leaf == "weight" and parameter.dim() == 2
            input_dim = 1 if is_weight and isinstance(owner, nn.Linear) else None
            input_dim = 0 if is_weight and isinstance(owner, Conv1D) else input_dim  # Conv1D stores (inputs, outputs)
            found.append(Matrix(".".join(filter(None, (prefix, path, leaf))), parameter, owner, input_dim))
    return found


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a layer's output, which is a tensor or a tuple that starts with it."""
    return output if isinstance(output, Tensor) else output[0]


def call_layer(layer: nn.Module, hidden_BTD: Tensor, call: LayerCall) -> Tensor:
    """The layer's output hidden states, (B, T, D), when the model calls it with `hidden_BTD`."""
    return first_tensor(layer(hidden_BTD, *call.args, **call.kwargs))


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


def to_float32(module: nn.Module, device: torch.device) -> list[torch.dtype]:
    """Move a module to `device`, its parameters in float32; the dtypes that they had, for `from_float32`.

    Buffers keep their dtype: the rotary frequencies of a bf16 model are float32 and would not survive the way back.
    """
    dtypes = [parameter.dtype for parameter in module.parameters()]
    module.to(device)
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
    return dtypes


def from_float32(module: nn.Module, dtypes: Sequence[torch.dtype]) -> None:
    """Take a module back to the CPU, its parameters in the dtypes that `to_float32` found."""
    module.to("cpu")
    for parameter, dtype in zip(module.parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)


@contextmanager
def float32_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module on `device` with float32 parameters, and as it was after."""
    dtypes = to_float32(module, device)
    try:
        yield
    finally:
        from_float32(module, dtypes)


class Decoder:
    """A Hugging Face decoder, seen as embeddings, layers with recorded calls, and a head.

    Args:
        model: The model; its embeddings and head stay on the device that they are on.
        device: Where recorded calls are put: the device on which the layers will be called.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.prefix, self.layers = decoder_layers(model)
        self._returns_tuple: dict[type, bool] = {}
        self._calls: dict[tuple[int, ...], list[LayerCall]] = {}

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """What reaches layer 0, (B, T, D) in float32, and every layer's own arguments, for these tokens."""
        received: list[Tensor] = []
        calls: list[LayerCall] = []

        def record(layer: nn.Module) -> Callable[..., Any]:
            original = layer.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden_BTD, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
                received.append(hidden_BTD)
                calls.append(LayerCall(args, kwargs).to(self.device))
                if type(layer) not in self._returns_tuple:  # a tuple where the model expects one, or it unpacks samples
                    output = original(hidden_BTD, *args, **kwargs)
                    self._returns_tuple[type(layer)] = not isinstance(output, Tensor)
                return self._like(layer, hidden_BTD)

            return forward

        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(patched_forward(layer, record(layer)))
            self.model.base_model(input_ids=tokens_BT, use_cache=False)
        assert len(calls) == len(self.layers), f"{len(calls)} layer calls in a model of {len(self.layers)} layers"
        return received[0].float(), calls

    def calls(self, tokens_BT: Tensor) -> list[LayerCall]:
        """Every layer's arguments for a batch of this shape; without padding they depend on nothing else."""
        shape = tuple(tokens_BT.shape)
        if shape not in self._calls:
            self._calls[shape] = self.embed(tokens_BT)[1]
        return self._calls[shape]

    @torch.no_grad()
    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The model's logits, (B, T, V), from the last layer's output: its own final norm, head and scaling."""
        tokens_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device)  # not looked at
        with ExitStack() as stack:
            for layer in self.layers:
                answer = self._like(layer, hidden_BTD.to(self.model.dtype))
                stack.enter_context(patched_forward(layer, lambda *_, _answer=answer, **__: _answer))
            return self.model(input_ids=tokens_BT, use_cache=False).logits

    @contextmanager
    def ends_on(self, device: torch.device) -> Iterator[None]:
        """Have all of the model but its layers on `device`, and on the CPU again after."""
        self._move_ends(device)
        try:
            yield
        finally:
            self._move_ends(torch.device("cpu"))

    def _move_ends(self, device: torch.device) -> None:
        layers = list(self.layers)
        del self.layers[:]  # Module.to walks the tree: take the layers out of it meanwhile
        try:
            self.model.to(device)  # type: ignore[arg-type]
        finally:
            self.layers.extend(layers)

    def _like(self, layer: nn.Module, hidden_BTD: Tensor) -> Any:
        return (hidden_BTD,) if self._returns_tuple[type(layer)] else hidden_BTD


@contextmanager
def observed(matrices: Sequence[Matrix], observe: Callable[[Matrix, Tensor], None]) -> Iterator[None]:
    """Call `observe(matrix, inputs_NI)` with what each matrix is multiplied by, for every call within the context."""

    def hook(matrix: Matrix) -> Callable[..., None]:
        return lambda _module, args: observe(matrix, args[0].flatten(0, -2))

    with ExitStack() as stack:
        for matrix in matrices:
            stack.callback(matrix.owner.register_forward_pre_hook(hook(matrix)).remove)
        yield
