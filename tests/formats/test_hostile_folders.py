"""LoRA folders of PEFT, of LoRI's official code and of our tuner that somebody else wrote: an AdapterError, or the
adapter, in bounded time and memory, whatever stands in them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lori_dist import formats
from lori_dist.adapter.adapter import Adapter
from lori_dist.errors import AdapterError
from lori_dist.integrations import official, peft
from lori_dist.integrations.peft_tuner import LoriConfig, sparsify
from tests.integrations.made import trained
from tests.models import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("peft", "official", "tuner")
TARGETS = ("q_proj", "v_proj")

WRONG: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        2**31,
        2**63,
        2**64,
        10**400,
        0.5,
        -0.0,
        1e38,
        1e308,
        5e-324,
        "",
        "4",
        "nan",
        "\0",
    ),
    *("/dev/zero", "(a+)+$", [], [None], [[]], [1, "a"], ["(.*)*$"], {}, {"": 1}, {"a": None}, {"q_proj": 10**400}),
    *({"q_proj": "4"}, {"q_proj": True}, {"q_proj": 1e300}, {"(.*.*)*x": 4}, {"q_proj": {"q_proj": [1]}}, ["x"] * 1000),
)
USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "peft_type"}
USED |= {"lori_alpha", "seed", "projection_dtype", "generator", "checksums", "shapes", "base_model_name_or_path"}
"""Keys of which another value of the right type is another adapter."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    adapter = trained(tiny_llama(), targets=TARGETS)
    peft.export(adapter, root / "peft", base_model_name="tiny")
    official.export(adapter, root / "official", base_model_name="tiny")
    model = get_peft_model(tiny_llama(), LoriConfig(r=4, target_modules=list(TARGETS)))
    sparsify(model, {path: torch.rand(rows, 4) < 0.5 for path, (rows, _) in adapter.shapes.items()})
    model.save_pretrained(root / "tuner")
    return root


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, folders: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(folders / request.param, tmp_path / request.param)


def read(folder: Path) -> Adapter | str:
    """The adapter, or what is said of it: nothing but an AdapterError may come out, short and printable."""
    try:
        return formats.load(folder)
    except AdapterError as error:
        said = str(error)
        assert len(said) < 2000 and said.isprintable(), said
        return said


def is_same(one: Adapter, other: Adapter) -> bool:
    return one.shapes == other.shapes and all(torch.equal(one.delta(path), other.delta(path)) for path in one.shapes)


def test_every_key_with_every_wrong_value(folder: Path) -> None:
    before = read(folder)
    assert isinstance(before, Adapter)
    config = json.loads((folder / CONFIG).read_text())
    num_refused = 0
    for key in (*config, "exclude_modules", "modules_to_save", "use_dora", "target_parameters", "kept", "unheard_of"):
        for value in WRONG:
            (folder / CONFIG).write_text(json.dumps({**config, key: value}))
            found = read(folder)
            if isinstance(found, str):
                num_refused += 1
                continue
            is_plausible = type(value) in (int, float) or not value or key in ("use_rslora", "fan_in_fan_out")
            if key not in USED:
                assert is_same(found, before), (key, value)
            else:
                assert is_plausible or key == "base_model_name_or_path", (key, value)
                assert all(bool(found.delta(path).isfinite().all()) for path in found.shapes), (key, value)
    assert num_refused > 100


def test_every_key_that_is_missing(folder: Path) -> None:
    config, before = json.loads((folder / CONFIG).read_text()), read(folder)
    assert isinstance(before, Adapter)
    for key in config:
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name != key}))
        found = read(folder)
        assert isinstance(found, str) or is_same(found, before), key
    for key in ("r", "lora_alpha", "lori_alpha", "seed", "checksums", "shapes", "generator", "projection_dtype"):
        if key in config:
            (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if name != key}))
            assert f"{key} is missing" in str(read(folder))


TEXTS: dict[str, Callable[[str], bytes]] = {
    "nan": lambda text: text.replace('"r": 4', '"r": NaN').encode(),
    "infinite": lambda text: text.replace('"r": 4', '"r": -Infinity').encode(),
    "overflow": lambda text: text.replace('"r": 4', '"r": 1e999').encode(),
    "digits": lambda text: text.replace('"r": 4', '"r": ' + "9" * 10_000).encode(),
    "twice": lambda text: text.replace('"r": 4', '"r": 4, "r": 4').encode(),
    "surrogate": lambda text: text.replace('"bias": "none"', '"bias": "none", "\\ud800": 1').encode(),
    "deep": lambda text: text.replace('"r": 4', '"r": ' + "[" * 100_000 + "]" * 100_000).encode(),
    "deep object": lambda text: text.replace('"r": 4', '"x": ' + '{"a":' * 50_000 + "1" + "}" * 50_000).encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "latin": lambda text: text.replace('"bias"', '"b\xe9as"').encode("latin-1"),
    "nuls": lambda text: b"\0" * 4096,
    "empty": lambda text: b"",
    "large": lambda text: text.encode() + b" " * 2**25,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_that_is_no_json_to_others(folder: Path, kind: str) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_bytes(TEXTS[kind](text))
    assert CONFIG in str(read(folder))


ENDLESS = ("(a+)+", "(.*)*", "(.*.*)*x", "(?=(.*a){20})x", r"(.)\1*", "(a|a)*b", "a?" * 60 + "a" * 60, ".*.*.*.*.*.*x")
ENDLESS += ("(" * 5000, "x{1000000000}", "(x{1000}){1000}", "[a-z]*" * 30 + "$", "(|a|b)" * 100, "(?:.*?,){15}P")


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_never_end_are_refused_at_once(folders: Path, tmp_path: Path, pattern: str) -> None:
    folder = shutil.copytree(folders / "peft", tmp_path / "peft")
    config = json.loads((folder / CONFIG).read_text())
    for field, value in (
        ("alpha_pattern", {pattern: 1.0}),
        ("rank_pattern", {pattern: 4}),
        ("target_modules", pattern),
    ):
        (folder / CONFIG).write_text(json.dumps({**config, field: value}))
        found = read(folder)  # that it ends is the test
        assert isinstance(found, Adapter) or field in found
    tuner = shutil.copytree(folders / "tuner", tmp_path / "tuner")
    config = json.loads((tuner / CONFIG).read_text())
    (tuner / CONFIG).write_text(json.dumps({**config, "target_modules": pattern}))
    with pytest.raises(
        (AdapterError, ValueError), match=r"(?i)target.modules"
    ):  # at once: that no module has such a name
        PeftModel.from_pretrained(tiny_llama(), tuner)


def test_patterns_of_peft_are_read_as_peft_reads_them(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "peft", tmp_path / "peft")
    before, config = formats.load(folder), json.loads((folder / CONFIG).read_text())
    path = "model.layers.1.self_attn.q_proj"
    for pattern in (
        "layers.1.self_attn.q_proj",
        r".*\.1\..*q_proj",
        r"(k_proj|layers\.[1-9]+\.self_attn\.q_pro?j)",
        path,
    ):
        (folder / CONFIG).write_text(json.dumps({**config, "alpha_pattern": {pattern: 2 * config["lora_alpha"]}}))
        after = formats.load(folder)
        for module in before.shapes:
            factor = 2 if module == path else 1
            torch.testing.assert_close(after.delta(module), factor * before.delta(module))


@pytest.mark.parametrize("name", [CONFIG, TENSORS, "0.9_mask.pt"])
def test_pipes_and_devices_are_not_read(folder: Path, name: str) -> None:
    if name.endswith(".pt") and not (folder / name).exists():
        pytest.skip("the kind has no mask")
    for put in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), os.mkdir):
        (folder / name).unlink()
        put(folder / name)
        found = read(folder)
        assert isinstance(found, str) and name in found
        os.rmdir(folder / name) if put is os.mkdir else None
        (folder / name).touch()


def test_a_module_under_two_names_or_none_is_refused(folders: Path, tmp_path: Path) -> None:
    for kind in ("peft", "tuner"):
        folder = shutil.copytree(folders / kind, tmp_path / kind)
        tensors = load_file(folder / TENSORS)
        name = next(name for name in tensors if name.endswith(("lora_A.weight", "values")))
        for other in (name.removeprefix("base_model.model."), name.replace("q_proj", "o_proj")):
            save_file({**tensors, other: tensors[name].clone()}, folder / TENSORS)
            assert isinstance(read(folder), str)
        for changed in (
            tensors[name][:0],
            tensors[name].to(torch.int64),
            tensors[name] * torch.nan,
            tensors[name][None],
        ):
            save_file({**tensors, name: changed.contiguous()}, folder / TENSORS)
            assert isinstance(read(folder), str)
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / TENSORS)
        assert isinstance(read(folder), str)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_of_the_header_and_configuration(folders: Path, data: st.DataObject) -> None:
    kind, name = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([CONFIG, TENSORS]))
    folder = folders / kind
    whole = (folder / name).read_bytes()
    length = len(whole) if name == CONFIG else 8 + int.from_bytes(whole[:8], "little")
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, length - 1))
        put = data.draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"0", b"9" * 8, b'"', b"{", b"-", b"e9"]))
        )
        size = data.draw(st.sampled_from([0, len(put)]))
        changed[place : place + size] = put
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    try:
        (folder / name).write_bytes(changed)
        read(folder)
    finally:
        (folder / name).write_bytes(whole)
