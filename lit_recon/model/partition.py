"""Cuts a model into windows; windows.py has the drawing."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_recon.model.decoder import Decoder, decoder_layers
from lit_recon.model.halves import SIDES, Split, split_layer
from lit_recon.model.head import Head
from lit_recon.model.layerwise import float32_on
from lit_recon.model.matrices import LayerMatrices, find_matrices
from lit_recon.model.windows import AnyWindow, HalfWindow, MatrixWindow, Window, WindowKind
from lit_recon.system.expressions import check_expression


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How a model is cut into windows, in order, so that each of its layers is kept in exactly one of them.

    Attributes:
        by: A WindowKind.
        size: Layers per window for "blocks"; the last window may be shorter.
        stride: Layers from one window's start to the next one's, for "blocks"; smaller than `size`, windows overlap,
            and each keeps its first `stride` layers. None: `size`.
        head: Whether the last window's loss is on the logits.
        match: Regular expression: windows in whose name it is found (re.search), of matrices in that of the weight,
            are reconstructed, and the others pruned only. None: all of them are.
        skip: Share of all windows, those whose dense inputs and outputs are most alike, that are pruned only as well;
            of blocks that do not overlap.
    """

    by: str = "block"
    size: int = 1
    stride: int | None = None
    head: bool = False
    match: str | None = None
    skip: float = 0.0

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.by not in list(WindowKind):
            raise ValueError(f"windows.by={self.by!r}: expected one of {', '.join(WindowKind)}.")
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"windows.size={self.size}: expected at least 1 layer per window.")
        if self.stride is not None and (type(self.stride) is not int or not 1 <= self.stride <= self.size):
            raise ValueError(
                f"windows.stride={self.stride}: expected 1 to windows.size={self.size} layers from window to window."
            )
        if self.by != WindowKind.BLOCKS and (self.size > 1 or self.stride is not None):
            raise ValueError(
                f"windows.size={self.size} windows.stride={self.stride}: these are of windows=blocks; leave them out "
                f"with windows={self.by}."
            )
        if type(self.head) is not bool:
            raise ValueError(f"windows.head={self.head}: expected true or false.")
        if self.head and self.by == WindowKind.MATRIX:
            raise ValueError("windows.head=true: a matrix has no logits; use half, block, blocks or model.")
        if self.match is not None:
            check_expression("windows.match", self.match, "names of windows, such as k_proj|up_proj")
        self._check_skip()

    def _check_skip(self) -> None:
        """Raise a ValueError for a share that is none, or of windows that do not follow each other."""
        if type(self.skip) not in (int, float) or not 0 <= self.skip < 1:
            raise ValueError(f"windows.skip={self.skip!r}: expected a share of the windows, 0 or more and below 1.")
        if self.skip and (self.by not in (WindowKind.BLOCK, WindowKind.BLOCKS) or self.overlapping):
            raise ValueError(
                f"windows.skip={self.skip:g} with windows={self.by}{' that overlap' if self.overlapping else ''}: it "
                "compares the input and the output of windows that follow each other; use windows=block, or blocks "
                "without a stride."
            )

    def check(self, model: PreTrainedModel) -> None:
        """Raise a ValueError for a model whose layers cannot be found, are too few, or share parameters.

        It needs no weights.
        """
        check_own_parameters(model)
        depth = len(decoder_layers(model)[1])
        if self.size > depth:
            raise ValueError(
                f"windows.size={self.size}: the model has {depth} layers; use windows=model for all of them."
            )

    def cut(
        self, model: PreTrainedModel, matrices: LayerMatrices | None = None, *, skipped: Sequence[str] = ()
    ) -> list[AnyWindow]:
        """The windows; they share the model's weights.

        Args:
            model: The model.
            matrices: Its matrices by layer, where more is known of them than their modules' kinds tell.
            skipped: Names of windows that are pruned only, whatever else is said of them.

        Raises:
            ValueError: What `check` finds, layers that do not fall into halves, halves without logits, or no window
                that matches.
        """
        self.check(model)
        by = WindowKind.BLOCK if self.by == WindowKind.MATRIX else self.by
        windows = layer_windows(model, matrices, by=by, size=self.size, stride=self.stride)
        if self.head:
            if windows[-1].parallel_half:
                raise ValueError(
                    "windows.head=true with windows=half: the halves of these layers stand side by side, and none has "
                    "the model's logits; use block, blocks or model."
                )
            windows[-1].head, windows[-1].measure = Head(Decoder(model, torch.device("cpu"))), "KL divergence"
        if self.by != WindowKind.MATRIX:
            return self._chosen([(window, window.name) for window in windows], skipped)
        found = [(layer, matrix) for layer in windows for matrix in layer.matrices() if matrix.input_dim is not None]
        return self._chosen([(MatrixWindow(matrix, layer), matrix.name) for layer, matrix in found], skipped)

    def _chosen(self, named: Sequence[tuple[AnyWindow, str]], skipped: Sequence[str]) -> list[AnyWindow]:
        """Windows with the names that are matched, of which those that are not, or are skipped, stay pruned."""
        if self.match is not None:
            for window, name in named:
                window.is_chosen = re.search(self.match, name) is not None
            if not any(window.is_chosen for window, _ in named):
                alike = ", ".join(dict.fromkeys(re.sub(r"[0-9]+", "<n>", name) for _, name in named))
                raise ValueError(f"windows.match={self.match}: found in none of the names of the windows ({alike}).")
        for window, _ in named:
            window.is_chosen = window.is_chosen and window.name not in skipped
        if not any(window.is_chosen for window, _ in named):
            raise ValueError(
                f"windows.match={self.match} windows.skip={self.skip:g}: of the windows that match, none is left when "
                f"those are skipped that are most alike ({', '.join(skipped)}); skip fewer."
            )
        return [window for window, _ in named]

    @property
    def overlapping(self) -> bool:
        """Whether layers are trained in more than one window."""
        return self.stride is not None and self.stride < self.size

    @property
    def blocks(self) -> int:
        """Layers per window for "blocks", where that is another kind than this one too."""
        return self.size if self.by == WindowKind.BLOCKS else 4

    def of_kind(self, by: str) -> "Partition":
        """The partition into another kind of windows."""
        size = self.blocks if by == WindowKind.BLOCKS else 1
        return self if by == self.by else Partition(by=by, size=size, head=self.head)

    def describe(self) -> str:
        """In the words of the settings."""
        size = f" of {self.size}" if self.by == WindowKind.BLOCKS else ""
        stride = f" every {self.stride}" if self.stride else ""
        match = f", those of {self.match}" if self.match is not None else ""
        skip = f", {self.skip:g} of them, most alike, skipped" if self.skip else ""
        return self.by + size + stride + (", logits at the end" if self.head else "") + match + skip


def check_own_parameters(model: PreTrainedModel) -> None:
    """Raise a ValueError for a parameter of a layer that another layer, or what stands outside of them, has as well."""
    prefix, layers = decoder_layers(model)
    owners = [{id(parameter) for parameter in layer.parameters()} for layer in layers]
    named = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    owners.append({identity for name, identity in named if not name.startswith(f"{prefix}.")})
    counts = Counter(identity for owner in owners for identity in owner)
    inside = {identity for owner in owners[:-1] for identity in owner}
    shared = next((identity for _, identity in named if counts[identity] > 1 and identity in inside), None)
    if shared is not None:
        names = " and ".join([name for name, identity in named if identity == shared][:2])
        raise ValueError(
            f"{type(model).__name__}: {names} are one parameter, which would be pruned and trained in each of its "
            "places; models whose layers share parameters are not supported."
        )


def partition(model: PreTrainedModel, **settings: Any) -> list[AnyWindow]:
    """Windows of a model, by settings of a Partition."""
    return Partition(**settings).cut(model)


def layer_windows(
    model: PreTrainedModel,
    matrices: LayerMatrices | None = None,
    *,
    by: str = WindowKind.BLOCK,
    size: int = 1,
    stride: int | None = None,
) -> list[Window]:
    """A partition into windows of layers or halves, which follow each other along the chain; see `Partition.cut`."""
    matrices = find_matrices(model) if matrices is None else matrices
    if by == WindowKind.HALF:
        return list(_halves(model, matrices))
    layers = list(decoder_layers(model)[1])
    size = {WindowKind.BLOCKS: size, WindowKind.MODEL: len(layers)}.get(WindowKind(by), 1)
    windows = list(_spans(layers, matrices, size=size, stride=stride or size))
    if by == WindowKind.MODEL:
        windows[0].name = "model"
    return windows


def _spans(layers: list[nn.Module], matrices: LayerMatrices, *, size: int, stride: int) -> Iterator[Window]:
    """Windows of whole layers."""
    digits = max(2, len(str(len(layers) - 1)))
    for first in range(0, len(layers), stride):
        members = layers[first : first + size]
        last = first + len(members) - 1
        is_last = last == len(layers) - 1
        name = f"block_{first:0{digits}}" if first == last else f"blocks_{first:0{digits}}_{last:0{digits}}"
        found = [matrix for layer in matrices[first : last + 1] for matrix in layer]
        yield Window(name, members, first=first, matrices=found, num_kept=None if is_last else stride)
        if is_last:
            return


@torch.no_grad()
def _halves(model: PreTrainedModel, matrices: LayerMatrices) -> Iterator[HalfWindow]:
    """Attention and MLP half of each layer. Layers that are built alike are taken apart once."""
    decoder = Decoder(model, torch.device("cpu"))
    vocabulary = model.config.get_text_config().vocab_size
    tokens_BT = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    hidden_BTD, calls = decoder.embed(tokens_BT)
    digits = max(2, len(str(len(calls) - 1)))
    splits: dict[str, Split] = {}
    for index, (layer, call) in enumerate(zip(decoder.layers, calls, strict=True)):
        if repr(layer) not in splits:
            with float32_on(layer, hidden_BTD.device):
                splits[repr(layer)] = split_layer(layer, hidden_BTD, call)
        for side in SIDES:
            name, split = f"half_{index:0{digits}}_{side}", splits[repr(layer)]
            yield HalfWindow(name, layer, index=index, matrices=matrices[index], split=split, side=side)
