"""The configuration of a run: frozen data, checked as a whole before anything heavy is imported.

kinds.py has the kinds of values, run.py the sections with all that a key says, rules.py what several keys must agree
on; check.py finds all mistakes at once, yaml.py reads files, loading.py puts these together, schema.py prints it all.
To add a key, add a field to its section: nothing else lists the keys. Imports pydantic and yaml, and never torch.
"""

from lori_dist.config.check import checked, fingerprinted
from lori_dist.config.kinds import (
    Choice,
    Dtype,
    Fingerprint,
    Methods,
    Name,
    Seed,
    Text,
    section,
)
from lori_dist.config.loading import dump, has_engine, load, text, validate
from lori_dist.config.rules import (
    COMPILED_AT_STAGE_3,
    LOOKED_AT,
    PACKED,
    checked_engine,
    is_per_task,
    of_form,
    reads_moments,
    relative_paths,
    unpackable,
)
from lori_dist.config.run import (
    FLASH,
    TRACKERS,
    Adapter,
    Calibrate,
    Cluster,
    Evaluate,
    LmEval,
    Merge,
    Model,
    Moments,
    Run,
    Search,
    Task,
    Template,
    Train,
    Weight,
    engine_files,
    files,
    held_out,
    trained_as,
)
from lori_dist.config.yaml import read, value
from lori_dist.errors import ConfigError

__all__ = [
    "COMPILED_AT_STAGE_3",
    "FLASH",
    "LOOKED_AT",
    "PACKED",
    "TRACKERS",
    "Adapter",
    "Calibrate",
    "Choice",
    "Cluster",
    "ConfigError",
    "Dtype",
    "Evaluate",
    "Fingerprint",
    "LmEval",
    "Merge",
    "Methods",
    "Model",
    "Moments",
    "Name",
    "Run",
    "Search",
    "Seed",
    "Task",
    "Template",
    "Text",
    "Train",
    "Weight",
    "checked",
    "checked_engine",
    "dump",
    "engine_files",
    "files",
    "fingerprinted",
    "has_engine",
    "held_out",
    "is_per_task",
    "load",
    "of_form",
    "read",
    "reads_moments",
    "relative_paths",
    "section",
    "text",
    "trained_as",
    "unpackable",
    "validate",
    "value",
]
