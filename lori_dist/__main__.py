"""The `lori` command."""

import argparse
import functools
import json
import logging
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Everything heavy is imported by the verb that needs it: --help and a mistake in a configuration answer at once.
from lori_dist import config, describe, gpus, plugin
from lori_dist.atomic import write_text
from lori_dist.errors import ConfigError, LoriError, Redacting, Stopped, print_anything, redacted
from lori_dist.files import read_regular

if TYPE_CHECKING:
    from lori_dist.merges import Weight
    from lori_dist.training.world import World

Verb = Callable[[argparse.Namespace], int | None]
"""Gives the exit code, where that is not 0."""

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 1 for what failed, 2 for a mistake in the configuration or the call, 3
    for what was told to end, and has saved."""
    print_anything()
    chosen = _parse(sys.argv[1:] if arguments is None else arguments)
    world_rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    _configure_logging(chosen.verbose, first=world_rank == "0")
    try:
        code = chosen.verb(chosen) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # as in `lori show FILE | head`; what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        told = _told(error, chosen.verbose)
        if told is None:
            raise
        message, code = told
        print(redacted(message if world_rank == "0" else f"rank {world_rank}: {message}"), file=sys.stderr)
    finally:
        if "torch" in sys.modules:
            from lori_dist.cluster import scratch

            scratch.remove_empty_cache()
    return int(code)


def _told(error: BaseException, verbose: bool) -> tuple[str, int] | None:
    """The message and the exit code, or None for what nobody raised on purpose."""
    if isinstance(error, LoriError):
        message = "".join(traceback.format_exception(error)).rstrip() if verbose else str(error)
        return message, 2 if isinstance(error, ConfigError) else 3 if isinstance(error, Stopped) else 1
    if isinstance(error, OSError):  # a folder that cannot be written, a full disk
        log.debug("", exc_info=error)
        return f"{error.filename or type(error).__name__}: {error.strerror or error}; check it and try again", 1
    return ("Interrupted.", 130) if isinstance(error, KeyboardInterrupt) else None


# --- verbs -----------------------------------------------------------------------------------------------------------


def _ended_by_sigterm(verb: Verb) -> Verb:
    """A verb that ends with a line and its own exit code when SIGTERM comes, from its first import on."""

    @functools.wraps(verb)
    def called(arguments: argparse.Namespace) -> int | None:
        if getattr(arguments, "address", None) is not None:  # it only follows a job, which does not end with it
            return verb(arguments)
        from lori_dist.training import preemption

        with preemption.raised_by_sigterm(""):
            return verb(arguments)

    return called


@_ended_by_sigterm
def run(arguments: argparse.Namespace) -> int | None:
    from lori_dist.cluster import scratch

    if arguments.address is not None:
        from lori_dist.cluster.submission import submit

        scratch.check()
        return submit(arguments.config, arguments.settings, arguments.address, dry_run=arguments.dry_run)
    described = config.load(arguments.config, arguments.settings)
    if arguments.dry_run:
        _show_dry_run(described)
        return None
    from lori_dist import progress
    from lori_dist.cluster.run import execute
    from lori_dist.cluster.summary import SUMMARY
    from lori_dist.evaluation._table import table

    with progress.of_run() as show_progress:
        summary = execute(described, progress=show_progress)
    made = {**summary["adapters"], **summary["merges"]}
    files = [(name, describe.size(item["kept"], item["total"]), item["path"]) for name, item in made.items()]
    print(
        table(summary["evaluation"], summary["intervals"]),
        describe.table(("model", "size", "adapter"), files),
        sep="\n\n",
    )
    before = [name for name, state in summary["jobs"].items() if state.get("cached")]
    if before:
        remedy = "Delete their folders, or give the run another name, to do them again."
        print(f"\nFinished before, and not done again: {', '.join(before)}.\n{remedy}")
    if summary["report"] is not None:
        print(f"\n{summary['report'].get('path') or 'No report: ' + summary['report']['error']}")
    print(f"\n{described.folder / SUMMARY}")
    return None


def _show_dry_run(described: config.Run) -> None:
    from lori_dist.cluster.dry_run import TITLES, dry_run

    lines, superseded = dry_run(described)
    print(describe.table(TITLES, lines))
    if superseded:
        print("", *superseded, sep="\n")
    ranks, place = described.cluster.workers, described.cluster.address
    built = f"Every training job was built by {ranks} rank{'' if ranks == 1 else 's'} (cluster.address: {place})"
    print(f"\n{built}, and no step was run. {described.folder} is unchanged.")
    if described.cluster.packing != "off":
        print("Training jobs were built one at a time; jobs that share a base take more memory.")


def plan(arguments: argparse.Namespace) -> None:
    described = config.load(arguments.config, arguments.settings)
    from lori_dist.plan import Hardware, picture
    from lori_dist.plan import plan as planned
    from lori_dist.plan.table import table

    name, usual = gpus.device(arguments.gpu or gpus.ASSUMED)
    given = {key: getattr(arguments, key) for key in (*usual, "efficiency", "price", "currency")}
    chosen: dict[str, Any] = usual | {key: value for key, value in given.items() if value is not None}
    for path in (arguments.out, arguments.picture):
        if path is not None:
            _check_writable(path, "--out" if path is arguments.out else "--picture")
    hardware = Hardware(
        gpus=arguments.gpus, nodes=arguments.nodes, name=name, is_assumed=arguments.gpu is None, **chosen
    )
    found = planned(described, hardware, row_tokens=arguments.row_tokens)
    if arguments.out is not None:
        _write_json(arguments.out, found)
    if arguments.picture is not None:
        picture.save(found, arguments.picture)
    print(json.dumps(found, indent=2) if arguments.json else table(found))


def _size(text: str) -> float:
    """Bytes, of `80GiB`, `80GB` or a number of GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|TB|TiB)?", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a size such as 80GiB")
    return float(match[1]) * {"GB": 1e9, "TB": 1e12, "TiB": 2**40}.get(match[2], 2**30)


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a number above 0")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a whole number of at least 1")
    return int(text)


def status(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import status

    found = status.status(status.folder_of(arguments.run, arguments.settings))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    who = f"{found['driver']} is working on it" if found["driver"] else "no process is working on it"
    line = f"{found['folder']}: {who}{', and was asked to stop' if found['stopping'] else ''}"
    print(status.printable(line), describe.table(status.TITLES, status.rows(found)), sep="\n\n")


def stop(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import status

    root = status.folder_of(arguments.run, arguments.settings)
    driver = status.stop(root, timeout=arguments.timeout)
    print(
        f"{root}: "
        + ("no process is working on it" if driver is None else f"{driver} has ended; `lori run` resumes from here")
    )


@_ended_by_sigterm
def compare(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import comparison

    described = comparison.load(arguments.config)
    comparison.runs(described, arguments.settings)  # its mistakes come before anything heavy is loaded
    from lori_dist import progress
    from lori_dist.cluster.run import execute
    from lori_dist.evaluation._table import compared

    def do(run: config.Run) -> dict[str, Any]:
        log.info("%s", run.name)
        with progress.of_run() as show_progress:
            return execute(run, progress=show_progress)

    result = comparison.compare(described, arguments.settings, execute=do)
    print(compared(result), result["path"], sep="\n\n")


def train(arguments: argparse.Namespace) -> None:
    from lori_dist.cluster import scratch
    from lori_dist.cluster.member import member

    scratch.check()
    with member(functools.partial(_told, verbose=arguments.verbose)) as watch:
        path, is_first = _train(arguments, watch)
        if is_first:
            print(path)


def _train(arguments: argparse.Namespace, watch: "Callable[[World], None]") -> tuple[Path, bool]:
    """Returns the adapter's file, and whether this is rank 0."""
    described = config.load(arguments.config, arguments.settings)
    trainings = list(_trainings(described))
    if arguments.task not in trainings:
        known, near = ", ".join(trainings), plugin.nearest(arguments.task, trainings)
        raise ConfigError(f"--task: unknown task {arguments.task!r}; there are {known}.{near}")
    import torch.distributed as dist

    from lori_dist import progress
    from lori_dist.cluster.launcher import train_task
    from lori_dist.training.accelerate_launch import followed
    from lori_dist.training.world import from_environment

    described = followed(described, os.environ, has_engine=config.has_engine(arguments.config, arguments.settings))
    world = from_environment()
    watch(world)
    with progress.of_training(arguments.task) as show_progress:
        path = train_task(described, arguments.task, world, progress=show_progress)
    dist.destroy_process_group()
    return path, world.rank == 0


def _trainings(described: config.Run) -> Iterator[str]:
    """The names of the adapters that a run trains: its tasks, unless its plan is another one."""
    plan = plugin.find("multitask", described.multitask.name, "plan", "multitask")
    jobs = plan.load()(described, **plan.bind(described.multitask.options, "multitask"))
    return (job.settings["task"] for job in jobs if job.kind == "train")


def merge(arguments: argparse.Namespace) -> None:
    adapters = [Path(word) for word in arguments.adapters if not _is_option(word)]
    options = _options([word for word in arguments.adapters if _is_option(word)] + arguments.settings)
    plugin.find("merges", arguments.method, "merge", "--method").bind(options, "--method")
    if not adapters:
        raise ConfigError("ADAPTER: none is given; give the adapters to merge")
    weights = _weights(arguments.weights, len(adapters))
    if arguments.out.exists():
        raise ConfigError(f"OUT: {str(arguments.out)!r} exists; the file to write comes first, and must be a new one")
    _check_writable(arguments.out, "OUT")
    from lori_dist.merges import merge_files

    made = merge_files(adapters, arguments.out, method=arguments.method, options=options, weights=weights)
    print(f"{made['path']}: {describe.size(made['kept'], made['total'])}, {made['bytes']:,} bytes")


def evaluate(arguments: argparse.Namespace) -> None:
    described = config.load(arguments.config, arguments.settings)
    if arguments.out is not None:
        _check_writable(arguments.out, "--out")
    from lori_dist.cluster import scratch
    from lori_dist.cluster.member import member

    scratch.check()
    with member(functools.partial(_told, verbose=arguments.verbose)) as watch:
        text = _evaluated(described, arguments, watch)
        if text is not None:
            print(text)


def _evaluated(described: config.Run, arguments: argparse.Namespace, watch: "Callable[[World], None]") -> str | None:
    """The tables, on rank 0."""
    adapters = {str(path): path for path in arguments.adapter or ()} or _finished_adapters(described)
    import torch.distributed as dist

    from lori_dist import progress
    from lori_dist.cluster.matrix import evaluate_models
    from lori_dist.evaluation._table import table
    from lori_dist.training.accelerate_launch import followed
    from lori_dist.training.world import from_environment

    described = followed(described, os.environ, has_engine=config.has_engine(arguments.config, arguments.settings))
    world = from_environment()
    watch(world)
    with progress.of_evaluation() as show_progress:
        matrix, intervals = evaluate_models(
            described, {"base": None, **adapters}, world, out=arguments.out, progress=show_progress
        )
    dist.destroy_process_group()
    return table(matrix, intervals) if world.rank == 0 else None


def export(arguments: argparse.Namespace) -> None:
    if arguments.format == "folded" and arguments.base is None:
        raise ConfigError("--base: is missing; --format folded writes the base model with the adapter in it")
    from lori_dist.adapter import source
    from lori_dist.integrations import model_card

    adapter, origin = source.opened(arguments.adapter), model_card.origin(arguments.adapter)
    if arguments.format == "folded":
        from lori_dist.integrations.folded import export_folded

        export_folded(
            arguments.base, adapter, arguments.out, origin=origin, trust_remote_code=arguments.trust_remote_code
        )
    else:
        from lori_dist.integrations import official, peft

        base = arguments.base or adapter.base.get("name")
        if base is None:
            raise ConfigError("--base: is missing, and the adapter does not name its base model; name it")
        write = official.export if arguments.format == "official" else peft.export
        write(adapter, arguments.out, base_model_name=str(base), origin=origin)
        if not peft.is_loadable(str(base)):
            print(
                f"{arguments.out}: names its base model {base!r}, a folder that is not here or a model that is not in "
                "the hub's cache; for AutoPeftModelForCausalLM.from_pretrained, export with --base PATH",
                file=sys.stderr,
            )
    print(arguments.out)


def report(arguments: argparse.Namespace) -> None:
    words = [*arguments.adapters, *arguments.settings]
    settings = [word for word in words if re.match(r"[A-Za-z_][\w.-]*=", word)]
    adapters = [word for word in words if word not in settings]
    described = config.load(arguments.run, settings) if arguments.run is not None else None
    if described is None and settings:
        raise ConfigError(f"{settings[0]}: is an override, which needs a configuration; add --run CONFIG")
    made = _finished_adapters(described) if described is not None else {}
    trainings = set(_trainings(described)) if described is not None else set()
    named = {name: path for name, path in made.items() if name in trainings}
    paths = adapters or list(named.values())
    if not paths:
        raise ConfigError("ADAPTER: none is given; give adapter files, or with --run a run that has finished some")
    where = "--run" if described is not None else "--evaluation"
    matrix = described.folder / "summary.json" if described is not None else arguments.evaluation
    tree = {} if matrix is None else _tree(matrix, where)
    measured = None if matrix is None else _evaluation(tree.get("evaluation", tree), matrix, where)
    conflicts: Mapping[str, Any] = {}
    from lori_dist.adapter import source
    from lori_dist.report import conflicts_of, write

    if described is not None:  # figures are those of the finished jobs, whose files are checked
        summary = _summary(described)
        measured, conflicts = summary["evaluation"], conflicts_of(summary)
    names = None if adapters else list(named)
    jobs = tree.get("jobs") if described is not None else None
    opened = [source.opened(Path(path)) for path in paths]
    written = write(opened, arguments.out, names=names, evaluation=measured, jobs=jobs, conflicts=conflicts)
    if measured and not written["drops"] and not conflicts:
        log.warning("%s: it has no model named after a task and no merge, so no drops can be computed", matrix)
    print(arguments.out / "report.html")


def _tree(path: Path, where: str) -> dict[str, Any]:
    """What is in a run's summary, or in what `lori evaluate --out` writes."""
    try:
        tree = json.loads(read_regular(path).decode())
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: {str(path)!r} does not exist; `lori run` and `lori evaluate` write it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: {str(path)!r} is not a JSON file ({error}); give the summary.json of a run"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: {str(path)!r} does not hold a JSON object; give the summary.json of a run")
    return tree


def _evaluation(tree: Any, path: Path, where: str) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> task -> metric -> value."""
    try:
        return {
            str(model): {
                task: {metric: float(value) for metric, value in values.items()} for task, values in tasks.items()
            }
            for model, tasks in tree.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {str(path)!r} does not say model, task, metric and a number; give the summary.json of a run"
        ) from error


def _summary(described: config.Run) -> dict[str, Any]:
    """What `lori run` would say of the jobs that are finished. Raises JobError for one whose files have changed."""
    from lori_dist.cluster.board import Board
    from lori_dist.cluster.run import planned

    return Board(run=described, jobs=planned(described), progress=lambda event: None).summary()


def show(arguments: argparse.Namespace) -> None:
    print(describe.methods() if arguments.what == "methods" else describe.adapter_file(Path(arguments.what)))


def schema(arguments: argparse.Namespace) -> None:
    from lori_dist import schema

    print(schema.as_yaml() if arguments.yaml else schema.text(), end="")


def bench(arguments: argparse.Namespace) -> None:
    suite = plugin.find("benchmarks", arguments.suite, "run", "SUITE")
    options = suite.bind(_options(arguments.settings), "SUITE")
    if arguments.out is not None:
        _check_writable(arguments.out, "--out")
    from lori_dist.benchmarks import provenance

    begun = provenance(shlex.join(["lori", "bench", arguments.suite, *arguments.settings]))
    measured = suite.load()(**options)
    ratios = [(name, str(ratio)) for name, ratio in _flat(measured["ratios"])]
    print(describe.records(measured["rows"]), describe.table(("ratio", ""), ratios), sep="\n\n")
    if arguments.out is not None:
        _write_json(arguments.out, {"suite": arguments.suite, "options": options, **begun, **measured})


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, with their keys in a row."""
    for key, item in tree.items():
        if isinstance(item, Mapping):
            yield from ((f"{key}, {name}", leaf) for name, leaf in _flat(item))
        else:
            yield key, item


# --- what they are given and leave -----------------------------------------------------------------------------------


def _options(words: Sequence[str]) -> dict[str, Any]:
    """Options of a method, from words such as `density=0.5`."""
    options = {}
    for word in words:
        if not _is_option(word):
            raise ConfigError(f"{word}: an option of a method has the form NAME=VALUE, such as density=0.5")
        name, _, text = word.partition("=")
        options[name] = config.value(text, word)
    return options


def _is_option(word: str) -> bool:
    return re.match(r"[A-Za-z_]\w*=", word) is not None


def _weights(text: str | None, num_adapters: int) -> "list[Weight] | None":
    """Numbers, or, for layers and modules, mappings as in a configuration: `0.5,{default: 0.4, "*.mlp.*": 0.6}`."""
    if text is None:
        return None
    try:
        merge = config.checked(
            config.Merge,
            {"method": "linear", "weights": config.value(f"[{text}]", f"--weights: {text!r}")},
            "--weights",
        )
    except ConfigError as error:
        raise ConfigError(f"--weights: got {text!r}; write numbers and commas, such as 0.7,0.3 ({error})") from error
    weights: list[Weight] = [*merge.weights] if isinstance(merge.weights, tuple) else []
    if len(weights) != num_adapters:
        raise ConfigError(f"--weights: {len(weights)} given for {num_adapters} adapters; give one per adapter")
    return weights


def _check_writable(path: Path, where: str) -> None:
    """Before long work, whose result would be lost at its end."""
    is_waited_for = path.exists() and not path.is_file() and not path.is_relative_to("/dev")
    if path.is_dir() or not path.absolute().parent.is_dir() or is_waited_for:
        raise ConfigError(f"{where}: {str(path)!r} cannot be a file; give a file's name in a folder that exists")


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    text = json.dumps(tree, indent=2) + "\n"
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8")
    else:
        write_text(path, text)


def _finished_adapters(described: config.Run) -> dict[str, Path]:
    """Task or merge -> its adapter, of all that a run of this very configuration has finished."""
    from lori_dist import folder
    from lori_dist.cluster import summary

    plan = plugin.find("multitask", described.multitask.name, "plan", "multitask")
    jobs = plan.load()(described, **plan.bind(described.multitask.options, "multitask"))
    making = [job for job in jobs if job.kind != "evaluate"]
    made = [job for job in making if folder.finished(described.folder, job)]
    if len(made) < len(making):
        log.warning(
            "%s: %d of %d adapters are finished; only these are evaluated", described.folder, len(made), len(making)
        )
    return {job.name.partition("-")[2]: summary.path(described, job) for job in made}


# --- how they are called ---------------------------------------------------------------------------------------------


def _configure_logging(verbose: bool, *, first: bool) -> None:
    """To stderr, from the first of the processes started together."""
    handler = logging.StreamHandler()
    handler.setFormatter(Redacting("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    level = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("lori_dist").setLevel(level if first else logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """KEY=VALUE may also come after options, and weights begin with a minus: argparse by itself expects neither."""
    parser = _parser()
    arguments = list(arguments)
    if "--weights" in arguments[:-1]:
        place = arguments.index("--weights")
        arguments[place : place + 2] = [f"--weights={arguments[place + 1]}"]
    chosen, more = parser.parse_known_args(arguments)
    unknown = [word for word in more if word.startswith("-") or not hasattr(chosen, "settings")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    chosen.settings = [*getattr(chosen, "settings", ()), *more]
    return chosen


OVERRIDES = """\
overrides:
  KEY=VALUE changes the configuration without editing the file; KEY is the dotted path of a field, VALUE is YAML:
    train.lr=1e-4   train.engine=fsdp   train.engine.stage=3   tasks.math.train=data/math.jsonl
"""


def _parser() -> argparse.ArgumentParser:
    """Every verb's function has its name, and is called with the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="lori",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tunes a language model on several tasks with LoRI adapters, merges and evaluates them.",
        epilog="Start with: lori run configs/quickstart.yaml\n`lori VERB --help` describes a verb and gives examples.",
    )
    parser.add_argument("--version", action="version", version=f"lori_dist {_version()}")
    _add_local_rank(parser)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = _add(
        verbs,
        run,
        "train, merge and evaluate everything a configuration describes, under Ray",
        f"""\
Trains an adapter per task, merges them, and evaluates base, adapters and merges on every task. Jobs that do not depend
on each other run side by side. Run the same command again to resume: finished jobs are skipped.

With --address the run is submitted to a Ray cluster as a job. The configuration and this package are sent along;
methods of your own must be installed there. Paths must be absolute and visible from all nodes. This command follows
the job's log and exits with the job's exit code; Ctrl-C stops following the log, and the job continues.

examples:
  lori run configs/quickstart.yaml train.engine=fsdp cluster.workers=2
  lori run mine.yaml --address http://HOST:8265 cluster.workers=16 cluster.gpus_per_worker=1

exit code: 0; 1 if a job failed; 2 for a mistake in the configuration; 3 if the run was stopped by `lori stop`, SIGTERM
or train.time_limit, and can be resumed.

{OVERRIDES}""",
    )
    _add_config(verb)
    verb.add_argument("--address", metavar="URL", help="address of the dashboard of a Ray cluster to run on")
    verb.add_argument(
        "--dry-run",
        action="store_true",
        help="load the data and build every training job, but run no step and write nothing",
    )

    verb = _add(
        verbs,
        compare,
        "run a configuration in several variants, with several seeds",
        f"""\
Runs all variants of a comparison, one after another, and prints mean and standard deviation over the seeds. Finished
runs are skipped. configs/comparison.yaml is an example; overrides apply to all runs.

example:
  lori compare configs/comparison.yaml train.steps=60

{OVERRIDES}""",
    )
    _add_config(verb)

    verb = _add(
        verbs,
        plan,
        "estimate memory, traffic, time and cost of a run, for every engine",
        f"""\
Estimates for every engine and placement of the base whether a run fits the devices, how fast it is and what it costs,
and recommends one. Reads the model's config.json and the rows, whose tokens it counts, but no weights. Memory is that
of the dense phase, which needs most, for rows of train.max_length tokens; time is given for the rows as they are and
for full rows. A plan is arithmetic with the assumptions that it prints, not a measurement.

devices: {", ".join(gpus.DEVICES)}

examples:
  lori plan configs/llama-3-70b-fsdp.yaml --gpus 16 --nodes 2 --row-tokens 1024
  lori plan mine.yaml --gpus 8 --gpu a100 --gpu-memory 40GiB --price 1.8 --out plan.json --picture plan.png

{OVERRIDES}""",
    )
    _add_config(verb)
    verb.add_argument("--gpus", type=_count, required=True, metavar="N", help="number of devices")
    verb.add_argument("--nodes", type=_count, default=1, metavar="N", help="number of nodes (default: 1)")
    verb.add_argument(
        "--gpu", metavar="NAME", help="device, see the list below (default: h100); the options below override its data"
    )
    verb.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="memory of a device, such as 80GiB")
    verb.add_argument("--tflops", type=_above_zero, metavar="X", help="peak TFLOP/s of a device in the base's dtype")
    verb.add_argument("--bandwidth", type=_above_zero, metavar="GB/S", help="memory bandwidth of a device")
    verb.add_argument(
        "--link", type=_above_zero, metavar="GB/S", help="bandwidth between devices of a node, one direction"
    )
    verb.add_argument(
        "--network",
        type=_above_zero,
        metavar="GB/S",
        help="bandwidth between nodes, of all network adapters of a node together",
    )
    verb.add_argument("--host", type=_above_zero, metavar="GB/S", help="bandwidth from the host's memory to a device")
    verb.add_argument(
        "--efficiency", type=_above_zero, metavar="X", help="share of the peak that is reached (default: 0.5)"
    )
    verb.add_argument("--price", type=_above_zero, metavar="X", help="price of one device for an hour")
    verb.add_argument("--currency", metavar="WORD", help="currency of the price (default: USD)")
    verb.add_argument(
        "--row-tokens",
        type=_count,
        metavar="N",
        help="tokens of every row (default: the tokens of the files' rows are counted)",
    )
    verb.add_argument("--json", action="store_true", help="print all figures as JSON")
    verb.add_argument("--out", metavar="FILE", type=Path, help="also write the plan as JSON")
    verb.add_argument("--picture", metavar="FILE", type=Path, help="also write a picture of the memory as PNG")

    verb = _add(
        verbs,
        status,
        "show the jobs of a run: progress, speed, retries, errors",
        f"""\
Reads only the run's files, so it works from any machine that sees them, during the run and after it. An ETA is that of
the whole training job.

examples:
  lori status runs/quickstart
  lori status mine.yaml output=/shared/runs --json

{OVERRIDES}""",
    )
    _add_run(verb)
    verb.add_argument("--json", action="store_true", help="print as JSON")

    verb = _add(
        verbs,
        stop,
        "stop a run so that the same command resumes it",
        f"""\
Requests a stop through the run's folder and waits until the run has stopped. Training jobs finish their step and save
a checkpoint first; the stopped command exits with code 3.

example:
  lori stop runs/quickstart

{OVERRIDES}""",
    )
    _add_run(verb)
    verb.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=120.0, help="longest time to wait (default: 120)"
    )

    verb = _add(
        verbs,
        train,
        "train one task's adapter, alone or under a launcher",
        f"""\
Trains the adapter of one task of a configuration in the processes that a launcher has started. The result is where
`lori run` expects it, so `lori run` does not train this task again.

examples:
  lori train run.yaml --task math
  torchrun --nproc-per-node 8 -m lori_dist train run.yaml --task math train.engine=fsdp
  deepspeed --num_gpus 8 --module lori_dist train run.yaml --task math train.engine=deepspeed train.engine.stage=3
  accelerate launch --multi_gpu --num_processes 8 -m lori_dist train run.yaml --task math
  srun --ntasks-per-node 8 lori train run.yaml --task math

{OVERRIDES}""",
    )
    _add_config(verb)
    verb.add_argument("--task", required=True, metavar="NAME", help="name of a task of the configuration")
    _add_local_rank(verb)

    verb = _add(
        verbs,
        merge,
        "merge adapters into one file",
        """\
Merges adapters, module by module and without the base model. `lori show methods` lists the methods and their options.
An adapter is an adapter file, a LoRA folder of PEFT, or a checkpoint of LoRI's official code; they can be mixed.

examples:
  lori merge merged.safetensors math.safetensors code.safetensors --method linear --weights 0.7,0.3
  lori merge merged.safetensors math.safetensors path/to/peft-lora path/to/LoRI-S --method concat
""",
    )
    verb.add_argument("out", metavar="OUT", type=Path, help="file to write")
    verb.add_argument(
        "adapters", metavar="ADAPTER", nargs="+", help="files or folders; options of the method as KEY=VALUE"
    )
    verb.add_argument(
        "--method",
        required=True,
        metavar="NAME",
        help="merge method: a name from `lori show`, or your own package.module",
    )
    verb.set_defaults(settings=[])
    verb.add_argument(
        "--weights",
        metavar="W,W,...",
        help="one weight per adapter (default: equal ones that sum to one, or 1 each for methods that take a mean)",
    )

    verb = _add(
        verbs,
        evaluate,
        "evaluate base and adapters on every task of a configuration",
        f"""\
Prints one table per metric, with a row per model and a column per task. Without --adapter it evaluates the base and
every adapter and merge that a run of this configuration has finished. Under a launcher, the ranks share the base as
evaluate.engine says (default: train.engine) and divide the rows. With --out, intervals and each row's prediction are
written beside the figures, and the same command resumes an evaluation that was cut off.

examples:
  lori evaluate run.yaml --adapter merged.safetensors --out matrix.json evaluate.rows=100
  torchrun --nproc-per-node 8 -m lori_dist evaluate run.yaml evaluate.engine=fsdp
  deepspeed --num_gpus 8 --module lori_dist evaluate run.yaml evaluate.engine=deepspeed evaluate.engine.stage=3
  accelerate launch --multi_gpu --num_processes 8 -m lori_dist evaluate run.yaml
  srun --ntasks-per-node 8 lori evaluate run.yaml

{OVERRIDES}""",
    )
    _add_config(verb)
    verb.add_argument(
        "--adapter", metavar="PATH", type=Path, action="append", help="adapter file or folder; can be repeated"
    )
    verb.add_argument("--out", metavar="FILE", type=Path, help="also write the figures as JSON")
    _add_local_rank(verb)

    verb = _add(
        verbs,
        export,
        "write an adapter in a form that other programs read",
        """\
peft: a LoRA folder that peft.PeftModel.from_pretrained loads; its outputs equal those of the adapter.
official: the adapter of one task in the layout of LoRI's official code, with B's mask as 0.9_mask.pt.
folded: the base model with the adapter added to its weights, an ordinary transformers folder.
Every export is read back and compared before it appears.

examples:
  lori export runs/quickstart/merge-concat/adapter.safetensors exported --format peft
  lori export adapter.safetensors model-with-adapter --format folded --base path/to/base
""",
    )
    verb.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter file, or LoRA folder of PEFT")
    verb.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist, or be empty")
    verb.add_argument("--format", required=True, choices=("peft", "official", "folded"))
    verb.add_argument("--base", metavar="PATH", help="base model (default for a LoRA folder: the one it names)")
    verb.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the base model brings along, as model.trust_remote_code does",
    )

    verb = _add(
        verbs,
        report,
        "measure interference between adapters; write a page, JSON and pictures",
        """\
Compares adapters without running a model: cosines of their updates with the theoretical bound, overlap of supports,
sign conflicts, shared energy, norms; and with an evaluation, the drop of each task under each merge. Writes
report.json, report.html, which needs no network, and report-*.png. `lori run` does it at its end.

examples:
  lori report math.safetensors code.safetensors --out comparison
  lori report --run run.yaml --out comparison
  lori report runs/mine/train-*/adapter.safetensors --evaluation runs/mine/summary.json --out comparison
""",
    )
    verb.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="*",
        help="adapter files or LoRA folders of PEFT; with --run, by default its tasks', and KEY=VALUE as for `run`",
    )
    verb.set_defaults(settings=[])
    matrix = verb.add_mutually_exclusive_group()
    matrix.add_argument("--run", metavar="CONFIG", help="the YAML file of a finished run: its adapters and evaluation")
    matrix.add_argument(
        "--evaluation", metavar="FILE", type=Path, help="summary.json of a run, or what `lori evaluate --out` wrote"
    )
    verb.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="folder to write; a report in it is replaced"
    )

    verb = _add(
        verbs,
        show,
        "show what is in an adapter, or list the methods",
        """\
With an adapter file, or a LoRA folder of PEFT: prints its header, its components, and the density of B by layer and
module kind. Without one, or with the word `methods`: lists every mask, merge, engine, plan, metric and benchmark.

examples:
  lori show runs/quickstart/train-arithmetic/adapter.safetensors
  lori show methods
""",
    )
    verb.add_argument(
        "what", metavar="ADAPTER", nargs="?", default="methods", help="adapter file or folder, or `methods`"
    )

    verb = _add(
        verbs,
        schema,
        "print the JSON schema of configurations",
        """\
Prints the JSON schema of configurations, or with --yaml all keys with their defaults and descriptions. An editor with a
YAML language server completes and checks a file that begins with a line such as
  # yaml-language-server: $schema=config.schema.json

examples:
  lori schema > config.schema.json
  lori schema --yaml
""",
    )
    verb.add_argument("--yaml", action="store_true", help="all keys with their defaults and descriptions, as YAML")

    verb = _add(
        verbs,
        bench,
        "run a benchmark",
        """\
Runs a benchmark on this machine and prints its figures and ratios. The JSON file has `rows`, `ratios`, `suite` and
`machine`.

example:
  lori bench projection --out projection.json
""",
    )
    verb.add_argument("suite", metavar="SUITE", help=f"one of {', '.join(plugin.names('benchmarks'))}")
    verb.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="options of the suite")
    verb.add_argument("--out", metavar="FILE", type=Path, help="write the figures there, as JSON")
    return parser


def _version() -> str:
    try:
        return metadata.version("lori_dist")
    except metadata.PackageNotFoundError:  # a job has the package from where it was submitted
        return "(not installed)"


def _add(verbs: Any, function: Verb, summary: str, text: str) -> argparse.ArgumentParser:
    description, _, rest = text.partition("\n\n")
    verb: argparse.ArgumentParser = verbs.add_parser(
        function.__name__,
        help=summary,
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.set_defaults(verb=function)
    verb.add_argument("--verbose", action="store_true", help="log more, and print tracebacks")
    return verb


def _add_config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", metavar="CONFIG", help="YAML file of the configuration")
    verb.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="overrides; see below")


def _add_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", metavar="RUN", help="YAML file of the run, or its folder")
    verb.add_argument("settings", metavar="KEY=VALUE", nargs="*", default=[], help="overrides; see below")


def _add_local_rank(parser: argparse.ArgumentParser) -> None:
    """The deepspeed launcher puts it before or after the verb. It says what the environment says as well."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


if __name__ == "__main__":
    sys.exit(main())
