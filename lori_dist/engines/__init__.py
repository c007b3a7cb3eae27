"""Engines, one per file, by the name that `train.engine` takes: where base, values, gradients and moments are.

A file has `build(model, weights, train, world, *, state, ...)`, which returns an object with the methods of the
protocol in training/engine.py, and says for `lori plan` what its ranks hold and send. Dropping in a file adds an
engine; files that begin with an underscore are shared. deepspeed is imported in deepspeed.py and _ds_keys.py alone.
Whatever changes, all engines must give the weights of one process to 5e-6 (tests/engines/test_contract.py).
"""
