"""Ways to train the tasks of a run, one per file, by the name that `multitask` takes.

A file has `plan(run, **options)`, which returns the run's jobs, each after those that it needs, and raises ConfigError
with every mistake for a run that it cannot plan. The jobs themselves are made in jobs.py (`train_job`, `joint_job`,
`merge_job`, `evaluate_job`). Dropping in a file adds a way. Plans are data: neither torch nor ray is imported.
"""
