"""The dense checkpoint: what is known of its files, that no run changes them, and that streaming changes no result."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended, content, letter_tokenizer, numbers, unmappable
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_recon.model.architectures import tiny_model
from lit_recon.model.decoder import decoder_layers
from lit_recon.model.mapped_files import DenseFiles, checkpoint_files, folder_problems, layer_state, listed_files

FILES = ("model.safetensors", "model.safetensors.index.json")


ONE_BATCH = "+trainer.limit_train_batches=1"


def saved(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    """A tiny model and its tokenizer."""
    tiny_model(kind).to(dtype).save_pretrained(folder, max_shard_size=shard)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run_on(tiny_run: Callable[..., Ended]) -> Callable[..., Ended]:
    """A tiny run on the model of a folder."""

    def run(folder: Path, *overrides: str) -> Ended:
        return tiny_run(f"model.name={folder}", *overrides)

    return run


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that the safetensors files of a folder hold."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        *(pytest.param(kind, torch.float32, marks=pytest.mark.slow) for kind in ("llama", "phi")),
    ],
    ids=str,
)
def test_a_streamed_run_finds_what_one_in_memory_finds(
    run_on: Callable[..., Ended], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    folder = saved(kind, tmp_path / "model", dtype=dtype)
    settings = ("model.dtype=bfloat16",) if dtype == torch.bfloat16 else ()
    dense = tensors(folder)
    for name in ("streamed", "whole"):
        if name == "whole":
            unmappable(folder.rename(tmp_path / "mapped"), folder)
        ended = run_on(folder, f"output_dir={name}", *settings)
        assert ended.status == 0 and ("in memory as a whole" in ended.out) == (name == "whole"), ended
    assert len(list(Path("streamed/checkpoint").glob("*.safetensors"))) == 4  # three layers and the rest
    assert len(list(Path("whole/checkpoint").glob("*.safetensors"))) == 1
    streamed, other = tensors(Path("streamed/checkpoint")), tensors(Path("whole/checkpoint"))
    assert streamed.keys() == other.keys() == dense.keys()
    for name, tensor in streamed.items():
        assert tensor.dtype == dtype and torch.equal(tensor, other[name]), name
    assert sum(not torch.equal(tensor, dense[name]) for name, tensor in streamed.items()) >= 3 * 4
    assert Path("streamed/masks.safetensors").read_bytes() == Path("whole/masks.safetensors").read_bytes()
    assert numbers(Path("streamed")) == numbers(Path("whole"))


@pytest.mark.parametrize(
    ("kind", "dtype", "settings", "reason"),
    [
        ("mixtral", torch.float32, (), "its files have no model.layers.0."),
        ("llama", torch.bfloat16, ("model.dtype=float32",), "is BF16 (32,) in its files and F32 (32,) in the model"),
    ],
)
def test_a_model_that_is_not_as_in_its_files_is_said_to_be_in_memory(
    run_on: Callable[..., Ended], tmp_path: Path, kind: str, dtype: torch.dtype, settings: tuple[str, ...], reason: str
) -> None:
    ended = run_on(saved(kind, tmp_path / "model", dtype=dtype), *settings, "plan=true")
    assert ended.status == 0, ended.err
    told = " ".join(ended.out.split())
    assert "the model is in memory as a whole: " in told
    assert reason in told or reason.replace("(32,)", "(32, 32)") in told


@pytest.mark.parametrize(  # norms that answer in the type of what they are given, too
    ("kind", "windows"),
    [
        ("gemma3", "half"),
        ("opt", "model"),
        pytest.param("gemma3", "model", marks=pytest.mark.slow),
        pytest.param("opt", "half", marks=pytest.mark.slow),
    ],
)
def test_a_16_bit_model_is_trained_on_its_logits(
    run_on: Callable[..., Ended], tmp_path: Path, kind: str, windows: str
) -> None:
    folder = saved(kind, tmp_path / "model", dtype=torch.bfloat16)
    ended = run_on(folder, f"windows={windows}", "windows.head=true", "module.optimizer.lr=1e-3")
    assert ended.status == 0, ended
    *_, last = json.loads(Path("run/results.json").read_text())["windows"]
    assert last["measure"] == "KL divergence" and last["accepted"], last


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_many_tensors_needs_few_open_files(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model", shard="60KB")
    files = DenseFiles(sorted(folder.glob("*.safetensors")))
    before = len(os.listdir("/proc/self/fd"))
    made = files.tensors(files.names)
    assert len(made) > 20 and len(os.listdir("/proc/self/fd")) - before <= len(list(folder.glob("*.safetensors")))
    expected = tensors(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())
    assert list(made) == files.names


def test_tensors_that_do_not_follow_each_other_or_are_empty_or_unaligned_are_read(tmp_path: Path) -> None:
    flags = torch.ones(2, 2, dtype=torch.bool)
    stored = {"a": torch.arange(6.0), "b": torch.zeros(0, 3), "c": flags, "d": torch.ones(3)}
    save_file(stored, tmp_path / "aligned.safetensors")
    content = (tmp_path / "aligned.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip() + b" "  # of an odd length
    header += b" " * (len(header) % 2 == 0)
    odd = tmp_path / "odd.safetensors"
    odd.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    for path in (tmp_path / "aligned.safetensors", odd):
        for names in (["d", "a"], ["b"], list("abcd")):
            made = DenseFiles([path]).tensors(names)
            assert list(made) == names
            for name, tensor in made.items():
                assert tensor.dtype == stored[name].dtype and torch.equal(tensor, stored[name])


def test_no_run_changes_the_dense_files(
    run_on: Callable[..., Ended], command: Callable[..., Ended], tmp_path: Path
) -> None:
    folder = saved("llama", tmp_path / "model", shard="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    before, times = content(folder), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run_on(folder, "stop_after=1", "windows=half", "chain.inputs=sparse", "chain.statistics=sparse").status == 0
    assert command("resume=run").status == 0
    whole = run_on(folder, "output_dir=other", "model.dtype=bfloat16", "windows=matrix", ONE_BATCH)
    assert whole.status == 0 and "in memory as a whole" in whole.out, whole
    assert content(folder) == before and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    for checkpoint in ("run/checkpoint", "other/checkpoint"):  # and none is in them
        assert all(path.stat().st_nlink == 1 for path in Path(checkpoint).iterdir())


def test_the_files_of_a_model_are_those_that_hold_its_weights(tmp_path: Path) -> None:
    one, many = saved("llama", tmp_path / "one"), saved("llama", tmp_path / "many", shard="60KB")
    assert checkpoint_files(str(one), None, FILES) == [one / "model.safetensors"]
    listed = json.loads((many / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert checkpoint_files(str(many), None, FILES) == [many / name for name in sorted(set(listed))]
    assert checkpoint_files(str(one), None, ["other.safetensors"]) == []


@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_dense_files_give_each_tensor_of_the_model_and_stay_as_they_are(tmp_path: Path, shard: str) -> None:
    folder = saved("llama", tmp_path / "model", shard=shard)
    before = content(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    files = DenseFiles.from_model(model, checkpoint_files(str(folder), None, FILES))
    assert isinstance(files, DenseFiles)
    expected = tensors(folder)
    assert set(files.names) == set(expected)
    assert files.nbytes == sum(tensor.numel() * 4 for tensor in expected.values())
    given = files.tensors(files.names[::2])
    assert list(given) == files.names[::2]
    for name, tensor in given.items():
        assert torch.equal(tensor, expected[name])
        tensor.add_(1)
    files.read_ahead(files.names)
    assert content(folder) == before
    assert all(torch.equal(tensor, expected[name]) for name, tensor in files.tensors(given).items())


def test_a_model_whose_weights_are_in_other_files_cannot_be_streamed(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for files in ([], [tmp_path / "pytorch_model.bin"]):
        assert DenseFiles.from_model(model, files) == "its weights are not in safetensors files"


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
def test_a_layer_that_is_not_as_in_its_files_is_told(tmp_path: Path, change: str) -> None:
    model, name = tiny_model("llama"), "model.layers.1.mlp.up_proj.weight"
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    if change == "missing":
        del state[name]
    else:
        state[name] = state[name][:16].clone() if change == "shape" else state[name].half()
    save_file(state, tmp_path / "model.safetensors")
    message = DenseFiles.from_model(model, [tmp_path / "model.safetensors"])
    said = {
        "missing": f"its files have no {name}",
        "shape": f"{name} is F32 (16, 32) in its files and F32 (48, 32) in the model",
        "dtype": f"{name} is F16 (48, 32) in its files and F32 (48, 32) in the model",
    }
    assert isinstance(message, str) and message.startswith(said[change])


def test_a_layers_state_is_named_as_in_the_model() -> None:
    model = tiny_model("gpt2")
    prefix, layers = decoder_layers(model)
    state = layer_state(layers[1], f"{prefix}.1")
    assert set(state) == {name for name in model.state_dict() if name.startswith(f"{prefix}.1.")} and state


def test_what_is_missing_or_damaged_in_a_folder_is_told_together(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "model", shard="60KB")
    assert folder_problems(folder) == []
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    first.unlink()
    os.truncate(second, 100)
    (folder / "config.json").unlink()
    problems = "; ".join(folder_problems(folder))
    for told in ("no config.json", f"no {first.name}, which", f"{second.name} is cut short, damaged"):
        assert told in problems


def write_header(path: Path, header: object) -> None:
    """A safetensors file with a header and 128 bytes of zeros behind it."""
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + bytes(128))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": ["F32"]},
        {"shape": [32.0]},
        {"shape": [-32]},
        {"shape": [True] * 7},
        {"shape": [31]},
        {"data_offsets": [-128, 0]},
        {"data_offsets": [128, 0]},
        {"data_offsets": [0.0, 128.0]},
        {"data_offsets": 128},
    ],
    ids=str,
)
def test_a_header_that_does_not_describe_tensors_is_refused_with_what_it_says(tmp_path: Path, change: dict) -> None:
    path, entry = tmp_path / "model.safetensors", {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}
    write_header(path, {"norm": entry})
    assert DenseFiles([path]).names == ["norm"]
    write_header(path, {"norm": entry | change})
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short, damaged .*'norm'"):
        DenseFiles([path])


@pytest.mark.parametrize(
    "name", ["../other/x.safetensors", "/x.safetensors", "a\\x.safetensors", "..", "", "x" * 300, 3]
)
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    for read in (lambda: listed_files(index), lambda: checkpoint_files(str(tmp_path), None, FILES)):
        with pytest.raises(ValueError, match="expected a name in its own folder"):
            read()


@pytest.mark.parametrize("change", ["written", "cut", "gone"])
def test_a_model_file_that_changes_during_a_run_ends_it_before_the_commit_and_says_so(
    run_on: Callable[..., Ended], tmp_path: Path, change: str
) -> None:
    folder = saved("llama", tmp_path / "model")
    weights = folder / "model.safetensors"
    Path("spoiler.py").write_text(
        "from pathlib import Path\nfrom lightning import Callback\n\n\nclass Spoiler(Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        f"        path = Path({str(weights)!r})\n"
        "        if not Path('run/config.yaml').exists():\n            return  # rehearsed\n"
        f"        if {change!r} == 'gone':\n            path.unlink(missing_ok=True)\n"
        f"        elif {change!r} == 'cut':\n            path.open('r+b').truncate(path.stat().st_size - 4)\n"
        "        else:\n            path.write_bytes(path.read_bytes())\n"
    )
    ended = run_on(folder, "+trainer.callbacks=[{_target_:spoiler.Spoiler}]")
    assert ended.status == 1 and "Traceback" not in ended.err, ended
    said = " ".join(ended.err.split())
    assert str(weights) in said and "window block_00 is not kept" in said and "resume=run" in said
    assert not list(Path("run").glob("commits/*.json"))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="maps keep no file open")
def test_too_few_open_files_are_told_with_a_remedy(tmp_path: Path) -> None:
    import resource

    folder = saved("llama", tmp_path / "model")
    files, kept = DenseFiles(list(folder.glob("*.safetensors"))), []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(descriptor) for descriptor in os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
    try:
        with pytest.raises(ValueError, match="too few files open at once.*ulimit -n"):
            while True:
                kept.append(files.tensors(files.names[:1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
