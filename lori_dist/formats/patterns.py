"""Regular expressions that somebody else wrote, only as far as it is known beforehand that they end in time."""

import re
from collections.abc import Sequence

from lori_dist.errors import AdapterError
from lori_dist.formats.checks import named

MAX_STEPS = 2 * 10**9
"""Most steps of all patterns over all texts together: some seconds. PEFT's own folders take some millions."""
MAX_LENGTH = 10_000
MAX_GROUPS = 64

_TOKEN = re.compile(
    r"(?P<escape>\\.)|(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})[?+]?)|(?P<other>.)",
    re.DOTALL,
)


def check(where: str, patterns: Sequence[str], texts: Sequence[str]) -> None:
    """Raises AdapterError for what is not a regular expression, and where all patterns over all texts could take long.

    where: what the patterns are, for messages.
    """
    longest = max(map(len, texts), default=0) + 1
    num_steps = 0
    for pattern in patterns:
        power, factor = _cost(where, pattern)
        num_steps += len(texts) * factor * longest ** (power + 1)  # one more, as matching may begin anywhere
        if num_steps > MAX_STEPS:
            raise AdapterError(
                f"{where}: {named(pattern)} could take for ever to match; give the modules' paths instead"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{where} has {named(pattern)}, not a regular expression ({error})") from error


def _cost(where: str, pattern: str) -> tuple[int, int]:
    """How often a pattern repeats something without a limit, and in how many ways the rest of it can be read."""
    power, factor, before = 0, 1, ""
    bars = [0]  # of each group that is open
    for token in _TOKEN.finditer(pattern[: MAX_LENGTH + 1]):
        kind = token.lastgroup if token["repeat"] is None else "repeat"
        if kind == "open":
            bars.append(0)
        elif kind == "close" and len(bars) > 1:
            factor *= bars.pop() + 1
        elif kind == "bar":
            bars[-1] += 1
        elif kind == "repeat":
            is_unbounded = token[0][0] in "*+" or (token["comma"] == "," and not token["most"])
            if token[0][0] == "?" and before != "open":
                factor *= 2
            elif before in ("open", "close", "repeat", ""):
                power = MAX_LENGTH  # a group that is repeated, which may hold repetitions, or a lookahead and the like
            elif is_unbounded:
                power += 1
            else:
                factor *= int((token["most"] or token["least"] or "1")[:6]) + 1
        elif kind == "escape" and token[0][1].isdigit():
            power = MAX_LENGTH  # what a group has matched, again
        before = str(kind)
        if power > 3 or len(bars) > MAX_GROUPS:
            break
    for of_group in bars:
        factor *= of_group + 1
    if power > 3 or len(bars) > MAX_GROUPS or len(pattern) > MAX_LENGTH:
        raise AdapterError(f"{where}: {named(pattern)} could take for ever to match; give modules' paths")
    return power, factor
