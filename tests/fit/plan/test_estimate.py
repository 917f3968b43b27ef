"""What the plan says of a model; an estimate that cannot be had is left out. Its numbers: test_layer_profile.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, letter_tokenizer
from transformers import WhisperConfig, WhisperForCausalLM

from lit_recon.model.architectures import tiny_model


@pytest.fixture
def planned(tiny_run: Callable[..., Ended], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """The plan of a run on a model."""

    def plan(model: Any, *overrides: str) -> Ended:
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        letter_tokenizer().save_pretrained(folder)
        ended = tiny_run(f"model.name={folder}", "plan=true", *overrides)
        return ended._replace(out=" ".join(ended.out.split()))

    return plan


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, ValueError])
def test_halves_that_cannot_be_had_are_left_out_of_the_estimate_and_refused_where_they_are_asked_for(
    planned: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise error("'NoneType' object has no attribute 'size'")

    monkeypatch.setattr("lit_recon.model.halves._split", fail)
    ended = planned(tiny_model("llama"))
    assert ended.status == 0 and "by window matrix" in ended.out and "half" not in ended.out, ended
    refused = planned(tiny_model("llama"), "windows=half")
    assert refused.status == 2 and "cannot be called by themselves" in refused.err and "windows=block" in refused.err


def test_a_layer_that_fails_on_a_batch_is_a_refusal_with_the_cause(
    planned: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a kernel that is not there")

    monkeypatch.setattr("lit_recon.fit.plan.estimate.profile", fail)
    ended = planned(tiny_model("llama"))
    assert ended.status == 2 and list(Path().iterdir()) == [], ended
    assert "cannot be run on one batch of the text: RuntimeError: a kernel that is not there" in ended.err


def test_norms_per_head_are_no_matrices_and_counted(planned: Callable[..., Ended]) -> None:
    ended = planned(tiny_model("cohere"))
    assert ended.status == 0, ended.err
    assert "6 parameters that are no matrices stay as they are" in ended.out


def test_attention_to_an_encoder_that_is_not_there_is_not_pruned(planned: Callable[..., Ended]) -> None:
    layers = {"num_hidden_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes = {"vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 64}
    torch.manual_seed(0)
    ended = planned(WhisperForCausalLM(WhisperConfig(**layers, **heads, **tokens, **sizes)))
    assert ended.status == 0, ended.err
    assert "8 parameters that are no matrices stay as they are" in ended.out  # q, k, v and o of two layers


def test_a_model_in_float64_is_planned_and_run(tiny_run: Callable[..., Ended], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").double().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    ended = tiny_run(f"model.name={folder}", "module.optimizer.lr=1e-3")
    assert ended.status == 0, ended.err
