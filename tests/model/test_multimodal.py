"""Models that also see: the decoder is found in them, they are mapped, and the rest of them stays as it is."""

from pathlib import Path

import pytest
import torch
from conftest import letter_tokenizer
from multimodal import MULTIMODAL, tiny_multimodal
from tiny_files import byte_level_tokenizer, refusal

from lit_recon.model.decoder import Decoder, decoder_layers
from lit_recon.model.loading import HubModel
from lit_recon.model.mapped_files import DenseFiles
from lit_recon.model.verify import verify


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_decoder_is_found_among_lists_of_the_same_length_and_its_files_are_mapped(
    kind: str, tmp_path: Path, tokens_BT: torch.Tensor
) -> None:
    made = tiny_multimodal(kind)
    made.save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    source = HubModel(name=str(tmp_path))
    source.check()
    model = source.load()
    assert type(model) is type(made)
    prefix, layers = decoder_layers(model)
    assert len(layers) == made.config.get_text_config().num_hidden_layers
    assert "vision" not in prefix and "visual" not in prefix
    files = DenseFiles.from_model(model, source.files(), source.renamed)
    assert isinstance(files, DenseFiles), files
    expected = made.state_dict()
    assert set(files.names) <= set(expected)
    for name, tensor in files.tensors(files.names).items():
        assert torch.equal(tensor, expected[name]), name
    verify(model, tokens_BT)


def test_a_text_part_with_a_head_of_its_own_is_what_continues_text() -> None:
    """Some releases cannot call the whole of Llama 4 without a picture."""
    model = tiny_multimodal("llama4")
    decoder = Decoder(model, torch.device("cpu"))
    assert decoder.model is model.language_model
    assert Decoder(tiny_multimodal("mistral3"), torch.device("cpu")).model.lm_head is not None


@pytest.mark.parametrize("architecture", ["Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"])
def test_the_configuration_says_whether_a_checkpoint_is_the_whole_model_or_its_text_part(
    architecture: str, tmp_path: Path
) -> None:
    model = tiny_multimodal("qwen3_5")
    model.config.architectures = [architecture]
    model.config.save_pretrained(tmp_path)
    assert type(HubModel(name=str(tmp_path)).skeleton()).__name__ == architecture


def test_a_model_that_does_not_continue_text_is_refused_in_one_sentence(tmp_path: Path) -> None:
    tiny_multimodal("gemma3").model.vision_tower.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    message = refusal(HubModel(name=str(tmp_path)))
    assert "no decoder" in message and "SiglipVisionConfig" in message and len(message) < 300
