"""What windows are trained on, towards what, and what the pruning criterion looks at.

Two chains may be kept: the dense one, through the dense model all the way, and the sparse one, through the windows that
are done. Which are needed follows from three choices; the paper's code (arXiv 2510.14444) has switches for the same,
in the last column:

    inputs  targets  statistics  memory  passes  the paper's code
    dense   dense    dense       2       1       propagate_sparse_activations_prune=False (its published sweep)
    dense   dense    sparse      3       3       its default
    sparse  dense    dense       3       2       ..._reconstruct=True, use_dense_targets=True, ..._prune=False
    sparse  dense    sparse      3       3       ..._reconstruct=True, use_dense_targets=True
    sparse  local    dense       4       3       ..._reconstruct=True, ..._prune=False
    sparse  local    sparse      2       2       ..._reconstruct=True
    mix     dense    dense       4       2       -
    mix     dense    sparse      4       3       -
    mix     local    dense       5       3       -
    mix     local    sparse      5       4       -

Memory counts arrays of all samples' hidden states, passes those over the window per sample besides training.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """What windows are trained on, towards what, and what the criterion looks at.

    Attributes:
        inputs: "dense", "sparse", or "mix": mix * dense + (1 - mix) * sparse.
        targets: "dense": the dense chain's next value; "local": the dense window applied to the window's own inputs.
        statistics: Which chain the criterion's statistics come from, through the window before it is pruned.
        mix: Share of the dense chain in mixed inputs.
    """

    inputs: str = "sparse"
    targets: str = "dense"
    statistics: str = "dense"
    mix: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings; all problems in one message."""
        allowed = {
            "inputs": ("dense", "sparse", "mix"),
            "targets": ("dense", "local"),
            "statistics": ("dense", "sparse"),
        }
        problems = [
            f"chain.{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}."
            for name, choices in allowed.items()
            if getattr(self, name) not in choices
        ]
        if not isinstance(self.mix, (int, float)) or not 0 < self.mix < 1:
            problems.append(
                f"chain.mix={self.mix}: expected a share of the dense chain between 0 and 1; "
                "for the ends use chain.inputs=sparse or dense."
            )
        if self.inputs == "dense" and self.targets == "local":
            problems.append(
                "chain.targets=local with chain.inputs=dense is nothing of its own: a window's own inputs are then the "
                "dense ones. Use chain.targets=dense, or chain.inputs=sparse or mix."
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def needs_dense(self) -> bool:
        """Whether the dense chain is kept."""
        return self.inputs != "sparse" or "dense" in (self.targets, self.statistics)

    @property
    def needs_sparse(self) -> bool:
        """Whether the sparse chain is kept."""
        return self.inputs != "dense" or self.statistics == "sparse"

    @property
    def num_arrays(self) -> int:
        """How many arrays of all samples' hidden states are kept."""
        needed = self.needs_dense + self.needs_sparse + (self.inputs == "mix")
        return needed + 1 + (self.targets == "local" and self.needs_dense)

    @property
    def passes(self) -> int:
        """Passes over a window per sample besides training."""
        local = self.targets == "local"
        apart = self.statistics == "sparse" and not (local and self.inputs == "sparse")
        return self.needs_dense + local + apart + self.needs_sparse

    @property
    def corrects(self) -> bool:
        """Whether windows are trained to make up for what those before them have changed."""
        return self.inputs != "dense" and self.targets == "dense"

    @property
    def one_source(self) -> bool:
        """Whether a matrix's targets are its dense products with the inputs that it is trained on."""
        return self.inputs == "dense" or self.targets == "local"

    @property
    def independent(self) -> bool:
        """Whether no window needs another one's result, so that they could be reconstructed in any order."""
        return not self.needs_sparse

    def describe(self) -> dict[str, str]:
        """The choices, in the words of the settings."""
        inputs = f"mix ({self.mix:g} dense)" if self.inputs == "mix" else self.inputs
        return {"inputs": inputs, "targets": self.targets, "statistics": self.statistics}
