"""The command `python -m lit_recon.fit`, and the library: a run from its settings to its results.

__main__.py        Hydra in, exit status out
configure.py       from the configuration to a Job; with the next three alone sees the configuration
parts.py           parts of a configuration as objects
settings.py        settings of the run itself
resume_config.py   the configuration of a run that is resumed
rehearsal.py       one training step of a tiny window, before anything is written
samples.py         samples of its source of text, which the dense model may generate
checks.py          rules between settings, and between settings and a model
pruning_checks.py  those of criterion, pattern, refinement and allocation
allocate.py        the pattern of each matrix: by rules, one threshold, or an allocation
job.py             a run as objects: Method, Execution, Output
run.py             load, plan, walk, read back, measure, report
dense_measure.py   what the dense model is measured at, once for all runs that share it
session.py         a loaded model and the objects that walk over it; `reconstruct`
library.py         load, prune_and_reconstruct: the same for a model object, in place
study.py           the runs of a sweep: what is done is skipped, what was interrupted resumed, a report at the end
forecast.py        how long they will take
signature.py       what a resumed run must share with the one before
resume_point.py    what a commit of a walk holds
walk_callbacks.py  progress bar, growing checkpoint
plan/              what a run will take
output/            the output folder
"""
