"""Imports point inward only: seen in the source, and in what a fresh process has loaded."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import lori_dist

PACKAGE = Path(lori_dist.__file__).parent

# A part is a file or a folder of the package; the libraries are what it may import besides the standard library, and a
# file's own line goes before its folder's.
RINGS = (
    {"__init__.py", "adapter", "forms", "formats", "masks", "merges", "balances", "interference.py"}
    | {"tensors.py", "files.py", "atomic.py", "plugin.py", "errors.py"},
    {
        "config",
        "tables.py",
        "rows.py",
        "jobs.py",
        "folder.py",
        "storage.py",
        "multitask",
        "scores.py",
        "predictions.py",
    },
    {"training", "engines", "evaluation"},
    {
        "cluster",
        "integrations",
        "benchmarks",
        "plan",
        "report",
        "describe.py",
        "gpus.py",
        "progress.py",
        "commands",
        "__main__.py",
    },
)
LIBRARIES = {
    "plugin.py": {"pydantic"},
    "errors.py": set(),
    "files.py": set(),
    "atomic.py": set(),
    "tensors.py": {"torch", "numpy"},
    "adapter/projection_cuda.py": {"torch", "triton"},
    "adapter/product_cuda.py": {"torch", "triton"},
    "adapter": {"torch", "safetensors", "numpy"},
    "formats": {"torch", "safetensors", "numpy"},
    "forms": {"torch"},
    "masks": {"torch", "safetensors", "numpy"},
    "merges": {"torch", "safetensors", "numpy"},
    "interference.py": {"torch"},
    "config": {"pydantic", "yaml"},
    "tables.py": {"datasets", "pyarrow"},
    "rows.py": {"pydantic", "yaml"},
    "jobs.py": {"pydantic", "yaml"},
    "folder.py": {"pydantic", "yaml"},
    "storage.py": {"fsspec", "pydantic", "yaml"},
    "multitask": {"pydantic", "yaml"},
    "balances": {"torch", "numpy"},
    "scores.py": set(),
    "predictions.py": {"pydantic", "yaml"},
    "engines/deepspeed.py": {"torch", "numpy", "transformers", "deepspeed"},
    "engines/_ds_keys.py": {"pydantic", "deepspeed"},
    "training/quantized.py": {"torch", "transformers", "bitsandbytes"},
    "training": {"torch", "safetensors", "numpy", "transformers", "accelerate"},
    "engines": {"torch", "numpy", "transformers", "accelerate"},
    "evaluation/_lm_eval.py": {"torch", "datasets", "lm_eval", "transformers"},
    "evaluation": {"torch", "numpy", "transformers", "accelerate"},
    "cluster/comparison.py": {"pydantic", "yaml"},
    "cluster/connection.py": {"ray"},
    "cluster/fitting.py": {"torch", "ray"},
    "cluster/gang.py": {"torch", "ray"},
    "cluster/submission.py": {"ray"},
    "cluster/trials.py": {"torch", "ray"},
    "cluster/work.py": {"torch", "ray"},
    "cluster/search.py": {"numpy", "cma"},
    "benchmarks/data.py": {"torch", "tokenizers", "transformers", "datasets"},
    "benchmarks/layer.py": {"torch", "numpy", "transformers", "peft"},
    "benchmarks/merge.py": {"torch", "peft"},
    "benchmarks/_methods.py": {"torch", "numpy", "transformers", "peft"},
    "benchmarks/plan.py": {"torch", "transformers", "tokenizers"},
    "benchmarks/train.py": {"torch", "safetensors", "numpy", "transformers"},
    "cluster": {"torch", "numpy"},
    "integrations/_by_peft.py": {"torch", "peft"},
    "integrations/peft_tuner.py": {"torch", "peft"},
    "integrations": {"torch", "safetensors", "numpy", "transformers", "accelerate"},
    "benchmarks": {"torch", "numpy", "transformers"},
    "plan/picture.py": {"matplotlib"},
    "plan": {"torch", "numpy", "transformers"},
    "report/plots.py": {"matplotlib"},
    "report/timeline.py": {"matplotlib"},
    "report": set(),
    "describe.py": set(),
    "progress.py": {"tqdm"},
    "commands": {"torch", "numpy"},
    "__main__.py": set(),
}
# Parts of the package that a part of an inner ring may import all the same; each with its reason.
ACROSS = {
    "__init__.py": {"adapter", "config", "formats", "errors.py"},  # the list of public names, loaded at first use
}
HEAVY = {"transformers", "deepspeed", "accelerate", "ray"}
LEAKS = {0: HEAVY, 1: HEAVY | {"torch"}}
"""What no module of ring 0, or of ring 1, may have loaded once it is imported."""


def ring(part: str) -> int:
    """0 for the innermost."""
    return next(number for number, parts in enumerate(RINGS) if part in parts)


def parts_of(package: Path) -> list[str]:
    found = (path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists())
    return sorted(path.name for path in found)


def imports(source: Path) -> Iterator[str]:
    """The dotted names a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(package: Path, dotted: str) -> str:
    """The part of the package that `lori_dist.x.y` stands in."""
    name = dotted.split(".")[1]
    return f"{name}.py" if (package / f"{name}.py").exists() else name if (package / name).is_dir() else "__init__.py"


def violations(package: Path, sources: Iterable[Path]) -> list[str]:
    found = []
    for source in sources:
        file = source.relative_to(package).as_posix()
        part = file.split("/")[0]
        allowed = LIBRARIES.get(file, LIBRARIES.get(part, set()))
        for dotted in imports(source):
            library = dotted.split(".")[0]
            if library == "lori_dist":
                target = part_of(package, dotted)
                if ring(target) > ring(part) and target not in ACROSS.get(part, set()):
                    found.append(f"{file} imports {dotted}, which is further out")
            elif library not in sys.stdlib_module_names and library not in allowed:
                found.append(f"{file} imports {dotted}, and may import {sorted(allowed)}")
    return found


def modules_of(package: Path, number: int) -> list[str]:
    """Dotted names of a ring's modules. Kernels are left out: Triton need not be there."""
    files = [path.relative_to(package.parent).with_suffix("") for path in sorted(package.rglob("*.py"))]
    dotted = [".".join(file.parts).removesuffix(".__init__") for file in files if not file.name.endswith("_cuda")]
    return [name for name in dotted if name == "lori_dist" or ring(part_of(package, name)) == number]


def leaks(package: Path, number: int) -> list[str]:
    """`module: what it loaded`, for the first such module of a ring, all of them imported in one fresh process."""
    program = f"""
import importlib, sys
forbidden = {sorted(LEAKS[number])!r}
for name in {modules_of(package, number)!r}:
    importlib.import_module(name)
    loaded = [library for library in forbidden if library in sys.modules]
    if loaded:
        print(f"{{name}}: {{', '.join(loaded)}}")
        break
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=package.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package to spoil. A process started in its folder imports it, not the installed one."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "lori_dist", ignore=shutil.ignore_patterns("__pycache__")))


def spoil(source: Path, line: str) -> None:
    """Adds a line at the end: an import deep in a file is found as well."""
    source.write_text(f"{source.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")


def test_every_part_of_the_package_has_a_ring() -> None:
    assert set(parts_of(PACKAGE)) <= set().union(*RINGS)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("__init__.py")), ids=lambda file: file.parent.name)
def test_every_package_says_what_is_in_it_and_names_only_files_that_exist(file: Path) -> None:
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    assert len(text.split()) >= 25 and len(text.splitlines()) <= 11
    for name in re.findall(r"[\w./]+\.(?:py|md)\b", text):
        assert any((place / name).exists() for place in (file.parent, PACKAGE, PACKAGE.parent)), name


def test_imports_point_inward() -> None:
    assert violations(PACKAGE, sorted(PACKAGE.rglob("*.py"))) == []


@pytest.mark.parametrize("number", sorted(LEAKS))
def test_a_fresh_process_loads_nothing_heavy(number: int) -> None:
    assert leaks(PACKAGE, number) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("adapter/adapter.py", "import transformers", "adapter/adapter.py imports transformers"),
        ("masks/magnitude.py", "from ray import train", "masks/magnitude.py imports ray.train"),
        ("merges/linear.py", "def _later():\n    import accelerate", "merges/linear.py imports accelerate"),
        ("plugin.py", "import lori_dist.config", "plugin.py imports lori_dist.config, which is further out"),
        (
            "formats/native.py",
            "from lori_dist import jobs",
            "formats/native.py imports lori_dist.jobs, which is further out",
        ),
        ("config/run.py", "import torch", "config/run.py imports torch"),
        ("jobs.py", "from lori_dist.training import data", "jobs.py imports lori_dist.training.data, which is further"),
        ("engines/ddp.py", "import deepspeed", "engines/ddp.py imports deepspeed"),
        ("integrations/folded.py", "import ray", "integrations/folded.py imports ray"),
    ],
)
def test_the_source_check_finds_a_forbidden_import(copied: Path, file: str, line: str, message: str) -> None:
    spoil(copied / file, line)
    assert any(found.startswith(message) for found in violations(copied, [copied / file]))


@pytest.mark.parametrize(
    ("number", "file", "line", "leaked"),
    [
        (0, "adapter/adapter.py", "import accelerate", "accelerate"),
        (0, "masks/magnitude.py", "import importlib\nimportlib.import_module('transformers')", "transformers"),
        (1, "config/run.py", "import lori_dist.errors\nfrom lori_dist import Spec", "torch"),
        (1, "errors.py", "import torch", "torch"),  # ring 0 may, what ring 1 uses of it may not
    ],
)
def test_the_fresh_process_notices_a_leak(copied: Path, number: int, file: str, line: str, leaked: str) -> None:
    spoil(copied / file, line)
    [found] = leaks(copied, number)
    assert leaked in found


def test_public_names_are_listed_once_and_load() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for_type_checkers = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(lori_dist.__all__) == for_type_checkers
    assert all(getattr(lori_dist, name).__name__ in (name, name.split("_")[0]) for name in lori_dist.__all__)
    assert dir(lori_dist) == sorted(lori_dist.__all__)
