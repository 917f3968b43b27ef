"""Samples of a run: of its source of text, which may have the dense model generate it."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_recon.data.generation import DenseModel
from lit_recon.data.source import Samples, TextSource
from lit_recon.fit.job import Execution
from lit_recon.fit.signature import model_signature
from lit_recon.model.loading import LanguageModel
from lit_recon.system.cache import cache_folder
from lit_recon.system.memory import release_memory


def make_samples(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, model: LanguageModel, execution: Execution
) -> Samples:
    """Samples of a source; one that generates text gets the dense model, which is loaded apart from the run's."""
    device = execution.compute.device
    settings: dict[str, Any] = {"seed": execution.seed, "cache": cache_folder()}
    if not source.needs_model:
        return source.samples(tokenizer, **settings)
    dense = DenseModel(
        signature=lambda: model_signature(model, device),
        load=lambda: model.load().to(device),  # type: ignore[arg-type]
    )
    try:
        return source.samples(tokenizer, **settings, model=dense)
    finally:
        release_memory()  # of the model, before the run loads its own
