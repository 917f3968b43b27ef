"""What tests of models share: a tiny Llama with a tokenizer of its own, and what is said where a model is refused."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_recon.model.loading import LanguageModel

TEXT = "def area(r):\n    return 3.14159 * r ** 2  # naïve"


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens, so that every text survives encoding and decoding."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3, "the cat sat on the mat and that was that " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_llama(
    *, tie_word_embeddings: bool = False, hidden_size: int = 16, intermediate_size: int = 32
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def refusal(model: LanguageModel) -> str:
    with pytest.raises(ValueError) as caught:
        model.check()
    message = str(caught.value)
    assert "\n" not in message
    return message
