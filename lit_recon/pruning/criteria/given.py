"""Masks that are given rather than made: of a model that is sparse already, or of a file.

Zeros       criterion=zeros   the zeros of a sparse model, someone else's pruning, with the weights that it has
MasksFile   criterion=file    masks.safetensors of a run, for another checkpoint of the same shapes
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from lit_recon.model.loading import HubModel
from lit_recon.model.matrices import Matrix
from lit_recon.pruning.masks import Masks

_SHOWN = 3  # names in a message


class GivenMasks(ABC):
    """Masks of a model's matrices that do not follow from scores; patterns and sparsity have no say in them.

    Attributes:
        changes_weights: Whether the weights that stay are others than the dense ones.
        shares: By matrix, the share of its weights that go, after `prepare`.
    """

    changes_weights = False

    def __init__(self) -> None:
        self.shares: dict[str, float] = {}

    def start(self, weight_OI: Tensor) -> None:
        """No statistics."""
        return None

    def update(self, statistics: None, inputs_NI: Tensor) -> None:
        """Never called: there are no statistics."""
        return None

    def scores(self, weight_OI: Tensor, statistics: None) -> Tensor:
        """Nothing: there are none."""
        raise AssertionError("masks are given")

    def prepare(self, matrices: Sequence[Matrix]) -> None:
        """Look whether the masks fit some matrices.

        Args:
            matrices: Those of the model, with their weights.

        Raises:
            ValueError: They do not; the message names what does not fit.
        """
        self.check(matrices)
        for matrix in (one for one in matrices if one.input_dim is not None):
            mask = self.given(matrix)[0]
            self.shares[matrix.name] = 1 - int(torch.count_nonzero(mask)) / mask.numel()

    @abstractmethod
    def check(self, matrices: Sequence[Matrix]) -> None:
        """Look whether the masks fit some matrices, of which the shapes are enough.

        Raises:
            ValueError: They do not; the message names what does not fit.
        """

    @abstractmethod
    def given(self, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        """The mask (True = kept) of a matrix, and its weights where they are not the dense ones; in its shape."""


class MasksFile(GivenMasks):
    """Masks from a file of a run.

    Args:
        masks: Path of a masks.safetensors that a run of lit_recon has left.
    """

    def __init__(self, masks: str) -> None:
        super().__init__()
        self.path = masks
        if not Path(masks).is_file():
            raise ValueError(f"criterion.masks={masks}: no such file; expected the masks.safetensors of a run.")
        try:
            self.masks = Masks.load(Path(masks))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"criterion.masks={masks}: not a file of masks ({error}); expected the masks.safetensors of a run."
            ) from error

    def check(self, matrices: Sequence[Matrix]) -> None:
        """Look whether there is a mask of the right shape for every matrix, and a matrix for every mask."""
        found = {name: self.masks.shape(name) for name in self.masks}
        if problems := list(_misfits(matrices, found, "mask")):
            said = f"criterion.masks={self.path}: {'; '.join(problems)}"
            raise ValueError(f"{said}. Expected the masks of a model of the same shapes.")

    def given(self, matrix: Matrix) -> tuple[Tensor, None]:
        """The mask of a matrix; its weights are the dense ones."""
        return self.masks[matrix.name], None


class Zeros(GivenMasks):
    """The zeros of a model that is sparse already, whoever pruned it, and the weights that it has.

    Its matrices alone are taken over. The dense model says what windows shall output.

    Args:
        name: Hub id or folder of the sparse model; None: the model of the run is sparse itself, and its windows have
            nothing to win back (walk=global loss=ce trains them further).
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self._source = None if name is None else HubModel(name=name)
        self._model: PreTrainedModel | None = None

    @property
    def changes_weights(self) -> bool:  # type: ignore[override]
        """Whether there is a second model."""
        return self._source is not None

    def check(self, matrices: Sequence[Matrix]) -> None:
        """Look whether the sparse model has every matrix, in the same shape."""
        if self._source is None:
            return
        found = {name: tuple(one.shape) for name, one in self._source.skeleton().named_parameters()}
        wanted = {matrix.name for matrix in matrices}
        if problems := list(_misfits(matrices, {name: found[name] for name in found if name in wanted}, "matrix")):
            said = f"criterion.name={self.name}: {'; '.join(problems)}"
            raise ValueError(f"{said}. Expected a sparse model of the same shapes as the dense one.")

    def prepare(self, matrices: Sequence[Matrix]) -> None:
        """Read the sparse model, and look whether it is one."""
        if self._source is not None and self._model is None:
            self._model = self._source.load()
        super().prepare(matrices)
        if not any(self.shares.values()):
            about = "model" if self.name is None else f"criterion.name={self.name}"
            raise ValueError(
                f"criterion=zeros: {about} has no zeros in its matrices, so there is no mask to take from it; give the "
                "folder of a pruned model (criterion.name=...), or another criterion."
            )

    def given(self, matrix: Matrix) -> tuple[Tensor, Tensor | None]:
        """Where the weights of a matrix in the sparse model are not zero, and these weights."""
        if self._model is None:
            return (matrix.weight.detach() != 0).cpu(), None
        weight = self._model.get_parameter(matrix.name).detach()
        return weight != 0, weight

    def __deepcopy__(self, memo: object) -> "Zeros":
        """Itself: a copy for a rehearsal would hold a second model."""
        return self


def _misfits(matrices: Sequence[Matrix], found: dict[str, tuple[int, ...]], what: str) -> Iterator[str]:
    """What does not fit between some matrices and the shapes that were found, in words."""
    shapes = {matrix.name: tuple(matrix.weight.shape) for matrix in matrices if matrix.input_dim is not None}
    others = [
        f"{name} is {found[name]}, not {shapes[name]}" for name in found if found[name] != shapes.get(name, found[name])
    ]
    listed = {
        f"there is no {what} for": [name for name in shapes if name not in found],
        f"the model has no matrix for the {what} of": [name for name in found if name not in shapes],
        "other shapes": others,
    }
    for about, names in listed.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{about} {', '.join(names[:_SHOWN])}{more}"
