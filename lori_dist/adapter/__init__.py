"""The adapter alone: the regenerated A (projection.py), the sparse layer (linear.py), the file's format (FORMAT.md).

attach.py puts adapters on the layers that matching.py finds, and takes them off, packed.py those of several tasks;
update.py is an adapter's effect on one module, which merges work on. The files of adapters are read and written by the
package `formats`. A training script uses what `lori_dist` lists: `attach`, `trainable`, `dense`, `sparsify`, `extract`,
`load_adapter`, `save_adapter`. The bits of A and the format of the file are fixed: files that exist must stay readable.
"""
