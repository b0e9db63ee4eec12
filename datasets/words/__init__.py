"""Other words for a class, to ask for it after it was forgotten: `NAME.txt` is a set's list."""
