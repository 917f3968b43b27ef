"""The command `python -m lit_recon.evaluate`: how good a model is, whoever made it, one layer at a time.

__main__.py       Hydra in, exit status out
configure.py      from the configuration to an Evaluation; subjects.py: what checkpoint= and dense= name
run.py            load, verify, measure, add to the record
windows.py        windows of a text, with a stride or without
side_by_side.py   dense, pruned and checkpoint on the same windows; rounds.py: as many at once as fit into memory
perplexity.py     perplexity and its protocol
agreement.py      divergence, top-1 agreement, errors of hidden states
drift.py          error of each matrix's output, alone and in the sparse model
continuations.py  how models go on with the same prompts, and whether they repeat themselves
harness.py        zero-shot and few-shot tasks, through lm-eval; counted_model.py: its model, with requests counted
whole_models.py   continuations, tasks and drift of all states, as the record has them
record.py         evaluations.json, to which every evaluation adds; output.py: the table; progress.py: the time left
evaluator.py      the same measures for every state of a run of lit_recon.fit
"""
