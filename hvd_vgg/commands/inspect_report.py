"""What `inspect` prints of the summary of a data set (`hvd_vgg.data.summary`)."""

from typing import Any, Dict, Iterator

from hvd_vgg.data.formats.layout import FOLDERS, TITLES
from hvd_vgg.text import plural

_MOST_PAIRS = 5  # that are printed; --json has more


def format_summary(summary: Dict[str, Any]) -> str:
    """Returns the summary as lines."""
    return "\n".join(_lines(summary))


def _lines(summary: Dict[str, Any]) -> Iterator[str]:
    for split, found in summary["splits"].items():
        yield f"{split}: {_size(found)}"
        yield from _class_lines(found["classes"], summary)
        yield from _image_lines(found)
        for name in ("bad", "mended"):
            records = found[name]["records"]
            yield _line(name, plural(records, "record") if records else "none")
            yield from (f"      {text.replace('data: ', '', 1)}" for text in found[name]["first"])
            yield from _more(records - len(found[name]["first"]))
        yield from _pair_lines("duplicates", found["duplicates"], "whose image occurs before in the split")
    yield "train and validation"
    yield from _pair_lines("shared", summary["validation_in_train"], "of validation whose image is in train too")
    for split, other, meaning in (("validation", "train", "; they count as misses"), ("train", "validation", "")):
        labels = summary[f"labels_of_{split}_alone"]
        if labels["labels"]:
            text = f"{plural(labels['labels'], 'label')} of {split} without records in {other}{meaning}: {_first(labels)}"
            yield _line("labels", text)


def _line(name: str, text: str) -> str:
    return f"  {name:12s} {text}"


def _size(found: Dict[str, Any]) -> str:
    shards, records = found["shards"], found["records"]
    folders = f"{shards} director{'y' if shards == 1 else 'ies'}"
    where = folders if found["layout"] == FOLDERS else plural(shards, "shard")
    mean = found["image_bytes"] / records
    what = f"{plural(records, 'record', ',')} in {where}, {TITLES[found['layout']]}"
    return f"{what}; {found['bytes']:,} bytes, {mean:,.0f} an image"


def _class_lines(classes: Dict[str, Any], summary: Dict[str, Any]) -> Iterator[str]:
    least, most, missing, outside = (classes[name] for name in ("least", "most", "missing", "outside"))
    text = f"{classes['present']} of --num_classes={summary['num_classes']}, the first label is {summary['label_base']}; "
    if least["records"] == most["records"]:
        text += f"{plural(least['records'], 'record')} each"
    else:
        text += f"least {least['records']:,} ({_first(least)}), most {most['records']:,} ({_first(most)})"
    yield _line("classes", text)
    if missing["labels"]:
        yield _line("missing", f"{plural(missing['labels'], 'label')}: {_first(missing)}")
    if outside["records"]:
        text = f"{plural(outside['records'], 'record')} with labels that training refuses: {_first(outside)}"
        yield _line("outside", f"{text}. Correct --num_classes or --label_base")


def _first(labels: Dict[str, Any], most: int = 5) -> str:
    """Returns the first of some labels for a line."""
    return ", ".join(labels["first"][:most]) + (", ..." if labels["labels"] > most else "")


def _image_lines(found: Dict[str, Any]) -> Iterator[str]:
    sizes = found["sizes"]
    for name, title in (("shorter_side", "shorter side"), ("area", "area")):
        if sizes:
            of = sizes[name]
            yield _line(title, f"{of['least']:,} to {of['most']:,} pixels, median {of['median']:,.0f}")
    for name in ("smallest", "largest") if sizes else ():
        yield _line(name, f"{sizes[name]['width']} x {sizes[name]['height']} pixels: {sizes[name]['where']}")
    kinds = [f"{row['records']:,} {row['format']} {row['mode']}".rstrip() for row in found["formats"]]
    yield _line("formats", ", ".join(kinds) or "none was read")


def _pair_lines(name: str, pairs: Dict[str, Any], what: str) -> Iterator[str]:
    if not pairs["records"]:
        yield _line(name, "none")
        return
    yield _line(name, f"{plural(pairs['records'], 'record')} {what}, {pairs['with_another_label']} under another label")
    yield from (f"      {later} = {before}" for later, before in pairs["first"][:_MOST_PAIRS])
    yield from _more(pairs["records"] - _MOST_PAIRS)


def _more(others: int) -> Iterator[str]:
    if others > 0:
        yield f"      and {others:,} more"
