"""Every architecture of transformers, built tiny, and what peftfn makes of it: `make zoo`."""
