"""Nothing that is read from a disk can run a program: no pickle, and no YAML that builds objects."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lori_dist

PACKAGE = Path(lori_dist.__file__).parent

LIBRARIES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
BUILDERS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load"}
TORCH = {"torch.load", "torch.hub.load", "torch.package.PackageImporter", "torch.jit.load"}
BUILDING_LOADERS = {"Loader", "UnsafeLoader", "FullLoader"}


def dangers(source: str) -> Iterator[str]:
    """What in a module may run a program out of a file, in the words of the source."""
    tree = ast.parse(source)
    full = _names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in LIBRARIES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in LIBRARIES:
                yield module
            case ast.Call(func=function, keywords=keywords):
                if _is_dangerous(_dotted(function, full), {word.arg: word.value for word in keywords}):
                    yield ast.unparse(node)
            case ast.Attribute() | ast.Name() if _dotted(node, full).removeprefix("yaml.") in BUILDING_LOADERS:
                yield ast.unparse(node)


def _names(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> what it stands for, of all imports."""
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return full


def _dotted(node: ast.expr, full: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, full)}.{node.attr}"
    return full.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_dangerous(name: str, words: dict[str | None, ast.expr]) -> bool:
    is_true = {word for word, value in words.items() if isinstance(value, ast.Constant) and value.value is True}
    if name in TORCH:
        return name != "torch.load" or "weights_only" not in is_true
    never = words.get("allow_pickle"), words.get("trust_remote_code")
    return name in BUILDERS or any(
        value is not None and not (isinstance(value, ast.Constant) and value.value is False) for value in never
    )


def test_no_module_reads_what_could_run() -> None:
    found = {str(path.relative_to(PACKAGE)): list(dangers(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert found and {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as quick",
        "import torch\ntorch.load(path)",
        "from torch import load as read\nread(path, weights_only=False)",
        "import torch as t\nt.load(path, weights_only=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "from yaml import UnsafeLoader\nclass Own(UnsafeLoader): pass",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "def later():\n    import shelve",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_check_finds_what_could_run(line: str) -> None:
    assert list(dangers(line))


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import json\njson.load(file)",
    ],
)
def test_the_check_lets_the_harmless_pass(line: str) -> None:
    assert list(dangers(line)) == []
