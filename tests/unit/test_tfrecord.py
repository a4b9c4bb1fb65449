import struct
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from support import example, picture, write_shard

from hvd_vgg.data.formats.example import encode_example, example_parts, parse_features, parse_label
from hvd_vgg.data.formats.shard_file import OpenShard
from hvd_vgg.data.formats.tfrecord import FOOTER_BYTES, frame, frame_parts, masked_crc, record_header
from hvd_vgg.errors import Failure


def field(number, data):
    """A length-delimited field of the wire format."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value):
    return bytes([value & 0x7F | 0x80]) + varint(value >> 7) if value > 0x7F else bytes([value])


def entry(name, feature):
    return field(1, name) + field(2, feature)


LABEL_3 = entry(b"image/class/label", field(3, field(1, b"\x03")))
IMAGE_X = entry(b"image/encoded", field(1, field(1, b"X")))


def parse(*entries):
    """What is parsed of an Example of map entries, with bytes behind it that are not its own."""
    data = field(1, b"".join(field(1, each) for each in entries))
    return parse_features(data + b"\x0a\x02\x0a\x00", len(data))


def test_framing_is_that_of_tensorflows_writer(tmp_path):
    write_shard(tmp_path / "shard", [b"some data", b""])
    expected = b"".join(
        record_header(len(data)) + data + struct.pack("<I", masked_crc(data)) for data in (b"some data", b"")
    )
    assert (tmp_path / "shard").read_bytes() == expected
    assert len(record_header(9)) + 9 + FOOTER_BYTES == len(expected) - 16


@pytest.mark.parametrize("length", [0, 1, 127, 128, 4095, 4096, 20_000])
def test_example_in_parts_is_that_of_protobuf(length):
    """Framed as by TensorFlow's writer; a long value is one of the parts itself, not copied."""
    features = {"image/encoded": bytes(range(256)) * (length // 256) + b"x" * (length % 256), "b": b"y" * 5000, "label": 300}
    of_protobuf = {
        name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        if isinstance(value, int)
        else tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in features.items()
    }
    message = tf.train.Example(features=tf.train.Features(feature=of_protobuf))
    data, parts = encode_example(features), example_parts(features)
    assert data == message.SerializeToString(deterministic=True) == b"".join(parts)
    assert any(part is features["b"] for part in parts)
    record = record_header(len(data)) + data + struct.pack("<I", masked_crc(data))
    assert frame(data) == b"".join(frame_parts(parts)) == record


def test_parse_features_finds_what_protobuf_holds():
    """ImageNet's other features, in an order of hashes; labels at the limits of the index."""
    more = {
        "image/height": tf.train.Feature(int64_list=tf.train.Int64List(value=[40])),
        "image/class/text": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"tench", b"x" * 300])),
        "image/object/bbox/xmin": tf.train.Feature(float_list=tf.train.FloatList(value=[0.1, 0.2])),
        "image/object/bbox/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2, 3])),
        "a" * 200: tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"long name"])),
        "image/empty": tf.train.Feature(),
    }
    for label in (0, 1, 127, 128, 999, 16384, 2**31 - 1, -1, -(2**31)):
        data = example(picture(label % 7, 1), label, **more)
        assert parse_features(data, len(data)) == (picture(label % 7, 1), label)
        assert parse_label(data) == label


@pytest.mark.parametrize(
    ("feature", "label"),
    [
        (field(3, field(1, b"\x85\x01")), 133),  # packed
        (field(3, b"\x08\x85\x01"), 133),  # not packed
        (b"\x08\x07" + field(3, b"\x11" + bytes(8) + field(1, b"\x02") + b"\x1d" + bytes(4)), 2),  # among unknown fields
    ],
)
def test_parse_features_reads_every_encoding(feature, label):
    assert parse(entry(b"image/class/label", feature), IMAGE_X) == (b"X", label)


def test_parse_features_takes_entries_in_any_form():
    """The value before the name; of two entries of a name the first."""
    swapped = field(2, field(3, field(1, b"\x05"))) + field(1, b"image/class/label")
    assert parse(IMAGE_X, swapped, LABEL_3) == (b"X", 5)
    assert parse(b"", LABEL_3, IMAGE_X) == (b"X", 3)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([LABEL_3], "image/encoded is missing; it has image/class/label"),
        ([IMAGE_X, entry(b"b", b"")], "image/class/label is missing; it has image/encoded, b"),
        ([], "image/encoded is missing; it has none"),
        ([LABEL_3, entry(b"image/encoded", b"")], "image/encoded must hold one byte string"),
        ([LABEL_3, entry(b"image/encoded", field(1, field(1, b"")))], "image/encoded must hold one byte string"),
        ([LABEL_3, entry(b"image/encoded", field(1, 2 * field(1, b"X")))], "image/encoded must hold one byte string"),
        ([IMAGE_X, entry(b"image/class/label", field(1, field(1, b"1")))], "image/class/label holds no integer"),
        ([IMAGE_X, entry(b"image/class/label", field(3, field(1, b"")))], "image/class/label holds no integer"),
        ([IMAGE_X, entry(b"image/class/label", field(3, field(1, b"\1\2")))], "image/class/label holds several integers"),
        ([IMAGE_X, entry(b"image/class/label", field(3, b"\x08\1\x08\2"))], "image/class/label holds several integers"),
        ([IMAGE_X, entry(b"image/class/label", field(3, field(1, varint(2**31))))], "image/class/label is 2147483648"),
        ([IMAGE_X, b"\x0b"], r"not a tf.train.Example \(wire type 3\)"),
        ([IMAGE_X, b"\x0a\x7f"], r"not a tf.train.Example \(a field is longer"),
        ([IMAGE_X, b"\x0a\xff"], r"not a tf.train.Example \(an integer is cut off"),
        ([IMAGE_X, b"\xff" * 11], r"not a tf.train.Example \(an integer is cut off or too long\)"),
    ],
)
def test_parse_features_says_what_is_wrong(entries, message):
    with pytest.raises(ValueError, match=message):
        parse(*entries)


def test_parse_features_never_reads_beyond_the_record():
    """Every prefix of a record is refused, whatever bytes follow it in memory."""
    whole = field(1, field(1, IMAGE_X) + field(1, LABEL_3))
    assert parse_features(whole, len(whole)) == (b"X", 3)
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            parse_features(whole, length)


def test_parse_features_refuses_millions_of_fields_cheaply():
    """Of entries without a name, and of an image list of empty strings: an object for each would take a hundred times it."""
    entries = field(1, b"") * 100_000
    strings = field(1, entry(b"image/encoded", field(1, field(1, b"") * 100_000)))
    for data, message in (
        (field(1, entries), "is missing; it has"),
        (field(1, field(1, LABEL_3) + strings), "must hold one byte string"),
    ):
        tracemalloc.start()
        with pytest.raises(ValueError, match=message):
            parse_features(data, len(data))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * len(data)


def test_message_is_printable_whatever_names_hold():
    with pytest.raises(ValueError, match="is missing") as raised:
        parse(entry("\x1b[2J\u202e".encode(), b""))
    assert str(raised.value).isprintable() and "\\x1b[2J\\u202e" in str(raised.value)


def test_open_shard_closes_with_its_last_reference(tmp_path):
    (tmp_path / "shard").write_bytes(np.arange(3).tobytes())
    shard = OpenShard(tmp_path / "shard")
    handle = shard.handle
    assert shard.size == 24 and tf.io.gfile.exists(f"/proc/self/fd/{handle}")
    del shard
    assert not tf.io.gfile.exists(f"/proc/self/fd/{handle}")
    with pytest.raises(Failure, match="is a directory"):
        OpenShard(tmp_path)
