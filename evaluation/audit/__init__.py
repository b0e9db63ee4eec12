"""Is it gone? What is left of a forgotten class, one measure a file; nothing here forgets."""
