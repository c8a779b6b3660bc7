"""PEFT's files, both ways, and merging from file to file."""
