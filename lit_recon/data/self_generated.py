"""SelfGenerated: calibration text that the dense model samples itself, so that none has to be found.

What a model says is closer to what it was trained on than most text at hand: reconstruction overfits it less (Shin,
Park, Lee, Lee, arXiv 2406.15524), and pruning on it often matches real text (Williams, Chrysostomou, Aletras:
"Self-calibration", arXiv 2410.17170). Each document is sampled from the whole distribution, starting from BOS.
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_recon.data.generation import DenseModel, Sampling, generate
from lit_recon.data.mixture import OtherEvaluation
from lit_recon.data.packing import PADDING, cached_pieces, find_opening
from lit_recon.data.source import Drawn, Part, Request

log = logging.getLogger(__name__)

CACHE_VERSION = 1  # raised when the code of generation.py, or that below, changes the samples


@dataclass(kw_only=True)
class SelfGenerated(OtherEvaluation):
    """Text sampled from the dense model: calibration and held-out samples; evaluation text is another source's.

    The model is handed in: `SelfGenerated().samples(tokenizer, model=model)`. Each document starts from the
    tokenizer's opening; where that is empty, from BOS or else the end-of-text token, no part of the sample then. When
    the model ends a document, another is sampled after it, from its own start, so that samples are packed as those of
    other sources are; were the end forbidden, the model would go on where it never does. A sample depends on the seed
    and its number, hardly on the batch, and is kept in the cache.

    Attributes:
        temperature: Divides the logits: below 1 likelier, more uniform text.
        generation_batch_size: Samples that are generated together; more are faster, and take memory.
    """

    temperature: float = 1.0
    generation_batch_size: int = 16

    @property
    def needs_model(self) -> bool:
        """It does."""
        return True

    def describe(self, part: Part) -> str:
        """What the samples of a part are."""
        own = f"self_generated (temperature {self.temperature:g})"
        return super().describe(part) if part == "evaluation" else own

    def _drawn(self, request: Request) -> Drawn:
        """Calibration, held-out and retraining samples, from the cache or generated."""
        if request.problems:  # before minutes are spent
            raise ValueError("\n".join(request.problems))
        model = request.model
        if isinstance(model, PreTrainedModel):
            model = DenseModel.from_model(model)
        if model is None:
            raise ValueError(
                f"{type(self).__name__}: the dense model generates its text; give samples(tokenizer, model=model)"
            )
        sampling, opening = self._sampling(request), find_opening(request.tokenizer, self.bos)
        total = self.num_samples + self.num_retraining
        names = [f"calibration {number}" for number in range(total)]
        names += [f"held_out {number}" for number in range(self.num_held_out)]
        decides = {
            "version": CACHE_VERSION,
            "libraries": [transformers.__version__, torch.__version__],
            "model": model.signature(),
            "sampling": asdict(sampling),
            "samples": [names, self.length, self.packing, opening],
        }
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

        def make() -> Tensor:
            room, joined = self.length - len(opening), self.packing == "fixed"
            rows = generate(model.load(), sampling, names, room=room, joined=joined)
            padded = [opening + row + [PADDING] * (room - len(row)) for row in rows]
            return torch.tensor(padded, dtype=torch.int32)

        pieces_PT = cached_pieces(key, make, length=self.length, cache=request.cache).long()
        if (alike := len(pieces_PT) - len(pieces_PT.unique(dim=0))) > 0:
            log.warning("%d of %d generated samples repeat another: raise data.temperature", alike, len(pieces_PT))
        return Drawn(pieces_PT[: self.num_samples], pieces_PT[total:], pieces_PT[self.num_samples : total])

    def _sampling(self, request: Request) -> Sampling:
        """How the model is asked; a ValueError where no token can start a document."""
        tokenizer: PreTrainedTokenizerBase = request.tokenizer
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        prompt = find_opening(tokenizer, self.bos) or starts[:1]
        if not prompt:
            raise ValueError(
                "data=self_generated: the model's tokenizer names neither a BOS nor an end-of-text token from which a "
                "text could start; use another source of text"
            )
        return Sampling(
            prompt=tuple(prompt),
            end=tokenizer.eos_token_id,
            vocabulary=len(tokenizer),
            temperature=self.temperature,
            batch_size=self.generation_batch_size,
            seed=request.seed,
        )

    def _problems(self) -> list[str]:
        problems = super()._problems()
        temperature, batch = self.temperature, self.generation_batch_size
        if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
            problems.append(f"data.temperature={temperature!r}: give a number above 0; 1 samples what the model says")
        if type(batch) is not int or batch < 1:
            problems.append(f"data.generation_batch_size={batch!r}: give a whole number, 1 or more")
        return problems
