"""The work of the stages, one file a kind of task.

A task is `call(spec, folder)`, or `call(spec, folder, inputs)`: a function of its spec alone. The key of its result
covers the source of its module and of all that this imports, so these modules import what they compute with and nothing
of the stages.

Inputs stand in a spec by their checksums. Where they lie is in `inputs`, which is no part of the key: equal inputs give
equal results wherever they come from.
"""
