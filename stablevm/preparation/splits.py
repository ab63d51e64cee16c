"""The split to which a file of a data set belongs, by its name."""

import re

# Words in names of files, and the splits that they mean; numbers may follow, as in val2017.
_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip
ALL = "all"  # files that name no split


def split_in(name: str) -> str:
    """The split that the name of a file says: the first word that is one, else `all`."""
    words = re.split(r"[\W\d_]+", name.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), ALL)
