"""Small data sets as people have them before `hvd-vgg prepare`: the same images in each layout."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np

WNIDS = ("n01440764", "n01443537", "n01484850")
KIT_IDS = {"n01440764": 3, "n01443537": 1, "n01484850": 2}  # whose order is not that of the WNIDs


def encode(seed, kind="JPEG", mode="RGB", size=(48, 40)):
    """Returns an image of noise in blocks, width by height pixels."""
    from PIL import Image

    width, height = size
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    image = Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))[:height, :width])
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    return file.getvalue()


def images(train=4, validation=2):
    """Returns {split: [(WNID, file's name, bytes)]}, sorted by class in train, and in order of the names in validation."""
    found = {
        "train": [
            (wnid, f"{wnid}_{7 * i}.JPEG", encode(100 * label + i)) for label, wnid in enumerate(WNIDS) for i in range(train)
        ]
    }
    found["train"].sort(key=lambda row: row[:2])
    classes = [WNIDS[(2 * i) % len(WNIDS)] for i in range(validation * len(WNIDS))]
    rows = [(wnid, f"ILSVRC2012_val_{i + 1:08d}.JPEG", encode(1000 + i)) for i, wnid in enumerate(classes)]
    return {**found, "validation": rows}


def write_folders(root, rows):
    """Writes a directory for each class."""
    for split, name in (("train", "train"), ("validation", "val")):
        for wnid, file, data in rows.get(split, ()):
            path = Path(root) / name / wnid / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def tar_of(rows):
    """Returns an archive of (name, bytes), in reverse order of the names."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in sorted(rows, reverse=True):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write_ilsvrc(root, rows):
    """Writes ILSVRC2012's two archives and its development kit."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    classes = [(f"{w}.tar", tar_of([(name, data) for wnid, name, data in rows["train"] if wnid == w])) for w in WNIDS]
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of([row[1:] for row in rows["validation"]]))
    write_kit(root / "ILSVRC2012_devkit_t12.tar.gz", [KIT_IDS[row[0]] for row in rows["validation"]])


def write_kit(path, truth):
    """Writes a development kit: meta.mat, with a synset that is no class, and the ground truth in the kit's own numbers."""
    import scipy.io

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = [(number, wnid, f"words of {wnid}", 0) for wnid, number in KIT_IDS.items()]
    meta = io.BytesIO()
    table = np.array([*synsets, (4, "n00001740", "entity", 3)], dtype=fields)
    scipy.io.savemat(meta, {"synsets": table.reshape(-1, 1)})
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (
            ("meta.mat", meta.getvalue()),
            ("ILSVRC2012_validation_ground_truth.txt", "".join(f"{number}\n" for number in truth).encode()),
        ):
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_parquet(root, rows, files=2, group=3):
    """Writes Parquet as Hugging Face's `datasets` does, in row groups of `group` rows."""
    import pyarrow
    from pyarrow import parquet

    (Path(root) / "data").mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": list(WNIDS), "_type": "ClassLabel"}}
    noted = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for split, of_split in rows.items():
        for number in range(files):
            part = of_split[number * len(of_split) // files : (number + 1) * len(of_split) // files]
            columns = {
                "image": [{"bytes": data, "path": name} for _, name, data in part],
                "label": pyarrow.array([WNIDS.index(wnid) for wnid, _, _ in part], pyarrow.int64()),
            }
            table = pyarrow.table(columns).replace_schema_metadata(noted)
            path = Path(root) / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet"
            parquet.write_table(table, path, row_group_size=group)


def write_webdataset(root, rows):
    """Writes one tar shard a split."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        with tarfile.open(root / f"tiny-{split}-0000.tar", "w") as archive:
            for number, (wnid, _, data) in enumerate(of_split):
                for name, content in ((f"{number:06d}.jpg", data), (f"{number:06d}.cls", str(WNIDS.index(wnid)).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
