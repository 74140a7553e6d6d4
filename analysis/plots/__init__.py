"""Data frames in, matplotlib figures out.

Functions of `steps` and `updates` take those of ONE setting (`study.setting(name).steps`), those of
`measures` the rows of several. None draws on screen or writes. `style.py` holds what they share.
"""
