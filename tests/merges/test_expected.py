"""Every method against the papers' formulas on small matrices, as make_expected.py worked them out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lori_dist import plugin
from lori_dist.adapter.adapter import Entries
from lori_dist.adapter.projection import checksum
from lori_dist.adapter.update import Part, Update

EXPECTED = json.loads(Path(__file__).with_name("expected.json").read_text(encoding="utf-8"))


def updates(shared: bool) -> list[Update]:
    made = []
    for number, name in enumerate(EXPECTED["names"]):
        b = torch.tensor(EXPECTED["b"][number], dtype=torch.float64)
        a = torch.tensor(EXPECTED["a"][0 if shared else number], dtype=torch.float64)
        shape, alpha = (b.shape[0], a.shape[1]), EXPECTED["alphas"][number]
        index = b.flatten().nonzero().squeeze(1).to(torch.int32)
        part = Part(
            name=name,
            module="m",
            shape=shape,
            seed=None,
            rank=a.shape[0],
            alpha=alpha,
            dtype=torch.float64,
            entries=Entries(index=index, values=b.flatten()[index.long()]),
            checksum=checksum(a),
            stored=a,
        )
        made.append(Update(name=name, module="m", shape=shape, parts=(part,)))
    return made


@pytest.mark.parametrize(
    "case",
    EXPECTED["cases"],
    ids=lambda case: f"{case['method']}-{case['options']}-{'shared' if case['shared'] else 'each'}",
)
def test_the_merge_is_the_papers_formula(case: dict[str, Any]) -> None:
    method = plugin.find("merges", case["method"], "merge", "merge.method")
    options = method.bind(case["options"], "merge.method")
    given = updates(case["shared"])
    parts = method.load()(given, weights=EXPECTED["weights"], **options)
    merged = Update(name="merged", module="m", shape=given[0].shape, parts=tuple(parts)).delta()
    torch.testing.assert_close(merged, torch.tensor(case["delta"], dtype=torch.float64), rtol=0, atol=1e-10)


def test_every_method_has_an_expected_value() -> None:
    assert {case["method"] for case in EXPECTED["cases"]} == set(plugin.names("merges"))
