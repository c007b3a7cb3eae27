"""Methods found by their file name: the folder is the registry.

A method is one function in one file of a plural folder (`masks/magnitude.py` holds `mask`), or of a module of the
user's own, named `package.module`. Its keyword-only parameters that have a default are its options. The annotation says
what they may be; a number's range stands in it as mathematicians write it: `Annotated[float, "(0, 1]"]`.

Signatures are read from the source, without running it: checking a configuration must not import torch.
"""

import ast
import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Annotated, Any, Literal

from lori_dist.errors import ConfigError

PACKAGE = Path(__file__).parent
ANNOTATIONS = {
    "Literal": Literal,
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "Annotated": Annotated,
}
_RANGE = re.compile(r"([\[(])(\S+), (\S+)([\])])\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One keyword-only parameter of a method."""

    annotation: Any
    default: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A function that has been found but not imported."""

    folder: str
    name: str
    role: str
    options: Mapping[str, Option]
    summary: str
    constants: Mapping[str, Any]
    """The literals that the file gives names in capitals at its top level."""

    def declares(self, constant: str, options: Mapping[str, Any]) -> bool:
        """Whether the file has a constant, option -> values, and every option that it names has one of its values."""
        wanted = self.constants.get(constant)
        return isinstance(wanted, dict) and all(
            options.get(name, self.options[name].default) in values for name, values in wanted.items()
        )

    def load(self) -> Callable[..., Any]:
        """Returns the function itself; this imports its module."""
        return typing.cast(Callable[..., Any], getattr(self._module(), self.role))

    def companion(self, role: str) -> Callable[..., Any] | None:
        """Another function that the same file defines, if it does; this imports its module."""
        module = self._module()
        found = getattr(module, role, None)
        return found if getattr(found, "__module__", None) == module.__name__ else None

    def _module(self) -> ModuleType:
        return importlib.import_module(self.name if "." in self.name else f"lori_dist.{self.folder}.{self.name}")

    def bind(self, options: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Returns `options` checked against the signature. Raises ConfigError that lists every mistake under `path`."""
        import pydantic

        bound, problems = {}, []
        for key, value in options.items():
            if key not in self.options:
                problems.append(
                    f"{path}.{key}: {self.name} has no such option; {_choices(key, self.options, 'it takes')}"
                )
                continue
            try:
                bound[key] = _adapter(self.options[key].annotation).validate_python(value)
            except pydantic.ValidationError as error:
                wanted = error.errors()[0]["msg"].replace("Input should be", "it should be")
                problems.append(f"{path}.{key}: got {value!r}; {wanted}")
                continue
            if isinstance(value, bool) and not isinstance(bound[key], bool):
                problems.append(f"{path}.{key}: got {value!r}; wanted a number")
            problems += [
                f"{path}.{key}: got {value!r}; it must be in {wanted}"
                for wanted in _ranges(self.options[key].annotation)
                if _is_number(bound[key]) and not _within(bound[key], wanted)
            ]
        if problems:
            raise ConfigError("\n".join(problems))
        return bound


@functools.lru_cache
def _adapter(annotation: Any) -> Any:
    import pydantic  # here, because the adapter core imports this module and needs torch, safetensors, numpy alone

    return pydantic.TypeAdapter(annotation)


def _ranges(annotation: Any) -> Iterator[str]:
    """The ranges that stand anywhere in an annotation."""
    yield from (text for text in getattr(annotation, "__metadata__", ()) if isinstance(text, str))
    for inner in typing.get_args(annotation):
        yield from _ranges(inner)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _within(value: float, wanted: str) -> bool:
    left, low, high, right = _parse_range(wanted)
    above = value >= low if left == "[" else value > low
    below = value <= high if right == "]" else value < high
    return above and below


def _parse_range(text: str) -> tuple[str, float, float, str]:
    """Raises ValueError if it is none."""
    found = _RANGE.match(text)
    if found is None:
        raise ValueError(f"{text!r} is not a range")
    return found[1], float(found[2]), float(found[3]), found[4]


def names(folder: str) -> tuple[str, ...]:
    """The methods of a folder, sorted. A file whose name starts with an underscore is private."""
    return tuple(sorted(file.stem for file in (PACKAGE / folder).glob("*.py") if not file.stem.startswith("_")))


def find(folder: str, name: str, role: str, path: str) -> Method:
    """The method `name` of a folder, or of the user's own `package.module`.

    role: what its function is called (`mask`, `merge`, `build`, ...). path: where in the configuration the name stands.
    Raises ConfigError naming what there is and the nearest valid name.
    """
    if "." in name:
        source = source_of(name, path)
    elif name.isidentifier() and not name.startswith("_") and os.path.isfile(PACKAGE / folder / f"{name}.py"):
        source = PACKAGE / folder / f"{name}.py"
    else:
        raise ConfigError(f"{path}: unknown {name!r} in {folder}; {_choices(name, names(folder), 'there are')}")
    try:
        return _read(folder, name, role, source, source.stat().st_mtime_ns)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@functools.lru_cache
def _read(folder: str, name: str, role: str, source: Path, changed: int) -> Method:
    """The method in a file as it was when it was last changed, read once wherever in a configuration it stands."""
    tree = _tree(source)
    function = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == role), None)
    if function is None:
        raise ConfigError(f"{name} has no function `{role}`; define one with the signature the README shows")
    return Method(
        folder=folder,
        name=name,
        role=role,
        options=MappingProxyType(_options(function)),
        summary=(ast.get_docstring(function) or "").split("\n")[0],
        constants=MappingProxyType(_constants(tree)),
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest valid name, or an empty string."""
    found = closest(name, valid)
    return f" Did you mean {found!r}?" if found is not None else ""


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that looks most like `name`, or None if none does."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)), None)


def _choices(name: str, valid: Iterable[str], verb: str) -> str:
    valid = sorted(valid)
    return f"{verb} {', '.join(valid) or 'none'}.{nearest(name, valid)}"


def source_of(module: str, path: str) -> Path:
    """The file of a module, without importing it or the packages it is in, which may be folders without __init__.py."""
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    source = None if spec is None or spec.origin is None else Path(spec.origin)
    inside = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    for part in below:
        source, inside = _below(inside, part)
    if source is None or source.suffix != ".py":
        raise ConfigError(f"{path}: no Python module {module!r} can be found; check the name and PYTHONPATH")
    return source


def _below(places: Sequence[Path], part: str) -> tuple[Path | None, list[Path]]:
    """The file of a module, None for a folder without __init__.py, and the folders that its own modules are in."""
    if not part:
        return None, []
    for place in places:
        for source, inside in ((place / part / "__init__.py", [place / part]), (place / f"{part}.py", [])):
            if source.is_file():
                return source, inside
    return None, [place / part for place in places if (place / part).is_dir()]


def _tree(source: Path) -> ast.Module:
    try:
        return ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{source} is not valid Python ({error}); fix it first") from error


def _constants(tree: ast.Module) -> dict[str, Any]:
    found = {}
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ) if name.isupper():
                with contextlib.suppress(ValueError):
                    found[name] = ast.literal_eval(value)
    return found


def default_weight(merge: Method, options: Mapping[str, Any], num_adapters: int) -> float:
    """The weight of each adapter in a merge for which none are given.

    1 where the method's file says so by `UNIT_WEIGHTS`, as it takes a mean or is the paper's sum; else equal weights
    that sum to one.
    """
    return 1.0 if merge.declares("UNIT_WEIGHTS", options) else 1 / num_adapters


def _options(function: ast.FunctionDef) -> dict[str, Option]:
    """Keyword-only parameters without a default are not options: the program itself passes those."""
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {
        argument.arg: _option(argument, default, f"option {argument.arg} of `{function.name}`")
        for argument, default in pairs
        if default is not None
    }


def _option(argument: ast.arg, default: ast.expr, what: str) -> Option:
    try:
        annotation = _annotation(argument.annotation)
    except (NameError, SyntaxError, TypeError, AttributeError) as error:
        found = ast.unparse(argument.annotation or default)
        raise ConfigError(f"{what} is annotated {found}; only {', '.join(ANNOTATIONS)} can be checked") from error
    try:
        for text in _ranges(annotation):
            _parse_range(text)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}; write it as in '(0, 1]'") from error
    try:
        return Option(annotation=annotation, default=ast.literal_eval(default))
    except ValueError as error:
        found = ast.unparse(default)
        raise ConfigError(f"{what} has the default {found}; write a literal, as the source is not run") from error


def _annotation(node: ast.expr | None) -> Any:
    if node is None:
        return Any
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _annotation(ast.parse(node.value, mode="eval").body)
    # Only names of ANNOTATIONS can be reached: this evaluates a method's own signature, never a user's file.
    return eval(compile(ast.Expression(node), "<annotation>", "eval"), {"__builtins__": {}}, dict(ANNOTATIONS))
