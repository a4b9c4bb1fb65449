"""Augmentations, and Pillow's resize, beside what torchvision makes of the same images (tests/reference/make_pixels.py)."""

import numpy as np
import pytest
from support import ROOT

from hvd_vgg.config import ImageConfig
from hvd_vgg.data import augment, colour, transforms
from hvd_vgg.data.augment import OPERATIONS, erased_rectangle, jitter_steps, standard_normals, trivial_choice
from hvd_vgg.seeds import uniform_draws

EVERYTHING = ImageConfig(augment="crop", auto_augment="trivial", color_jitter=0.4, pca_lighting=0.1, random_erasing=0.5)


@pytest.fixture(scope="module")
def reference():
    with np.load(ROOT / "tests" / "reference" / "pixels.npz", allow_pickle=False) as file:
        return dict(file)


def cases(reference, kind):
    """Yields the other parts of each name that begins with `kind`, and its array."""
    found = [(name.split("/")[1:], array) for name, array in reference.items() if name.startswith(f"{kind}/")]
    assert found
    return found


def draws_of(count, n=20_000):
    return uniform_draws(np.stack([np.arange(n), np.full(n, 9)], 1).astype(np.int64), count)


def difference(found, expected):
    return np.abs(found.astype(int) - expected)


def chi_squared(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_torchvisions(reference, name):
    """Within a unit of 255; where it interpolates, also by the 1/64 of a pixel by which OpenCV rounds a point both ways."""
    chosen = [case for case in cases(reference, "operation") if case[0][0] == name]
    assert len(chosen) >= (0 if name == "Identity" else 2)
    for (_, number, sign, image), expected in chosen:
        found = reference["images"][int(image)].copy()
        steepest = sum(np.abs(np.diff(found.astype(int), axis=axis)).max() for axis in (0, 1))
        OPERATIONS[name].apply(found, int(sign) * OPERATIONS[name].magnitude(int(number)))
        allowed = 1 + steepest / 60 if name in ("ShearX", "ShearY", "Rotate") else 1
        assert difference(found, expected).max() <= allowed
        assert (difference(found, expected) > 1).mean() < 0.005
        assert ((found == 0).all(-1) == (expected == 0).all(-1)).mean() > 0.99  # the same pixels lie outside


def test_magnitudes_are_torchvisions(reference):
    """But for its float32, which makes 15.999999 of 16 pixels."""
    for (name,), expected in cases(reference, "magnitudes"):
        magnitudes = [OPERATIONS[name].magnitude(number) for number in range(len(expected) - 1)]
        assert magnitudes == pytest.approx(expected[:-1], abs=2e-6)
        assert OPERATIONS[name].signed == expected[-1]
    assert list(OPERATIONS) == [name for (name,), _ in cases(reference, "magnitudes")]


def test_jitter_is_torchvisions(reference):
    """Steps in turn: what is a unit after the first may be 2 after a rise of contrast, in less than one of 200 values."""
    for (steps, image), expected in cases(reference, "jitter"):
        found = reference["images"][int(image)].copy()
        for kind, factor in zip(steps.split()[::2], steps.split()[1::2]):
            getattr(colour, f"adjust_{kind}")(found, float(factor))
        assert difference(found, expected).max() <= 2
        assert (difference(found, expected) > 0).mean() < 0.005


def test_jitter_draws_orders_and_factors_uniformly():
    """All six orders, and each factor by itself, for a strength that reaches 0."""
    draws = draws_of(4)
    steps = [jitter_steps(1.5, row) for row in draws.tolist()]
    orders = np.unique([[adjust.__name__ for adjust, _ in each] for each in steps], axis=0, return_counts=True)[1]
    assert len(orders) == 6 and chi_squared(orders, len(draws) / 6) < 20.5  # 5 degrees of freedom: p = 0.001
    factors = np.array([[factor for _, factor in each] for each in steps])
    for column in factors.T:
        counts = np.histogram(column, 20, (0, 2.5))[0]
        assert counts.sum() == len(draws) and chi_squared(counts, len(draws) / 20) < 43.8  # 19
    assert all(low <= factor < high for low, high in [(0.6, 1.4)] for _, factor in jitter_steps(0.4, draws[0].tolist()))


def test_lighting_is_alexnets(reference):
    """The numbers of many ImageNet programs in PyTorch, for values 0..1."""
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    for amounts in ([0.1, -0.2, 0.05], [-3.0, 1.0, 2.0], [2.5, 0.0, 0.0], [0.0, 0.0, 0.0]):
        found = reference["images"][0].copy()
        colour.add_lighting(found, amounts)
        expected = reference["images"][0] / 255 + (vectors * np.array(amounts) * values).sum(1)
        assert difference(found, np.clip(255 * expected, 0, 255)).max() <= 1


def test_standard_normals_are_normal():
    """By moments, and by the shares within 1, 2 and 3 deviations."""
    found = np.array([standard_normals(row) for row in draws_of(4).tolist()])
    assert found.shape == (20_000, 4) and np.isfinite(standard_normals([0.0, 0.0])).all()
    assert np.abs(found.mean(0)).max() < 0.03 and np.abs(found.std(0) - 1).max() < 0.02
    assert np.abs((found**3).mean(0)).max() < 0.1 and np.abs((found**4).mean(0) - 3).max() < 0.2
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (np.abs(found) < deviations).mean() == pytest.approx(share, abs=0.006)
    assert np.abs(np.corrcoef(found.T) - np.eye(4)).max() < 0.03


def test_erased_rectangles_are_torchvisions(reference):
    """Drawn for the same image: as frequent in each of 8 ranges of top, left, height, width and area."""
    theirs = reference["erased"].astype(float)
    ours = np.array([erased_rectangle(64, 64, row) for row in draws_of(22).tolist()], float)
    assert (ours[:, :2] + ours[:, 2:] <= 64).all() and (ours[:, 2:] < 64).all()
    for column in (*zip(ours.T, theirs.T), (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])):
        edges = np.quantile(np.concatenate(column), np.linspace(0, 1, 9)) + [-1, *[0] * 7, 1]
        mine, other = (np.histogram(each, edges)[0] for each in column)
        pooled = (mine + other) / (len(ours) + len(theirs))
        assert chi_squared(mine, pooled * len(ours)) + chi_squared(other, pooled * len(theirs)) < 24.3  # 7


def test_trivial_choices_are_uniform():
    """In operation, bin and sign, which only signed operations have."""
    chosen = [trivial_choice(row) for row in draws_of(3).tolist()]
    names, counts = np.unique([name for name, _ in chosen], return_counts=True)
    assert set(names) == set(OPERATIONS) and chi_squared(counts, len(chosen) / 14) < 34.5  # 13
    degrees = np.array([magnitude for name, magnitude in chosen if name == "Rotate"])
    bins, counts = np.unique(np.abs(degrees), return_counts=True)
    assert (
        bins.tolist() == [135 * number / 30 for number in range(31)] and chi_squared(counts, len(degrees) / 31) < 59.7
    )  # 30
    assert (degrees > 0).mean() == pytest.approx(0.5 * 30 / 31, abs=0.05)
    assert min(magnitude for name, magnitude in chosen if name in ("Solarize", "Posterize")) == 0


def test_params_of_augmentations_never_change():
    """They follow those of crop and flip, each in its place whatever else is on. Literal numbers, as of the first ones."""
    seeds = np.array([[123, 7]], np.int64)
    (bare,) = transforms.augmentation_params(seeds, ImageConfig())
    (params,) = transforms.augmentation_params(seeds, EVERYTHING)
    assert params[: len(bare)] == bare and len(params) == 33 + augment.DRAWS == 67
    assert params == transforms.augmentation_params(seeds, ImageConfig(random_erasing=0.1))[0]
    assert params[33:36] == pytest.approx([0.9476217021402263, 0.40737239128708724, 0.5714201643748329], abs=1e-15)


def test_train_image_augments_after_the_flip(reference):
    """In its order; and erases as often as it was asked to, in the mean colour."""
    encoded, sizes = reference["encoded/PNG"].tobytes(), 0
    for n in range(40):
        (params,) = transforms.augmentation_params(np.array([[5, n]], np.int64), EVERYTHING)
        found, expected = np.empty((2, 32, 32, 3), np.uint8)
        transforms.train_image(encoded, params, EVERYTHING, found)
        transforms.train_image(encoded, params[:33], ImageConfig(), expected)
        name, magnitude = trivial_choice(params[33:36])
        OPERATIONS[name].apply(expected, magnitude)
        for adjust, factor in jitter_steps(0.4, params[36:40]):
            adjust(expected, factor)
        colour.add_lighting(expected, [0.1 * each for each in standard_normals(params[40:44])[:3]])
        if params[44] < 0.5:
            top, left, height, width = erased_rectangle(32, 32, params[45:])
            expected[top : top + height, left : left + width] = (124, 116, 104)
            sizes += height * width > 0
        assert (found == expected).all()
    assert 10 < sizes < 30


def test_pillow_crop_is_torchvisions(reference):
    """A random crop, resized with its antialiased filter. A window's edge is decoded without the colour beside it."""
    for (kind, window), expected in cases(reference, "crop"):
        found = np.empty_like(expected)
        window = tuple(map(int, window.split()))
        transforms._decode_and_resize(reference[f"encoded/{kind}"].tobytes(), window, "pillow", found)
        inner = slice(None) if kind == "PNG" else slice(6, -6)
        assert difference(found, expected)[inner, inner].max() <= 1


def test_pillow_evaluation_is_torchvisions(reference):
    """Resize of the whole image, then the central crop: shrunk, enlarged, and with a crop of 1."""
    for (kind, sizes), expected in cases(reference, "centre"):
        size, shorter = map(int, sizes.split())
        found = np.empty_like(expected)
        transforms.eval_image(reference[f"encoded/{kind}"].tobytes(), size / shorter, "pillow", found)
        assert difference(found, expected).max() <= 1
        assert difference(found, expected).mean() < 0.02
