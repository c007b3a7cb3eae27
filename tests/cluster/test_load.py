"""A run of 201 tiny jobs leaves nothing behind while it works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lori_dist import config
from tests.cluster.trained import described

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DRIVER = """
import json, os, sys
from lori_dist import config
from lori_dist.cluster.run import execute
from tests.processes import descendants

seen = []

def look(event):
    if event.state != "finished":
        return
    import ray
    groups = ray.util.placement_group_table().values()
    pages = int(open("/proc/self/statm").read().split()[1])
    seen.append({
        "done": event.num_done,
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "groups": sum(group["state"] != "REMOVED" for group in groups),
        "processes": len(descendants(os.getpid())),
    })

execute(config.validate(json.load(sys.stdin)), progress=look)
print(json.dumps(seen))
"""

WARM = 40
"""Jobs after which all parts of the program have been used."""


def test_two_hundred_jobs_of_forty_tasks_leak_nothing(tmp_path: Path) -> None:
    tree = config.dump(described(tmp_path, workers=1, cpus_per_worker=0.5))
    tree["tasks"] = {f"task{number}": tree["tasks"]["copy"] for number in range(40)}
    tree["train"] |= {"steps": 2, "checkpoint_every": None}
    names = list(tree["tasks"])
    tree["merges"] = {
        f"merge{number}": {"method": "concat", "tasks": [names[number % 40], names[(number + 1 + number // 40) % 40]]}
        for number in range(60)
    }
    tree["evaluate"] |= {"rows": 1, "max_new_tokens": 1, "metrics": ["loss"]}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(tree).encode(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen[-1]["done"] == 201
    warm = [look for look in seen if look["done"] >= WARM]
    assert warm[-1]["bytes"] < 1.2 * warm[0]["bytes"], (warm[0], warm[-1])
    assert max(look["descriptors"] for look in warm[-20:]) <= max(look["descriptors"] for look in warm[:20]) + 10
    assert max(look["threads"] for look in warm[-20:]) <= max(look["threads"] for look in warm[:20]) + 10
    assert max(look["groups"] for look in seen) <= 4
    assert max(look["processes"] for look in warm[-20:]) <= max(look["processes"] for look in warm[:20]) + 4
    print(json.dumps({"start": warm[0], "end": warm[-1]}))
