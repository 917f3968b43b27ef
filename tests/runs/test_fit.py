"""The command from end to end on a tiny model: what it leaves behind, that it repeats, and what bad input gets."""

import errno
import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CPU, Ended, content, letter_tokenizer, numbers, tiny_settings, title
from launcher import Launcher
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_recon.data.files import Files
from lit_recon.evaluate.perplexity import perplexity
from lit_recon.model.architectures import SHAPES, tiny_model
from lit_recon.pruning.masks import Masks
from lit_recon.system.cache import cache_folder

WHOLE_RUNS = ("gpt2", "gemma3", "phi", "bloom", "gpt_oss", "llama4")  # beside those of llama
WITHOUT_HALVES = ("bloom", "mpt", "opt_post_norm", "minimax", "gemma4_moe")


@pytest.fixture
def finished(run_once: Callable[..., Ended]) -> Ended:
    """A run with the settings of `tiny_run`."""
    return run_once()


def test_a_run_leaves_exactly_the_promised_files(tiny_run: Callable[..., Ended], drawn: None) -> None:
    assert tiny_run().status == 0
    names = {path.name for path in Path("run").iterdir()}
    files = {"config.yaml", "results.json", "checkpoint", "masks.safetensors", "tensorboard", "report.html", "figures"}
    assert names == files
    assert len(list(Path("run/tensorboard").iterdir())) == 2  # curves, final numbers
    assert {path.suffix for path in Path("run/figures").iterdir()} == {".png"}


def test_results_have_every_field_of_the_contract(finished: Ended) -> None:
    results = json.loads(Path("run/results.json").read_text())
    assert set(results["perplexity"]) == {"dense", "pruned", "reconstructed"}
    assert {"dataset", "split", "context", "windows", "tokens"} <= set(results["protocol"])
    assert results["protocol"]["tokens"] == 4 * 31
    for errors in (results["relative_error"], results["typical_error"]):
        assert set(errors) == {"pruned", "reconstructed"}
        assert 0 < errors["reconstructed"] < errors["pruned"]
    propagation = {key: results["recipe"][key] for key in ("inputs", "targets", "statistics")}
    assert propagation == {"inputs": "sparse", "targets": "dense", "statistics": "dense"}
    assert {"total", "prunable", "by_matrix", "by_magnitude", "by_wanda", "target_by_matrix"} == set(
        results["sparsity"]
    )
    assert results["sparsity"]["by_magnitude"] == []
    assert len(results["sparsity"]["by_matrix"]) == 21
    assert [window["name"] for window in results["windows"]] == ["block_00", "block_01", "block_02"]
    fields = "name relative_error_before relative_error_after held_out_before held_out_after accepted steps seconds"
    assert set(fields.split()) <= set(results["windows"][0])
    assert {window["measure"] for window in results["windows"]} == {"relative error"}
    assert [window["steps"] for window in results["windows"]] == [4, 4, 4]
    phases = {"load", "teacher", "prune", "fit", "advance", "commit", "evaluate", "total"}
    assert set(results["seconds"]) == phases
    assert results["seconds"]["total"] >= sum(results["seconds"][phase] for phase in phases - {"total"}) - 0.1
    assert results["tokens"]["calibration"] == 8 * 32
    assert results["seed"] == 0
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert results["peak_memory_bytes"] >= results["walk_peak_memory_bytes"] > 1e8
    peaks = results["phase_peak_memory_bytes"]  # empty where the system cannot count anew
    assert set(peaks) in (phases - {"total"}, set())
    assert all(1e8 < peak <= results["peak_memory_bytes"] for peak in peaks.values())
    assert set(results["predicted"]) == {"seconds", "peak_memory_bytes", "walk_peak_memory_bytes"}
    assert results["predicted"]["seconds"] > 0 and results["predicted"]["peak_memory_bytes"] > 1e8


def test_reconstruction_lowers_the_held_out_error_of_every_window(finished: Ended) -> None:
    for window in json.loads(Path("run/results.json").read_text())["windows"]:
        assert window["accepted"]
        assert window["held_out_after"] < window["held_out_before"]


def test_the_checkpoint_is_a_hugging_face_folder_with_the_promised_zeros_and_perplexity(
    finished: Ended, model_folder: Path, text_file: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained("run/checkpoint")
    tokenizer = AutoTokenizer.from_pretrained("run/checkpoint")
    masks = Masks.load(Path("run/masks.safetensors"))
    assert len(masks) == 21
    for name in masks:
        weight = model.get_parameter(name)
        assert torch.count_nonzero(weight[~masks[name]]) == 0
        assert (~masks[name]).float().mean() == 0.5
    results = json.loads(Path("run/results.json").read_text())
    source = Files(
        paths=[str(text_file)], num_samples=8, length=32, evaluation_samples=4, evaluation_length=32
    ).samples(tokenizer, seed=0, cache=cache_folder())
    values = {
        "reconstructed": perplexity(model, source.evaluation_ST, batch_size=4, compute=CPU),
        "dense": perplexity(
            AutoModelForCausalLM.from_pretrained(model_folder), source.evaluation_ST, batch_size=4, compute=CPU
        ),
    }
    for state, value in values.items():  # the run may have computed in bf16
        assert results["perplexity"][state] == pytest.approx(value, rel=0.02)
    assert "arXiv 2510.14444" in Path("run/checkpoint/README.md").read_text()


def test_the_pruned_perplexity_is_that_of_dense_weights_times_masks(
    finished: Ended, model_folder: Path, text_file: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).requires_grad_(False)
    masks = Masks.load(Path("run/masks.safetensors"))
    for name in masks:
        model.get_parameter(name).mul_(masks[name])
    samples = Files(paths=[str(text_file)], evaluation_samples=4, evaluation_length=32, length=32).samples(
        AutoTokenizer.from_pretrained(model_folder), seed=0, cache=cache_folder()
    )
    value = perplexity(model, samples.evaluation_ST, batch_size=4, compute=CPU)
    assert json.loads(Path("run/results.json").read_text())["perplexity"]["pruned"] == pytest.approx(value, rel=0.02)


def test_the_relative_errors_are_those_of_the_final_states_on_samples_that_decided_nothing(
    finished: Ended, model_folder: Path, text_file: Path
) -> None:
    tokens_ST = (
        Files(paths=[str(text_file)], num_samples=8, length=32, evaluation_samples=4, evaluation_length=32)
        .samples(AutoTokenizer.from_pretrained(model_folder), seed=0, cache=cache_folder())
        .evaluation_ST
    )
    masks = Masks.load(Path("run/masks.safetensors"))
    states = {}
    for state in ("dense", "pruned", "reconstructed"):
        folder = "run/checkpoint" if state == "reconstructed" else model_folder
        model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
        for name in masks if state == "pruned" else ():
            model.get_parameter(name).mul_(masks[name])
        model.model.norm.register_forward_pre_hook(lambda _, args, state=state: states.update({state: args[0]}))
        model(tokens_ST, use_cache=False)
    rows = {state: states_STD.flatten(0, 1).double() for state, states_STD in states.items()}
    found = json.loads(Path("run/results.json").read_text())
    unit = rows["dense"].square().mean(1).median()
    for state in ("pruned", "reconstructed"):  # the run may have computed in bf16
        errors_N = (rows[state] - rows["dense"]).square().mean(1) / unit
        assert found["relative_error"][state] == pytest.approx(errors_N.mean().item(), rel=0.02), state
        assert found["typical_error"][state] == pytest.approx(errors_N.median().item(), rel=0.02), state


def test_the_terminal_shows_the_plan_the_windows_and_the_result(finished: Ended) -> None:
    for said in (
        "3 windows (block), 4 steps each",
        "42.1% of the parameters",
        "in 84.2% of them",
        "peak memory",
        "3/3 block_02",
    ):
        assert said in finished.out
    results = json.loads(Path("run/results.json").read_text())
    for state, value in results["perplexity"].items():
        assert f"perplexity {state}" in finished.out
        assert f"{value:.2f}" in finished.out


def test_the_same_seed_gives_the_same_numbers_and_bytes_and_another_seed_others(
    finished: Ended, tiny_run: Callable[..., Ended]
) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert tiny_run(f"output_dir={name}", f"seed={seed}").status == 0
    assert numbers(Path("same")) == numbers(Path("run"))
    assert content(Path("same/checkpoint")) == content(Path("run/checkpoint"))
    assert content(Path("other/checkpoint")) != content(Path("run/checkpoint"))


def test_n_m_keeps_n_of_every_m_in_the_checkpoint(tiny_run: Callable[..., Ended]) -> None:
    assert tiny_run("pattern=n_m", "pattern.n=2", "pattern.m=4").status == 0
    model = AutoModelForCausalLM.from_pretrained("run/checkpoint")
    for name in Masks.load(Path("run/masks.safetensors")):
        groups = model.get_parameter(name).reshape(-1, 4)
        assert torch.all((groups == 0).sum(1) == 2), name


def found_in(folder: str = "run", *, all_accepted: bool = True) -> list[dict]:
    """What a run, which must have reconstructed every window unless that is not asked, found in each."""
    windows = json.loads(Path(folder, "results.json").read_text())["windows"]
    assert not all_accepted or all(window["accepted"] for window in windows)
    return windows


def masks_in(folder: str = "run") -> dict[str, torch.Tensor]:
    """The masks of a run."""
    masks = Masks.load(Path(folder, "masks.safetensors"))
    return {name: masks[name] for name in masks}


def errors(windows: list[dict]) -> list[float]:
    """The held-out errors in front of and behind each reconstruction."""
    return [window[key] for window in windows for key in ("held_out_before", "held_out_after")]


def test_a_criterion_and_the_scope_of_a_pattern_make_the_masks(
    run_once: Callable[..., Ended], model_folder: Path
) -> None:
    run_once("criterion=magnitude", "pattern.scope=matrix")
    found_in()
    dense, masks = load_file(model_folder / "model.safetensors"), masks_in()
    assert len(masks) == 21
    for name, mask in masks.items():
        assert torch.equal(mask, dense[name].abs() > dense[name].abs().median()), name


SOLVED = ("windows=matrix", "module=least_squares", "data.num_samples=16", "chain.inputs=dense")
HALVES = ("windows=half", "module.optimizer.lr=3e-3")  # at 1e-2 the last is not accepted on every processor
BY_GRADIENT = ("windows=matrix", "module.optimizer.lr=3e-3", "data.num_samples=16", "chain.inputs=dense")
MATRICES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (("windows=blocks", "windows.size=3"), ["blocks_00_02"]),
        (("windows=blocks", "windows.stride=1"), ["blocks_00_01", "blocks_01_02"]),
        (("windows=model",), ["model"]),
        (HALVES, [f"half_{layer:02}_{side}" for layer in range(3) for side in ("attention", "mlp")]),
        (BY_GRADIENT, [f"block_{layer:02}.{name}" for layer in range(3) for name in MATRICES]),
    ],
    ids=lambda value: title(value) if isinstance(value, tuple) else "",
)
def test_windows_are_those_that_were_asked_for(
    run_once: Callable[..., Ended], overrides: tuple[str, ...], names: list[str]
) -> None:
    run_once(*overrides)
    assert [window["name"] for window in found_in()] == names


def test_least_squares_leaves_less_of_each_matrixs_error_than_gradients_on_the_same_samples(
    run_once: Callable[..., Ended],
) -> None:
    run_once(*BY_GRADIENT)
    trained = found_in()
    run_once(*SOLVED)
    solved = found_in()
    assert len(solved) == len(trained) == 21
    for one, other in zip(solved, trained, strict=True):
        assert (one["steps"], other["steps"]) == (0, 8)
        assert one["held_out_before"] == pytest.approx(other["held_out_before"], rel=0.02)
        assert one["held_out_after"] < other["held_out_after"], one["name"]


SPARSE_HALVES = (*HALVES, "chain.inputs=sparse", "chain.targets=local", "chain.statistics=sparse")


@pytest.mark.parametrize(
    ("overrides", "unchanged"),
    [
        ((*HALVES, "chain.inputs=dense"), 1),
        (SPARSE_HALVES[:4], 1),
        (SPARSE_HALVES, 1),
        ((*SOLVED, "chain.inputs=sparse"), 3),  # q, k and v of the first layer: others see what these have become
    ],
    ids=lambda value: title(value) if isinstance(value, tuple) else "",
)
def test_what_windows_see_changes_with_the_last_of_these_settings_but_not_for_the_first(
    run_once: Callable[..., Ended], overrides: tuple[str, ...], unchanged: int
) -> None:
    run_once(*overrides[:-1])
    before, masks = errors(found_in()), masks_in()
    run_once(*overrides)
    after, others = errors(found_in(all_accepted="windows=matrix" not in overrides)), masks_in()
    count = 2 * unchanged
    assert after[:count] == pytest.approx(before[:count], rel=0.01)
    assert len(after) == len(before) > count
    assert all(abs(one - other) > 1e-4 * other for one, other in zip(after[count:], before[count:], strict=True))
    same = all(torch.equal(mask, masks[name]) for name, mask in others.items())
    assert same == (overrides[-1] != "chain.statistics=sparse"), "masks depend on the statistics alone"


def test_mixed_inputs_are_nearer_to_what_is_left_than_dense_ones(run_once: Callable[..., Ended]) -> None:
    before = []
    for overrides in (("chain.inputs=dense",), ("chain.inputs=mix",), ()):
        run_once(*overrides)
        before.append([window["held_out_before"] for window in found_in()])
    assert before[0][0] == before[1][0] == before[2][0], "the first window has the dense inputs"
    for dense, mixed, sparse in zip(*(found[1:] for found in before), strict=True):
        assert 1.2 * dense < mixed < sparse / 1.2  # the dense targets are the further away


def test_a_layer_that_is_pruned_by_halves_is_scored_behind_its_pruned_attention(run_once: Callable[..., Ended]) -> None:
    run_once("chain.statistics=sparse")
    found_in()
    at_once = masks_in()
    run_once("chain.statistics=sparse", "prune_by=half")
    found_in()
    in_turn = masks_in()
    same = [
        torch.equal(in_turn[f"model.layers.0.{name}.weight"], at_once[f"model.layers.0.{name}.weight"])
        for name in MATRICES
    ]
    assert same == [True] * 4 + [False] * 3


def test_samples_packed_by_document_have_no_more_tokens_than_their_document(
    finished: Ended, tiny_run: Callable[..., Ended]
) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.sample("abcdefghijklmnopqrstuvwxyz", 26)) for _ in range(100)]
    Path("short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ended = tiny_run("data.paths=[short.jsonl]", "data.packing=documents", "output_dir=documents")
    assert ended.status == 0, ended.err
    found_in("documents")
    calibration = [
        json.loads(Path(run, "results.json").read_text())["tokens"]["calibration"] for run in ("documents", "run")
    ]
    assert calibration == [8 * 26, 8 * 32]


def test_epochs_and_accumulated_batches_make_the_steps(run_once: Callable[..., Ended]) -> None:
    run_once("trainer.max_epochs=3", "trainer.accumulate_grad_batches=2")
    assert [window["steps"] for window in found_in()] == [6, 6, 6], "three times 8 samples, 4 in a step"


def test_a_checkpoint_is_of_the_dtype_that_was_asked_for_in_which_its_weights_are_rounded(
    run_once: Callable[..., Ended], model_folder: Path
) -> None:
    run_once("model.dtype=bfloat16", "trainer.precision=32-true")
    found_in()
    dense = load_file(model_folder / "model.safetensors")
    tensors = {
        name: tensor
        for path in Path("run/checkpoint").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert tensors.keys() == dense.keys() and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    embedding = "model.embed_tokens.weight"
    assert torch.equal(tensors[embedding], dense[embedding].bfloat16())


def test_a_run_computes_in_the_precision_that_was_asked_for(
    run_once: Callable[..., Ended], model_folder: Path, text_file: Path
) -> None:
    source = Files(paths=[str(text_file)], num_samples=8, length=32, evaluation_samples=4, evaluation_length=32)
    samples = source.samples(AutoTokenizer.from_pretrained(model_folder), seed=0, cache=cache_folder())
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    expected, off = perplexity(model, samples.evaluation_ST, batch_size=2, compute=CPU), {}
    for precision in ("32-true", "bf16-mixed"):
        run_once(f"trainer.precision={precision}")
        found_in()
        results = json.loads(Path("run/results.json").read_text())
        assert results["protocol"]["precision"] == precision
        off[precision] = abs(results["perplexity"]["dense"] / expected - 1)
    assert off["32-true"] < 1e-6 < 1e-5 < off["bf16-mixed"] < 0.02


@pytest.mark.parametrize(
    ("windows", "measures"),
    [("block", ["relative error", "relative error", "KL divergence"]), ("model", ["KL divergence"])],
)
def test_with_the_head_only_the_last_window_is_measured_on_the_logits(
    run_once: Callable[..., Ended], windows: str, measures: list[str]
) -> None:
    run_once(f"windows={windows}", "windows.head=true", "module.optimizer.lr=3e-3", "trainer.max_epochs=4")
    assert [window["measure"] for window in found_in()] == measures


def test_chosen_matrices_are_windows_and_chosen_parameters_of_a_window_are_trained(
    tiny_run: Callable[..., Ended], model_folder: Path
) -> None:
    ended = tiny_run("windows=matrix", "windows.match=[kq]_proj|up_proj")
    assert ended.status == 0 and "9 of 21 windows (matrix, those of [kq]_proj|up_proj)" in ended.out, ended
    measured = [one["name"] for one in found_in(all_accepted=False) if one["held_out_before"]]
    assert len(measured) == 9 and all(name.endswith(("k_proj", "q_proj", "up_proj")) for name in measured)
    ended = tiny_run("module.train=up_proj", "overwrite=true")
    assert ended.status == 0 and len(found_in()) == 3, ended.err
    dense, masks = AutoModelForCausalLM.from_pretrained(model_folder).state_dict(), masks_in()
    found = AutoModelForCausalLM.from_pretrained("run/checkpoint").state_dict()
    changed = {name for name, one in found.items() if not torch.equal(one, dense[name] * masks.get(name, 1))}
    assert changed == {f"model.layers.{index}.mlp.up_proj.weight" for index in range(3)}


def test_the_blocks_whose_inputs_and_outputs_are_most_alike_are_pruned_only(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_recon.fit.allocate.block_influence", lambda *_: [0.3, 0.1, 0.2])
    ended = tiny_run("windows.skip=0.3", "stop_after=1")
    assert ended.status == 0 and "leaves out none: it is less than one of 3 windows" in " ".join(ended.out.split())
    ended = tiny_run("windows.skip=0.34", "overwrite=true")
    assert ended.status == 0 and "2 of 3 windows (block, 0.34 of them, most alike, skipped)" in ended.out, ended
    (skipped,) = [one for one in found_in(all_accepted=False) if not one["held_out_before"]]
    assert skipped["name"] == "block_01" and "windows.skip=0.34 leaves out block_01" in ended.out
    assert skipped["note"] == "left out by windows.match or windows.skip: kept its pruned weights"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["auto", "32-true"])
def test_a_run_on_a_gpu_reconstructs_too(tiny_run: Callable[..., Ended], precision: str) -> None:
    ended = tiny_run("trainer.accelerator=cuda", f"trainer.precision={precision}")
    assert ended.status == 0, ended.err
    assert "cuda" in ended.out
    assert all(window["accepted"] for window in json.loads(Path("run/results.json").read_text())["windows"])


def test_ctrl_c_after_the_walk_leaves_a_whole_checkpoint_and_only_measuring_to_be_done(
    tiny_run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lit_recon.fit.run.read_back", interrupt)
        ended = tiny_run()
    assert ended.status == 1
    assert ended.err.endswith("interrupted: resume it with resume=run\n")
    model = AutoModelForCausalLM.from_pretrained("run/checkpoint")
    assert torch.count_nonzero(model.model.layers[2].mlp.up_proj.weight) == 48 * 32 // 2
    before = content(Path("run/checkpoint"))
    ended = tiny_run("resume=run")
    assert ended.status == 0, ended.err
    assert "3 of 3 windows are done" in ended.out and "1/3" not in ended.out
    assert content(Path("run/checkpoint")) == before and Path("run/results.json").is_file()


def test_what_ends_a_run_at_its_report_says_that_only_that_is_left_and_resuming_draws_it(
    tiny_run: Callable[..., Ended], drawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise error

    full: BaseException = OSError(errno.ENOSPC, "No space left on device")
    for again, error in (([], full), (["resume=run"], full), (["resume=run"], KeyboardInterrupt())):
        with monkeypatch.context() as failing:
            failing.setattr("lit_recon.fit.output.folder.write_report", fail)
            ended = tiny_run(*again)
        assert ended.status == 1
        assert ended.err.endswith("run is finished but for its report, which resume=run draws\n")
        assert len(ended.err.splitlines()) == 1 and str(error) in ended.err
        assert Path("run/results.json").is_file() and not Path("run/commits").exists()
    Path("run/commits").mkdir()  # where the process was killed
    before = Path("run/results.json").read_bytes()
    ended = tiny_run("resume=run")
    assert ended.status == 0 and ended.out == "run was finished but for its report, which is there now\n"
    assert Path("run/report.html").is_file() and not Path("run/commits").exists()
    assert Path("run/results.json").read_bytes() == before
    assert "that run is finished" in tiny_run("resume=run").err


def test_a_plan_is_printed_and_nothing_written(tiny_run: Callable[..., Ended]) -> None:
    ended = tiny_run("plan=true")
    assert ended.status == 0
    assert "predicted" in ended.out
    assert re.search(r"by window +matrix .* GB, half .* GB, block .* GB, .*model .* GB", " ".join(ended.out.split()))
    assert not Path("run").exists()


def test_norms_that_both_halves_depend_on_are_named(tiny_run: Callable[..., Ended], tmp_path: Path) -> None:
    tiny_model("phi").save_pretrained(tmp_path / "phi")
    letter_tokenizer().save_pretrained(tmp_path / "phi")
    ended = tiny_run(f"model.name={tmp_path / 'phi'}", "windows=half", "plan=true")
    told = "input_layernorm.bias, input_layernorm.weight of both halves, trained in the attention half"
    assert told in " ".join(ended.out.split()), ended


def test_a_second_run_is_refused_until_it_may_overwrite_and_then_leaves_nothing_of_the_first(
    finished: Ended, tiny_run: Callable[..., Ended]
) -> None:
    before = content(Path("run"))
    refused = tiny_run()
    assert refused.status == 2
    assert "overwrite=true" in refused.err
    assert content(Path("run")) == before
    assert tiny_run("overwrite=true", "seed=5").status == 0
    assert len(list(Path("run/tensorboard").iterdir())) == 2  # curves, final numbers


def test_a_folder_whose_weights_lack_tensors_gets_status_2_one_message_and_nothing_is_written(
    tiny_run: Callable[..., Ended], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("incomplete") / "model")
    tensors = load_file(folder / "model.safetensors")
    missing = sorted(name for name in tensors if name.startswith("model.layers.1.mlp."))
    kept = {name: tensor for name, tensor in tensors.items() if name not in missing}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    ended = tiny_run(f"model.name={folder}")
    assert ended.status == 2
    for said in (str(folder), "lack 3 tensors", *missing):
        assert ended.err.count(said) == 1
    assert "Traceback" not in ended.err + ended.out
    assert list(Path().iterdir()) == []


BAD_INPUT = {
    ("windows.head=no",): ["windows.head=no", "true or false"],
    ("overwrite=off", "plan=no", "allow_unscored=1"): [
        *("overwrite=off", "plan=no", "allow_unscored=1", "true or false")
    ],
    ("model=foo",): ["model=foo", "choose one of gemma3_270m, hf"],
    ("modell=hf",): ["modell", "Did you mean model?"],
    ("trainer.max_epoch=2",): ["trainer.max_epoch", "Did you mean trainer.max_epochs?"],
    ("sparsity=1",): ["sparsity=1", "[0, 1)"],
    ("sparsity=-0.5",): ["sparsity=-0.5", "[0, 1)"],
    ("sparsity=half",): ["sparsity=half", "[0, 1)"],
    ("pattern=n_m", "pattern.n=5"): ["pattern.n=5 pattern.m=4", "0 < n <= m"],
    ("pattern=n_m", "pattern.m=5"): ["pattern.m=5", "width 32", "model.layers.0.self_attn.q_proj.weight"],
    ("pattern=n_m", "sparsity=0.7"): ["sparsity=0.7", "0.5"],
    ("data.num_samples=100000",): ["100000", "3200000 tokens", "data.num_samples"],
    ("data.paths=[nowhere.txt]",): ["nowhere.txt"],
    ("model.name=nowhere/at/all",): ["nowhere/at/all"],
    ("model.name=.",): ["config.json", "tokenizer"],
    ("trainer.precision=bf16-true",): ["bf16-true", "bf16-mixed"],
    ("trainer.accelerator=cpu", "trainer.precision=16-mixed"): ["16-mixed", "bf16-mixed"],
    ("trainer.accelerator=cpu", "trainer.devices=2"): ["trainer.devices=1"],
    ("trainer.max_epochs=0",): ["max_epochs=0"],
    ("trainer.max_epochs=-1",): ["max_epochs=-1"],
    ("+trainer.speed=9",): ["speed"],
    ("module.optimizer.lr=-1",): ["module.optimizer", "learning rate: -1"],
    ("module.warmup=abc",): ["module.warmup=abc", "a number"],
    ("module.warmup=-1", "windows=matrix"): ["module.warmup=-1", "share of the steps"],
    ("+module.momentum=1",): ["module: ", "momentum"],
    ("windows=matrix", "module=least_squares", "module.max_iterations=0"): ["module.max_iterations=0", "at least 1"],
    ("windows=matrix", "module=least_squares", "module.tolerance=abc"): ["module.tolerance=abc", "a number"],
    ("windows=matrix", "module=least_squares", "module.damping=0"): ["module.damping=0", "above 0"],
    ("+module.scheduler.power=2",): ["module.scheduler: ", "power"],
    ("loss=huber", "loss.delta=0"): ["loss.delta=0", "above 0"],
    ("loss=custom",): ["loss._target_ has no value"],
    ("module.loss._target_=nowhere.f",): ["loss._target_=nowhere.f: cannot be imported"],  # its name up to 0.4
    ("loss=l1",): ["loss=l1: unknown; choose one of balanced, ce, cosine, custom, hidden, huber, kl, mse, relative"],
    ("windows=matrix", "module=least_squares", "loss=cosine"): ["loss=cosine: LeastSquares takes no loss"],
    ("windows=matrix", "module=least_squares", "optimizer=adamw"): ["optimizer=adamw: LeastSquares takes no optimizer"],
    ("scheduler=none",): ["scheduler=none: MaskedWeights needs one; choose one of", "linear"],
    ("module.anchor=-1",): ["module.anchor=-1", "0 (no pull) or more"],
    ("windows=matrix", "module.token_weights={_target_:lit_recon.modules.losses.after_first,_partial_:true}"): [
        "module.token_weights with windows=matrix",
    ],
    ("keep=first", "patience=0"): ["keep=first: expected one of last, best", "patience=0: expected a number"],
    ("seed=abc",): ["seed=abc", "whole number"],
    ("windows=half", "+windows.size=2"): ["windows.size=2", "windows=blocks", "half"],
    ("windows=blocks", "windows.size=0"): ["windows.size=0"],
    ("windows=blocks", "windows.size=4"): ["windows.size=4", "3 layers"],
    ("windows=blocks", "windows.stride=3"): ["windows.stride=3", "windows.size=2"],
    ("windows.by=layer",): ["windows.by='layer'", "matrix, half, block, blocks, model"],
    ("chain.inputs=pruned", "chain.targets=none"): [
        "chain.inputs='pruned'",
        "chain.targets='none'",
        "dense, sparse, mix",
    ],
    ("chain.inputs=dense", "chain.targets=local"): ["chain.targets=local", "chain.inputs=dense"],
    ("chain.inputs=mix", "chain.mix=1"): ["chain.mix=1"],
    ("windows._target_=lit_recon.model.partition.partition", "+windows._partial_=true"): [
        "lit_recon.model.partition.Partition"
    ],
    ("windows=matrix", "prune_by=half", "chain.statistics=sparse"): ["prune_by=half", "windows=matrix", "block"],
    ("windows=half", "prune_by=layer"): ["prune_by=layer", "window, half, block, model"],
    ("windows=half", "module=least_squares"): ["module=least_squares", "windows=matrix", "half"],
    ("criterion=custom",): ["criterion._target_"],
    ("criterion=custom", "criterion._target_=mine.Nothing"): ["mine.Nothing", "working directory"],
    ("output_dir=/proc/run",): ["/proc", "output_dir"],
    ("data.num_samples=x", "sparsity=2"): ["data.num_samples=x", "sparsity=2"],
}


@pytest.mark.parametrize("overrides", BAD_INPUT, ids=" ".join)
def test_bad_input_gets_status_2_one_message_and_writes_nothing(
    tiny_run: Callable[..., Ended], overrides: tuple[str, ...]
) -> None:
    ended = tiny_run(*overrides)
    assert ended.status == 2, ended.err
    for said in BAD_INPUT[overrides]:
        assert said in ended.err
    assert "Traceback" not in ended.err + ended.out
    assert "Error executing job" not in ended.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=() if shape in WHOLE_RUNS else pytest.mark.slow) for shape in SHAPES]
)
def test_every_layer_shape_is_pruned_reconstructed_saved_and_read_back(
    tiny_run: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory, shape: str
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(shape).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    windows = "block" if shape in WITHOUT_HALVES else "half"
    settings = ("trainer.precision=bf16-mixed", "module.optimizer.lr=1e-3")
    settings += ("chain.inputs=sparse",) if shape == "qwen3_5" else ()  # whose errors grow from layer to layer
    ended = tiny_run(f"model.name={folder}", f"windows={windows}", *settings)
    assert ended.status == 0, ended.err
    results = json.loads(Path("run/results.json").read_text())
    assert results["sparsity"]["prunable"] == pytest.approx(0.5, abs=1e-3)
    accepted = [window for window in results["windows"] if window["accepted"]]
    assert len(accepted) > 0.8 * len(results["windows"]), "few samples: a half of experts may not improve"
    assert all(window["held_out_after"] < window["held_out_before"] for window in accepted)
    assert results["relative_error"]["reconstructed"] < results["relative_error"]["pruned"]
    assert results["sparsity"]["by_magnitude"] == []


def test_units_of_pruning_that_a_model_does_not_fall_into_matter_with_sparse_statistics_only(
    tiny_run: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("bloom").save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    settings = (f"model.name={folder}", "prune_by=half", "plan=true")
    assert tiny_run(*settings).status == 0
    ended = tiny_run(*settings, "chain.statistics=sparse")
    assert ended.status == 2
    assert "prune_by=half: BloomBlock has no mlp side; use prune_by=block." in ended.err


def test_callbacks_of_the_trainer_reach_each_fit_anew(tiny_run: Callable[..., Ended]) -> None:
    Path("mine.py").write_text(
        "from lightning import Callback\n\n\nclass Stopper(Callback):\n    batches = 0\n\n"
        "    def on_train_batch_end(self, trainer, *given):\n        self.batches += 1\n"
        "        trainer.should_stop |= self.batches == 1\n"
    )
    ended = tiny_run("+trainer.callbacks=[{_target_:mine.Stopper}]", "trainer.max_epochs=4")
    assert ended.status == 0, ended.err
    windows = json.loads(Path("run/results.json").read_text())["windows"]
    assert [window["steps"] for window in windows] == [1] * 3, "of 16"


def test_a_folder_that_is_not_a_run_is_left_alone_even_with_overwrite(tiny_run: Callable[..., Ended]) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("title: thesis")
    Path("run/figures").mkdir()
    Path("run/figures/map.pdf").write_text("years of work")
    ended = tiny_run("overwrite=true")
    assert ended.status == 2
    assert set(content(Path("run"))) == {"config.yaml", "figures/map.pdf"}


def test_a_learning_rate_that_diverges_keeps_the_pruned_weights_and_says_so(tiny_run: Callable[..., Ended]) -> None:
    ended = tiny_run("module.optimizer.lr=1e30", "trainer.log_every_n_steps=1")
    assert ended.status == 0, ended.err
    windows = json.loads(Path("run/results.json").read_text())["windows"]
    assert not any(window["accepted"] for window in windows)
    assert "not finite" in windows[0]["note"]
    assert "not finite" in ended.out
    results = json.loads(Path("run/results.json").read_text())
    assert results["perplexity"]["reconstructed"] == pytest.approx(results["perplexity"]["pruned"], rel=1e-6)


def test_help_explains_groups_and_settings_without_running(command: Callable[..., Ended]) -> None:
    ended = command("--help")
    assert ended.status == 0
    for said in (
        "criterion: custom, file, magnitude, random, ria, sparsegpt, wanda, zeros",
        "pattern.n=2",
        "output_dir",
        "module.optimizer.lr",
    ):
        assert said in ended.out


def test_ctrl_c_stops_within_seconds_says_what_was_done_and_leaves_no_half_written_file(
    launcher: Launcher, model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    running = launcher.start(*tiny_settings(model_folder, text_file), "trainer.max_epochs=100000")
    events = tmp_path / "run" / "tensorboard"
    while not (events.is_dir() and any(events.iterdir())):
        time.sleep(0.02)
    time.sleep(0.5)  # well inside the first window's training
    start = time.monotonic()
    running.send(signal.SIGINT)
    ended = running.wait()
    assert time.monotonic() - start < 5
    assert ended.status == 1
    assert ended.err.endswith("interrupted: no window was done yet; start again with resume=run\n")
    assert "Traceback" not in ended.err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "tensorboard", "checkpoint"}
    assert not list((tmp_path / "run").rglob("*.partial"))
    read, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run/checkpoint", model_folder))
    assert all(torch.equal(weight, dense.get_parameter(name)) for name, weight in read.named_parameters())


def test_a_setting_that_another_member_has_is_not_proposed_for_itself(command: Callable[..., Ended]) -> None:
    ended = command("windows=matrix", "module=least_squares", "module.optimizer.lr=1")
    assert ended.status == 2
    assert "module.optimizer.lr: unknown setting" in ended.err and "Did you mean module.optimizer.lr" not in ended.err


def test_a_folder_may_be_named_by_digits(tiny_run: Callable[..., Ended]) -> None:
    ended = tiny_run("output_dir=1", "plan=true")
    assert ended.status == 0, ended.err


def changed_folder(source: Path, folder: Path, change: Callable) -> Path:
    """A copy of a model, with its weights changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    """Where the matrices of the layers of a checkpoint are zero."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: one == 0 for name, one in model.named_parameters() if one.dim() == 2 and "layers." in name}


def prune_70_percent(tensors: dict[str, torch.Tensor]) -> None:
    """Zero 70% of each row of the matrices of the layers."""
    for name, weight in tensors.items():
        if weight.dim() == 2 and "layers." in name:
            lowest = weight.abs().argsort(1)[:, : int(0.7 * weight.shape[1])]
            weight.scatter_(1, lowest, 0)


def test_zeros_of_a_sparse_model_stay_zeros_and_are_told(
    tiny_run: Callable[..., Ended], model_folder: Path, tmp_path: Path
) -> None:
    sparse = changed_folder(model_folder, tmp_path / "sparse70", prune_70_percent)
    ended = tiny_run("model=hf", f"model.name={sparse}", "pattern=n_m")
    assert "69% of its weights are zero already and stay zero" in " ".join(ended.out.split())
    before, after = zeros_of(sparse), zeros_of(Path("run/checkpoint"))
    masks, found = Masks.load(Path("run/masks.safetensors")), json.loads(Path("run/results.json").read_text())
    for name, zero in before.items():
        assert after[name][zero].all(), f"{name}: zeros have come back"
        assert torch.equal(after[name], ~masks[name]), name
        kept_OG4 = (~after[name]).unflatten(1, (-1, 4)).sum(2)
        assert torch.equal(kept_OG4, (~zero).unflatten(1, (-1, 4)).sum(2).clamp(max=2)), f"{name}: zeros go first"
        assert found["sparsity"]["by_matrix"][name] == pytest.approx(float(after[name].float().mean()))
    assert found["sparsity"]["prunable"] > 0.7
    assert sum(window["steps"] for window in found["windows"]) == 12


def test_where_pruning_takes_only_zeros_nothing_is_trained_and_the_file_is_the_models(
    tiny_run: Callable[..., Ended], model_folder: Path, tmp_path: Path
) -> None:
    sparse = changed_folder(model_folder, tmp_path / "sparse70", prune_70_percent)
    ended = tiny_run("model=hf", f"model.name={sparse}")
    found = json.loads(Path("run/results.json").read_text())
    assert [window["steps"] for window in found["windows"]] == [0, 0, 0]
    assert ended.out.count("what pruning takes is zero already") == 3 + 1, "a line for each window, one at the end"
    assert found["perplexity"]["reconstructed"] == found["perplexity"]["dense"] == found["perplexity"]["pruned"]
    assert found["gap_recovered"] is None and "none to recover" in ended.out
    assert found["sparsity"]["prunable"] == pytest.approx(0.69, abs=0.01)
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (sparse, "run/checkpoint"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_file_holds_a_negative_zero(finished: Ended) -> None:
    for name, weight in AutoModelForCausalLM.from_pretrained("run/checkpoint").named_parameters():
        assert not torch.signbit(weight[weight == 0]).any(), name


def damage(tensors: dict[str, torch.Tensor]) -> None:
    """Make the embedding of the digit 7 a NaN."""
    (name,) = (name for name in tensors if "embed_tokens" in name)
    tensors[name][letter_tokenizer().convert_tokens_to_ids("7"), 3] = float("nan")


@pytest.mark.parametrize("where", ["calibration", "evaluation"])
def test_a_token_whose_embedding_is_not_a_number_is_named_before_anything_is_written(
    tiny_run: Callable[..., Ended], model_folder: Path, text_file: Path, tmp_path: Path, where: str
) -> None:
    damaged = changed_folder(model_folder, tmp_path / "damaged", damage)
    paragraphs = text_file.read_text().split("\n\n")
    rare, often = tmp_path / "rare.txt", tmp_path / "often.txt"
    rare.write_text("\n\n".join(f"{text[:250]}7{text[250:]}" for text in paragraphs))  # not in the sample that is tried
    often.write_text("\n\n".join(text.replace("e", "7") for text in paragraphs))
    paths = {"calibration": (rare, text_file), "evaluation": (text_file, often)}[where]
    ended = tiny_run(
        "model=hf",
        f"model.name={damaged}",
        "data=files",
        f"data.paths=[{paths[0]}]",
        f"data.evaluation_paths=[{paths[1]}]",
        "data.num_samples=16",
    )
    assert ended.status == 2 and not Path("run").exists()
    id_of_7 = letter_tokenizer().convert_tokens_to_ids("7")
    if where == "calibration":
        assert re.search(rf"token id {id_of_7} is not finite \(first in (calibration|held-out) sample \d+", ended.err)
    else:
        assert re.search(r"dense model's perplexity is not finite: \d of 4 evaluation samples, first sample", ended.err)
        assert "trainer.precision" in ended.err
    assert "Traceback" not in ended.err


CRITERION = """
class Broken:
    def start(self, weight_OI):
        return None

    def update(self, statistics, inputs_NI):
        return None

    def scores(self, weight_OI, statistics):
        return weight_OI.abs() / (weight_OI.shape[0] != {outputs})
"""


def test_scores_that_are_not_finite_end_the_run_and_name_the_matrix(
    tiny_run: Callable[..., Ended], model_folder: Path
) -> None:
    outputs = AutoModelForCausalLM.from_pretrained(model_folder).model.layers[0].mlp.up_proj.weight.shape[0]
    Path("broken.py").write_text(CRITERION.format(outputs=outputs))
    ended = tiny_run("criterion=custom", "criterion._target_=broken.Broken")
    assert ended.status == 1 and "Traceback" not in ended.err
    assert "block_00: scores of model.layers.0.mlp." in ended.err and "are not finite, first for output 0" in ended.err
    assert not Path("run/results.json").exists()
