"""nightly: for each disk snapshot, ship, merge; for each destination merge by retention, collect, verify a sample.

config.py      what a user may write, and document.py  from TOML to that, every mistake with its line
selection.py   which images are disks, and their names
plan.py        pure: order, window, budgets, which local layers to merge
preview.py     what a run would do
run.py         the runner; disk.py one disk, place.py one destination, upkeep.py what a destination needs afterwards
state.py       what runs have reached, kept between them; lock.py one run at a time
hooks.py       commands of the user's around it; report.py, metrics.py, systemd.py what others read
"""
