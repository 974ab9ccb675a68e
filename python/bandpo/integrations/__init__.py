"""Adapters to trainers, one a file, each imported where its framework is; nothing here imports one.

`settings` is the rule as a trainer's configuration has it, `loss` that rule on a batch. `epsilons`
is for a trainer that clamps the ratio by itself, `steps` for one that tells its loss of no
optimiser step, `version` for one that has changed.
"""
