"""Reports on finished runs: tables beside the paper's, figures and comparisons. Needs no torch."""
