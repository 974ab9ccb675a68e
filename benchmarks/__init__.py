"""What bandpo costs, beside what else would do the work; run by asv, see CONTRIBUTING.md.

Costs alone are tracked, never speed-ups, since asv takes less as better. Names, parameters and data
are only added to: a changed one begins a new history.
"""
