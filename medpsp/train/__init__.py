"""The training loop and what it needs; start at loop.py."""
