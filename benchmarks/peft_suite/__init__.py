"""peft's own test tables and procedures, each case through peftfn."""
