"""The commands. Each imports torch, transformers and mergekit only once it knows what to do."""
