"""Note on a window: which tries of it failed, why, and what was kept of it."""

from collections.abc import Sequence

from lit_recon.reconstruction.rate_search import Try

DIVERGED, NOT_BETTER = "the loss was not finite", "held-out error did not improve"


def note_on(tries: Sequence[Try], best: Try | None, dtypes: str, solved: Try | None) -> str:
    """The note on a window of which a try failed, or that was tried at several rates to find the best.

    Args:
        tries: The fits.
        best: That which is kept.
        dtypes: Those in which the window is stored, in words.
        solved: Its least-squares start.
    """
    kept, remarks = "kept its pruned weights", []
    if solved and solved.accepted:
        kept = "kept its least-squares solution"
    elif solved:
        remarks = [f"its least-squares solution was not better ({_in_words(solved)})"]
    if not tries:
        return "; ".join([*remarks, f"nothing of it is trained: {kept}"])
    if shown := (best or tries[-1]).remark:
        remarks.append(shown)
    failed = [one for one in tries if not one.accepted]
    if best and (not failed or len(tries) > len(failed) + 1):
        if len(tries) > 1:
            remarks.append(f"tried at {len(tries)} rates, best at {best.rate:g} of the learning rate")
        return "; ".join(remarks)
    last = failed[-1]
    reason = f"{NOT_BETTER} ({_in_words(last)})"
    if last.diverged:
        reason = DIVERGED
    elif last.lost == 1:
        reason = f"rounding to {dtypes} took all that training had gained"
    if best:
        return "; ".join([*remarks, f"{reason}; reconstructed at {best.rate:g} of the learning rate"])
    also = f", also at {last.rate:g} of the learning rate" if len(tries) > 1 else ""
    return "; ".join([*remarks, f"{reason}{also}: {kept}"])


def _in_words(tried: Try) -> str:
    """The held-out errors of a try."""
    return f"{tried.held_out.mean:.3g}, typical {tried.held_out.typical:.3g}"
