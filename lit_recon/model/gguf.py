"""GGUF files: dequantised into the safetensors folder that transformers would write, without holding the model.

One tensor at a time is read, put into the form that transformers' own tables say, and written. Where these do not know
each tensor of a model, transformers dequantises it whole, in more memory than its float32 weights take.
"""

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from lit_recon.system.atomic_files import CHUNK
from lit_recon.system.quiet_libraries import no_progress_bars
from lit_recon.system.tensor_files import write_tensors

HEADER = "gguf.json"  # next to the model that was dequantised: what its file said of itself


def check_transformers(oldest: str) -> None:
    """Refuse releases of transformers that read the weights of a GGUF file right and its tokenizer wrong.

    Args:
        oldest: The first release that reads the tokenizer of the file right.

    Raises:
        ValueError: An older one is installed.
    """
    if Version(transformers.__version__) < Version(oldest):
        raise ValueError(
            f"it is a GGUF file, whose tokenizer transformers {transformers.__version__} misreads; upgrade it to "
            f"{oldest} or newer (5.23 and newer need Python 3.11), or use a model that is no GGUF file: model=hf "
            "model.name=<folder or Hub id>"
        )


def dequantise(file: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as a safetensors folder, in float32, which holds the values exactly.

    Raises:
        ValueError: A tensor has another shape than the configuration says.
    """
    location: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    AutoTokenizer.from_pretrained(**location).save_pretrained(folder)
    settings, _ = PreTrainedConfig.get_config_dict(**location)
    config = CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = _parameters(model)
    reader = gguf.GGUFReader(file)
    (folder / HEADER).write_text(json.dumps(header(reader), indent=1), encoding="utf-8")
    make = _maker(reader, settings, model, parameters)
    del reader  # Python objects of half a gigabyte, for a large vocabulary
    if make is None:
        _dequantise_whole(location, folder)
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    with (folder / "model.safetensors").open("xb") as weights:
        write_tensors(weights, parameters, {"format": "pt"}, make)


def _parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that a checkpoint of a model holds; of tied ones the first."""
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[id(tensor)] == name}


def _maker(
    reader: gguf.GGUFReader, settings: dict[str, Any], model: PreTrainedModel, parameters: Mapping[str, Tensor]
) -> Callable[[str], Tensor] | None:
    """How each parameter is made of a GGUF file, by its name; None: transformers' tables do not say it of all.

    Args:
        reader: The file.
        settings: The configuration in it, as transformers reads it.
        model: The model, on the meta device.
        parameters: Its parameters, by name.
    """
    try:  # not public; newer releases read some architectures another way
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        architecture = reader.fields["general.architecture"].contents()
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=settings)
        names = get_gguf_hf_weights_map(model, processor)
    except (ImportError, NotImplementedError):
        return None
    stored = {names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names}
    if stored.keys() != parameters.keys():
        return None

    def make(name: str) -> Tensor:
        made: dict[str, dict[str, Tensor]] = {"tensors": {}}  # where some processors put a tensor instead
        values, rest, _ = processor.process(
            weights=_values(stored[name]), name=stored[name].name, tensor_key_mapping=names, parsed_parameters=made
        )
        tensor = made["tensors"][name] if rest is None else torch.from_numpy(values)
        if tensor.shape != parameters[name].shape:
            raise ValueError(f"{name} is {(*tensor.shape,)} in its file, and {(*parameters[name].shape,)} in the model")
        return tensor

    return make


def _values(tensor: gguf.ReaderTensor) -> np.ndarray:
    """A tensor in float32, dequantised some rows at a time: gguf itself takes twice the memory."""
    values = np.empty(tensor.shape[::-1], np.float32)
    rows = max(1, CHUNK // values[0].nbytes) if values.ndim > 1 else len(values)
    for start in range(0, len(values), rows):
        data = tensor.data[start : start + rows] if values.ndim > 1 else tensor.data
        values[start : start + rows] = gguf.dequantize(data, tensor.tensor_type)
    return values


def _dequantise_whole(location: dict[str, Any], folder: Path) -> None:
    """Write the model of a GGUF file by transformers alone, which holds it in memory, more than once for a moment."""
    settings = dict(location)
    if hasattr(transformers, "GgufConfig"):  # releases that have it may keep the weights quantised by default
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with no_progress_bars(), redirect_stderr(io.StringIO()):  # the bar of its GGUF reader obeys no setting
        AutoModelForCausalLM.from_pretrained(**settings, dtype=torch.float32).save_pretrained(folder)


def header(reader: gguf.GGUFReader) -> dict[str, str | int]:
    """What a GGUF file says of itself: name, size, kind of quantisation and so on (its fields `general.*`)."""
    found = {name: field.contents() for name, field in reader.fields.items() if name.startswith("general.")}
    return {name: value for name, value in found.items() if isinstance(value, str | int)}


def license_of(folder: Path) -> str | None:
    """Licence of a dequantised model, as its GGUF file gave it; None where it gave none."""
    found = _header_in(folder).get("general.license")
    return found if isinstance(found, str) and found else None


def title(folder: Path) -> str | None:
    """Name, size and quantisation of a dequantised model, as its GGUF file gave them; None where it gave none."""
    said: Any = _header_in(folder)
    name, size, kind = (said.get(f"general.{key}") for key in ("name", "size_label", "file_type"))
    kinds = {member.value: member.name.partition("_")[2] for member in gguf.LlamaFileType}
    parts = [name, size if size and size not in str(name) else None, kinds.get(kind)]
    return ", ".join(str(part) for part in parts if part) or None


def _header_in(folder: Path) -> dict[str, Any]:
    """What the GGUF file of a dequantised model said of itself; empty for another model."""
    try:
        return json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
