"""What the main process does while the others wait for it."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from stablevm.errors import UserError

Result = TypeVar("Result")


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
