"""Rules for the entries of B that are kept after calibration, one per file, by the name that `adapter.mask` takes.

A file has `mask(b, *, density, **options)`, which maps the dense B of every module to bool masks of the same shapes. A
file that also has `rule(**options)`, with the group and the key by which entries compete, lets sharded ranks choose
together. Dropping in a file adds a rule; _select.py has the exact selection that all of them share. Pure functions of
tensors: they import torch and numpy alone.
"""
