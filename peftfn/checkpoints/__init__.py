"""Adapters read from PEFT's files and written to them, and merging from file to file."""
