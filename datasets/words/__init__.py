"""Other words for a class: for an audit after the class was forgotten.

`NAME.txt` beside these modules holds a set's list. No list is needed to forget.
"""
