"""Benchmarks: what ttc costs over bare engines, beside its peers. Each compares its arms in one run, turn by turn."""
