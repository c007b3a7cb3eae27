"""What hostile names, links, files and secrets come to."""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lori_dist
from lori_dist import config, folder
from lori_dist.cluster.status import status
from lori_dist.errors import ConfigError, JobError, is_secret, redacted
from lori_dist.jobs import Job

PACKAGE = Path(lori_dist.__file__).parent

PARTS = st.sampled_from(["..", ".", "/", "\\", "\0", "\n", "\x1b[2J", "~", "a", "base", "é", "\u202e", "\uff0e\uff0e"])
HOSTILE = st.lists(PARTS, min_size=1, max_size=5).map("".join) | st.text(max_size=80)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("inputs")
    (place / "config.json").write_text("{}")
    (place / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    return {
        "name": "demo",
        "output": str(place / "runs"),
        "model": {"path": str(place)},
        "tasks": {"math": {"train": str(place / "rows.jsonl"), "test": str(place / "rows.jsonl")}},
        "train": {"steps": 1},
    }


@given(name=HOSTILE, where=st.sampled_from(["run", "task", "merge"]))
def test_a_name_is_refused_or_stays_in_the_run_s_folder(tree: dict[str, Any], name: str, where: str) -> None:
    hostile = dict(tree)
    if where == "run":
        hostile["name"] = name
    elif where == "task":
        hostile["tasks"] = {name: tree["tasks"]["math"]}
    else:
        hostile["merges"] = {name: {"method": "concat"}}
    try:
        run = config.validate(hostile)
    except ConfigError:
        return
    assert run.folder.parent == Path(tree["output"])
    assert name.isascii()
    assert name.isprintable()
    for job in (*run.tasks, *run.merges):
        assert (run.folder / f"{folder.PARTIAL}train-{job}").parent == run.folder


LINKS = (".lock", ".stop", "summary.json", ".summary.json.writing", ".partial-train-math", "logs", "logs/x")


@given(link=st.sampled_from(LINKS), is_dangling=st.booleans(), is_relative=st.booleans())
def test_a_link_out_of_the_run_s_folder_is_refused(
    tmp_path_factory: pytest.TempPathFactory, link: str, is_dangling: bool, is_relative: bool
) -> None:
    place = tmp_path_factory.mktemp("links")
    root, target = place / "runs" / "demo", place / "precious"
    (root / link).parent.mkdir(parents=True)
    if not is_dangling:
        target.write_text("precious")
    up = "../" * (2 + link.count("/"))
    (root / link).symlink_to(f"{up}precious" if is_relative else target)
    with pytest.raises(JobError, match="is a link to"), folder.lock(root):
        pass
    assert not is_dangling or not target.exists()
    assert is_dangling or target.read_text() == "precious"
    with pytest.raises(JobError):
        status(root)


def test_a_run_s_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "demo").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JobError, match="is a link to"), folder.lock(tmp_path / "demo"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- pickles ---------------------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unsafe(source: str) -> Iterator[str]:
    """What in a program may run code out of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and given.get("weights_only") != "True":
                yield called
            if given.get("allow_pickle", "False") != "False":
                yield called
            trusts = given.get("trust_remote_code", "False")
            if trusts != "False" and trusts.rpartition(".")[2] != "trust_remote_code":  # the user's word, handed on
                yield called
            loads_model = called.startswith("AutoModel") and called.endswith("from_pretrained")
            if loads_model and given.get("use_safetensors") != "True":
                yield called
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "pandas.read_pickle"):
                yield called


def test_nothing_in_the_package_reads_a_pickle() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    assert {str(file): found for file in files if (found := list(unsafe(file.read_text(encoding="utf-8"))))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModelForCausalLM.from_pretrained(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "yaml.load(text)",
    ],
)
def test_the_check_for_pickles_finds_one(line: str) -> None:
    assert list(unsafe(f"def read(path):\n    {line}\n"))


# --- secrets ---------------------------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("abcXYZ019-_.~%!$&*+,;=:"), min_size=1, max_size=20)


@given(user=WORDS, password=WORDS, scheme=st.sampled_from(["s3", "https", "gs", "hf", "sftp"]))
def test_a_url_s_secrets_are_in_no_message_and_no_file(
    tmp_path_factory: pytest.TempPathFactory, user: str, password: str, scheme: str
) -> None:
    url, shown = f"{scheme}://{user}:{password}@host/bucket", f"{scheme}://***@host/bucket"
    assert redacted(f"output: got {url!r}") == f"output: got {shown!r}"
    assert str(JobError(f"{url}: no answer")) == f"{shown}: no answer"
    path = tmp_path_factory.mktemp("file") / "summary.json"
    folder.write_json(path, {"path": url, "jobs": {"x": {"error": f"{url}: no answer"}}})
    assert json.loads(path.read_text()) == {"path": shown, "jobs": {"x": {"error": f"{shown}: no answer"}}}


SECRETS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=8, max_size=20)
NAMES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "API_KEYS")


@given(secret=SECRETS.filter(lambda text: "*" not in text), name=st.sampled_from(NAMES))
def test_a_secret_of_the_environment_is_in_no_message_and_no_file(
    tmp_path_factory: pytest.TempPathFactory, secret: str, name: str
) -> None:
    path = tmp_path_factory.mktemp("file") / "job.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        patch.setenv("KEY", secret[:7])  # too short to be one: it would be a part of many texts
        message = str(JobError(f"store: refused {secret!s}"))
        folder.write_json(path, {"error": f"store: refused {secret}"})
    assert message == "store: refused ***"
    assert json.loads(path.read_text(encoding="utf-8")) == {"error": "store: refused ***"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("key abcdef1234 refused", "key *** refused"),
        ("abcdef1234 and longer-abcdef1234", "*** and ***"),
        ("cannot reach https://me:pass@host:5000/api", "cannot reach https://***@host:5000/api"),
        ("home and short", "home and short"),
        ("https://host/a@b", "https://host/a@b"),
        ("seven77 is a key", "*** is a key"),
        ("seventy, seven77s", "seventy, seven77s"),
        ("s3:/k:s@h", "s3:/***@h"),
        ("read /etc/keys/token-file", "read /etc/keys/token-file"),
    ],
)
def test_secrets_are_left_out(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"WANDB_API_KEY": "abcdef1234", "X_PASSWORD": "longer-abcdef1234", "HOME": "home", "A_TOKEN": "short"}
    more = {"NEPTUNE_KEY": "seven77", "RAY_AUTH_TOKEN_PATH": "/etc/keys/token-file"}
    monkeypatch.setattr(os, "environ", variables | more)
    assert redacted(text) == told


def test_a_secret_that_is_a_number_leaves_a_file_that_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_PASSWORD", "12345678")
    folder.write_json(tmp_path / "job.json", {"loss": 0.12345678, "error": "12345678 was refused"})
    assert json.loads((tmp_path / "job.json").read_text()) == {"loss": 0.12345678, "error": "*** was refused"}


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "HOME", "SSL_KEY_FILE"])
def test_other_variables_are_no_secrets(name: str) -> None:
    assert not is_secret(name)


@given(name=HOSTILE)
def test_a_plan_s_job_is_refused_or_stays_in_the_run_s_folder(name: str) -> None:
    try:
        job = Job(name=name, kind="train", fingerprint="")
    except ConfigError as error:
        assert str(error).startswith("multitask: the plan has a job called")
        return
    for place in (job.name, f"{folder.PARTIAL}{job.name}", f"{folder.REPLACED}{job.name}", f"logs/{job.name}.log"):
        assert os.path.normpath(place) == place
        assert place.count("/") == place.startswith("logs/")
        assert place.isascii()
        assert place.isprintable()


@pytest.mark.parametrize("name", ["", "..", "logs", "train-a\n", "train/a", "/etc", ".partial-a", "a" * 201, "é"])
def test_names_of_jobs_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="multitask"):
        Job(name=name, kind="train", fingerprint="")


@given(text=st.text(st.sampled_from("ab:/ .@'\""), max_size=30).filter(lambda text: "@" not in text))
def test_what_has_no_secret_is_left_as_it_is(text: str) -> None:
    assert redacted(text) == text


def test_a_fingerprint_is_the_same_wherever_the_results_go(tree: dict[str, Any]) -> None:
    from lori_dist.multitask.independent import plan

    def fingerprints(output: str) -> list[tuple[str, str]]:
        jobs: list[Job] = plan(config.validate({**tree, "output": output}))
        return [(job.name, job.fingerprint) for job in jobs]

    assert fingerprints(tree["output"]) == fingerprints(tree["output"] + "-other")
