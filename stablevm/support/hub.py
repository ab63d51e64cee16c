"""The Hugging Face Hub: names such as hf:OWNER/NAME@REVISION, fetching what they name, and its faults in one line."""

import re
import ssl
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from stablevm.support.bars import hidden
from stablevm.support.errors import UserError
from stablevm.support.extras import need
from stablevm.support.launcher import Place
from stablevm.support.options import some_of
from stablevm.support.text import brief, printable

PREFIX = "hf:"
FORM = f"{PREFIX}OWNER/NAME, or {PREFIX}OWNER/NAME@REVISION"
PATIENCE_SECONDS = 10.0
LOG_IN = "log in (hf auth login), or set HF_TOKEN"
_OFFLINE = "HF_HUB_OFFLINE is set"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """What hf:OWNER/NAME[/FILE][@REVISION] names."""

    repository: str
    file: str | None = None  # a path inside the repository
    revision: str | None = None  # a branch, tag or commit; None is the main branch

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{PREFIX}{self.repository}{file}" + (f"@{self.revision}" if self.revision else "")


def is_on_hub(name: str | Path) -> bool:
    """Whether a name is one of the hub, instead of a path."""
    return str(name).startswith(PREFIX)


def hub_name(name: str | Path) -> HubName:
    """Take hf:OWNER/NAME[/FILE][@REVISION] apart; UserError for a text of another form."""
    place, at, revision = str(name).removeprefix(PREFIX).partition("@")
    owner, _, rest = place.partition("/")
    short, slash, file = rest.partition("/")
    right = _REPOSITORY.fullmatch(f"{owner}/{short}") and bool(slash) == bool(file) and bool(at) == bool(revision)
    if not right or not {"..", "."}.isdisjoint([owner, short, *file.split("/"), *revision.split("/")]):
        raise UserError(f"{printable(str(name))}: expected {FORM}")
    return HubName(f"{owner}/{short}", file or None, revision or None)


def downloaded(repository: str, file: str) -> Path:
    """The file of the hub's `repository`, fetched unless it is in the cache."""
    need(f"the hub's {repository}", "huggingface_hub")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file))


def check_reachable(repository: str, *files: str) -> None:
    """Raise OSError if none of `files` of the hub's `repository` is in the cache and the hub does not answer."""
    need(f"the hub's {repository}", "huggingface_hub")
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    cached = any(isinstance(try_to_load_from_cache(repository, file), str) for file in files)
    if constants.HF_HUB_OFFLINE or cached:
        return
    if fault := _silence(hf_hub_url(repository, files[0])):
        raise OSError(fault)


def _silence(address: str) -> str | None:
    """The reason why the hub does not answer a single request; its own client would retry for half a minute.

    None if it answers, even with an error. An unknown certificate is ignored, because the client may accept it.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else f"the hub does not answer: {error.reason}"
    except (OSError, HTTPException) as error:  # it accepts the connection and says nothing, or nothing of HTTP
        return f"the hub does not answer: {_reason(error)}"
    return None


def fetched_folder(name: str | Path, files: Sequence[str]) -> Path:
    """The folder, named by its commit, with those of `files` that the repository `name` has: no other is fetched.

    Where the hub can't be asked, it is the one in the cache. UserError, in one line, where there is none, and for a
    repository or revision that is absent or may not be read.
    """
    asked = hub_name(name)
    if asked.file:
        raise UserError(f"{asked}: names a file; expected {FORM}")
    with answered(asked):
        from huggingface_hub import snapshot_download

        def take(cached: bool) -> Path:
            patterns = list(files)
            return Path(
                snapshot_download(
                    asked.repository, revision=asked.revision, allow_patterns=patterns, local_files_only=cached
                )
            )

        return _fetched(asked, take, lambda folder: all((folder / file).is_file() for file in files))


def fetched_file(name: str | Path, endings: Sequence[str]) -> Path:
    """The file that hf:OWNER/NAME/FILE[@REVISION] names; FILE may be left out where only one has such an ending.

    Errors are those of `fetched_folder`.
    """
    asked = hub_name(name)
    with answered(asked):
        from huggingface_hub import hf_hub_download

        file = asked.file or _only_file(asked, endings)
        if not file.endswith(tuple(endings)):
            raise UserError(f"{asked}: expected a file that ends in {' or '.join(endings)}")

        def take(cached: bool) -> Path:
            return Path(hf_hub_download(asked.repository, file, revision=asked.revision, local_files_only=cached))

        return _fetched(asked, take, Path.is_file)


def _only_file(asked: HubName, endings: Sequence[str]) -> str:
    from huggingface_hub import HfApi

    if fault := unanswered():
        raise UserError(f"{asked}: {fault}; to take a file from the cache name it, {PREFIX}{asked.repository}/FILE")
    there = HfApi().list_repo_files(asked.repository, revision=asked.revision)
    found = [file for file in there if file.endswith(tuple(endings))]
    if len(found) != 1:
        these = f"holds {some_of(found)}" if found else f"holds no file that ends in {' or '.join(endings)}"
        raise UserError(f"{asked}: {these}; name one, {PREFIX}{asked.repository}/FILE")
    return found[0]


def _fetched(asked: HubName, take: Callable[[bool], Path], is_whole: Callable[[Path], bool]) -> Path:
    """What `take`, from the cache alone or not, gives; a commit does not change, so a whole one needs no question."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def cached() -> Path | None:
        try:
            path = take(True)
        except LocalEntryNotFoundError:
            return None
        return path if is_whole(path) else None

    if asked.revision and _COMMIT.fullmatch(asked.revision) and (known := cached()):
        return known
    fault = unanswered()
    if fault is None:
        return take(False)
    path = cached()
    if path is None:
        raise UserError(
            f"{asked}: {fault}, and this machine's cache does not have it; run the command again with a connection, "
            f"or fetch it where there is one (hf download {asked.repository})"
        )
    if fault != _OFFLINE and Place.from_environment().rank == 0:
        print(f"warning: {asked}: {fault}; it is taken from this machine's cache", file=sys.stderr)
    return path


def unanswered() -> str | None:
    """The reason why the hub can't be asked; None if it can be."""
    from huggingface_hub import constants

    return _OFFLINE if constants.HF_HUB_OFFLINE else _silence(constants.ENDPOINT)


@contextmanager
def answered(asked: HubName) -> Iterator[None]:
    """Inside the block, the hub's client is quiet, with bars only on a terminal, and its faults are UserErrors."""
    need(str(asked), "huggingface_hub")
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    hide = bars and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    hide = hide and hidden(sys.stderr.isatty() and Place.from_environment().rank == 0)
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except errors.HTTPError as error:
        raise UserError(_fault(asked, error)) from None
    except ValueError as error:  # its client refuses a name, or the hub the metadata of a page
        raise UserError(f"{asked}: {brief(' '.join(str(error).split()))}") from None
    except (RuntimeError, OSError) as error:  # the transfer of a file; a number says that the disk is at fault
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        raise UserError(f"{asked}: the transfer broke off ({_reason(error)}); run the command again") from None
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            enable_progress_bars()


def _fault(asked: HubName, error: Exception) -> str:
    """An answer of the hub that is an error, or a connection without an answer, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{asked}: its owner grants access on request; ask for it on its page, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{asked}: the hub shows no such repository; check the name, or, if it is private, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{asked}: the repository has no revision {asked.revision}; give one of its branches, tags or commits"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{asked}: the repository has no such file; check the name"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status in (401, 403):
        return f"{asked}: the hub refuses it ({status}); {LOG_IN} of an account that may do this"
    if status is None:
        return f"{asked}: the connection to the hub broke ({_reason(error)}); run the command again"
    return f"{asked}: the hub answered {status} ({_reason(error)}); try again later"


def _reason(error: Exception) -> str:
    return brief(next(iter(str(error).strip().splitlines()), type(error).__name__))
