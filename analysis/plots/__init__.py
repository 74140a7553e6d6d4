"""Data frames in, matplotlib figures out.

Every public function takes a frame of ONE setting (`study.setting(name).steps` and the like), draws
nothing on screen and writes nothing. `style.py` holds what they share.
"""
