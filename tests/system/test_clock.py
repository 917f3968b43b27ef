"""Clock of a run: seconds and peak memory of parts that lie within each other, also of runs that are resumed."""

import json
from collections.abc import Iterable

import pytest
import torch

from lit_recon.system.clock import PHASES, WHOLE_WALK, Clock, timed
from lit_recon.system.memory import PeakMemory, reset_peak_memory

CPU, MIB = torch.device("cpu"), 1 << 20


class Looks:
    """Peaks that are found, look by look."""

    def __init__(self, peaks: Iterable[int], *, is_reset: bool = True) -> None:
        self.peaks, self.is_reset = iter(peaks), is_reset

    def take(self) -> int:
        return next(self.peaks)


def test_both_memories_are_looked_at_and_a_resumed_run_keeps_the_larger_peaks() -> None:
    clock = Clock(memory=Looks([1, 2, 3, 3, 3]), host=Looks([10, 30, 20, 20, 20]))
    with clock.phase("fit"):
        ...
    assert (clock.peak("fit"), clock.host_peak("fit")) == (2, 30)
    resumed = Clock(memory=Looks([0] * 9), host=Looks([0, 40, *[0] * 7]))
    resumed.resume(json.loads(json.dumps(clock.state())))
    with resumed.phase("fit"):
        ...
    assert (resumed.peak("fit"), resumed.host_peak("fit"), resumed.host_peak()) == (2, 40, 40)
    assert Clock(memory=Looks([1])).host_peak() is None, "it is the same memory"


def test_what_a_phase_has_asked_for_is_waited_for_where_it_begins_and_ends() -> None:
    waits: list[str] = []
    clock = Clock(wait=lambda: waits.append("wait"))
    with clock.phase("fit"):
        waits.append("fit")
    assert waits == ["wait", "fit", "wait"]


def walk(clock: Clock) -> None:
    """A walk of two phases between a load and an evaluation."""
    with clock.phase("load"):
        ...
    with clock.part(WHOLE_WALK):
        with clock.phase("fit"):
            ...
        with clock.phase("advance"):
            ...
    with clock.phase("evaluate"):
        ...


# before load, in it, before walk, before fit, in it, before advance, in it, to the walk's end, before evaluate, in it
LOOKS = [90, 10, 70, 20, 30, 45, 40, 35, 80, 50]


def test_each_peak_counts_for_all_parts_that_are_open_and_for_no_other() -> None:
    clock = Clock(memory=Looks([*LOOKS, 5, 6]))
    walk(clock)
    assert clock.phase_peaks() == {"load": 10, "fit": 30, "advance": 40, "evaluate": 50}
    assert clock.peak(WHOLE_WALK) == 45, "also of what lies between its phases"
    assert clock.peak() == 90, "also of what came before the first phase"


def test_a_phase_that_comes_again_keeps_the_larger_peak_and_an_error_ends_it() -> None:
    clock = Clock(memory=Looks([0, 30, 0, 20, 99]))
    with clock.phase("fit"):
        ...
    with pytest.raises(ZeroDivisionError), clock.phase("fit"):
        _ = 1 / 0
    assert clock.phase_peaks() == {"fit": 30} and clock.peak() == 99


def test_the_clock_of_an_object_takes_what_its_methods_need() -> None:
    class Fitter:
        clock = Clock(memory=Looks([1, 7]))

        @timed("fit")
        def fit(self) -> None:
            return None

    Fitter().fit()
    assert Fitter.clock.phase_peaks() == {"fit": 7} and Fitter.clock.seconds["fit"] > 0


def test_a_resumed_run_has_the_larger_peaks_and_the_sum_of_the_seconds() -> None:
    first = Clock(memory=Looks([1, 60, 2]))
    with first.phase("fit"):
        ...
    first.seconds["fit"] = 5.0
    state = json.loads(json.dumps(first.state()))
    resumed = Clock(memory=Looks([*LOOKS, 5, 6]))
    resumed.resume(state)
    walk(resumed)
    assert resumed.phase_peaks() == {"load": 10, "fit": 60, "advance": 40, "evaluate": 50}
    assert resumed.peak(WHOLE_WALK) == 45 and resumed.peak() == 90
    assert resumed.seconds["fit"] >= 5.0 and resumed.total() >= state["elapsed"] > 0


@pytest.mark.parametrize("resets", [(False, False), (True, False), (False, True)])
def test_nothing_is_said_of_phases_where_one_of_the_machines_cannot_count_anew(resets: tuple[bool, bool]) -> None:
    first, second = (Clock(memory=Looks([*LOOKS, 90, 91], is_reset=is_reset)) for is_reset in resets)
    walk(first)
    second.resume(first.state())
    walk(second)
    assert second.phase_peaks() == {} and second.peak() == 90 and second.peak(WHOLE_WALK) == 45


def test_a_clock_without_memory_says_nothing_of_it() -> None:
    clock = Clock()
    walk(clock)
    assert clock.phase_peaks() == {} and clock.peak() == 0 and set(clock.summary()) == {*PHASES, "total"}


@pytest.mark.skipif(not reset_peak_memory(CPU), reason="the peak of a process cannot be counted anew here")
def test_memory_of_a_phase_is_that_and_not_what_came_before_or_after() -> None:
    torch.ones(300 * MIB, dtype=torch.uint8)
    clock = Clock(memory=PeakMemory(CPU))
    with clock.phase("load"):
        ...
    with clock.phase("fit"):
        torch.ones(150 * MIB, dtype=torch.uint8)
    with clock.phase("advance"):
        ...
    load, fit, advance = clock.phase_peaks().values()
    assert 120 * MIB < fit - load < 200 * MIB and advance - load < 50 * MIB
    assert clock.peak() - load > 250 * MIB, "what came before the clock was made is the process's, and counts"
