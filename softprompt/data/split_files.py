"""The splits of a folder of files, by the names of files and folders as `datasets` reads them:
train-00000-of-00002.parquet, data/test.jsonl, validation/rows.csv."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from softprompt.data.readers import READERS

TRAIN = "train"
MAX_LISTED = 20  # files or splits listed in a message
WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"(\w+(?:\.\w+)*)-(\d{5,})-of-(\d{5,})(?:-\w+)?")  # a file's name as push_to_hub makes it
METADATA_FILES = ("dataset_info.json", "dataset_infos.json")  # beside the rows of a hub dataset
# Formats that are not supported.
UNREADABLE_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tsv", ".arrow", ".feather", ".xlsx")


def shards(folder: Path) -> list[Path]:
    """Return the data files of a folder, sorted by name; if it has none, those in its subfolders (data/ in a hub
    repository)."""
    return _files_of(folder.iterdir()) or _files_of(folder.rglob("*"), folder)


def _files_of(paths: Iterator[Path], folder: Path | None = None) -> list[Path]:
    """Return the data files among `paths`, sorted. Hidden files and, below `folder`, files in hidden folders are left
    out."""
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in READERS
        and path.name not in METADATA_FILES
        and not any(part.startswith(".") for part in (path.relative_to(folder).parts if folder else (path.name,)))
        and path.is_file()
    )


def splits_of_files(source: str, folder: Path, files: Sequence[Path]) -> tuple[dict[str, list[Path]], bool, list[str]]:
    """Return the files of each split, whether names of files name the splits, and notices; see `splits.Splits`."""
    notices, named = list(_missing(folder, files)), {file: _split_of(file.relative_to(folder)) for file in files}
    names = {name for name in named.values() if name}
    if len(names) == 1 and not _word_in(next(iter(names))):  # data-00000-of-00002
        names, named = set(), dict.fromkeys(files)
    parts = {name: [f for f in files if named[f] == name] for name in sorted(names)}
    others = [file for file in files if named[file] is None]
    if others and TRAIN not in parts:
        parts = {TRAIN: others, **parts}
    elif others:
        notices.append(f"{source}: left out, since their names name no split: {_relative(folder, others)}")
    unread = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in UNREADABLE_SUFFIXES]
    if unread:
        notices.append(f"{source}: not read: {_relative(folder, unread)}; rows are read from {', '.join(READERS)}")
    below = [] if files[0].parent != folder else _files_of(folder.rglob("*"), folder)
    if nested := [file for file in below if file.parent != folder]:
        notices.append(
            f"{source}: left out, because they are in subfolders of a folder that itself holds files of rows: "
            f"{_relative(folder, nested)}"
        )
    return parts, bool(names), notices


def _split_of(path: Path) -> str | None:
    """Return the split that a file's name, or else one of its folders, names; None if none does."""
    if shard := SHARD.fullmatch(path.stem):
        return shard[1]
    return next((word for name in (path.stem, *reversed(path.parts[:-1])) if (word := _word_in(name))), None)


def _word_in(name: str) -> str | None:
    return next((WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS), None)


def _missing(folder: Path, files: Sequence[Path]) -> Iterator[str]:
    """Yield warnings about missing shards. The names of the existing shards tell how many there should be."""
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if shard := SHARD.fullmatch(file.stem):
            name = str(file.relative_to(folder).with_name(shard[1]))
            found.setdefault((name, int(shard[3])), set()).add(int(shard[2]))
    for (name, count), there in found.items():
        if len(there) < count:
            found_shards = f"{len(there):,} of the {count:,} shards of {name} exist"
            yield f"warning: {folder}: {found_shards}; the rows of the others are missing"


def _relative(folder: Path, files: Sequence[Path]) -> str:
    return listed([file.relative_to(folder).as_posix() for file in files])


def listed(names: Sequence[str]) -> str:
    """Join names for a message; of more than MAX_LISTED names, only the number of the others is given."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more:,} more" if more > 0 else "")
