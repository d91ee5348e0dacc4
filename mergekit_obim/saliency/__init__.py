"""Saliency files: what they hold, and where an expert's is found."""
