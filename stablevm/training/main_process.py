"""What the main process does while the others wait for it."""

from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from stablevm.support.errors import UserError

Result = TypeVar("Result")


def told_by_main(accelerator: Accelerator, task: Callable[[], Result]) -> Result:
    """The result of `task` on the main process, on all of them; errors as in `on_main`."""
    result = on_main(accelerator, task)
    if accelerator.num_processes > 1:
        (result,) = broadcast_object_list([result])
    return cast(Result, result)


def on_main(accelerator: Accelerator, task: Callable[[], Result]) -> Result | None:
    """The result of `task` on the main process, None on the others, which wait for its end.

    A UserError or OSError, such as of a full disk, is raised on all of them: otherwise they would wait for one that is
    gone.
    """
    result, failure = None, None
    if accelerator.is_main_process:
        try:
            result = task()
        except (UserError, OSError) as error:
            failure = error
    if accelerator.num_processes > 1:
        (failure,) = broadcast_object_list([failure])
    if failure is not None:
        raise failure
    return result
