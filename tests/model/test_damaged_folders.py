"""Damaged model folders: each is refused in one message, with status 2, nothing written, nothing executed."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

WEIGHTS, INDEX, CONFIG, TOKENIZER = "model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"
NORM = "model.norm.weight"
DEEP = b"[" * 200_000
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n"
Damage = Callable[[Path], object]


def holds(name: str, content: bytes) -> Damage:
    """A file with other content."""
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, keep: Callable[[int], int]) -> Damage:
    """A file that lost its end, or is longer than it was."""
    return lambda folder: (folder / name).open("r+b").truncate(keep((folder / name).stat().st_size))


def says(name: str, **changes: Any) -> Damage:
    """A JSON file with other settings."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def header(change: Callable[[dict], object]) -> Damage:
    """A safetensors file with another header, and the same tensors behind it."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        entries = change(entries) or entries
        made = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(len(made).to_bytes(8, "little") + made + content[8 + length :])

    return damage


def entry(**changes: Any) -> Damage:
    """A header in which one tensor is described otherwise."""
    return header(lambda entries: entries[NORM].update(changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Whole files with other tensors."""

    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def index(weight_map: Any, **others: Any) -> Damage:
    """An index in place of the one file."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | others))

    return damage


def broken_index(content: bytes) -> Damage:
    """What is no index in place of one."""
    return lambda folder: ((folder / WEIGHTS).unlink(), holds(INDEX, content)(folder))


def binary(content: Callable[[Path], bytes]) -> Damage:
    """A pytorch_model.bin in place of the safetensors file."""

    def damage(folder: Path) -> None:
        made = content(folder)
        (folder / WEIGHTS).unlink()
        (folder / "pytorch_model.bin").write_bytes(made)

    return damage


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path("executed").resolve().touch, ()


def evil_archive(folder: Path) -> bytes:
    """What torch.save writes of it."""
    torch.save({NORM: Evil()}, folder / "evil")
    return (folder / "evil").read_bytes()


def empty_archive(folder: Path) -> bytes:
    """A zip file without entries."""
    zipfile.ZipFile(folder / "empty", "w").close()
    return (folder / "empty").read_bytes()


def no_tensors(folder: Path) -> bytes:
    """A state that holds numbers."""
    torch.save({NORM: 3, "lm_head.weight": "words"}, folder / "numbers")
    return (folder / "numbers").read_bytes()


def with_code(name: str, classes: dict[str, Any]) -> Damage:
    """A configuration that asks for code in the folder to be run."""

    def damage(folder: Path) -> None:
        (folder / "mine.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
        says(name, auto_map=classes, **({"model_type": "mine"} if name == CONFIG else {"tokenizer_class": "Mine"}))(
            folder
        )
        if name != CONFIG:
            (folder / TOKENIZER).rename(folder / "vocab.txt")

    return damage


NOTHING = (b"", b"null", b"[]", b"3", b'"words"', b"{", b"\x00" * 64, b"\xff\xfe\x00", DEEP)
DAMAGES: dict[str, Damage] = {
    **{f"weights hold {content[:8]!r}": holds(WEIGHTS, content) for content in (b"", b"1234567", LFS, b"\x00" * 4096)},
    "weights lack their last byte": cut(WEIGHTS, lambda size: size - 1),
    "weights lack their second half": cut(WEIGHTS, lambda size: size // 2),
    "weights end in their header": cut(WEIGHTS, lambda size: 100),
    "weights end after their length": cut(WEIGHTS, lambda size: 8),
    "weights have bytes too many": cut(WEIGHTS, lambda size: size + 64),
    "header longer than any file": holds(WEIGHTS, b"\xff" * 8 + b"{}"),
    **{f"header is {content[:8]!r}": header(lambda _, content=content: content) for content in NOTHING[1:]},
    "header of tensors that are lists": header(lambda entries: {name: [1] for name in entries}),
    "entry without a type": header(lambda entries: entries[NORM].pop("dtype") and None),
    "entry without a shape": header(lambda entries: entries[NORM].pop("shape") and None),
    "entry without offsets": header(lambda entries: entries[NORM].pop("data_offsets") and None),
    "type is a list": entry(dtype=["F32"]),
    "type is unknown": entry(dtype="F7"),
    "type is too wide": entry(dtype="F64"),
    "shape of fractions": entry(shape=[32.0]),
    "shape below zero": entry(shape=[-32]),
    "shape is a word": entry(shape="32"),
    "shape is null": entry(shape=None),
    "shape is another": entry(shape=[31]),
    "shape is enormous": entry(shape=[10**30]),
    "shape is nested": entry(shape=[[32]]),
    "offsets of fractions": entry(data_offsets=[0.0, 128.0]),
    "offsets below zero": entry(data_offsets=[-128, 0]),
    "offsets the other way round": entry(data_offsets=[128, 0]),
    "offsets are three": entry(data_offsets=[0, 64, 128]),
    "offsets are one": entry(data_offsets=128),
    "offsets beyond the file": entry(data_offsets=[10**12, 10**12 + 128]),
    "a tensor is missing": tensors(lambda found: found.pop(NORM)),
    "a tensor has another name": tensors(lambda found: found.update(other=found.pop(NORM))),
    "a tensor has another shape": tensors(lambda found: found.update({NORM: torch.ones(31)})),
    "a weight is not a number": tensors(lambda found: found[NORM].fill_(float("nan"))),
    "a weight is infinite": tensors(lambda found: found["model.layers.1.mlp.up_proj.weight"][0].fill_(float("inf"))),
    **{f"index is {content[:8]!r}": broken_index(content) for content in NOTHING},
    "index maps to a list": index([]),
    "index maps to null": index(None),
    "index maps to numbers": index({NORM: 3}),
    "index maps to lists": index({NORM: ["model-00001-of-00001.safetensors"]}),
    "index maps nothing": index({}),
    "index names a long file": index({NORM: "x" * 300 + ".safetensors"}),
    "index names a file elsewhere": index({NORM: "../other/model.safetensors"}),
    "index names an absolute path": index({NORM: "/etc/hostname"}),
    "index names the folder above": index({NORM: ".."}),
    "index names a NUL": index({NORM: "a\0.safetensors"}),
    "index names a file that is missing": index({NORM: "model-00002-of-00001.safetensors"}),
    "index of a bin file elsewhere": lambda folder: (
        (folder / WEIGHTS).unlink(),
        holds("pytorch_model.bin.index.json", json.dumps({"weight_map": {NORM: "../evil.bin"}}).encode())(folder),
    ),
    **{f"config is {content[:8]!r}": holds(CONFIG, content) for content in NOTHING},
    "config of a million layers": says(CONFIG, num_hidden_layers=1_000_000),
    **{
        f"config of {number!r} layers": says(CONFIG, num_hidden_layers=number) for number in ("three", 0, -1, None, [3])
    },
    **{f"config {number!r} wide": says(CONFIG, hidden_size=number) for number in (0, -32, 10**12, "wide", 33)},
    **{f"config of {number!r} heads": says(CONFIG, num_attention_heads=number) for number in (0, -4, 5, None)},
    **{f"config of {number!r} tokens": says(CONFIG, vocab_size=number) for number in (0, -64, 32, "many")},
    **{
        f"config of type {kind!r}": says(CONFIG, model_type=kind) for kind in ("nonsense", "t5", "", None, ["llama"], 3)
    },
    "config of an unknown activation": says(CONFIG, hidden_act="nonsense"),
    "config of a rotation that is a list": says(CONFIG, rope_parameters=[1]),
    "config of an unknown rotation": says(CONFIG, rope_parameters={"rope_type": "nonsense", "rope_theta": 1.0}),
    "config of an unknown type of weights": says(CONFIG, dtype="float7"),
    "config of an unknown attention": says(CONFIG, attn_implementation="nonsense"),
    "config of quantised weights": says(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
    "config of quantised weights that are a word": says(CONFIG, quantization_config="gptq"),
    "config of compressed weights": says(
        CONFIG,
        quantization_config={"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
    ),
    "config with code": with_code(CONFIG, {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}),
    "tokenizer with code": with_code("tokenizer_config.json", {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}),
    **{f"tokenizer is {content[:8]!r}": holds(TOKENIZER, content) for content in NOTHING},
    "tokenizer of an unknown model": says(TOKENIZER, model={"type": "Nonsense"}),
    "tokenizer without words": says(
        TOKENIZER, model={"type": "WordLevel", "vocab": {}, "unk_token": "_"}, added_tokens=[]
    ),
    "tokenizer of ids that are words": says(
        TOKENIZER, model={"type": "WordLevel", "vocab": {"a": "b"}, "unk_token": "_"}
    ),
    "tokenizer is missing": lambda folder: (folder / TOKENIZER).unlink(),
    "pickle that runs code": binary(lambda _: pickle.dumps({NORM: Evil()})),
    "archive that runs code": binary(evil_archive),
    "bin of an empty archive": binary(empty_archive),
    "bin without tensors": binary(no_tensors),
    **{
        f"bin is {content[:8]!r}": binary(lambda _, content=content: content)
        for content in (b"", b"\x00" * 64, LFS, b"\x80\x02.")
    },
    "config is missing": lambda folder: (folder / CONFIG).unlink(),
    "weights are missing": lambda folder: (folder / WEIGHTS).unlink(),
    "weights are a folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "config is a folder": lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
    "nothing is there": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_message_and_leaves_nothing(
    tiny_run: Callable[..., Ended], model_folder: Path, tmp_path_factory: pytest.TempPathFactory, damage: str
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("damaged") / "model"))
    DAMAGES[damage](folder)
    ended = tiny_run(f"model.name={folder}")
    assert ended.status == 2, ended
    lines = [line for line in ended.err.splitlines() if line and not line.startswith("[transformers]")]
    assert len(lines) == 1 and len(lines[0]) < 1500, ended.err
    assert "Traceback" not in ended.err + ended.out
    assert list(Path().iterdir()) == [], "also nothing that a pickle or code of the folder would have written"


def test_at_least_forty_ways_to_damage_a_folder_are_tried_and_the_whole_one_loads(model_folder: Path) -> None:
    assert len(DAMAGES) >= 40
    AutoModelForCausalLM.from_pretrained(model_folder)
