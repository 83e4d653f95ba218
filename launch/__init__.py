"""Composition root: command line, run folder, jobs."""
