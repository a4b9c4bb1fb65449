"""What old software can read: Python 3.8's syntax and library, TensorFlow 2.6's names."""

import subprocess

from support import BIN, ROOT
from tensorflow_names import KNOWN, known, used, used_by_package


def test_versions_python_3_8_has_all_that_is_used():
    folders = [ROOT / name for name in ("hvd_vgg", "tests", "benchmarks")]
    found = subprocess.run([BIN / "vermin", "--target=3.8-", "--violations", "--no-tips", *folders], capture_output=True)
    assert found.returncode == 0, found.stdout.decode()


def test_versions_tensorflow_2_6_has_all_that_is_used():
    """Of what is new, tests/programs/tensorflow_names.py says whether 2.6 has it."""
    places = used_by_package()
    new = "; ".join(f"{name} ({', '.join(places[name])})" for name in places if name not in known())
    assert not new, f"not in {KNOWN.name}: {new}"
    assert set(known()) == set(places), f"{KNOWN.name} has names that are no longer used"


def test_versions_find_names_wherever_they_are():
    source = "@tf.function\ndef f(x: 'tf.no') -> tf.int8:\n  # tf.no\n  return tf.a.b(x, tf.c[tf.d])\n"
    assert sorted(used(source)) == [("tf.a.b", 4), ("tf.c", 4), ("tf.d", 4), ("tf.function", 1), ("tf.int8", 2)]


def test_versions_tensorflow_goes_by_one_name():
    """Else its names would not be found."""
    for path in (ROOT / "hvd_vgg").rglob("*.py"):
        imports = [line.strip() for line in path.read_text().splitlines() if "import" in line and "tensorflow" in line]
        imports = [line for line in imports if line.startswith(("import ", "from "))]
        assert set(imports) <= {"import tensorflow as tf", "import horovod.tensorflow as hvd"}, path
