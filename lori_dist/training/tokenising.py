"""Pieces of files as tokens, in several processes at once.

`python -m lori_dist.training.tokenising` is one of these: pieces come on its standard input, and what is made of them
goes to its standard output. It ends with the process that started it. A fork of that process would not
do, as it may have threads and a device.
"""

import contextlib
import itertools
import logging
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lori_dist import rows, tables
from lori_dist.errors import ConfigError
from lori_dist.training import tokens
from lori_dist.training.examples import Encoded, Segmenter, Segments, encoded

ALONE = 4
"""Pieces that are done before other processes are started: these take as long to begin."""
AHEAD = 4
"""Pieces for each process that are read before what the first becomes is taken."""
MOST = 64
"""Largest number of processes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """The tokens of a piece, row by row."""

    tokens: npt.NDArray[np.int32]
    """Those of all rows, one after the other."""
    lengths: npt.NDArray[np.int32]
    prompts: npt.NDArray[np.int32]
    """Tokens of each prompt."""
    targets: npt.NDArray[np.int32]
    """Targets of each row."""
    whole: npt.NDArray[np.int32]
    """Tokens of each row before it was cut."""
    read_only: npt.NDArray[np.int32]
    """(ranges, 3): row in the piece, and start and end in the response of what is not learned."""
    texts: list[tuple[bytes, bytes]]
    """Prompt and response of each row, if they are kept."""
    problems: list[tuple[int, str]]
    """What is wrong with the other rows, by line."""
    has_tools: bool
    num_cut_prompts: int
    num_cut_responses: int
    openings: list[str]
    """As `Segmenter.openings`."""
    blank: str | None
    """As `tokens.blank_end`, in the first piece."""


@dataclass(kw_only=True)
class Work:
    """Makes tokens of pieces of a source. Raises ConfigError for what is wrong with all of them."""

    source: rows.Source
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    keeps_texts: bool
    """Whether texts are kept beside the tokens."""
    chosen: npt.NDArray[np.int64] | None = None
    """The rows, ascending, that become tokens; None: all."""
    _opened: tuple[rows.Renderer, Segmenter] | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # templates are functions, which do not leave a process

    def __call__(self, first: int, piece: tables.Piece) -> Made:
        """first: number of the piece's first row, from 0."""
        if self._opened is None:
            self._opened = rows.Renderer(self.source), Segmenter(self.source, self.tokenizer)
        render, segment = self._opened
        texts = render(piece)
        found = segment(texts)
        places = self._places(first, found.rows)
        given, numbers = [found.rows[place] for place in places], [found.numbers[place] for place in places]
        try:
            made = encoded(given, self.tokenizer, self.max_length)
        except ConfigError:
            tokens.eos_id(self.tokenizer)  # whose lack is none of the rows' mistakes
            made = self._each(given, numbers, found.problems)
        examples, num_rows = made.examples, len(found.rows) - len(given) + len(made.examples)
        places = places[: len(examples)]  # of a file with bad rows none is used

        def column(values: Iterable[int]) -> npt.NDArray[np.int32]:
            whole = np.zeros(num_rows, dtype=np.int32)
            whole[places] = np.fromiter(values, dtype=np.int32, count=len(examples))
            return whole

        return Made(
            tokens=np.array(
                [*itertools.chain.from_iterable((*one.prompt_ids, *one.response_ids) for one in examples)],
                dtype=np.int32,
            ),
            lengths=column(one.num_tokens for one in examples),
            prompts=column(len(one.prompt_ids) for one in examples),
            targets=column(one.num_targets for one in examples),
            whole=column(made.whole),
            read_only=np.array(
                [(place, *ends) for place, one in zip(places, examples, strict=True) for ends in one.read_only],
                dtype=np.int32,
            ).reshape(-1, 3),
            texts=[(row[0].encode(), "".join(row[1:]).encode()) for row in found.rows] if self.keeps_texts else [],
            problems=sorted(found.problems, key=lambda problem: problem[0]),
            has_tools=texts.has_tools,
            num_cut_prompts=made.num_cut_prompts,
            num_cut_responses=made.num_cut_responses,
            openings=list(segment.openings),
            blank=tokens.blank_end(given, self.tokenizer) if first == 0 else None,
        )

    def _places(self, first: int, given: Sequence[Segments]) -> list[int]:
        """Places in a piece of the rows that become tokens, and of those that may give none, which is a mistake."""
        if self.chosen is None:
            return [*range(len(given))]
        start, end = np.searchsorted(self.chosen, [first, first + len(given)])
        chosen = {int(row) - first for row in self.chosen[start:end]}
        return [place for place, row in enumerate(given) if place in chosen or not row[0].strip()]

    def _each(self, given: list[Segments], numbers: list[int], problems: list[tuple[int, str]]) -> Encoded:
        """One row after the other. What is wrong with some is added to the problems."""
        examples, whole, cut_prompts, cut_responses = [], [], 0, 0
        for number, row in zip(numbers, given, strict=True):
            try:
                made = encoded([row], self.tokenizer, self.max_length)
            except ConfigError as error:
                problems.append((number, str(error)))
                continue
            examples += made.examples
            whole += made.whole
            cut_prompts += made.num_cut_prompts
            cut_responses += made.num_cut_responses
        return Encoded(examples=examples, whole=whole, num_cut_prompts=cut_prompts, num_cut_responses=cut_responses)


def cores() -> int:
    """Cores that this process may use."""
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def made_of(work: Work, pieces: Iterable[tables.Piece], num_processes: int) -> Iterator[tuple[tables.Piece, Made]]:
    """Yields each piece with what work makes of it, in their order: the first few here, of more as many at once as
    there may be processes. Raises what `work` raises."""
    left: Iterator[tables.Piece] = iter(pieces)
    first = 0
    for begun in itertools.islice(left, ALONE):
        yield begun, work(first, begun)
        first += len(begun)
    rest = next(left, None)
    if rest is None:
        return
    idle: queue.SimpleQueue[Callable[[int, tables.Piece], Made]] = queue.SimpleQueue()
    idle.put(work)
    helpers = list[Helper]()
    with contextlib.suppress(OSError):  # the machine has no memory for more processes
        while len(helpers) < num_processes - 1:
            helpers.append(Helper(work, idle))

    def do(first: int, piece: tables.Piece) -> Made:
        while True:
            worker = idle.get()
            try:
                made = worker(first, piece)
            except Lost:
                continue  # others do what it did not
            except BaseException:
                idle.put(worker)
                raise
            idle.put(worker)
            return made

    waiting: deque[tuple[tables.Piece, Future[Made]]] = deque()
    executor = ThreadPoolExecutor(num_processes, thread_name_prefix="tokens")
    try:
        piece: tables.Piece | None = rest
        while piece is not None or waiting:
            while piece is not None and len(waiting) < AHEAD * num_processes:
                waiting.append((piece, executor.submit(do, first, piece)))
                first += len(piece)
                piece = next(left, None)
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
        for helper in helpers:
            helper.close()
        executor.shutdown(wait=True, cancel_futures=True)


class Lost(Exception):
    """A process has ended, as when the machine had no memory for it."""


class Helper:
    """Another process that does the work. It puts itself among the idle ones when it is ready."""

    def __init__(self, work: Work, idle: "queue.SimpleQueue[Callable[[int, tables.Piece], Made]]") -> None:
        self._is_closed = False
        # One thread: there is a process for each core.
        settings = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        path = os.pathsep.join(place for place in sys.path if place)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **settings, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the process that started it
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._questions = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self._answers = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        for stream in (self.process.stdin, self.process.stdout):
            stream.close()
        threading.Thread(target=self._begin, args=(work, idle), daemon=True, name="tokens-start").start()

    def _begin(self, work: Work, idle: "queue.SimpleQueue[Callable[[int, tables.Piece], Made]]") -> None:
        try:
            self._ask(work)
        except Exception as error:
            log.debug("a process makes no tokens", exc_info=error)
        else:
            idle.put(self)

    def __call__(self, first: int, piece: tables.Piece) -> Made:
        answer: Made = self._ask((first, piece))
        return answer

    def _ask(self, question: Any) -> Any:
        try:
            self._questions.send(question)
            answer = self._answers.recv()
        except Exception as error:  # a tokenizer may be of a class that cannot be sent
            if not self._is_closed:
                log.info("a process that makes tokens has ended (%s: %s)", type(error).__name__, error)
            raise Lost from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._is_closed = True
        self.process.kill()
        self.process.wait()
        self._questions.close()
        self._answers.close()


def serve(source: Connection, sink: Connection) -> None:
    """Answers one question after the other: the first is the work, the others are pieces."""
    work: Work | None = None
    while True:
        try:
            question = source.recv()
        except EOFError:
            return
        answer: Any = None
        try:
            if work is None:
                work = question
            else:
                answer = work(*question)
        except Exception as error:
            answer = error
        sink.send(answer)


if __name__ == "__main__":
    questions, answers = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    os.dup2(2, 1)  # what libraries print is not an answer
    with contextlib.suppress(BrokenPipeError):  # whoever asked has ended
        serve(questions, answers)
