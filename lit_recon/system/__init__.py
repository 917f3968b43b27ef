"""Device, files, processes, clock and memory: what the method runs on. Nothing here knows of models or pruning.

device.py           device and precision of a run
atomic_files.py     files and folders that are whole or absent
tensor_files.py     tensors in safetensors files, memory maps
transfer.py         copies between CPU memory and a GPU
commits.py          resume points of a run, found whole or refused
git_state.py        commit and state of a repository
lock.py             one process per output folder
cache.py            folders that are built once and kept
environment.py      variables that end libraries as they are imported
signals.py          Ctrl-C, SIGTERM and SIGHUP, held back in protected sections
terminal.py         lines that are printed, with control characters as escapes; the end of the terminal
console.py          the same for tables, lines of the log and bars
markdown.py         any text as Markdown without markup
clock.py            seconds and peak memory per phase
memory.py           peak memory, a limit of it, giving memory back
expressions.py      regular expressions that choose names
finite.py           numbers that are not finite, found and named
units.py            bytes and seconds as text
versions.py         versions of what computed a result
command_line.py     problems in one message, refusals, the end of a process
quiet_libraries.py  log levels and warnings of libraries, their progress bars
"""
