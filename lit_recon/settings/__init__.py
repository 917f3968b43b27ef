"""Settings of the commands that Hydra composes: from a command line and conf/ to checked objects.

command.py      a command: its words in Hydra's grammar, sweeps, and every end as one message
conf.py         conf/ and the members of its groups
values.py       values of a configuration: texts, paths, what a call gives, types of a call's own settings
parts.py        parts of a configuration as objects
annotations.py  types of settings, by the annotations of what they are given to
trusted.py      what of another person's configuration may run
sweep.py        the runs of a sweep, a process each
moved.py        paths from before version 0.3.0
"""
