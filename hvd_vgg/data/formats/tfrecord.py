"""The TFRecord format: framing and checksums, and the index of a file."""

import functools
import re
import struct
from typing import List, Pattern, Sequence, Tuple, Union

import crc32c

from hvd_vgg.data.formats.example import STANDARD, Features, parse_label
from hvd_vgg.data.formats.shard_file import MAX_RECORD_BYTES, OpenShard, Shard, data_failure, place, require_plain
from hvd_vgg.errors import Failure
from hvd_vgg.watchdog import watchdog

HEADER_BYTES, FOOTER_BYTES = 12, 4  # a record: its length, the length's checksum, the data, the data's checksum
# A label is searched for in this much of a record's beginning and end before the whole record is read.
_SEARCH_BYTES = 512


def masked_crc(data: Union[bytes, memoryview]) -> int:
    """Returns the checksum that TFRecord files hold: CRC-32C, rotated and offset (tensorflow/core/lib/hash/crc32c.h)."""
    return _mask(crc32c.crc32c(data))


def _mask(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record_header(length: int) -> bytes:
    """Returns the header of a record of `length` bytes of data."""
    header = struct.pack("<Q", length)
    return header + struct.pack("<I", masked_crc(header))


def frame(data: bytes) -> bytes:
    """Returns a record that holds `data`."""
    return b"".join(frame_parts([data]))


def frame_parts(data: Sequence[bytes]) -> List[bytes]:
    """Returns a record that holds the parts of its data one after the other, in parts itself, without copies of them."""
    crc = functools.reduce(lambda before, part: crc32c.crc32c(part, before), data, 0)
    return [record_header(sum(map(len, data))), *data, struct.pack("<I", _mask(crc))]


def describe_damage(file: OpenShard, offset: int, found: bytes) -> str:
    """Returns what is wrong with a record's data at `offset`, followed by their checksum; "" where the checksum holds."""
    length = len(found) - FOOTER_BYTES
    computed, (stored,) = masked_crc(memoryview(found)[:length]), struct.unpack_from("<I", found, length)
    if computed == stored:
        return ""
    text = f"the checksum of its {length} bytes of data is {computed:08x}, the file says {stored:08x}: damaged"
    zeros = re.search(rb"\0{64}", found)  # no data of an image have so many
    return f"{text}, with {file.zeros_around(offset + zeros.start())}" if zeros else text


def scan(file: OpenShard, features: Features = STANDARD) -> Shard:
    """Returns the index of one file from its records' headers and labels, nearly always without reading the images.

    Raises Failure(DATA) naming the record where the file is empty or cut off, a header's checksum is wrong, or a record has
    anything but one label; OSError.
    """
    path, size = file.path, file.size
    entry = _label_entry(features.label)
    records: List[Tuple[int, int, int]] = []
    start, unpack = 0, struct.Struct("<QI").unpack_from

    def failure(reason: str) -> Failure:
        return data_failure(f"{place(path, len(records), start)}: {reason}")

    def cut_off(expected: str) -> Failure:
        return failure(
            f"expected {expected}, but the file ends at byte {size} (cut off while copying?). Copy the shard again"
        )

    while start < size:
        if not len(records) % 4096:
            watchdog.heartbeat(phase="start")
        # One read for the header and what follows it. No more of it: records are far apart, and the rest is the image.
        head = file.read(HEADER_BYTES + _SEARCH_BYTES, start)
        if head and not head[:HEADER_BYTES].strip(b"\0"):
            raise failure(
                f"{file.zeros_around(start)} of {size} bytes, where a record was expected (a copy that was cut off after "
                f"its space was reserved, or a hole in it). Copy the shard again"
            )
        if len(head) < HEADER_BYTES:
            raise cut_off(f"a header of {HEADER_BYTES} bytes")
        length, checksum = unpack(head)
        if checksum != masked_crc(head[:8]):
            if not start:
                require_plain(path, head, "a plain TFRecord file")
            raise failure(
                "the checksum of the record's length is wrong (not a TFRecord file, or damaged). Copy the shard again"
            )
        end = start + HEADER_BYTES + length + FOOTER_BYTES
        if end > size:
            raise cut_off(f"{length} bytes of data and a checksum")
        if length > MAX_RECORD_BYTES:
            limit = f"expected at most {MAX_RECORD_BYTES}, one image"
            raise failure(f"it claims {length} bytes of data; {limit}. Leave the record out")
        try:
            label = _find_label(head, file, start + HEADER_BYTES, length, entry, features)
        except ValueError as error:
            damage = describe_damage(file, start + HEADER_BYTES, file.read(length + FOOTER_BYTES, start + HEADER_BYTES))
            raise failure(f"{damage}. Copy the shard again" if damage else f"{error}. {features.expected}") from error
        records.append((start + HEADER_BYTES, length, label))
        start = end
    return Shard.of_records(records)


@functools.lru_cache(maxsize=4)
def _label_entry(name: bytes) -> Pattern[bytes]:
    """Returns what matches the name and Feature of a label of one byte (0..127) or two, packed or not.

    It is what writers of Examples produce. A match is a shortcut to what `parse_label` would find; reading the record whole
    verifies it.
    """
    return re.compile(
        b"\n" + re.escape(bytes([len(name)]) + name) + rb"\x12(?:(?:\x05\x1a\x03\n\x01|\x04\x1a\x02\x08)([\x00-\x7f])"
        rb"|(?:\x06\x1a\x04\n\x02|\x05\x1a\x03\x08)([\x80-\xff][\x01-\x7f]))"
    )


def _find_label(head: bytes, file: OpenShard, offset: int, length: int, entry: Pattern[bytes], features: Features) -> int:
    """Returns the label of the record of `length` bytes at `offset`, whose header and first bytes are `head`."""
    found = entry.search(head, HEADER_BYTES, HEADER_BYTES + length)
    if not found and length > _SEARCH_BYTES:
        found = entry.search(file.read(_SEARCH_BYTES, offset + length - _SEARCH_BYTES))
    if not found:
        return parse_label(file.read(length, offset), features)
    low, high = found[1] or found[2][:1], found[2] or b"\0\0"
    return low[0] & 0x7F | high[1] << 7


def could_be_index(shard: Shard, size: int) -> bool:
    """Returns whether `scan` could have made `shard` of a file of `size` bytes."""
    first, ends = shard.offsets[0], shard.offsets + shard.lengths + FOOTER_BYTES
    return bool(first == HEADER_BYTES and (shard.offsets[1:] == ends[:-1] + HEADER_BYTES).all() and ends[-1] == size)
