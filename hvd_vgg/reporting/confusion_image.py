"""The confusion matrix as a picture, of any number of classes: NumPy alone draws it, in less time than a plotter imports."""

from typing import Tuple

import numpy as np

_PIXELS = 1000  # of the matrix at most; of more classes several share a row
_MOST_CELL, _NUMBERED_CELL = 64, 36  # pixels of a class: at most, and from which on its share is written into it
_SCALE = 2  # pixels of a dot of a digit
_ADVANCE, _HEIGHT = 4 * _SCALE, 5 * _SCALE  # pixels from one digit to the next; of a digit
_GAP = 6  # pixels between numbers and what they are of
_TICK = 44  # pixels between two numbers beside the matrix, at least
_PAPER, _INK, _DARK, _EMPTY, _FRAME = (np.array(rgb) for rgb in ((255,) * 3, (0,) * 3, (8, 48, 107), (225,) * 3, (120,) * 3))
# Rows of the digits 0 to 9, three dots each, as bits.
_DIGITS = (0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71111, 0o75757, 0o75717)


def draw_confusions(pairs: np.ndarray, records: np.ndarray) -> np.ndarray:
    """Returns the picture of a confusion matrix, uint8 [height, width, 3]: rows are labels, columns likeliest classes.

    pairs: label, class and records of each pair that occurs, int64 [n, 3]; records: of each label, int64 [classes], at least
    two. A cell has the colour of its share of the row's records, from white for none to dark blue for all, by the root of
    the share, and small cells with any at least a third of that, so that rare confusions can be seen; the row of a class
    without records is grey. The numbers at the left and above are those of classes. Beyond 1000 classes each row and column
    stands for several.
    """
    classes = len(records)
    block = -(-classes // _PIXELS)
    count = -(-classes // block)
    cell = max(1, min(_MOST_CELL, _PIXELS // count))
    shares, empty = _shares(pairs, records, block, count)
    darkness = np.sqrt(shares)
    if cell < _NUMBERED_CELL:
        darkness = np.where(shares > 0, (1 + 2 * darkness) / 3, 0)
    colours = np.rint(_PAPER + darkness[:, :, np.newaxis] * (_DARK - _PAPER)).astype(np.uint8)
    colours[empty] = _EMPTY
    left = len(str(classes - 1)) * _ADVANCE + 2 * _GAP
    top = _HEIGHT + 2 * _GAP
    side = count * cell
    image = np.full([top + side + _GAP, left + side + _TICK // 2, 3], _PAPER, np.uint8)
    image[top - 1 : top + side + 1, left - 1 : left + side + 1] = _FRAME
    image[top : top + side, left : left + side] = colours.repeat(cell, axis=0).repeat(cell, axis=1)
    for row in range(0, count, _tick(cell)):
        text, centre = str(row * block), row * cell + cell // 2
        _write(image, text, top + centre - _HEIGHT // 2, left - _GAP - len(text) * _ADVANCE, _INK)
        _write(image, text, _GAP, left + centre - len(text) * _ADVANCE // 2, _INK)
    if cell >= _NUMBERED_CELL:
        for row, column in zip(*np.nonzero(shares > 0.005)):
            text = str(round(100 * float(shares[row, column])))
            ink, down = (_PAPER if shares[row, column] > 0.2 else _INK), top + row * cell + (cell - _HEIGHT) // 2
            _write(image, text, down, left + column * cell + (cell - len(text) * _ADVANCE) // 2, ink)
    return image


def _shares(pairs: np.ndarray, records: np.ndarray, block: int, count: int) -> Tuple[np.ndarray, np.ndarray]:
    """Returns the shares of each row's records, float64 [count, count], and which rows have none, bool [count]."""
    cells = pairs[:, 0] // block * count + pairs[:, 1] // block
    found = np.bincount(cells, weights=pairs[:, 2], minlength=count * count).reshape(count, count)
    of = np.bincount(np.arange(len(records)) // block, weights=records, minlength=count)
    return found / np.maximum(of, 1)[:, np.newaxis], of == 0


def _tick(cell: int) -> int:
    """Returns how many rows apart the numbers are: 1, 2, 5, 10, ..."""
    steps = (base * 10**power for power in range(6) for base in (1, 2, 5))
    return next(step for step in steps if step * cell >= _TICK)


def _write(image: np.ndarray, text: str, top: int, left: int, ink: np.ndarray) -> None:
    """Writes digits; what does not fit is left out."""
    for number, digit in enumerate(text):
        rows = [_DIGITS[int(digit)] >> 3 * shift & 7 for shift in (4, 3, 2, 1, 0)]
        dots = np.array([[row >> 2 & 1, row >> 1 & 1, row & 1] for row in rows], bool)
        drawn = dots.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
        begin = left + number * _ADVANCE
        part = image[max(top, 0) : top + _HEIGHT, max(begin, 0) : begin + 3 * _SCALE]
        part[drawn[: part.shape[0], : part.shape[1]]] = ink
