"""Training: the loop of all models, checkpoints, run folders, the grid search."""
