"""What float16 on the wire costs: relative error of a dense layer's gradient against float64, each way to exchange it.

    mpirun -np 4 --oversubscribe --bind-to none python benchmarks/wire_dtype.py

256 rows of 4096 inputs as after ReLU and dropout and 1000 output gradients of a mean; norm of the difference over norm.
"""

import measure

ROWS, INPUTS, OUTPUTS = 256, 4096, 1000


def main():
    """Prints the table on rank 0."""
    measure.command_line(__doc__).parse_args()
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.data.sampler import slice_bounds
    from hvd_vgg.parallel import comm, exchange
    from hvd_vgg.parallel.init import start

    start()
    random, rows = np.random.default_rng(0), []
    dropped = 2 * (random.random((ROWS, INPUTS)) < 0.5)
    x = (np.maximum(random.normal(size=(ROWS, INPUTS)), 0) * dropped).astype(np.float32)
    d = (random.normal(size=(ROWS, OUTPUTS)) * 1e-2 / ROWS).astype(np.float32)
    exact = x.astype(np.float64).T @ d.astype(np.float64)
    low, high = slice_bounds(ROWS, comm.rank(), comm.size())
    for wire_dtype in ("float32", "float16"):

        @tf.function
        def both(x, d, wire_dtype=wire_dtype):
            inputs = exchange.gather_rows(x, "inputs_fc2", ROWS, wire_dtype, 1.0)
            outputs = exchange.gather_rows(d, "outputs_fc2", ROWS, wire_dtype, float(ROWS))
            gathered = exchange.product("fc2", inputs, outputs)
            local = {"fc2/kernel": tf.matmul(x, d, transpose_a=True)}
            return gathered["fc2/kernel"], exchange.sum_gradients(local, wire_dtype, float(ROWS))["fc2/kernel"]

        found = both(tf.constant(x[low:high]), tf.constant(d[low:high]))
        errors = [np.linalg.norm(kernel.numpy() - exact) / np.linalg.norm(exact) for kernel in found]
        rows.append((wire_dtype, *(f"{error:.1e}" for error in errors)))
    if comm.is_root():
        title = f"Relative error of a gradient on {comm.size()} ranks"
        measure.print_table(title, ("--wire_dtype", "--exchange=factored", "--exchange=allreduce"), rows)
    comm.shutdown()


if __name__ == "__main__":
    measure.run(main)
