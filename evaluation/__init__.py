"""Measures: exact losses, what is written, drawn and played against what should be, and what depth buys."""
