"""The check that the Hugging Face hub is reachable, in one request; its own client retries for half a minute."""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

from stablevm.support.extras import need

PATIENCE_SECONDS = 10.0


def downloaded(repository: str, file: str) -> Path:
    """The file of the hub's `repository`, fetched unless it is in the cache."""
    need(f"the hub's {repository}", "huggingface_hub")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file))


def check_reachable(repository: str, *files: str) -> None:
    """Raise OSError if none of `files` of the hub's `repository` is in the cache and the hub does not answer.

    Any answer counts, even an error. An unknown certificate is ignored, because the hub's client may accept it.
    """
    need(f"the hub's {repository}", "huggingface_hub")
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
    if constants.HF_HUB_OFFLINE or cached:
        return
    request = urllib.request.Request(hf_hub_url(repository, files[0]), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PATIENCE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise OSError(f"the hub does not answer: {error.reason}") from None
