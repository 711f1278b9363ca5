"""Checkpoints made of other checkpoints."""
