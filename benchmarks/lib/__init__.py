"""What the benchmarks share: how they time, what they time, and what they write."""
