"""merge of a local chain by what it brings: which ranges of its layers are worth merging, and then each of them.

request   what the user said: a range, rules, a cap, budgets, destinations
stack     what each layer holds and hides, and why it stays
choose    the ranges, by the rules and within the budgets
rates     how long that takes, by what earlier merges took on this filesystem
plan      all of it in numbers, before anything moves
run       one merge after the other, uppermost first
"""
