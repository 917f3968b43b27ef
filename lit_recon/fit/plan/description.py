"""Description of a plan: what a run will do and what it takes, as lines by their names, for people to read."""

import torch

from lit_recon.fit.allocate import describe_patterns, target_sparsity
from lit_recon.fit.job import Job, Method
from lit_recon.fit.plan.estimate import Plan
from lit_recon.fit.plan.global_fit import describe_global_fit
from lit_recon.fit.session import Session
from lit_recon.model.precision import describe_measured
from lit_recon.model.windows import HalfWindow
from lit_recon.modules.trained import needs_gram
from lit_recon.system.units import duration, in_gb

_MANY_ZEROS = 0.01  # of the weights of a model: it was pruned before, and the plan says so


def describe_plan(
    job: Job, plan: Plan, session: Session, protocol: str, *, done: int, steps: int = 0
) -> dict[str, str]:
    """What a run will do and what it takes, as lines by their names.

    Args:
        job: The run.
        plan: Its plan.
        session: Its model, cut into windows.
        protocol: How perplexity is measured.
        done: Windows that are done, of a run that is resumed.
        steps: Steps of the fit of all layers at once that are done.
    """
    samples, compute = job.samples, job.execution.compute
    halves = [window for window in session.windows if isinstance(window, HalfWindow)]
    shared = sorted({name for half in halves for name in half.split.shared})
    zeros = _share_of_zeros(session)
    measured = f"; {describe_measured(compute)}" if compute.measured else ""
    chosen = sum(window.is_chosen for window in session.windows)
    some = "" if chosen == len(session.windows) else f"{chosen} of "
    lines = {
        "model": f"{job.model.describe()}, {plan.parameters / 1e6:.1f} M parameters",
        "prune": f"{_removed(session, job.method) / plan.parameters:.1%} of the parameters: "
        f"{job.recipe['pattern']} by {job.recipe['criterion']}, in {plan.prunable / plan.parameters:.1%} of "
        + ("them" if not plan.unscored else f"them; {plan.unscored} matrices stay dense")
        + (f"; {plan.unused} parameters that are no matrices stay as they are" if plan.unused else "")
        + (f"; {plan.routers} routers stay dense" if plan.routers else "")
        + (f"; {zeros:.0%} of its weights are zero already and stay zero" if zeros >= _MANY_ZEROS else ""),
        "reconstruct": f"{some}{len(session.windows)} windows ({job.recipe['windows']}), "
        + ("solved exactly, " if needs_gram(job.method.training.module) else f"{plan.steps} steps each, ")
        + f"on {samples.num_tokens} tokens of {samples.description}"
        + (f"; {', '.join(shared)} of both halves, trained in the attention half" if shared else ""),
        "compute": f"{compute.device.type}, {compute.precision}, masters in float32{measured}",
        "evaluate": protocol,
        "predicted": f"about {duration(plan.seconds)}, peak memory {in_gb(plan.peak_bytes)}"
        + (f" (up to {in_gb(plan.mapped_bytes)} of it mapped from the model's files)" if plan.mapped_bytes else "")
        + (f" on the GPU, {in_gb(plan.host_bytes)} of the CPU's" if plan.host_bytes is not None else "")
        + f", disk {in_gb(plan.disk_bytes)}",
        "by window": ", ".join(f"{name} {in_gb(peak)}" for name, peak in plan.peaks_by_kind.items()),
        "output": str(job.output.folder),
    }
    if session.pruner.patterns:
        lines["sparsity"] = f"\n{'':12}".join(describe_patterns(session.pruner.patterns))
    if job.method.walk == "global":
        lines["reconstruct"] = f"nothing; {len(session.windows)} windows ({job.recipe['windows']}) are pruned"
    if session.retrained:
        lines["retrain"] = describe_global_fit(plan.global_fit, job.method.training.retraining, samples)
    if job.output.resume:
        lines["resume"] = f"{done} of {plan.windows} windows are done" if done else "no window was done: from the start"
        lines["resume"] += f", and {steps} steps of all layers at once" if steps else ""
    return lines


def _removed(session: Session, method: Method) -> float:
    """How many weights will be removed."""
    shares = target_sparsity(method, session.pruner.patterns, session.matrices)
    return sum(shares.get(one.name, 0) * one.weight.numel() for layer in session.matrices for one in layer)


def _share_of_zeros(session: Session) -> float:
    """Share of the prunable weights that are zero before anything is pruned."""
    weights = [one.weight for layer in session.matrices for one in layer if one.input_dim is not None]
    nonzero = sum(int(torch.count_nonzero(weight != 0)) for weight in weights)
    session.weights.release_pages()
    return 1 - nonzero / max(1, sum(weight.numel() for weight in weights))
