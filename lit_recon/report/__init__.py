"""Reports of runs, made from the files of a run alone: neither torch nor the model is loaded.

__main__.py      the command python -m lit_recon.report: draw reports again, compare runs
page.py          report.html, one page per run, from page.html.j2
checkpoint_page.py  the page of a checkpoint that was only evaluated, from checkpoint.html.j2
evaluation_section.py  what both show of evaluations.json, from evaluation.html.j2
figures.py       the figures of a run: perplexity, error over depth, learning curves, time and memory
drift_figure.py  the figure of drift over depth, of an evaluation
heat_map.py      the figure of the sparsity of every matrix; hidden_figure.py of hidden states over depth
overview.py      the page over many runs, from overview.html.j2
groups.py        runs in groups by keys of config.yaml; sweeps over rates; group_figure.py draws groups
measures.py      what runs are compared by: labels, units, numbers
tables.py        tables over runs and groups, as CSV, in Markdown and on the page
setting_figure.py  quality over a setting that varies by number
pareto.py        quality against cost, and the front
templates.py     pages from templates, with a policy that lets them request nothing; base.html.j2 and macros.html.j2,
                 style.css, and sort.js, which sorts tables
comparison.py    the table over several runs for the terminal, and in Markdown
study.py         runs that differ in nothing but the criterion: their spread before and after reconstruction
study_figure.py  its figure
runs.py          folders of runs in any state: finished, running, unfinished, failed, damaged; or evaluated alone
provenance.py    where a run came from, as its page shows it
run_files.py     reads results.json and TensorBoard's event files
evaluations.py   reads evaluations.json
shapes.py        what parts of such files must look like
format.py        numbers and keys of results.json as text
"""
