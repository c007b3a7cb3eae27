"""The documentation's figures are those of the measurements in results/."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks import results


def measured(suite: str, ratios: dict[str, Any]) -> dict[str, Any]:
    where = {"cpu": "a processor", "cores": 2, "gpu": None, "torch": "2.13.0", "load": 0.5}
    begun = {"command": f"lori bench {suite}", "date": "2026-01-01", "machine": where, "versions": {"torch": "2.13.0"}}
    return {"suite": suite, "options": {}, **begun, "rows": [], "ratios": ratios}


def test_what_is_written_is_what_was_measured() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.results", "--check"]
    checked = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_a_ratio_that_does_not_repeat_is_a_range(tmp_path: Path) -> None:
    for number, ratio in enumerate((0.5, 0.75)):
        quartiles = {"seconds_quartiles": [ratio - 0.1, ratio + 0.1]}
        found = measured("joint", {"exact": {"2": {"seconds": ratio, **quartiles}}, "bytes": 3.0})
        (tmp_path / f"joint-{number}.json").write_text(json.dumps(found))
    text = results.page(results.load(tmp_path))
    assert "| exact, 2, seconds | 0.5 to 0.75 | 0.4 to 0.85 |" in text
    assert "| bytes | 3 |  |" in text
    assert text.count("| `lori bench joint` | 2026-01-01 | a processor, 2 cores | 0.5 | torch 2.13.0 |") == 2


def test_only_the_table_of_its_section_is_written() -> None:
    readme = "before\n\n| a |\n## What it saves\n\ntext\n\n{}\n\nmore\n\n## Next\n\n| b |\n"
    assert results.filled(readme.format("| old |\n| --- |"), "| new |") == readme.format("| new |")
