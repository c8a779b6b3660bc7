"""Adapters in, values out, and nothing runs: init, stacks, merges, combinations, checks."""
