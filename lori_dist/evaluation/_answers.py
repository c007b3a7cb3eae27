"""The answers of models to requests: batches of rows that need little padding, divided among ranks.

Every rank of a gang runs the model equally often, as each forward pass gathers what is sharded: a rank that has no
batch left runs one row once more, and a rank whose rows have ended writes on until those of all ranks have.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lori_dist.adapter.routing import Routing
from lori_dist.evaluation._batches import Side, by_length, hides_padding, left_padded, without_settings
from lori_dist.evaluation._rows import Answer, Continuation, Likelihood, Request
from lori_dist.training.data import Example, collate, pad_id
from lori_dist.training.device import put
from lori_dist.training.loss import log_likelihoods
from lori_dist.training.tokens import Ids
from lori_dist.training.world import World, from_first

Names = Sequence[str | None]
"""Adapters on the model; None: the base alone."""
BASE: Names = (None,)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: the likeliest one, or, with a temperature above 0, one that is drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Draw from the likeliest tokens only, those that have this much of the probability together."""
    seed: int = 0


GREEDY = Sampling()


@dataclass(kw_only=True)
class Reader:
    """A model that answers, on this process alone or on a gang whose ranks all call it alike."""

    model: PreTrainedModel
    """Model in evaluation mode, with its adapters if it has any."""
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    """Rows run at once, each with all models."""
    device: torch.device
    """Device of the model."""
    routing: Routing | None = None
    """The routing of rows to adapters; None without several adapters."""
    world: World | None = None
    """The gang; None: this process alone."""
    is_sharded: bool = False
    """Whether a forward pass is a collective."""
    sampling: Sampling = GREEDY
    _seen: dict[Side, tuple[int, bool]] = field(default_factory=dict)
    """Side of padding -> the longest row it was tested with, and whether the model hides it."""

    @torch.no_grad()
    def answers(self, names: Names, requests: Sequence[Request]) -> dict[str | None, list[Answer]]:
        """Name -> answers, in the order of the requests, on every rank."""
        known: list[dict[Request, Answer]] = [{} for _ in names]
        for kind in (Likelihood, Continuation):
            asked = list(dict.fromkeys(request for request in requests if isinstance(request, kind)))
            for (which, number), answer in self._answered(names, asked).items():
                known[which][asked[number]] = answer
        return {name: [known[which][request] for request in requests] for which, name in enumerate(names)}

    @contextlib.contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """Inside, whoever calls the model itself has all rows meet one adapter. A forward pass of what is sharded is a
        collective, so every rank is to call it alike."""
        self._meet((name,))
        with torch.no_grad():
            yield

    def _answered(self, names: Names, requests: Sequence[Request]) -> dict[tuple[int, int], Answer]:
        """(place of the name, place of the request) -> answer. requests: of one kind."""
        if not requests:
            return {}
        is_written = isinstance(requests[0], Continuation)
        self._meet(names[:1])
        is_padded = self._is_padded(requests, "left" if is_written else "right")
        lengths = [request.num_tokens for request in requests]
        batches = list(by_length(lengths, self.batch_size, is_padded=is_padded))
        rank, size = (0, 1) if self.world is None else (self.world.rank, self.world.size)
        own: dict[tuple[int, int], Answer] = {}
        with self._hooked():
            for first in range(0, len(batches), size):
                is_spare = first + rank >= len(batches)
                if is_spare and not self.is_sharded:
                    continue
                numbers = batches[-1][:1] if is_spare else batches[first + rank]
                of_batch = [requests[number] for number in numbers]
                run = self._written if is_written else self._read
                answers = run(names, of_batch)  # type: ignore[arg-type]
                if not is_spare:
                    places = [(which, number) for which in range(len(names)) for number in numbers]
                    own.update(zip(places, answers, strict=True))
        if self.world is None or size == 1:
            return own
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, own)
        return {place: answer for of_rank in everyone for place, answer in of_rank.items()}

    def _is_padded(self, requests: Sequence[Request], side: Side) -> bool:
        """Whether rows of different lengths may share a batch: the same on all ranks."""
        longest = max(request.num_tokens for request in requests)
        checked, hides = self._seen.get(side, (0, True))
        if self.batch_size == 1 or len(requests) == 1 or not hides or longest <= checked:
            return hides or self.batch_size == 1
        rows = [
            request.prompt_ids + (request.response_ids if isinstance(request, Likelihood) else ())
            for request in requests
        ]
        if len({len(row) for row in rows}) == 1:
            return True
        steps = max((request.max_new_tokens for request in requests if isinstance(request, Continuation)), default=0)
        hides = hides_padding(self.model, rows, self._pad, side, steps=steps)
        if self.world is not None and self.world.size > 1:
            own = hides
            hides = from_first(self.world, lambda: own)
        self._seen[side] = (longest, hides)
        return hides

    @property
    def _pad(self) -> int:
        return pad_id(self.tokenizer)

    @property
    def ends(self) -> list[int]:
        """The token that training ends responses with, and those that the base's own authors end them with."""
        settings = self.model.generation_config
        own = settings.eos_token_id if settings is not None else None
        return sorted({cast(int, self.tokenizer.eos_token_id), *([own] if isinstance(own, int) else own or [])})

    # --- one batch: rows of the first name, then those of the second, ...

    def _read(self, names: Names, requests: Sequence[Likelihood]) -> list[float]:
        examples = [
            Example(prompt="", response="", prompt_ids=request.prompt_ids, response_ids=request.response_ids)
            for request in requests
        ] * len(names)
        self._meet(names, len(requests))
        return [float(value) for value in log_likelihoods(self.model, collate(examples, self._pad).to(self.device))]

    def _written(self, names: Names, requests: Sequence[Continuation]) -> list[Ids]:
        input_ids, attention_mask = left_padded([request.prompt_ids for request in requests] * len(names), self._pad)
        self._meet(names, len(requests))
        ends, draws = self.ends, self.sampling.temperature > 0
        # Of the settings left out here, each has its neutral value.
        settings = GenerationConfig(
            do_sample=draws,
            num_beams=1,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=self._pad,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            **({"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "top_k": 0} if draws else {}),
        )
        with without_settings(self.model), self._drawing():
            output = self.model.generate(
                input_ids=put(input_ids, self.device),
                attention_mask=put(attention_mask, self.device),
                generation_config=settings,
                synced_gpus=self.is_sharded and self.world is not None and self.world.size > 1,
            )
        written = cast(list[list[int]], output[:, input_ids.shape[1] :].tolist())
        limits = [request.max_new_tokens for request in requests] * len(names)
        return [_until(tokens[:limit], ends) for tokens, limit in zip(written, limits, strict=True)]

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Random numbers of their own, from the seed."""
        if self.sampling.temperature == 0:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.sampling.seed)
            yield

    def _meet(self, names: Names, num_rows: int = 1) -> None:
        """Routes the rows of the next batch: as many rows for each name, one name after the other."""
        if self.routing is None:
            return
        if len(names) == 1:
            self.routing.only(names[0])
            return
        numbers = [-1 if name is None else self.routing.names.index(name) for name in names]
        self.routing.begin([number for number in numbers for _ in range(num_rows)])

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        """Tells the routing how many tokens each forward pass has, as some layers see tokens and no rows. And gives the
        output layer the last token's states in one piece: on a CPU torch would copy its weight for each row of a slice.
        """

        def count(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            if self.routing is not None and (ids := kwargs.get("input_ids")) is not None:
                self.routing.num_tokens = ids.numel()

        def in_one_piece(module: Any, args: Any) -> Any:
            return (args[0].contiguous(), *args[1:]) if args else None

        handles = [self.model.register_forward_pre_hook(count, with_kwargs=True, prepend=True)]
        if (output := self.model.get_output_embeddings()) is not None:
            handles.append(output.register_forward_pre_hook(in_one_piece))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _until(tokens: Sequence[int], ends: Sequence[int]) -> Ids:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:end])
