"""A model as lm-eval runs it, that tells of each request which is answered, so that the time left is known.

The harness hands all requests of a kind over at once, and its model reports every answer to a hook that is made for a
cache; here the hook counts. lm-eval's own bars, one for each kind, are off.

Imported when tasks are run only: lm-eval is an extra.
"""

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM


class CountedModel(HFLM):
    """lm-eval's model of transformers, with its requests counted.

    Args:
        expect: Is told how many requests come.
        answered: Is told of each answer.
        settings: Of lm-eval's class.
    """

    def __init__(self, *, expect: Callable[[int], None], answered: Callable[[], None], **settings: Any) -> None:
        super().__init__(**settings)
        self.expect = expect
        self.set_cache_hook(_Count(answered))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of texts after others."""
        self.expect(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts."""
        self.expect(len(requests))
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that the model writes."""
        self.expect(len(requests))
        return super().generate_until(requests, disable_tqdm=True)


class _Count(CacheHook):
    """Counts answers; nothing is kept."""

    def __init__(self, answered: Callable[[], None]) -> None:
        super().__init__(None)
        self.answered = answered

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """An answer is there."""
        self.answered()
