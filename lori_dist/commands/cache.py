"""`lori cache`: show or clear the tokens that are kept."""

import argparse
import time

from lori_dist import describe

SUMMARY = "show or clear the tokens that are kept"
HELP = """\
Rows become tokens once and are kept in a folder, LORI_CACHE or ~/.cache/lori_dist, for every run with the same rows,
template, tokenizer and train.max_length. Prints the folder and what is in it, the last used first. The folder holds at
most LORI_CACHE_SIZE bytes (such as 20GB; 64GB where it is not set): what was not used for longest is deleted first.

examples:
  lori cache
  lori cache --clear
"""
TITLES = ("used", "rows", "tokens", "bytes", "of")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="delete all that no process uses")


def run(arguments: argparse.Namespace) -> None:
    from lori_dist.training import token_cache

    folder, most = token_cache.cache_folder(), token_cache.most_bytes()
    if arguments.clear:
        before = {entry.path: entry.num_bytes for entry in token_cache.entries()}
        deleted = token_cache.clear()
        left = len(before) - len(deleted)
        used = f"; {left} {'is' if left == 1 else 'are'} in use" if left else ""
        print(f"{folder}: {len(deleted)} deleted, {sum(before.get(path, 0) for path in deleted):,} bytes{used}")
        return
    found = token_cache.entries()
    total = sum(entry.num_bytes for entry in found)
    print(f"{folder}: {len(found)} files, {total:,} of at most {most:,} bytes")
    if found:
        print(describe.table(TITLES, [_line(entry.used, entry.num_bytes, entry.notes) for entry in found]))


def _line(used: float, num_bytes: int, notes: dict[str, object]) -> tuple[str, ...]:
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
    rows, tokens = (f"{notes[name]:,}" if name in notes else "?" for name in ("rows", "tokens"))
    return day, rows, tokens, f"{num_bytes:,}", str(notes.get("path", "an unreadable file"))
