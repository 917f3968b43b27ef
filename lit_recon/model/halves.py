"""The two halves of a layer: the true layer with its other side answering zeros.

    sequential   h = x + attention(norm(x))      attention half: x -> h      MLP half: h -> layer's output
                 y = h + mlp(norm(h))
    parallel     y = x + attention(norm(x)) + mlp(norm(x))
                                                 attention half: x -> x + attention     MLP half: x -> x + mlp

Which child modules of a layer are its attention side is read off one call: they are given more than hidden states
(masks, positions). That the halves make up the layer is not assumed but checked on a batch; a layer that they do not
make up, because its norms come after the residual or the residual goes through the attention, is refused.

Shapes: B samples, T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_recon.model.decoder import LayerCall, call_layer, cause, patched_forward

SIDES = ("attention", "mlp")
Answers = dict[str, Any]
TOLERANCE = 1e-5  # largest difference between a layer and its halves, relative to the largest output


@dataclass(frozen=True)
class Split:
    """How a layer falls into halves.

    Attributes:
        children: For each side the names of the layer's child modules that hold its matrices.
        answers: For each of these children the form of its output: a tensor, or a tuple or list of what it answers,
            each tensor with no rows and the last dimension that it has, others None.
        parallel: Both halves start from the layer's input; otherwise the second starts from the first one's output.
        trained: For each side the names, in the layer, of the parameters that are trained in its half.
        shared: Those of them that the other half, which is the second one, depends on too.
    """

    children: dict[str, list[str]]
    answers: Answers
    parallel: bool
    trained: dict[str, list[str]]
    shared: list[str]


def run_half(layer: nn.Module, split: Split, side: str, hidden_BTD: Tensor, call: LayerCall) -> Tensor:
    """The output of one half, (B, T, D): the layer with its other side answering zeros."""
    return _run_without(layer, split.children[_other(side)], split.answers, hidden_BTD, call)


def split_layer(layer: nn.Module, hidden_BTD: Tensor, call: LayerCall) -> Split:
    """Find the halves of a layer, and check that they make it up.

    Args:
        layer: The layer, with float32 weights.
        hidden_BTD: Hidden states to check on.
        call: The layer's own arguments for them.

    Raises:
        ValueError: The layer has no two sides, or its halves do not make it up, or cannot be called by themselves.
    """
    try:
        split, problem = _split(layer, hidden_BTD, call)
    except Exception as error:  # of the layer's own code, which was not made for a side that answers zeros
        raise ValueError(
            f"{type(layer).__name__}: its attention and MLP halves cannot be called by themselves ({cause(error)}); "
            "use windows=block."
        ) from error
    if split is None:
        raise ValueError(f"{type(layer).__name__}{problem}; use windows=block.")
    return split


def _split(layer: nn.Module, hidden_BTD: Tensor, call: LayerCall) -> tuple[Split | None, str]:
    """The halves of a layer, or None and why it has none."""
    children, answers = _sides(layer, hidden_BTD, call)
    missing = [side for side in SIDES if not children[side]]
    if missing:
        return None, f" has no {missing[0]} side"
    halves = {side: partial(_run_without, layer, children[_other(side)], answers) for side in SIDES}
    with torch.no_grad():
        whole_BTD = call_layer(layer, hidden_BTD, call)
        attention_BTD = halves["attention"](hidden_BTD, call)
        in_turn_BTD = halves["mlp"](attention_BTD, call)
        beside_BTD = attention_BTD + halves["mlp"](hidden_BTD, call) - hidden_BTD
    fits = [_close(candidate_BTD, whole_BTD) for candidate_BTD in (in_turn_BTD, beside_BTD)]
    if sum(fits) != 1:
        return None, (
            ": attention and MLP halves do not make up the layer, neither one after the other nor side by side"
        )
    trained, shared = _trained(layer, children, halves, hidden_BTD, call)
    return Split(children, answers, parallel=fits[1], trained=trained, shared=shared), ""


def _other(side: str) -> str:
    return SIDES[1 - SIDES.index(side)]


def _close(candidate_BTD: Tensor, expected_BTD: Tensor) -> bool:
    return bool((candidate_BTD - expected_BTD).abs().max() <= TOLERANCE * expected_BTD.abs().max())


@torch.no_grad()
def _sides(layer: nn.Module, hidden_BTD: Tensor, call: LayerCall) -> tuple[dict[str, list[str]], Answers]:
    """The children with matrices, by side, and what each answers, as one call of the layer shows them."""
    children: dict[str, list[str]] = {side: [] for side in SIDES}
    answers: Answers = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in answers:
                children["attention" if len(args) + len(kwargs) > 1 else "mlp"].append(name)
                answers[name] = _form(output)

        return hook

    with ExitStack() as stack:
        for name, child in layer.named_children():
            if any(parameter.dim() >= 2 for parameter in child.parameters()):
                stack.callback(child.register_forward_hook(note(name), with_kwargs=True).remove)
        call_layer(layer, hidden_BTD, call)
    return children, answers


def _run_without(
    layer: nn.Module, silent: Sequence[str], answers: Answers, hidden_BTD: Tensor, call: LayerCall
) -> Tensor:
    with _silenced(layer, silent, answers):
        return call_layer(layer, hidden_BTD, call)


@contextmanager
def _silenced(layer: nn.Module, names: Sequence[str], answers: Answers) -> Iterator[None]:
    """Have some children of a layer answer zeros, in the form of their own answers."""

    def answer(form: Any) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            return _zeros(form, given)

        return forward

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patched_forward(layer.get_submodule(name), answer(answers[name])))
        yield


def _form(output: Any) -> Any:
    """A child's output with tensors of no rows in place of its tensors, and None for what is no tensor."""
    if isinstance(output, Tensor):
        return output.new_empty(0, *output.shape[-1:])
    if isinstance(output, list | tuple):
        return (list if isinstance(output, list) else tuple)(_form(entry) for entry in output)
    return None


def _zeros(form: Any, given: Tensor) -> Any:
    """Zeros in the form of a child's output, for each row that it is given."""
    if isinstance(form, Tensor):
        floating = form.is_floating_point() and given.is_floating_point()  # then as autocast has it now
        return given.new_zeros((*given.shape[:-1], *form.shape[1:]), dtype=given.dtype if floating else form.dtype)
    return type(form)(_zeros(entry, given) for entry in form) if form is not None else None


def _trained(
    layer: nn.Module,
    children: dict[str, list[str]],
    halves: Mapping[str, Callable[[Tensor, LayerCall], Tensor]],
    hidden_BTD: Tensor,
    call: LayerCall,
) -> tuple[dict[str, list[str]], list[str]]:
    """By side, the parameters that are trained in its half; and those that both halves depend on.

    A side's own parameters are trained in its half. What stands outside of both sides, such as norms, belongs to the
    first half whose output it changes, as its gradient shows.
    """
    inside = {
        side: {
            name
            for name, _ in layer.named_parameters()
            if any(name.startswith(child + ".") for child in children[side])
        }
        for side in SIDES
    }
    outside = {
        name: parameter for name, parameter in layer.named_parameters() if name not in set().union(*inside.values())
    }
    depends = {side: _with_gradient(outside, partial(halves[side], hidden_BTD, call)) for side in SIDES}
    shared = [name for name in outside if all(name in depends[side] for side in SIDES)]
    belongs = {
        "attention": inside["attention"] | depends["attention"],
        "mlp": inside["mlp"] | (depends["mlp"] - depends["attention"]),
    }
    return {side: [name for name, _ in layer.named_parameters() if name in belongs[side]] for side in SIDES}, shared


def _with_gradient(parameters: dict[str, nn.Parameter], run: Callable[[], Tensor]) -> set[str]:
    """Names of the parameters that the output of `run` depends on."""
    if not parameters:
        return set()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            output_BTD = run()
            if not output_BTD.requires_grad:  # on none of them
                return set()
            weights_BTD = torch.randn(output_BTD.shape, generator=torch.Generator().manual_seed(0)).to(output_BTD)
            gradients = torch.autograd.grad(
                (output_BTD * weights_BTD).sum(), list(parameters.values()), allow_unused=True
            )
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    # After a side that answers zeros a norm's gradient is zero, not missing.
    named = zip(parameters, gradients, strict=True)
    return {name for name, gradient in named if gradient is not None and torch.count_nonzero(gradient)}
