"""The chain: hidden states of all samples at the current window's start, and how they advance to the next window's.

Which chains are kept, and what for, is decided by a Propagation (propagation.py). Between the halves of a parallel
layer each chain needs one more array of hidden states; windows that overlap need one more for the dense chain. Where
targets are recomputed for each batch (teacher.py), the dense chain advances like the sparse one.

Shapes: S samples (calibration first, then held-out), B samples of a batch, T tokens, D hidden size.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lit_recon.activations.boundary import Boundary, check_state, correct, state_of
from lit_recon.activations.passes import CALIBRATION, Energies, Observer, Passes
from lit_recon.activations.propagation import Propagation
from lit_recon.activations.teacher import TeacherWindow
from lit_recon.model.windows import Window
from lit_recon.system.clock import Clock, timed


class Chain:
    """Hidden states at the current boundary, and what the window that starts there is trained on.

    Args:
        passes: Runs windows over all samples.
        propagation: Which chains are kept and what for.
        recompute: Whether targets are recomputed for each batch rather than kept.
        clock: Takes the seconds.

    Attributes:
        dense: The dense chain, where it is kept.
        sparse: The sparse chain, where it is kept.
        teacher: Where targets are recomputed, from `dense_pass` to `advance`: the dense window, which makes them.
        energies_ST: Energy of the dense window's update of each token, after `dense_pass`; of calibration samples
            alone where targets are recomputed, and None where nothing was run that shows it.
    """

    def __init__(
        self,
        passes: Passes,
        propagation: Propagation | None = None,
        *,
        recompute: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.passes, self.propagation, self.recompute = passes, propagation or Propagation(), recompute
        self.clock = clock or Clock()
        embedded_STD = passes.embedded()
        self._shape = embedded_STD.shape
        needs_dense, needs_sparse = self.propagation.needs_dense, self.propagation.needs_sparse
        self.dense = Boundary(embedded_STD) if needs_dense else None
        self.sparse = Boundary(passes.copy(embedded_STD) if self.dense else embedded_STD) if needs_sparse else None
        # The dense chain's next value if there is one, else targets.
        self._outputs_STD = None if recompute else self._new_array()
        self._own_targets_STD: Tensor | None = None  # where they are not these outputs
        self._targets_STD = self._outputs_STD
        self._mixed_STD = self._new_array() if self.propagation.inputs == "mix" else None
        self.teacher: TeacherWindow | None = None
        self.energies_ST: Tensor | None = None

    @property
    def inputs_STD(self) -> Tensor:
        """What the window is trained on, (S, T, D)."""
        if self._mixed_STD is not None:
            return self._mixed_STD
        boundary = self.sparse if self.propagation.inputs == "sparse" else self.dense
        assert boundary is not None
        return boundary.states_STD

    @property
    def targets_STD(self) -> Tensor:
        """What the window shall output, after `dense_pass`, (S, T, D); not there where targets are recomputed."""
        assert self._targets_STD is not None, "targets are recomputed"
        return self._targets_STD

    @property
    def sources_STD(self) -> Tensor:
        """What the dense window makes targets of, (S, T, D)."""
        if self.propagation.targets == "local":
            return self.inputs_STD
        assert self.dense
        return self.dense.states_STD

    def state(self) -> dict[str, Tensor]:
        """The arrays from which a walk is resumed at a window boundary, by name; not copied."""
        return state_of(self._boundaries)

    def restore(self, arrays: Mapping[str, Tensor]) -> None:
        """Resume from the `state` of a chain with the same samples, propagation and type of the store.

        Raises:
            ValueError: It was another chain's.
        """
        check_state(arrays, self._boundaries)
        for name, boundary in self._boundaries.items():
            self.passes.each_batch(Tensor.copy_, boundary.states_STD, arrays[name])
            aside_STD = arrays.get(f"{name}_aside")
            boundary.aside_STD = None if aside_STD is None else self.passes.copy(aside_STD)

    def forget(self) -> None:
        """Let go of all hidden states: the walk is over."""
        self.dense = self.sparse = self.teacher = self.energies_ST = None
        self._outputs_STD = self._own_targets_STD = self._targets_STD = self._mixed_STD = None

    @timed("teacher")
    def dense_pass(self, window: Window, observers: Sequence[Observer] = ()) -> None:
        """Run the window, before it is pruned, over all samples: targets, the dense chain's next value, statistics.

        Args:
            window: The window with its dense weights.
            observers: Look at the pass from which the criterion's statistics come.
        """
        propagation = self.propagation
        if self._mixed_STD is not None:
            assert self.dense and self.sparse
            self.passes.each_batch(self._mix, self._mixed_STD, self.sparse.states_STD, self.dense.states_STD)
        # The pass for local targets on sparse inputs serves sparse statistics too; but not where an earlier window has
        # changed what this one uses: targets are of the dense window, statistics of the window as it is now.
        shares_pass = propagation.targets == "local" and propagation.inputs == "sparse"
        shares_pass = shares_pass and not window.has_shared_norms and not self.recompute
        of_dense = observers if propagation.statistics == "dense" else ()
        of_sparse = observers if propagation.statistics == "sparse" else ()
        with window.with_dense_norms():
            if self.recompute:
                self.teacher, self.energies_ST = TeacherWindow(window, self.passes.compute), None
                if propagation.statistics == "dense":
                    assert self.dense
                    # Where targets are local, the teacher's update is another one: of the window's own inputs.
                    energies = self._energies(self.dense.states_STD) if propagation.targets == "dense" else None
                    self.passes.run(window, self.dense.states_STD, None, of_dense, CALIBRATION, energies=energies)
            else:
                if self.dense:
                    self._dense_outputs(window, of_dense)
                if propagation.targets == "local":
                    seen_by, energies = of_sparse if shares_pass else (), self._energies(self.inputs_STD)
                    self.passes.run(window, self.inputs_STD, self._own_targets(), seen_by, energies=energies)
        if propagation.statistics == "sparse" and not shares_pass:
            assert self.sparse
            self.passes.run(window, self.sparse.states_STD, None, of_sparse, CALIBRATION)

    @timed("advance")
    def advance(self, window: Window) -> None:
        """Step over the window, which is reconstructed now, to the end of the layers that it keeps."""
        if self.teacher:
            if self.dense:
                with self.teacher.installed():
                    self.step_over(self.dense, window)
            self.teacher = None
        elif self.dense:
            assert self._outputs_STD is not None
            free_STD = self.dense.step(window.parallel_half, self._outputs_STD, self.passes.each_batch)
            self._outputs_STD = self._new_array() if free_STD is None else free_STD
        if self.sparse:
            self.step_over(self.sparse, window)

    def step_over(self, boundary: Boundary, window: Window) -> None:
        """Run a window as it is now from a boundary, and move the boundary to the end of the layers that it keeps."""
        inputs_STD = boundary.states_STD
        outputs_STD = self._new_array() if window.parallel_half == "first" else inputs_STD
        self.passes.run(partial(window, layers=slice(0, window.num_kept)), inputs_STD, outputs_STD)
        boundary.step(window.parallel_half, outputs_STD, self.passes.each_batch)

    @property
    def _boundaries(self) -> dict[str, Boundary]:
        """Those that are there, by name."""
        return {name: one for name, one in (("dense", self.dense), ("sparse", self.sparse)) if one}

    def _new_array(self) -> Tensor:
        return self.passes.store.zeros(self._shape)

    def _mix(self, mixed_BTD: Tensor, sparse_BTD: Tensor, dense_BTD: Tensor) -> None:
        """Mixed inputs."""
        torch.lerp(sparse_BTD, dense_BTD, self.propagation.mix, out=mixed_BTD)

    def _dense_outputs(self, window: Window, observers: Sequence[Observer]) -> None:
        """The dense chain's next value, after the layers that are kept, and the dense targets, at the window's end."""
        assert self.dense and self._outputs_STD is not None
        kept, rest = slice(0, window.num_kept), slice(window.num_kept, None)
        energies = self._energies(self.dense.states_STD)
        inputs_STD, outputs_STD = self.dense.states_STD, self._outputs_STD
        self.passes.run(partial(window, layers=kept), inputs_STD, outputs_STD, observers, energies=energies)
        self._targets_STD = self._outputs_STD
        if window.num_kept < len(window.indices):
            layers = partial(window, layers=rest)
            self.passes.run(layers, outputs_STD, self._own_targets(), observers, energies=energies)
        elif window.parallel_half == "second" and self.propagation.corrects:
            self._correct()

    def _correct(self) -> None:
        """Let a parallel layer's second half make up for what the first one has left of the chains' difference."""
        assert self.dense and self.sparse and self._outputs_STD is not None
        assert self.dense.aside_STD is not None and self.sparse.aside_STD is not None
        share = 1 - (self.propagation.mix if self.propagation.inputs == "mix" else 0)
        arrays_STD = (self._own_targets(), self._outputs_STD, self.dense.aside_STD, self.sparse.aside_STD)
        self.passes.each_batch(partial(correct, share=share), *arrays_STD)

    def _energies(self, starts_STD: Tensor) -> Energies:
        """Takes the energies of updates that start from these hidden states."""
        self.energies_ST = torch.zeros(self._shape[:2], device=self.passes.compute.device)
        return Energies(self.energies_ST, starts_STD)

    def _own_targets(self) -> Tensor:
        """Memory for targets that are not the dense chain's next value."""
        if self._own_targets_STD is None:
            self._own_targets_STD = self._new_array() if self.dense else self._outputs_STD
        self._targets_STD = self._own_targets_STD
        return self.targets_STD
