"""Randomly damaged model files; the same seed gives the same damage."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from tests.zoo.catalogue import ENTRIES
from tests.zoo.entry import Rng
from tests.zoo.meaning_mutations import mutate_meaning
from tests.zoo.model_builder import place_bytes

BASES: Final = (
    "mlp",
    "several",
    "unusual_names",
    "by_mean",
    "doubled_in_a_loop",
    "scan_over_columns",
    "text",
    "similarity",
    "images",
    "image_classifier",
    "words_without_stop_words",
    "logistic_strings",
)


def place_mutants(folder: Path, count: int, *, first_seed: int = 0) -> None:
    """Writes `count` damaged models to the folder, each named by its seed and the original."""
    originals = {name: ENTRIES[name].build().SerializeToString() for name in BASES}
    for seed in range(first_seed, first_seed + count):
        base = BASES[seed % len(BASES)]
        place_bytes(folder, f"{seed:04}_{base}", mutate(originals[base], seed))


def mutate(content: bytes, seed: int) -> bytes:
    """Damages a model one to three times: its bytes, or in half of all cases its meaning."""
    rng = np.random.default_rng(seed)
    times = int(rng.integers(1, 3, endpoint=True))
    if rng.random() < 0.5:
        return mutate_meaning(content, rng, times)
    damaged = bytearray(content)
    for _ in range(times):
        _DAMAGES[int(rng.integers(len(_DAMAGES)))](damaged, rng)
    return bytes(damaged)


def _random_index(content: bytearray, rng: Rng) -> int:
    return int(rng.integers(max(1, len(content))))


def _flip_bit(content: bytearray, rng: Rng) -> None:
    content[_random_index(content, rng)] ^= 1 << int(rng.integers(8))


def _set_byte(content: bytearray, rng: Rng) -> None:
    extremes = (0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256)))
    content[_random_index(content, rng)] = extremes[int(rng.integers(len(extremes)))]


def _cut_end(content: bytearray, rng: Rng) -> None:
    del content[max(1, _random_index(content, rng)) :]


def _cut_out(content: bytearray, rng: Rng) -> None:
    start = _random_index(content, rng)
    del content[start : min(start + int(rng.integers(1, 20)), len(content) - 1)]


def _insert(content: bytearray, rng: Rng) -> None:
    start = _random_index(content, rng)
    content[start:start] = rng.bytes(int(rng.integers(1, 20)))


def _repeat(content: bytearray, rng: Rng) -> None:
    start = _random_index(content, rng)
    content[start:start] = content[start : start + int(rng.integers(1, 200))]


def _change_length(content: bytearray, rng: Rng) -> None:
    """Changes a byte after one that looks like a message's tag: it is probably a length."""
    indices = [index for index in range(1, len(content)) if content[index - 1] & 7 == 2]
    if indices:
        index = indices[int(rng.integers(len(indices)))]
        content[index] = (content[index] + int(rng.integers(-3, 4))) & 0xFF


def _lengthen_number(content: bytearray, rng: Rng) -> None:
    """Replaces a byte by a varint of up to 64 bits."""
    index = _random_index(content, rng)
    content[index : index + 1] = b"\xff" * int(rng.integers(1, 9)) + b"\x7f"


_DAMAGES: Final[tuple[Callable[[bytearray, Rng], None], ...]] = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_byte,
    _cut_end,
    _cut_out,
    _insert,
    _repeat,
    _change_length,
    _change_length,
    _lengthen_number,
)
