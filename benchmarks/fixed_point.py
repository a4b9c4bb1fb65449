"""How exact sums in fixed point are: the gradients of real micro-batches of 2 images, summed both ways, against float64.

    python benchmarks/fixed_point.py --data_dir=DIR [--checkpoint=FILE] [--sums=8,64,256] [TRAIN'S FLAGS]

float32: added from the first micro-batch to the last. int32: in fixed point, under the limits that these micro-batches
leave to the next step, which are the loosest that it may have. Each cell is the norm of the difference over the norm of
the sum: the median and the largest of all layers. bound: that of parallel/fixed_point.py over the norm, of the worst
layer, where each element is as wrong as can be.
"""

import statistics
from pathlib import Path

import measure

IMAGES = 2  # in a micro-batch


def main():
    """Prints a row for each number of micro-batches, of kernels and of biases."""
    parser = measure.command_line(__doc__)
    parser.add_argument("--checkpoint", help="of these flags, to take the weights from; else they are new")
    parser.add_argument("--sums", type=measure.list_of(measure.positive), default="8,64,256", help="micro-batches in a sum")
    options, words = parser.parse_known_args()
    import numpy as np
    import tensorflow as tf

    from hvd_vgg.commands.evaluate import load_checkpoint
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.data.index import scan_split
    from hvd_vgg.data.loader import train_batches
    from hvd_vgg.flags import parse_flags
    from hvd_vgg.parallel import fixed_point
    from hvd_vgg.parallel.init import start
    from hvd_vgg.training.backward import make_backward
    from hvd_vgg.training.state import assign_variables, initial_state
    from hvd_vgg.training.train_step import step_inputs

    most = max(options.sums)
    config = parse_flags(TrainConfig, [*words, f"--global_batch={IMAGES * most}", f"--device_batch={IMAGES}"])
    start()
    state = initial_state(config)
    if options.checkpoint:
        assign_variables(state.variables(), load_checkpoint(Path(options.checkpoint)))
    backward = tf.function(make_backward(state, config, "NHWC", []), autograph=False)
    batch = next(train_batches(scan_split(config.data_dir, "train"), config, 1, range(1), 0, 1, 1))
    position, keys, _ = step_inputs(config, 0, 0, 0.0)
    gradients = []
    for low in range(0, IMAGES * most, IMAGES):
        part = backward(batch.images[low : low + IMAGES], batch.labels[low : low + IMAGES], position + low, keys)
        gradients.append([gradient.numpy() for gradient in part.gradients])

    rows = []
    for count in options.sums:
        found = {}
        for name, summands in zip(state.weights, zip(*gradients[:count])):
            magnitudes = tf.stack([fixed_point.magnitudes([each]) for each in summands])
            limits = tf.constant(fixed_point.first_limits(1))
            for _ in range(4):  # to those that they ask for
                tally = fixed_point.tally(magnitudes, limits)
                limits = fixed_point.next_limits(limits, tally)
            inverse = fixed_point.inverse_scales(limits, fixed_point.tally(magnitudes, limits))
            total = sum(fixed_point.encode(each, fixed_point.scales(limits), tf.int32) for each in summands)
            exact = np.sum(np.array(summands, np.float64), axis=0)
            norm = np.linalg.norm(exact) or 1.0
            bound = count / 2 * float(inverse[0]) * np.sqrt(exact.size) / norm
            errors = [
                np.linalg.norm(each - exact) / norm for each in (sum(summands), fixed_point.decode(total, inverse).numpy())
            ]
            found.setdefault(name.split("/")[1], []).append([*errors, bound])
        for kind, layers in found.items():
            float32, int32, bounds = zip(*layers)
            cells = [f"{statistics.median(each):.1e}, {max(each):.1e}" for each in (float32, int32)]
            rows.append((f"{count}, {kind}", *cells, f"{max(bounds):.1e}"))
    measure.print_table(f"Relative error of a sum, {config.model}", ("micro-batches", "float32", "int32", "bound"), rows)


if __name__ == "__main__":
    measure.run(main)
