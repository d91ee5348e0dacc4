"""Model checkpoints: reading them, the names of their weights, and how models relate."""
