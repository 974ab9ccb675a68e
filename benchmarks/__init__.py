"""Costs of bandpo and of its peers; run by asv, see CONTRIBUTING.md.

Costs are tracked, not speed-ups, because asv treats a lower number as better. Existing names,
parameters and data stay as they are, because a change begins a new history.
"""
