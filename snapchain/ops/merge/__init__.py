"""merge of a local chain, offline: one file of several neighbours, under the path of the uppermost.

    plan        which layers, which way of making the result, what it costs; nothing is touched
    run         locks, the work of the chosen strategy, the proof, the switch, the removal of the inputs
    journal     what a killed run leaves, and `settle` finishes or undoes

`snapchain.ops.merge_image` has the names that callers need.
"""
