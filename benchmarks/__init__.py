"""Benchmarks and proofs; each writes JSON into results/. Not part of the package."""
