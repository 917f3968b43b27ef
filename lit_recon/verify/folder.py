"""Model folder: its safetensors files, and the layout of its matrices, by its architecture or by names of tensors.

Without an architecture that transformers knows, matrices are found by their names and taken to be (outputs, inputs).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from lit_recon.model.decoder import cause, decoder_layers
from lit_recon.model.loading import HubModel
from lit_recon.model.mapped_files import DenseFiles, listed_files, weight_problems
from lit_recon.model.matrices import Matrix, find_matrices
from lit_recon.verify.layout import IN_LAYER, Layout, shapes_of
from lit_recon.verify.quantised import check_readable
from lit_recon.verify.request import WEIGHTS

_NO_MATRIX = re.compile(
    r"emb|norm|\bln_|layernorm|router|\bgate\b|\bconv\b|conv1d|\bwte\b|\bwpe\b|lora_", re.IGNORECASE
)


def open_weights(folder: Path) -> DenseFiles:
    """The safetensors files of a model folder, opened.

    Raises:
        ValueError: Files are missing or damaged.
    """
    weights = next(name for name in WEIGHTS if (folder / name).is_file())
    if problems := weight_problems(folder, weights):
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    names = listed_files(folder / weights) if weights.endswith(".index.json") else [weights]
    return DenseFiles([folder / name for name in names])


def read_layout(
    folder: Path, files: DenseFiles, masks: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Layout, list[str]]:
    """The layout of a folder, and remarks on how it was found.

    Args:
        folder: The folder, for its config.json.
        files: Its weights.
        masks: Shapes of masks, by the names of their matrices: these are matrices in any case.

    Raises:
        ValueError: Matrices are stored packed, or otherwise than config.json says, or there are none.
    """
    stored, of_masks = shapes_of(files), {name: (shape, 1) for name, shape in (masks or {}).items()}
    try:
        skeleton = _skeleton(folder, most=len(stored))
        shapes = {matrix.name: (tuple(matrix.weight.shape), matrix.input_dim) for matrix in _matrices(skeleton)}
        layout = Layout(stored, skeleton, of_masks | shapes)
        check_readable(folder, files, layout, set(shapes))
        reason = "" if layout.places else "Its tensors are named otherwise than its config.json has it"
    except _Unknown as error:
        reason = f"Its architecture is not known ({error})"
    if not reason:
        return layout, []
    shapes = {name: (shape, 1) for name, shape in stored.items() if _looks_like_a_matrix(name, shape)}
    layout = Layout(stored, None, of_masks | shapes)
    check_readable(folder, files, layout, set(shapes))
    if not layout.places:
        raise ValueError(f"{folder}: no matrices found. {reason}, and no tensor has the name of a layer's weight.")
    return layout, [f"{reason}: matrices are found by their names, and taken to be stored (outputs, inputs)"]


class _Unknown(Exception):
    """No skeleton can be made."""


def _skeleton(folder: Path, *, most: int) -> PreTrainedModel:
    """The model of a folder's config.json without weights.

    Args:
        folder: The folder.
        most: Layers that its weights can have; to build more would take minutes.

    Raises:
        _Unknown: transformers cannot make one, or it is no decoder.
    """
    if not (folder / "config.json").is_file():
        raise _Unknown("no config.json")
    model = HubModel(name=str(folder), attention="eager")  # the one that needs no other library
    try:
        depth = getattr(model.config().get_text_config(), "num_hidden_layers", None)
        if isinstance(depth, int) and depth > most:
            raise _Unknown(f"its config.json says num_hidden_layers={depth}, and its weights are {most} tensors")
        skeleton = model.skeleton()
        skeleton.tie_weights()  # which transformers 5.0 does not do on the meta device
        decoder_layers(skeleton)
    except ValueError as error:
        raise _Unknown(cause(error)) from error
    return skeleton


def _matrices(skeleton: PreTrainedModel) -> Iterator[Matrix]:
    """The matrices of a skeleton; parameters in no linear module are matrices if they hold experts, not filters."""
    for matrix in (matrix for layer in find_matrices(skeleton) for matrix in layer):
        if matrix.input_dim is not None or (matrix.weight.dim() == 3 and 1 not in matrix.weight.shape[1:]):
            yield matrix


def _looks_like_a_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of a layer, by its name."""
    if _NO_MATRIX.search(name) or not IN_LAYER.search(name):
        return False
    is_stacked = len(shape) == 3 and "experts" in name and not name.endswith("bias")
    return is_stacked or (len(shape) == 2 and name.endswith(".weight"))
