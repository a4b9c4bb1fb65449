"""Makes hvd_vgg/data/imagenet_classes.txt: the 1000 classes of ILSVRC2012, sorted by WNID, each with WordNet's words for it.

    python tests/reference/make_imagenet_classes.py

Run where timm is: its package has both the list of the 1000 WNIDs and the lemmas of each synset of ImageNet, which are those
of Princeton's WordNet 3.0. Where synsets have the same words (crane, the bird and the machine), the WNID tells them apart.
"""

from importlib.util import find_spec
from pathlib import Path

TARGET = Path(__file__).resolve().parents[2] / "hvd_vgg" / "data" / "imagenet_classes.txt"


def main():
    """Writes a line `WNID words` for each class."""
    folder = Path(find_spec("timm").origin).parent / "data" / "_info"
    wnids = (folder / "imagenet_synsets.txt").read_text().split()
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    words = dict(line.split("\t") for line in lines)
    assert len(set(wnids)) == 1000 and wnids == sorted(wnids)
    TARGET.write_text("".join(f"{wnid} {words[wnid].strip()}\n" for wnid in wnids))


if __name__ == "__main__":
    main()
