"""What old software can read: Python 3.8's syntax and library, TensorFlow 2.6's names."""

import subprocess
from pathlib import Path

import tensorflow_names
from support import BIN, ROOT


def test_python_3_8_has_all_that_is_used():
    folders = [ROOT / name for name in ("hvd_vgg", "tests", "benchmarks")]
    found = subprocess.run([BIN / "vermin", "--target=3.8-", "--violations", "--no-tips", *folders], capture_output=True)
    assert found.returncode == 0, found.stdout.decode()


def test_tensorflow_2_6_has_all_that_is_used():
    used = tensorflow_names.used_by_package()
    new = "; ".join(f"{name} ({', '.join(places)})" for name, places in used.items() if name not in tensorflow_names.known())
    assert not new, (
        f"not in {tensorflow_names.KNOWN.name}: {new}. Do without, or see whether 2.6 has it by tests/programs/tensorflow_names.py"
    )
    assert set(tensorflow_names.known()) == set(used), (
        f"{tensorflow_names.KNOWN.name} has names that are no longer used: run tests/programs/tensorflow_names.py"
    )


def test_names_are_found_wherever_they_stand_and_with_their_line():
    source = "@tf.function\ndef f(x: 'tf.no') -> tf.int8:\n  # tf.no\n  return tf.a.b(x, tf.c[tf.d])\n"
    assert sorted(tensorflow_names.used(source)) == [
        ("tf.a.b", 4),
        ("tf.c", 4),
        ("tf.d", 4),
        ("tf.function", 1),
        ("tf.int8", 2),
    ]


def test_tensorflow_goes_by_one_name():
    for path in Path(ROOT / "hvd_vgg").rglob("*.py"):
        imports = [line.strip() for line in path.read_text().splitlines() if "import" in line and "tensorflow" in line]
        imports = [line for line in imports if line.startswith(("import ", "from "))]
        assert set(imports) <= {"import tensorflow as tf", "import horovod.tensorflow as hvd"}, path
