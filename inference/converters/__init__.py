"""Checkpoints of other projects as ours: `python convert.py huginn`, `ouro` and `retrofit`."""
