"""Where the commands of this room write, checked before they begin: no output replaces an input or another output."""

from collections.abc import Mapping
from pathlib import Path

from stablevm.evaluation.config import JudgeConfig
from stablevm.support.errors import UserError


def default_output(samples: Path) -> Path:
    """Beside the samples: their name with .json for its ending, or behind it where they are a folder."""
    if samples.is_dir():
        return samples.parent / f"{samples.resolve().name}.json"
    return samples.with_suffix(".json")


def outputs_of(output: Path, config: JudgeConfig) -> dict[str, Path]:
    """The files that an evaluation writes, by what asks for them."""
    page = {"--report": output.with_suffix(".html")} if config.report and config.extractor is None else {}
    return {"--output": output} | page


def inputs_of(config: JudgeConfig) -> dict[str, Path | None]:
    """What an evaluation reads besides the images, by option."""
    return {
        "--reference": config.reference,
        "--extractor": config.extractor,
        "--inception-weights": config.inception_weights,
        "--encoder-weights": config.encoder_weights,
        "--cache-dir": config.cache_dir,
    }


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Path | None]) -> None:
    """UserError for outputs that are folders, that are one file, or that would replace a file that is read.

    Files that lie in an input's folder and are there already count as read, unless they are results of an earlier
    command.
    """
    written: dict[Path, str] = {}
    for option, path in outputs.items():
        if path.is_dir():
            raise UserError(f"{option} {path}: is a folder; give the name of a file")
        if (other := written.setdefault(path.resolve(), option)) != option:
            raise UserError(f"{option} would write {path}, which is {other} too; give --output a name in .json")
        for source, read in inputs.items():
            if read is not None and _would_replace(path, read):
                raise UserError(
                    f"{option} would replace {path}, which {source} {read} reads; give --output another name"
                )


def _would_replace(path: Path, read: Path) -> bool:
    if not path.exists() or not read.exists():
        return path.resolve() == read.resolve()
    if path.samefile(read):
        return True
    return read.is_dir() and path.resolve().is_relative_to(read.resolve()) and not _is_result(path)


def _is_result(path: Path) -> bool:
    """Whether it looks like what an evaluation wrote: results, a report, or a reference file, which no folder needs."""
    if path.suffix == ".npz":
        return True
    with path.open("rb") as file:
        head = file.read(4096)
    if path.suffix == ".html":
        return b"<title>Evaluation of " in head
    return head.startswith(b"{") and b'"samples"' in head
