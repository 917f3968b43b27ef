"""The library: what the command does, on a model object, in place, with the same numbers and the same refusals."""

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CPU, Ended, cpu_seconds
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, PreTrainedModel

import lit_recon
from lit_recon import (
    Files,
    FitSettings,
    LeastSquares,
    Magnitude,
    MaskedWeights,
    Masks,
    Partition,
    Propagation,
    Samples,
    StoreSettings,
    Unstructured,
    Wanda,
    load,
    perplexity,
    prune_and_reconstruct,
)
from lit_recon.activations.datamodule import Batch
from lit_recon.fit.library import TRAINER
from lit_recon.report.run_files import read_results
from lit_recon.settings.conf import CONF

ROOT = Path(__file__).parents[2]
FAST = partial(MaskedWeights, optimizer=partial(AdamW, lr=1e-2, eps=1e-15, weight_decay=0.0, fused=True))
CPU_ONLY = {"accelerator": "cpu", "precision": "32-true"}


@pytest.fixture
def loaded(model_folder: Path, text_file: Path) -> tuple[PreTrainedModel, Samples]:
    """The tiny model and the samples of `tiny_run`."""
    model, tokenizer = load(str(model_folder))
    settings = {"num_samples": 8, "length": 32, "num_held_out": 4, "evaluation_samples": 4, "evaluation_length": 32}
    return model, Files(paths=str(text_file), **settings).samples(tokenizer, seed=0)


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ([], {}),
        (["windows=half", "chain.inputs=sparse"], {"windows": Partition(by="half"), "propagation": "sparse"}),
        (["windows=matrix", "module=least_squares"], {"windows": Partition(by="matrix"), "module": "exact"}),
        (["store=disk", "store.dtype=float32"], {"store": StoreSettings(kind="disk", dtype="float32")}),
    ],
    ids=["default", "half, sparse", "least squares", "disk"],
)
def test_weights_masks_and_errors_are_those_of_the_command(
    loaded: tuple[PreTrainedModel, Samples], tiny_run: Callable[..., Ended], overrides: list[str], settings: dict
) -> None:
    ended = tiny_run(*overrides, "trainer.precision=32-true")
    assert ended.status == 0, ended.err
    saved, masks = AutoModelForCausalLM.from_pretrained("run/checkpoint"), Masks.load(Path("run/masks.safetensors"))
    told = json.loads(Path("run/results.json").read_text())
    model, samples = loaded
    module = partial(LeastSquares, tolerance=1e-3, max_iterations=200) if "module" in settings else FAST
    chain = {"propagation": Propagation(inputs="sparse")} if "propagation" in settings else {}
    result = prune_and_reconstruct(model, samples, **settings | chain | {"module": module}, trainer=CPU_ONLY)
    for name, parameter in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert set(result.masks) == set(masks) and all(torch.equal(result.masks[name], masks[name]) for name in masks)
    assert [window.held_out_after for window in result.windows] == [one["held_out_after"] for one in told["windows"]]
    assert perplexity(model, samples.evaluation_ST, batch_size=2, compute=CPU) == pytest.approx(
        told["perplexity"]["reconstructed"], rel=1e-5
    )


def test_a_model_returns_to_training_with_gradients_where_it_had_them(loaded: tuple[PreTrainedModel, Samples]) -> None:
    model, samples = loaded
    model.train().requires_grad_(True)
    model.lm_head.requires_grad_(False)
    model.model.layers[1].eval()
    address = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    prune_and_reconstruct(model, samples, module=FAST)
    assert model.training and not model.model.layers[1].mlp.training
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad and not model.lm_head.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == address, "not in place"


def test_sixteen_bits_stay_sixteen_bits_and_zeros_exact(loaded: tuple[PreTrainedModel, Samples]) -> None:
    model, samples = loaded
    result = prune_and_reconstruct(model.bfloat16(), samples, pattern=Unstructured(sparsity=0.75), module=FAST)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name in result.masks:
        assert not model.get_parameter(name)[~result.masks[name]].any(), name
        assert result.masks[name].float().mean() == 0.25, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": partial(LeastSquares, tolerance=0.1, max_iterations=9)}, "windows=matrix"),
        ({"prune_by": "layer"}, "prune_by=layer: expected one of window, half, block, model"),
        ({"trainer": {"max_epochs": 0}}, "trainer.max_epochs=0"),
        ({"trainer": {"precision": "16"}}, "trainer.precision='16'"),
        ({"trainer": {"epochs": 3}}, "trainer: .*'epochs'"),
        ({"module": partial(MaskedWeights, warmup=2)}, r"module\.warmup=2: expected"),
        ({"module": partial(MaskedWeights, momentum=2)}, "module: .*'momentum'"),
        ({"windows": Partition(by="blocks", size=9)}, "windows.size=9: the model has 3 layers"),
    ],
)
def test_what_the_command_refuses_is_a_value_error_and_the_model_stays_as_it_was(
    loaded: tuple[PreTrainedModel, Samples], settings: dict, message: str
) -> None:
    model, samples = loaded
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prune_and_reconstruct(model, samples, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Odd(MaskedWeights):
    """A module that ends with a step, and one that ends with a batch of three."""

    def __init__(self, window: object, masks: object, unit: object, *, worst: int = 1, **settings: object) -> None:
        super().__init__(window, masks, unit, **settings)
        self.worst = worst

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if len(batch.inputs_BTD) >= self.worst:
            raise IndexError("odd step")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("settings", "guilty"),
    [
        ({"module": Odd, "batch_size": 1, "trainer": {"max_epochs": 2}}, r"module=.*Odd.*"),
        ({"module": partial(Odd, worst=3), "batch_size": 3, "criterion": Magnitude()}, r"batch_size=3"),
        ({"trainer": {"callbacks": [7], "max_epochs": 2}}, r"trainer=\{'callbacks': \[7\]\}"),
    ],
    ids=["module", "batch size", "trainer"],
)
def test_what_would_end_the_first_window_is_refused_by_the_name_of_its_argument(
    loaded: tuple[PreTrainedModel, Samples], settings: dict, guilty: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{guilty}: a training step on a tiny model .* ends in: .*leave it out\.$"):
        prune_and_reconstruct(*loaded, **settings)


def test_an_interrupted_walk_leaves_whole_windows(
    loaded: tuple[PreTrainedModel, Samples], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = loaded
    dense = copy.deepcopy(model)

    class Interrupting(MaskedWeights):
        def on_train_start(self) -> None:
            super().on_train_start()
            if self.window.name == "block_01":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_and_reconstruct(model, samples, module=partial(Interrupting, **FAST.keywords))
    share = [float((layer.mlp.up_proj.weight == 0).float().mean()) for layer in model.model.layers]
    assert share == [0.5, 0.0, 0.0]
    for index in (1, 2):
        for name, parameter in model.model.layers[index].named_parameters():
            assert torch.equal(parameter, dense.model.layers[index].get_parameter(name)), (index, name)


def test_a_criterion_and_windows_of_ones_own_choice_are_used(loaded: tuple[PreTrainedModel, Samples]) -> None:
    model, samples = loaded
    dense = copy.deepcopy(model)
    result = prune_and_reconstruct(model, samples, criterion=Magnitude(), windows=Partition(by="model"), module=FAST)
    assert [window.name for window in result.windows] == ["model"]
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dense.get_parameter(name).abs()
    assert torch.equal(result.masks[name], weight > weight.kthvalue(weight.shape[1] // 2, dim=1, keepdim=True).values)


@pytest.mark.parametrize("settings", [{"criterion": Wanda()}, {}], ids=["given", "default"])
def test_wanda_compares_weights_times_the_norms_of_their_inputs_and_is_the_default(
    loaded: tuple[PreTrainedModel, Samples], settings: dict
) -> None:
    model, samples = loaded
    matrix, inputs = model.model.layers[1].mlp.up_proj, []
    handle = matrix.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(samples.calibration_ST)
    handle.remove()
    scores = matrix.weight.detach().abs() * inputs[0].norm(dim=0)
    result = prune_and_reconstruct(model, samples, **settings, module=FAST, trainer=CPU_ONLY)
    expected = scores > scores.kthvalue(scores.shape[1] // 2, dim=1, keepdim=True).values
    assert torch.equal(result.masks["model.layers.1.mlp.up_proj.weight"], expected)


def test_a_report_is_that_of_a_run_and_refuses_what_it_cannot_tell(
    loaded: tuple[PreTrainedModel, Samples], tmp_path: Path
) -> None:
    model, samples = loaded
    dense = copy.deepcopy(model)
    result = prune_and_reconstruct(model, samples, module=FAST)
    measured = {"dense": 20.0, "pruned": 40.0, "reconstructed": 30.0}
    with pytest.raises(ValueError, match="pruned, reconstructed is missing"):
        result.report(tmp_path / "run", model, samples, perplexity={"dense": 20.0})
    with pytest.raises(ValueError, match="pruned weights are not zero"):
        result.report(tmp_path / "run", dense, samples, perplexity=measured)
    page = result.report(tmp_path / "run", model, samples, perplexity=measured)
    assert page == tmp_path / "run" / "report.html" and "50.0%" in page.read_text()
    results = read_results(tmp_path / "run")
    assert results["gap_recovered"] == 0.5
    assert results["gap_recovered_nats"] == pytest.approx(math.log(4 / 3) / math.log(2))
    assert results["sparsity"]["prunable"] == 0.5 and results["recipe"]["criterion"] == "Wanda"
    assert [one["name"] for one in results["windows"]] == [one.name for one in result.windows]
    assert {*Masks.load(tmp_path / "run" / "masks.safetensors")} == {*result.masks}
    with pytest.raises(ValueError, match="something already"):
        result.report(tmp_path / "run", model, samples, perplexity=measured)


def test_defaults_are_those_of_the_configuration() -> None:
    cfg = OmegaConf.load(CONF / "fit.yaml")
    assert {f"trainer.{key}": value for key, value in TRAINER.items()} == {
        f"trainer.{key}": value for key, value in cfg.trainer.items() if key not in ("_target_", "_partial_")
    }
    defaults = prune_and_reconstruct.__kwdefaults__
    assert (defaults["batch_size"], defaults["seed"], defaults["prune_by"], defaults["allow_unscored"]) == (
        cfg.data.batch_size,
        cfg.seed,
        cfg.prune_by,
        cfg.allow_unscored,
    )
    assert FitSettings() == FitSettings(keep=cfg.keep, patience=cfg.patience)
    groups = {key: group for entry in cfg.defaults if OmegaConf.is_dict(entry) for key, group in entry.items()}
    assert (groups["criterion"], groups["pattern"], groups["windows"], groups["module"], groups["store"]) == (
        "wanda",
        "unstructured",
        "block",
        "masked_weights",
        "auto",
    )
    own = {key: value for key, value in cfg.chain.items() if key != "_target_"}
    assert own == vars(Propagation())


def test_every_public_name_can_be_imported_and_none_is_a_folder() -> None:
    folders = {path.name for path in (ROOT / "lit_recon").iterdir() if path.is_dir()}
    assert 20 <= len(lit_recon.__all__) <= 30 and not folders & set(lit_recon.__all__)
    for name in lit_recon.__all__:
        assert getattr(lit_recon, name) is not None
    assert dir(lit_recon) == sorted(lit_recon.__all__)
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        lit_recon.prune  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_transformers_nor_hydra() -> None:
    code = "import sys, lit_recon; print(sorted({'torch', 'lightning', 'transformers', 'hydra'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_importing_the_package_takes_less_than_three_tenths_of_a_second() -> None:
    assert cpu_seconds("-c", "import lit_recon") < 0.3
