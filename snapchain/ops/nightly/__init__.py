"""nightly: for each disk snapshot, ship, merge; for each destination merge by retention, collect, verify a sample.

config.py      the fields of a configuration; values.py how sizes, times and names are written; document.py loads a file
selection.py   which images are disks, their names, and which disks of earlier runs are missing
plan.py        pure: order, window, budgets
local_chain.py the chain of an image, and which of its layers to merge
preview.py     what a run would do
run.py         the runner; disk.py one disk, maintenance.py what a destination needs after all disks
open_destination.py  one destination of a run, whatever its kind
state.py       what runs have reached, kept between them
hooks.py       the user's programs around it; steps.py failures that end one step and no other
report.py, metrics.py, systemd.py  what others read
"""
