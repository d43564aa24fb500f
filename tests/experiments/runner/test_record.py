"""Records as text: nothing that was changed passes, and what earlier versions wrote is read."""

import copy
import hashlib
import json
import pickle

import pytest

from experiments.runner.cell import Cell
from experiments.runner.record import FORMAT, DamagedError, NewerFormatError, decode, encode, interned

CELL = Cell("tiny", {"seed": 0, "kind": "plain", "note": "naïve"})
RECORD = {
    "format": FORMAT,
    "sweep": CELL.sweep,
    "key": CELL.key,
    "settings": dict(CELL.settings),
    "result": {
        "value": 1.5e-7,
        "curve": [1.0, None, -2e300],
        "text": "ü\n",
        "none": {},
        "long": [0.1 * n for n in range(9)],
    },
    "provenance": {"seconds": 1.0, "fallbacks": []},
}


def as_format_1(record):
    """What the first version wrote."""
    return json.dumps({**record, "format": 1}, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def test_what_is_encoded_is_decoded():
    assert decode(encode(RECORD)) == (RECORD, FORMAT)
    failure = {**{name: RECORD[name] for name in RECORD if name != "result"}, "failure": "MemoryError"}
    assert decode(encode(failure)) == (failure, FORMAT)


def test_records_share_their_texts():
    def texts(value):
        if isinstance(value, dict):
            return [*value, *(text for item in value.values() for text in texts(item))]
        return [value] if isinstance(value, str) else []

    # From files, and as they come from a worker.
    read = decode(encode(RECORD))[0]
    sent = pickle.loads(pickle.dumps(RECORD | {"key": CELL.key[:8] + CELL.key[8:]}))
    assert interned(sent) == sent == read
    assert all(one is other for one, other in zip(texts(interned(sent)), texts(read), strict=True))
    assert not all(one is other for one, other in zip(texts(sent), texts(read), strict=True))


def flips(content):
    for position, byte in enumerate(content):
        for bit in range(8):
            yield content[:position] + bytes([byte ^ 1 << bit]) + content[position + 1 :]


def passed(content):
    count = 0
    for flipped in flips(content):
        try:
            decode(flipped)
        except DamagedError:
            continue
        count += 1
    return count


def test_no_flipped_bit_passes():
    content = encode(RECORD)
    assert 8 * len(content) > 3000 and passed(content) == 0
    # Without a checksum many do: what the test above finds where there is none.
    assert passed(as_format_1(RECORD)) > 300


@pytest.mark.parametrize(
    "change", [lambda text: text[:-1], lambda text: text + b"\n", lambda text: b" " + text, lambda text: b""]
)
def test_no_other_length_passes(change):
    with pytest.raises(DamagedError):
        decode(change(encode(RECORD)))


def test_what_the_first_version_wrote_is_read():
    before = copy.deepcopy(RECORD)
    assert decode(as_format_1(RECORD)) == (RECORD, 1)
    # As it stands in stores, spaces and the order of the fields being as they may.
    assert decode(json.dumps({**dict(reversed(RECORD.items())), "format": 1}, indent=1).encode()) == (RECORD, 1)
    assert before == RECORD


def test_a_later_format_is_no_damage():
    rest = encode(RECORD)[len(b'{"checksum":""') + 64 + 1 :].replace(b'"format":2', b'"format":3')
    sealed = b'{"checksum":"%s",' % hashlib.sha256(rest).hexdigest().encode() + rest
    with pytest.raises(NewerFormatError, match="it has format 3, and this version knows those up to 2"):
        decode(sealed)
    with pytest.raises(DamagedError, match="expected a checksum before all else, as format 3 has"):
        decode(b"{" + rest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "no valid JSON"),
        (b'{"format":1,"settings":' + b"1" * 10_000 + b"}", "no valid JSON"),
        (as_format_1(RECORD).replace(b"1.5e-07", b"1e999"), "1e999 is no JSON number"),
        (
            as_format_1(RECORD).replace(b'"format":1', b'"format":true'),
            "expected the number of a format, up to 2, got True",
        ),
        (as_format_1(RECORD).replace(b'"format":1', b'"format":0'), "expected the number of a format, up to 2, got 0"),
        (as_format_1(RECORD).replace(b'"sweep":"tiny"', b'"sweep":"../pwn"'), "its settings are those of no cell"),
        (as_format_1(RECORD).replace(CELL.key.encode(), b"../../pwn"), "have the key .*, but it says '../../pwn'"),
    ],
    ids=["brackets", "digits", "infinite", "a boolean format", "format 0", "a path as sweep", "a path as key"],
)
def test_what_is_no_record_is_named(content, message):
    with pytest.raises(DamagedError, match=message):
        decode(content)


@pytest.mark.parametrize(
    ("field", "value"), [("format", 1), ("key", "0" * 16), ("result", None), ("sweep", 3), ("settings", [])]
)
def test_what_is_malformed_is_not_encoded(field, value):
    with pytest.raises(DamagedError):
        encode({**RECORD, field: value})
