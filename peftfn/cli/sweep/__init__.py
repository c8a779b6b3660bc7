"""Several adapters over one base in one program."""
