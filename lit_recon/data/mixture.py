"""Mixture: samples of several sources by weight, such as text that the model generates and text of a kind it is for.

Also what it shares with self-generated text: evaluation text of another source, so that the perplexities of runs with
different calibration text compare.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from lit_recon.data.python_docs import PythonDocs
from lit_recon.data.source import Drawn, Part, Request, TextSource

COUNTED = ("num_samples", "num_held_out", "num_retraining")
OURS = (*COUNTED, "length", "packing", "bos")  # of a mixture, which its sources follow


@dataclass(kw_only=True)
class OtherEvaluation(TextSource):
    """A source without evaluation text of its own; it is another source's, as that source's own runs have it.

    Attributes:
        evaluation: Gives the documents of the evaluation part. How many samples are taken of it, and how long, is said
            by evaluation_samples and evaluation_length of this source.
    """

    evaluation: TextSource = field(default_factory=PythonDocs)

    def __post_init__(self) -> None:
        """Find what is no source."""
        if not isinstance(self.evaluation, TextSource):
            raise ValueError(
                f"data.evaluation={self.evaluation!r} is no source of text; choose a member of the group data by "
                "data@data.evaluation=wikitext2"
            )

    def documents(self, part: Part) -> Iterable[str]:
        """Documents of the evaluation part; the others are samples without documents."""
        assert part == "evaluation", part
        return self.evaluation.documents("evaluation")

    def describe(self, part: Part) -> str:
        """Name of the evaluation text."""
        return self.evaluation.describe("evaluation")

    def split_name(self, part: Part) -> str:
        """That of the evaluation text."""
        return self.evaluation.split_name(part) if part == "evaluation" else part

    def is_one_text(self, part: Part) -> bool:
        """Whether the evaluation text is."""
        return part == "evaluation" and self.evaluation.is_one_text(part)

    def text_files(self) -> list[Path]:
        """Those of the evaluation text."""
        return self.evaluation.text_files()

    def _problems(self) -> list[str]:
        return [*super()._problems(), *_problems_of(self.evaluation, "data.evaluation")]


@dataclass(kw_only=True)
class Mixture(OtherEvaluation):
    """Calibration and held-out samples of several sources, in shares of their weights, shuffled.

    Attributes:
        sources: By a name of your choice. How many samples are taken, how long, packed and opened, is said by the
            mixture.
        weights: Of each source by its name, in any unit; 0 leaves it out.
    """

    sources: Mapping[str, TextSource]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        """Find what is no source, and weights that are none."""
        super().__post_init__()
        if not isinstance(self.sources, Mapping) or not self.sources:
            raise ValueError(f"data.sources={self.sources!r}: give each by a name: +data@data.sources.mine=python_docs")
        for name, source in self.sources.items():
            if not isinstance(source, TextSource):
                raise ValueError(
                    f"data.sources.{name}={source!r} is no source of text; choose a member of the group data by "
                    f"data@data.sources.{name}=python_docs"
                )
        weights = self.weights
        if not isinstance(weights, Mapping) or set(weights) != set(self.sources):
            named = ", ".join(f"{name}: 1" for name in self.sources)
            raise ValueError(f"data.weights={weights!r}: give each of the sources its weight, such as {{{named}}}")
        for name, weight in weights.items():
            if type(weight) not in (int, float) or not 0 <= weight < math.inf:
                raise ValueError(f"data.weights.{name}={weight!r}: give a number, 0 or more")
        if not sum(weights.values()):
            raise ValueError(f"data.weights={weights!r}: all are 0; give one of them a larger number")

    @property
    def needs_model(self) -> bool:
        """Whether one of its sources does."""
        return any(source.needs_model for source in self._used().values())

    def describe(self, part: Part) -> str:
        """How many samples are of which source."""
        if part == "evaluation":
            return super().describe(part)
        counts = self._counts(self.num_held_out if part == "held_out" else self.num_samples)
        used = [(counts[name], source) for name, source in self.sources.items() if counts[name]]
        return " and ".join(f"{number} samples of {source.describe(part)}" for number, source in used)

    def text_files(self) -> list[Path]:
        """Those of all sources of which there are samples, and of the evaluation text."""
        named = [path for source in [*self._used().values(), self.evaluation] for path in source.text_files()]
        return list(dict.fromkeys(named))

    def hub_datasets(self) -> list[str]:
        """Those of all sources of which there are samples."""
        return sorted({name for source in self._used().values() for name in source.hub_datasets()})

    def _used(self) -> dict[str, TextSource]:
        """The sources of which there are samples."""
        counts = [self._counts(getattr(self, setting)) for setting in COUNTED]
        return {name: source for name, source in self.sources.items() if any(count[name] for count in counts)}

    def _counts(self, number: int) -> dict[str, int]:
        """Samples of each source: `number` in shares of the weights, the largest remainders rounded up."""
        total = sum(self.weights.values())
        exact = {name: number * self.weights[name] / total for name in self.sources}
        counts = {name: math.floor(share) for name, share in exact.items()}
        last = sorted(exact, key=lambda name: counts[name] - exact[name])  # of two alike, the first that is named
        for name in last[: number - sum(counts.values())]:
            counts[name] += 1
        return counts

    def _drawn(self, request: Request) -> Drawn:
        """Samples of each source, shuffled by the seed."""
        numbers = {setting: self._counts(getattr(self, setting)) for setting in COUNTED}
        drawn = []
        for name, source in self._used().items():
            part = copy.copy(source)
            settings = {setting: getattr(self, setting) for setting in OURS}
            for setting, value in (settings | {of: counts[name] for of, counts in numbers.items()}).items():
                setattr(part, setting, value)
            drawn.append(part._drawn(request))
        return Drawn(
            *(
                tokens_ST[torch.randperm(len(tokens_ST), generator=torch.Generator().manual_seed(request.seed))]
                for tokens_ST in map(torch.cat, zip(*drawn, strict=True))
            )
        )

    def _problems(self) -> list[str]:
        inner = {f"data.sources.{name}": source for name, source in self.sources.items() if self.weights[name]}
        problems = [problem for place, source in inner.items() for problem in _problems_of(source, place)]
        return [*super()._problems(), *problems]


def _problems_of(source: TextSource, place: str) -> list[str]:
    """What is wrong with a source that stands at `place`, with its settings named as they stand there."""
    try:
        source.check()
    except ValueError as error:
        names = "|".join(setting.name for setting in fields(source))
        return [re.sub(rf"\bdata\.(?=({names})\b)", f"{place}.", problem) for problem in str(error).splitlines()]
    return []
