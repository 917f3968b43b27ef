"""Quantised weights: those whose zeros can be told, and those that are refused.

Zeros can be told where each weight has a code of its own and that of zero is 0: float8, and int8 without a zero point.
Packed codes (of 4 bits, or bitmasks) are refused: what they mean is known to the library that made them.
"""

import json
from collections.abc import Set
from pathlib import Path

import torch

from lit_recon.model.mapped_files import DenseFiles
from lit_recon.verify.layout import Layout

FLOATS = ("F64", "F32", "F16", "BF16")
CODES = ("F8_E4M3", "F8_E5M2", "I8")  # of one weight each
_PACKED = (".qweight", ".weight_packed", "_blocks", ".compressed", ".bitmask")  # ends of names


def check_readable(folder: Path, files: DenseFiles, layout: Layout, known: Set[str]) -> None:
    """Refuse matrices whose zeros cannot be told, or that are none.

    Args:
        folder: The folder.
        files: Its weights.
        layout: Where they lie.
        known: Matrices whose shape is known otherwise than by a mask.

    Raises:
        ValueError: With the reason, and what to do.
    """
    packed = [name for name in layout.lacking if _packed_as(layout, name)]
    packed += [name for name in layout.files if layout.skeleton is None and name.endswith(_PACKED)]
    for place in layout.places:
        for part in place.parts:
            dtype, shape = files.kind(part.name)
            is_plain = dtype in FLOATS
            is_readable = dtype in CODES and shape == part.shape and not _has_zero_point(files, part.name)
            if not is_plain and not is_readable:
                packed.append(part.name)
            elif shape != part.shape and known >= {*place.matrices}:
                raise ValueError(
                    f"{folder}: {part.name} is {shape} in its files, and {part.shape} by its config.json, which is "
                    "that of another model."
                )
    if packed:
        raise ValueError(
            f"{folder}: matrices stored packed by {_method(folder)}: {len(packed)}, such as {packed[0]}; which "
            "weights are zero cannot be told from their codes. Look at the model that was quantised, or at a "
            "dequantised copy."
        )


def _packed_as(layout: Layout, name: str) -> bool:
    """Whether the files have something else in place of a matrix that they lack, such as its codes and scales."""
    shape, _ = layout.shapes[name]
    expected = {name, *layout.converted({name: torch.empty(shape, device="meta")})}
    return any(one.removesuffix(".weight") in layout.owners or one in layout.owners for one in expected)


def _has_zero_point(files: DenseFiles, name: str) -> bool:
    """Whether a code of 0 is not a weight of 0."""
    zero_point = f"{name}_zero_point"
    return zero_point in files.names and bool(files.tensors([zero_point])[zero_point].any())


def _method(folder: Path) -> str:
    """How weights were quantised, as config.json says it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a method that its config.json does not name"
