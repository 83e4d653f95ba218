"""Zarr shards on disk: plan, write, read, verify."""
