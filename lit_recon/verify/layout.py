"""Layout: where each matrix of a model lies in the files of a folder, and which of its dimensions are its inputs.

The architecture tells what a matrix is: a skeleton without weights is built of config.json. transformers may store a
matrix under another name, or in parts (a tensor for each expert of a mixture); its own conversion for saving, given a
tensor in the shape of the matrix, shows where each of its weights goes. Nothing is loaded for that.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lit_recon.model.mapped_files import DenseFiles

IN_LAYER = re.compile(r"\.\d+\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Part:
    """A tensor of the files that is a matrix, or a part of one.

    Attributes:
        name: Its name in the files.
        shape: Its shape, by the architecture.
        input_dim: Which of its last two dimensions runs over the inputs; None: not known.
    """

    name: str
    shape: tuple[int, ...]
    input_dim: int | None


@dataclass(frozen=True)
class Place:
    """Where matrices lie: one, mostly; several where the files hold them as one tensor.

    Attributes:
        matrices: Their names in the model.
        parts: The tensors of the files that they are.
    """

    matrices: tuple[str, ...]
    parts: tuple[Part, ...]


@dataclass
class Layout:
    """Where the matrices of a model lie in files, found when it is made.

    Attributes:
        files: Shapes of all tensors of the files, by their names.
        skeleton: The model without weights; None: its architecture is not known.
        shapes: Shape and input dimension of each matrix, by its name in the model.
        places: Where they lie.
        lacking: Matrices that the files do not have.
    """

    files: Mapping[str, tuple[int, ...]]
    skeleton: PreTrainedModel | None = None
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list, init=False)
    lacking: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Find where each matrix lies, and which names of the model share a parameter (tied embeddings)."""
        self._input_dims: dict[str, int | None] = {}
        self._tied: dict[str, list[str]] = {}
        if self.skeleton is not None:
            owners: dict[int, list[str]] = {}
            for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
                owners.setdefault(id(parameter), []).append(name)
            self._tied = {name: names for names in owners.values() if len(names) > 1 for name in names}
        left: dict[str, list[str]] = {}  # by layer: those that the files may hold as one tensor
        for name in self.shapes:
            if not self._place([name]):
                left.setdefault(_layer_of(name), []).append(name)
        for names in left.values():
            if len(names) == 1 or not self._place(names):
                self.lacking += names

    def _place(self, names: list[str]) -> bool:
        """Note where these matrices lie; False if the files do not have them."""
        tensors = {name: torch.empty(self.shapes[name][0], device="meta") for name in names}
        stored = self.stored(tensors)
        if stored is None:
            return False
        as_they_are = {id(tensor): self.shapes[name][1] for name, tensor in tensors.items()}
        parts = []
        for name, tensor in stored.items():
            known = id(tensor) in as_they_are
            input_dim = as_they_are[id(tensor)] if known else self._input_dim(name, names)
            parts.append(Part(name, tuple(tensor.shape), input_dim))
        self.places.append(Place(tuple(names), tuple(parts)))
        return True

    def _input_dim(self, part: str, names: list[str]) -> int | None:
        """The dimension of a tensor that runs over inputs, if not stored as in the model; found once for all layers."""
        kind = _NUMBER.sub("*", part)
        if kind not in self._input_dims:
            known = self.shapes[names[0]][1]
            stored = self.stored({name: _first_input(*self.shapes[name]) for name in names})
            for name, first in (stored or {}).items():
                self._input_dims[_NUMBER.sub("*", name)] = None if known is None else _dim_of_inputs(first, known)
        return self._input_dims[kind]

    @cached_property
    def owners(self) -> set[str]:
        """What the files' tensors belong to, as their names say, but for biases: modules, and parameters in blocks."""
        weights = [name for name in self.files if not name.endswith("bias")]
        return {name.rpartition(".")[0] for name in weights} | {
            re.sub(r"_(blocks|scales)$", "", name) for name in weights
        }

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Tensors, by names in the model and in its shapes, as the files hold them.

        Returns:
            Tensors by their names in the files; None if the files do not have all of these. Their shapes are those of
            the files if they can be: some files have stacked experts transposed, which transformers undoes.
        """
        same = {self._same(name) or "": tensor for name, tensor in tensors.items()}
        if self._has(same, in_shape=True):
            return same
        converted = self.converted(tensors)
        if self._has(converted, in_shape=True):
            return converted
        transposed = {name: tensor.mT if tensor.dim() == 3 else tensor for name, tensor in same.items()}
        if self.skeleton is not None and self._has(transposed, in_shape=True):
            return transposed
        return same if self._has(same) else converted if self._has(converted) else None

    def _has(self, stored: Mapping[str, Tensor], *, in_shape: bool = False) -> bool:
        """Whether the files have all of these tensors, if any."""
        return bool(stored) and all(
            name in self.files and (not in_shape or self.files[name] == tensor.shape) for name, tensor in stored.items()
        )

    def _same(self, name: str) -> str | None:
        """The name in the files of a tensor that they hold as the model does; None: they do not."""
        prefix = "" if self.skeleton is None else f"{self.skeleton.base_model_prefix}."
        for one in (name, *self._tied.get(name, ())):
            other = one.removeprefix(prefix) if one.startswith(prefix) else prefix + one  # of a model without head
            found = next((known for known in (one, other) if known in self.files), None)
            if found is not None:
                return found
        return None

    def converted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as transformers saves them; empty where it cannot save these without others."""
        if self.skeleton is None:
            return {}
        try:
            return revert_weight_conversion(self.skeleton, dict(tensors))
        except Exception:  # whatever its conversions raise on a part of a model
            return {}


def shapes_of(files: DenseFiles) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of files, by their names."""
    return {name: files.kind(name)[1] for name in files.names}


def _layer_of(name: str) -> str:
    """The part of a name up to its first number."""
    found = IN_LAYER.search(name)
    return name[: found.end()] if found else ""


def _first_input(shape: tuple[int, ...], input_dim: int | None) -> Tensor:
    """A boolean tensor in the shape of a matrix, True for the weights of the first input; without memory of its own."""
    first = torch.zeros(shape[-2 if input_dim == 0 else -1], dtype=torch.bool)
    first[:1] = True
    return (first[:, None] if input_dim == 0 else first).expand(shape)


def _dim_of_inputs(first: Tensor, known: int) -> int:
    """The dimension of a stored tensor that runs over the inputs.

    Args:
        first: Where `_first_input` went.
        known: The answer where it has no shape that could tell.
    """
    first_XX = first[0] if first.dim() == 3 else first
    if min(first_XX.shape) < 2:
        return known
    return 0 if first_XX[0, 0] != first_XX[1, 0] else 1
