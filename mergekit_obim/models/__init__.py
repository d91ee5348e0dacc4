"""Model checkpoints: reading them, the names of their weights, and comparing models."""
