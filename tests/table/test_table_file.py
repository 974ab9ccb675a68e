"""The table file: its layout by docs/table-format.md, and files that depart from it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import bandpo
from bandpo import Band, BandTable
from bandpo._core import BandTable as CoreTable
from bandpo.error import TableFileError

DOCUMENT = (Path(__file__).parents[2] / "docs" / "table-format.md").read_text(encoding="utf-8")
KEYS = re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE)
"""The keys of the metadata as the document lists them: in the order of the checksum, it last."""

REGIONS = re.findall(r"^\| `(\{.*\})` \| `(.+)` \|$", DOCUMENT, re.MULTILINE)
"""Regions as the document lists them: as JSON and as one makes them."""

SEED = 20260304
MUTATIONS = 100_000
FORGERIES = 20_000

Header = dict[str, Any]


def content(spec: str, delta: float | tuple[float, float]) -> bytes:
    return Band(spec, delta).table()._core.to_bytes()


# Two of them have images of the same size, so that exchanging parts changes nothing but content.
ORIGINALS = [
    content("kl", 0.05),
    content("tv", (0.01, 0.3)),
    content("pearson-chi2", 1e-4),
    content("renyi:2", 1e-4),
    content("reverse-kl", 0.2),
]


# --- the file as the document describes it, with struct and json alone --------------------------


def take_apart(file: bytes) -> tuple[Header, bytes]:
    """The header and the image."""
    (n,) = struct.unpack_from("<Q", file, 0)
    return json.loads(file[8 : 8 + n]), file[8 + n :]


def put_together(header: Header, image: bytes) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + image


def checksum(metadata: dict[str, str], image: bytes) -> str:
    digest = hashlib.sha256()
    for key in KEYS[:-1]:
        for part in (key.encode(), metadata[key].encode()):
            digest.update(struct.pack("<Q", len(part)) + part)
    digest.update(image)
    return digest.hexdigest()


def float32(value: float) -> float:
    """Rounds; of one sum or product of float32 in double precision that is float32 arithmetic."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def bits_of(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def uint(image: bytes, word: int) -> int:
    return int(struct.unpack_from("<I", image, 4 * word)[0])


def number(image: bytes, word: int) -> float:
    return float(struct.unpack_from("<f", image, 4 * word)[0])


def cell_of(image: bytes, side: int, y: float) -> tuple[int, float, float]:
    """Steps 2 to 6 of the document: the left node, the fraction and the width."""
    lane = 8 * side + sum(number(image, 8 * side + i) <= y for i in range(1, 8))
    z = float32(float32(abs(y - number(image, 16 + lane))) * number(image, 32 + lane))
    q = min(max(bits_of(z), uint(image, 64 + lane)), uint(image, 80 + lane))
    e = q >> 23
    (entries,) = struct.unpack_from("<i", image, 4 * (48 + lane))
    entry = uint(image, entries + e)
    b = entry & 15
    cell = (q & 0x7FFFFF) >> (23 - b)
    t = (q & (2 ** (23 - b) - 1)) * 2.0 ** (b - 23)
    return (entry >> 4) + cell, t, 2.0 ** (e - 127 - b)


def look_up(image: bytes, side: int, y: float) -> float:
    """Steps 1 to 8 of the document; `y` is a float32 at least 0, or NaN."""

    def limited(value: float) -> float:
        return min(value, y) if side == 0 else max(value, 0.0)

    if math.isnan(y):
        return y
    if y == 0.0:
        return limited(number(image, 96 + side))
    if y >= 128.0:
        return limited(number(image, 98 + side))
    node, t, width = cell_of(image, side, y)
    v0, v1 = number(image, 2 * node), number(image, 2 * node + 2)
    m0 = float32(number(image, 2 * node + 1) * width)
    m1 = float32(number(image, 2 * node + 3) * width)
    d = float32(v1 - v0)
    square = float32(float32(float32(3 * d) - 2 * m0) - m1)
    cube = float32(float32(m0 + m1) - 2 * d)
    inner = float32(m0 + float32(t * float32(square + float32(t * cube))))
    return limited(float32(v0 + float32(t * inner)))


@pytest.mark.parametrize("file", ORIGINALS)
def test_a_file_is_laid_out_as_documented(file: bytes) -> None:
    header, image = take_apart(file)
    assert put_together(header, image) == file
    assert len(image) % 4 == 0
    count = len(image) // 4
    assert set(header) == {"__metadata__", "words"}
    assert header["words"] == {"data_offsets": [0, 4 * count], "dtype": "U32", "shape": [count]}
    metadata = header["__metadata__"]
    assert sorted(metadata) == sorted(KEYS)
    assert metadata["format"] == "bandpo-table"
    assert metadata["format_version"] == "2"
    assert metadata["checksum"] == checksum(metadata, image)
    assert metadata["verification"] == "sampled"
    table = BandTable(CoreTable.from_bytes(file))
    assert list(table.metadata) == KEYS[:-1]
    errors = float(metadata["max_error_log_upper"]), float(metadata["max_error_lower"])
    assert errors == table.max_error
    assert image == table.words.tobytes()
    # The part of the header that holds nothing, and the pieces that are not used.
    words = struct.unpack(f"<{count}I", image)
    for first in 0, 8:
        used = sum(word != bits_of(math.inf) for word in words[first : first + 8])
        for row in range(16 + first, 96, 16):
            last = words[row + used - 1]
            assert all(word == last for word in words[row + used : row + 8])


@pytest.mark.parametrize(("text", "made"), REGIONS)
def test_regions_are_described_as_documented(text: str, made: str) -> None:
    region = eval(made, dict(vars(bandpo)))  # noqa: S307 -- our own text
    assert json.loads(region.table().metadata["region"]) == json.loads(text)


def test_constants_of_the_file_are_in_the_document() -> None:
    header, _ = take_apart(ORIGINALS[0])
    assert len(REGIONS) == 9
    for key in ("format", "format_version", "grid"):
        assert f"| `{key}` | `{header['__metadata__'][key]}` |" in DOCUMENT


@pytest.mark.parametrize("file", ORIGINALS)
def test_a_reader_written_from_the_document_gets_the_same_values(file: bytes) -> None:
    _, image = take_apart(file)
    table = BandTable(CoreTable.from_bytes(file))
    rng = np.random.default_rng(SEED)
    last = int(np.float32(130.0).view(np.uint32))
    y = rng.integers(0, last, 3000, dtype=np.uint32).view(np.float32)
    y = np.concatenate([y, rng.uniform(0, 40, 3000).astype(np.float32)])
    words = np.frombuffer(image, "<f4")
    starts = words[[*range(1, 6), *range(49, 54)]]
    starts = starts[np.isfinite(starts)]
    with np.errstate(under="ignore"):
        around = [
            starts,
            np.nextafter(starts, np.float32(0)),
            np.nextafter(starts, np.float32(200)),
        ]
    ends = np.array([0, 1e-45, 127.99999, 128, 1e30, np.inf, np.nan], np.float32)
    y = np.concatenate([y, *around, ends])
    log_lower, log_upper = table.log_bounds(-y.astype(np.float64))
    lower = np.exp(log_lower)
    for i, value in enumerate(y):
        for side, actual in ((0, log_upper[i]), (1, lower[i])):
            expected = look_up(image, side, float(value))
            if math.isfinite(expected):
                ulp = float(np.spacing(np.float32(abs(expected))))
                assert abs(actual - expected) <= ulp, (side, value)
            else:
                np.testing.assert_equal(actual, expected)


# --- what is refused ---------------------------------------------------------------------------


def refusal(file: bytes) -> str:
    with pytest.raises(TableFileError) as caught:
        CoreTable.from_bytes(file)
    return str(caught.value)


@pytest.mark.parametrize("file", ORIGINALS)
def test_reading_and_writing_gives_the_same_bytes(file: bytes) -> None:
    assert CoreTable.from_bytes(file).to_bytes() == file


@pytest.mark.parametrize("version", ["3", "10", "1.0", "", "0"])
def test_another_format_version_is_refused_and_both_are_named(version: str) -> None:
    header, image = take_apart(ORIGINALS[0])
    metadata = header["__metadata__"]
    metadata["format_version"] = version
    metadata["checksum"] = checksum(metadata, image)
    message = refusal(put_together(header, image))
    assert f'format version "{version}"' in message
    assert 'reads "1" and "2"' in message


@pytest.mark.parametrize("file", ORIGINALS)
def test_a_file_of_version_1_gives_the_same_table(file: bytes) -> None:
    header, image = take_apart(file)
    old = image[: 4 * 108] + bytes(16) + image[4 * 112 :]
    metadata = {**header["__metadata__"], "format_version": "1"}
    metadata["checksum"] = checksum(metadata, old)
    header["__metadata__"] = metadata
    assert CoreTable.from_bytes(put_together(header, old)).to_bytes() == file
    # What version 1 left 0 has to be 0.
    metadata["checksum"] = checksum(metadata, image)
    assert "version 1 leaves 0" in refusal(put_together(header, image))


@pytest.mark.parametrize("file", ORIGINALS)
def test_log_ratios_that_are_near_are_inside_both_bounds(file: bytes) -> None:
    """As the document describes them, at values of either sign next to the limit."""
    _, image = take_apart(file)
    slope, bend, floor, end = np.frombuffer(image, "<f4")[108:112].astype(np.float64)
    rng = np.random.default_rng(SEED)
    y = np.concatenate([rng.exponential(1.0, 2000), 2.0 ** rng.uniform(-140.0, 8.0, 6000), [0.0]])
    y = y.astype(np.float32).astype(np.float64)
    nearer = np.minimum(y, 1.5)
    reach = nearer * (slope - bend * nearer)
    assert reach.max() < math.log(2.0) / 2.0
    log_lower, log_upper = BandTable(CoreTable.from_bytes(file)).log_bounds(-y)
    assert (reach <= log_upper).all()
    # Compared as ratios, in float32, which the kernels do.
    lower = np.exp(log_lower).astype(np.float32)
    assert (np.exp(-reach).astype(np.float32) >= lower).all()
    next_to_zero = y < end
    assert next_to_zero.any() or end == 0.0
    assert (log_upper[next_to_zero] == y[next_to_zero]).all()
    assert np.float32(math.exp(-floor)) >= lower[next_to_zero].max(initial=0.0)


def test_near_reaches_as_far_as_bounds_let_it() -> None:
    """Steps of the logit by 0.3 are near, for bounds of which 0.35 is the closest."""
    words = Band("kl", 0.05).table().words.view(np.float32)
    slope, bend, floor, end = (float(word) for word in words[108:112])
    y = 2.0 ** np.arange(-20.0, 6.0, 0.25)
    nearer = np.minimum(y, 1.5)
    assert (nearer * (slope - bend * nearer) >= 0.3 * -np.expm1(-y)).all()
    assert floor > 0.04
    assert 1e-3 < end < 1e-2


def test_a_newer_file_is_refused_by_its_version_whatever_else_changed() -> None:
    header, image = take_apart(ORIGINALS[0])
    header["__metadata__"] = {"format": "bandpo-table", "format_version": "3", "novel": "key"}
    header["more"] = {"data_offsets": [len(image), len(image) + 8], "dtype": "F64", "shape": [1]}
    message = refusal(put_together(header, image + bytes(8)))
    assert 'format version "3"' in message
    assert 'reads "1" and "2"' in message


def test_an_unknown_key_is_refused_even_with_a_right_checksum() -> None:
    header, image = take_apart(ORIGINALS[0])
    header["__metadata__"]["comment"] = "x"  # the checksum covers known keys, so it is right still
    assert "byte for byte" in refusal(put_together(header, image))


def test_another_spelling_of_the_same_content_is_refused() -> None:
    header, image = take_apart(ORIGINALS[0])
    spaced = json.dumps(header, sort_keys=True).encode()
    spaced += b" " * (-len(spaced) % 8)
    turned = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode()
    turned += b" " * (-len(turned) % 8)
    padded = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    padded += b" " * (8 - len(padded) % 8 + 8)
    for text in (spaced, turned, padded):
        assert "byte for byte" in refusal(struct.pack("<Q", len(text)) + text + image)
    metadata = header["__metadata__"]
    metadata["max_error_lower"] += "0" if "e" not in metadata["max_error_lower"] else ""
    metadata["max_error_log_upper"] = "+" + metadata["max_error_log_upper"]
    metadata["checksum"] = checksum(metadata, image)
    refusal(put_together(header, image))


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_refused(key: str) -> None:
    header, image = take_apart(ORIGINALS[0])
    del header["__metadata__"][key]
    refusal(put_together(header, image))


def test_a_verification_by_samples_checks_every_cell() -> None:
    """Next to saturation a cell holds so few floats that even spacing over all floats misses it."""
    header, image = take_apart(CoreTable.to_bytes(Band("hellinger", 0.05).table()._core))
    edges = [number(image, 16 + 1), number(image, 16 + 9)]
    assert min(edges) > 0.0, "both sides saturate"
    signs = [1.0, -1.0]
    for side, power in [(side, power) for side in (0, 1) for power in range(1, 23)]:
        y = float32(edges[side] * (1.0 + signs[side] * 2.0**-power))
        node, _, _ = cell_of(image, side, y)
        spoiled = bytearray(image)
        for word in 2 * node, 2 * node + 2:
            # Into the simplex, because a lookup clamps a value outside it.
            value = number(image, word) - signs[side] * 1e-3
            struct.pack_into("<f", spoiled, 4 * word, value)
        metadata = {**header["__metadata__"]}
        metadata["checksum"] = checksum(metadata, bytes(spoiled))
        file = put_together({**header, "__metadata__": metadata}, bytes(spoiled))
        found = BandTable(CoreTable.from_bytes(file)).verify(2).max_error
        assert found[side] > 0.5e-3, f"side {side}, {power} octaves next to its edge"


def mutations(random: Random) -> list[Callable[[], bytes]]:
    """Ways to spoil a file, each making another one at every call."""

    def original() -> bytes:
        return random.choice(ORIGINALS)

    def place(file: bytes) -> int:
        # As often in the header as in the image, which is far longer.
        (n,) = struct.unpack_from("<Q", file, 0)
        return random.randrange(8 + n) if random.random() < 0.5 else random.randrange(len(file))

    def flipped_bits() -> bytes:
        file = original()
        altered = bytearray(file)
        for _ in range(random.choice([1, 1, 1, 2, 5])):
            altered[place(file)] ^= 1 << random.randrange(8)
        return bytes(altered)

    def set_bytes() -> bytes:
        file = original()
        altered = bytearray(file)
        for _ in range(random.choice([1, 1, 4, 16])):
            byte = random.choice([0, 0x20, 0x22, 0x7B, 0xFF, random.randrange(256)])
            altered[place(file)] = byte
        return bytes(altered)

    def truncated() -> bytes:
        file = original()
        return file[: place(file)]

    def extended() -> bytes:
        file = original()
        more = random.randbytes(random.choice([1, 4, 8, 100]))
        return random.choice([file + more, more + file, file + bytes(len(more)), file + file])

    def cut_or_repeated() -> bytes:
        file = original()
        start, end = sorted((place(file), place(file)))
        return random.choice([file[:start] + file[end:], file[:end] + file[start:]])

    def spliced() -> bytes:
        first, second = original(), original()
        at = place(first)
        return first[:at] + second[random.choice([at, place(second)]) :]

    def another_header_length() -> bytes:
        file = original()
        (n,) = struct.unpack_from("<Q", file, 0)
        near = [n + 8 * random.randrange(-60, 500), n + random.randrange(-9, 9)]
        far = [0, 1, 2**63, 2**64 - 1, random.getrandbits(64), len(file), len(file) - 8]
        other = random.choice(near + far)
        return struct.pack("<Q", other % 2**64) + file[8:]

    def edited_key() -> bytes:
        header, image = take_apart(original())
        holder = random.choice([header, header["__metadata__"], header["words"]])
        key = random.choice(list(holder))
        value = holder.pop(key)
        other = random.choice(["", key.upper(), key + "s", key[:-1], random.choice(KEYS), "words"])
        if random.random() < 0.7:
            holder[other] = value
        return put_together(header, image)

    def edited_value() -> bytes:
        header, image = take_apart(original())
        holder = random.choice([header, header["__metadata__"], header["words"]])
        holder[random.choice(list(holder))] = random.choice(
            [
                None,
                True,
                0,
                -1,
                1e400,
                2**70,
                [],
                {},
                "",
                "1",
                "nan",
                "1e999",
                "-0.0",
                "\x00",
                "é" * 9,
            ]
        )
        return put_together(header, image)

    def edited_number() -> bytes:
        """A digit of a number in the metadata, everything else kept."""
        file = original()
        (n,) = struct.unpack_from("<Q", file, 0)
        digits = [i for i in range(8, 8 + n) if 0x30 <= file[i] <= 0x39]
        at = random.choice(digits)
        digit = random.choice(b"0123456789.e-+")
        return file[:at] + bytes([digit]) + file[at + 1 :]

    def swapped_metadata() -> bytes:
        header, image = take_apart(original())
        other, other_image = take_apart(original())
        taken = random.choice([[*KEYS], KEYS[:-1], [random.choice(KEYS)]])
        for key in taken:
            header["__metadata__"][key] = other["__metadata__"][key]
        return put_together(header, random.choice([image, other_image]))

    def swapped_words() -> bytes:
        header, image = take_apart(original())
        words = bytearray(image)
        first, second = (4 * random.randrange(len(words) // 4) for _ in range(2))
        words[first : first + 4], words[second : second + 4] = (
            words[second : second + 4],
            words[first : first + 4],
        )
        return put_together(header, bytes(words))

    def rubbish() -> bytes:
        size = random.choice([0, 1, 7, 8, 9, 64, 5000])
        return random.randbytes(size) if random.random() < 0.5 else original()[8 : 8 + size]

    return [flipped_bits, set_bytes, truncated, extended, cut_or_repeated, spliced,
            another_header_length, edited_key, edited_value, edited_number, swapped_metadata,
            swapped_words, rubbish]  # fmt: skip


def test_a_hundred_thousand_spoiled_files_are_refused_or_identical() -> None:
    random = Random(SEED)  # noqa: S311 - spoiled files, not secrets
    ways = mutations(random)
    valid = set(ORIGINALS)
    identical = 0
    for i in range(MUTATIONS):
        file = ways[i % len(ways)]()
        try:
            table = CoreTable.from_bytes(file)
        except TableFileError:
            continue  # any other exception, a panic of the extension included, fails the test
        assert file in valid, "a spoiled file was taken for another table"
        assert table.to_bytes() == file
        identical += 1
    assert identical < MUTATIONS // 10, "most mutations change something"


def test_forged_images_are_refused_or_can_be_looked_up() -> None:
    """A right checksum over any image: a lookup must stay inside it, whatever wrote it."""
    random = Random(SEED)  # noqa: S311 - forged files, not secrets
    logp = -np.concatenate(
        [[0.0, 1e-45, 1e-30, 1e-9], np.geomspace(1e-6, 127.9, 60), [128, np.inf, np.nan]]
    )
    parts = [take_apart(file) for file in ORIGINALS]
    special = [
        0,
        1,
        5,
        2**22,
        2**31 - 1,
        2**31,
        2**32 - 1,
        *map(bits_of, [1.0, math.inf, math.nan]),
    ]
    accepted = 0
    for _ in range(FORGERIES):
        header, image = random.choice(parts)
        words = list(struct.unpack(f"<{len(image) // 4}I", image))
        for _ in range(random.choice([1, 2, 3, 6])):
            at = random.randrange(128) if random.random() < 0.9 else random.randrange(len(words))
            words[at] = random.choice([*special, random.getrandbits(32), random.choice(words)])
        forged = struct.pack(f"<{len(words)}I", *words)
        metadata = {**header["__metadata__"]}
        metadata["checksum"] = checksum(metadata, forged)
        file = put_together({**header, "__metadata__": metadata}, forged)
        try:
            table = CoreTable.from_bytes(file)
        except TableFileError:
            continue
        assert table.to_bytes() == file
        table.log_bounds(logp, np.empty_like(logp), np.empty_like(logp))
        accepted += 1
    assert 0 < accepted < FORGERIES
