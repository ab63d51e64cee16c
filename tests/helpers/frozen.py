"""What frozen surfaces hold, the same for every version of Python."""

import json


def plain_json(surface):
    """The surface as a JSON file holds it. Python 3.13 names the inner module of paths."""
    return json.loads(json.dumps(surface, default=str).replace("pathlib._local.", "pathlib."))
