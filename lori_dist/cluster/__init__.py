"""Runs under Ray: run.py starts jobs as there is room (schedule.py) on gangs of ranks (gang.py), which do work.py.

board.py has the jobs' states, attempts.py the attempts at a job, failures.py why a rank died, whether to
retry and what the other ranks do, summary.py the files that a run leaves. launcher.py trains one task under torchrun
and other launchers instead. Decisions in schedule.py, failures.py and search.py are functions of data and are tested
without a cluster; ray is imported inside functions. Call `run.execute`; what a run leaves on disk is a public format.
"""
