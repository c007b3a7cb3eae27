"""Training on one rank: trainer.py has the loop for one task or several, task.py what it needs of a task.

train.py leads a job through its phases (phases.py: calibrate, mask, train what is kept). The rest has a file each: rows
and tokens (examples.py, tokens.py, token_files.py, token_cache.py, job_rows.py, data.py), the base (model.py,
weights.py, quantized.py), the loss, masking.py, checkpoint.py, validation.py, divergence.py, preemption.py, and the
ranks (world.py, device.py). engine.py is the protocol that the files in engines/ implement. Call `train.train` on every
rank of a process group. Ray is not imported here, and deepspeed only through an engine. Checkpoints that exist must
stay readable.
"""
