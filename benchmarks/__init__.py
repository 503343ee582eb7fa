"""Benchmarks; each prints one JSON object as its last line. Run them from the repository root."""
