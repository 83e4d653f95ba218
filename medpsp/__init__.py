"""Medicine, networks, the training loop, export and prediction."""

__version__ = "0.1.0"
