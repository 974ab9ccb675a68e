"""Adapters to trainers, one a file, each imported where its framework is; nothing here imports one.

`settings` is the rule as a trainer's configuration has it. `epsilons` is for a trainer that clamps
the ratio by itself, `numbers` for one that logs Python numbers, `version` for one that has changed.
"""
