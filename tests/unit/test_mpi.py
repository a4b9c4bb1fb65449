"""Which MPI is loaded, and which mpirun is on PATH."""

import pytest

from hvd_vgg.run import mpi


@pytest.mark.parametrize("path", ["/opt/x/libmpi.so.40.30.8", "/opt/x/libmpich.so.12", "/home/my env/lib/libmpi.so.40.30.7"])
def test_the_library_of_mpi_is_found_among_those_loaded(path):
    line = "7f57c2e00000-7f57c2e41000 r--p 00000000 fe:00 329634    "
    maps = [f"{line}/usr/lib/libc.so.6", f"{line}{path}", f"{line}/opt/x/libmpi_cxx.so.40", f"{line}[stack]"]
    assert mpi._libraries("\n".join(maps)) == [path]
