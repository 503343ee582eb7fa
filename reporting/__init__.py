"""Reports on finished runs: the paper's tables, figures and comparisons. Needs no torch."""
