"""Checkpoints that several ranks wrote together, a folder each."""
