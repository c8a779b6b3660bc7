"""Rows out of files, and examples out of rows."""
