"""Writes layouts.zip: the same pictures in the layouts that are read as they are, each made by its own library.

python tests/reference/make_layouts.py [--torchvision=PYTHON]    # none of what it imports is needed by the tests

With tensorflow, tensorflow-datasets, webdataset, pyarrow, Pillow and SciPy; PYTHON has torchvision, whose ImageFolder says
in what order records lie in all layouts. `versions.json` in the archive has the versions used. The archive holds

    folders/{train,val}/WNID/...        files; one class has a directory of its own, one image is a PNG
    folders.json                        ImageFolder's order: {split: [[path below the split, label from 0], ...]}
    imagenet/                           TFRecords in ImageNet's layout, labels from 1, the usual features
    tfds/                               tensorflow-datasets' own writer: features.json, label.labels.txt
    webdataset/                         webdataset.ShardWriter: KEY.jpg (or .png), KEY.cls, KEY.json
    parquet/data/                       columns image {bytes, path} and label, names of classes in Hugging Face's metadata
    ilsvrc/                             a tar of a tar a class, a flat tar, Caffe's list and a dev kit, whose ids are in
                                        another order; all images are named .JPEG, as in ILSVRC2012
    gzip/, zlib/                        the first shard of imagenet/, compressed by TensorFlow's writer
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import scipy.io
import tensorflow as tf
import tensorflow_datasets as tfds
import webdataset
from PIL import Image

CLASSES = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus", "n01484850": "great white shark"}
DEV_KIT_IDS = {"n01440764": 3, "n01443537": 1, "n01484850": 2}
TRAIN, VALIDATION = 6, 3  # images a class
PACKAGES = ("tensorflow-datasets", "webdataset", "pyarrow", "pillow", "scipy")
ORDER = """
import json, os, sys, torchvision
found = {"torchvision": torchvision.__version__}
for split in ("train", "val"):
    root = os.path.join(sys.argv[1], split)
    dataset = torchvision.datasets.ImageFolder(root)
    found[split] = [[os.path.relpath(path, root), label] for path, label in dataset.samples]
    found["classes"] = dataset.classes
print(json.dumps(found))
"""


def picture(number, label, kind):
    """Returns an image of 40 by 48 pixels whose colours tell its label."""
    random, base = np.random.default_rng(number), np.random.default_rng(1000 + label)
    image = np.kron(base.integers(0, 200, (4, 4, 3)), np.ones((10, 12, 1))) + random.integers(0, 55, (40, 48, 3))
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, kind, **({"quality": 75} if kind == "JPEG" else {}))
    return file.getvalue()


def write_folders(folder):
    number = 0
    for split, count in (("train", TRAIN), ("val", VALIDATION)):
        for label, wnid in enumerate(CLASSES):
            for i in range(count):
                number += 1
                kind = "PNG" if (split, label, i) == ("train", 0, 2) else "JPEG"
                # Names of several digits, whose order is not that of the numbers in them; some directories lie deeper.
                name = f"{wnid}_{7 * i}.{kind}" if split == "train" else f"ILSVRC2012_val_{3 * i + label + 1:08d}.JPEG"
                path = folder / split / wnid / ("more" if (label, i % 3) == (1, 0) and split == "train" else "") / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(number, label, kind))


def write_imagenet(folder, split, rows, shards, options=None):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = folder / f"{split}-{number:05d}-of-{shards:05d}"
        with tf.io.TFRecordWriter(str(path), options) as writer:
            for image, name, label, wnid in part(rows, number, shards):
                height, width = tf.io.decode_image(image).shape[:2]
                values = {
                    "image/height": height,
                    "image/width": width,
                    "image/colorspace": b"RGB",
                    "image/channels": 3,
                    "image/class/label": label + 1,
                    "image/class/synset": wnid.encode(),
                    "image/class/text": CLASSES[wnid].encode(),
                    "image/format": b"JPEG",
                    "image/filename": name.encode(),
                    "image/encoded": image,
                }
                feature = {
                    key: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
                    if isinstance(value, int)
                    else tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                    for key, value in values.items()
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def part(rows, number, count):
    """Returns consecutive rows, the parts of unequal length."""
    bounds = [0, *(len(rows) * (i + 1) // count - i for i in range(count - 1)), len(rows)]
    return rows[bounds[number] : bounds[number + 1]]


def write_tfds(folder, splits):
    class Pictures(tfds.core.GeneratorBasedBuilder):
        """Three classes of ImageNet."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                    "file_name": tfds.features.Text(),
                }
            )
            # Else records are in the order of hashes of their keys.
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            for number, (image, name, label, _) in enumerate(rows):
                yield number, {"image": io.BytesIO(image), "label": label, "file_name": name}

    with tempfile.TemporaryDirectory() as made:
        builder = Pictures(data_dir=made)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
        Path(builder.data_dir).rename(folder)


def write_webdataset(folder, splits):
    folder.mkdir()
    for split, rows in splits.items():
        pattern = str(folder / f"pictures-{split}-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=7, mtime=0, verbose=0) as sink:
            for number, (image, name, label, wnid) in enumerate(rows):
                kind = "png" if image.startswith(b"\x89PNG") else "jpg"
                sample = {"__key__": f"{split}/{number:06d}", kind: image, "cls": label}
                sink.write({**sample, "json": {"filename": name, "synset": wnid}})


def write_parquet(folder, splits):
    folder.mkdir(parents=True)
    names = {"names": list(CLASSES), "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": names}}}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], {"huggingface": json.dumps(info)})
    for split, rows in splits.items():
        for number in range(2):
            columns = [
                [{"bytes": each, "path": Path(name).name} for each, name, _, _ in part(rows, number, 2)],
                [label for _, _, label, _ in part(rows, number, 2)],
            ]
            arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema)]
            path = folder / f"{split}-{number:05d}-of-00002.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), path, row_group_size=5)


def write_ilsvrc(folder, splits):
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as whole:
        for wnid in sorted(CLASSES, key=DEV_KIT_IDS.get):  # the archive's order is not that of the names either
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for image, name, _, own in splits["train"]:
                    if own == wnid:
                        add(inner, f"{Path(name).stem}.JPEG", image)
            add(whole, f"{wnid}.tar", file.getvalue())
    rows = sorted(splits["validation"], key=lambda row: Path(row[1]).name)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as whole:
        for image, name, _, _ in reversed(rows):
            add(whole, Path(name).name, image)
    (folder / "val.txt").write_text("".join(f"{Path(name).name} {label}\n" for _, name, label, _ in rows))
    synsets = np.zeros(len(CLASSES), [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")])
    for row, (wnid, number) in zip(synsets, sorted(DEV_KIT_IDS.items(), key=lambda item: item[1])):
        row["ILSVRC2012_ID"], row["WNID"], row["words"], row["num_children"] = float(number), wnid, CLASSES[wnid], 0.0
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets[:, None]}, do_compression=True)
    truth = "".join(f"{DEV_KIT_IDS[wnid]}\n" for *_, wnid in rows).encode()
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as kit:
        add(kit, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(kit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torchvision", metavar="PYTHON", default=sys.executable, help="that has torchvision")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        write_folders(root / "folders")
        order = json.loads(subprocess.check_output([options.torchvision, "-c", ORDER, str(root / "folders")]))
        assert order["classes"] == list(CLASSES)
        splits = {
            split: [
                ((root / "folders" / folder / name).read_bytes(), name, label, list(CLASSES)[label])
                for name, label in order[folder]
            ]
            for split, folder in (("train", "train"), ("validation", "val"))
        }
        (root / "folders.json").write_text(json.dumps({"train": order["train"], "val": order["val"]}))
        for split, rows in splits.items():
            write_imagenet(root / "imagenet", split, rows, 2)
        for kind in ("GZIP", "ZLIB"):
            rows = part(splits["train"], 0, 2)
            write_imagenet(root / kind.lower(), "train", rows, 1, tf.io.TFRecordOptions(compression_type=kind))
        write_tfds(root / "tfds", splits)
        write_webdataset(root / "webdataset", splits)
        write_parquet(root / "parquet" / "data", splits)
        write_ilsvrc(root / "ilsvrc", splits)
        versions = {name: metadata.version(name) for name in PACKAGES}
        versions.update(tensorflow=tf.__version__, torchvision=order["torchvision"])
        (root / "versions.json").write_text(json.dumps(versions))
        with zipfile.ZipFile(Path(__file__).with_name("layouts.zip"), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    entry = zipfile.ZipInfo(path.relative_to(root).as_posix())
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    file.writestr(entry, path.read_bytes())


if __name__ == "__main__":
    main()
