"""What a model cannot take is found before a run begins; that replayed layers are the model is in test_partition.py."""

import pytest
import torch

from lit_recon.data.packing import PADDING
from lit_recon.model.architectures import tiny_model
from lit_recon.model.verify import verify

POSITIONS = 64  # of the tiny models
TOKENS_ST = torch.randint(3, 64, (1, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", ["gpt2", "opt", "gptj"])  # tables of positions, beside and inside the layers
def test_samples_longer_than_a_table_of_positions_are_refused_with_both_numbers(shape: str) -> None:
    model = tiny_model(shape)
    verify(model, TOKENS_ST, lengths={"data.length": POSITIONS})
    said = f"data.evaluation_length={POSITIONS + 1}: .* max_position_embeddings={POSITIONS} "
    with pytest.raises(ValueError, match=said):
        verify(model, TOKENS_ST, lengths={"data.length": POSITIONS, "data.evaluation_length": POSITIONS + 1})


@pytest.mark.parametrize("shape", ["llama", "bloom"])
def test_models_without_such_a_table_take_longer_ones(shape: str) -> None:
    verify(tiny_model(shape), TOKENS_ST, lengths={"data.length": 2 * POSITIONS})


def test_the_sample_with_the_most_text_is_tried() -> None:
    tokens_ST = TOKENS_ST.repeat(3, 1)
    tokens_ST[0, 2:] = tokens_ST[1, 9:] = PADDING
    model, shapes = tiny_model("llama"), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    verify(model, tokens_ST)
    assert shapes and set(shapes) == {(1, 16)}
