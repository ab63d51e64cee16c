"""The command `stablevm demo`: the page, made with gradio, and its server."""

import threading
from typing import TYPE_CHECKING, Any

from stablevm.demo.config import DemoConfig
from stablevm.demo.studio import SAMPLERS, Controls, Studio
from stablevm.support.errors import UserError
from stablevm.support.processes import Process

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"  # this machine alone
FEW_CLASSES = 16  # up to so many, the first picture has a row for each
PER_CLASS, FIRST_IMAGES, MOST_IMAGES = 4, 16, 64
MOST_STEPS, MOST_GUIDANCE = 250, 8.0


def demo(config: DemoConfig) -> None:
    """Serve the page until Ctrl-C. UserError where the port is taken, or the checkpoint can't be loaded."""
    studio = Studio(config, Process.from_environment().device)
    page = build(studio)
    address = start(page, config.port)
    print(f"{address} generates images of {config.ckpt}, step {studio.card.step:,}; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended")
    finally:
        page.close(verbose=False)


def start(page: "gradio.Blocks", port: int) -> str:
    """Serve the page at this machine's own address; returns that. UserError where the port is taken."""
    try:
        _, address, _ = page.launch(
            server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[]
        )
    except OSError:
        raise UserError(f"--port {port}: another program has it; give another one") from None
    except ValueError:  # gradio asks its own page whether it answers, within a few seconds
        raise UserError(
            f"http://{HOST}:{port} did not answer in time: the machine is busy, or a proxy is in the way; run it again"
        ) from None
    return str(address).rstrip("/")


def build(studio: Studio) -> "gradio.Blocks":
    """The page: controls on the left, the picture with its cost and its command on the right."""
    import gradio

    card = studio.card
    with gradio.Blocks(title="stablevm demo", analytics_enabled=False) as page:
        gradio.Markdown(f"## {card.model.name}, step {card.step:,}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                controls = _controls(studio)
                button = gradio.Button("Generate", variant="primary")
            with gradio.Column(scale=2, min_width=320):
                picture = gradio.Image(
                    label="Images", format="png", interactive=False, buttons=["download", "fullscreen"]
                )
                cost = gradio.Markdown()
                command = gradio.Code(label="The same by command", language="shell", interactive=False, wrap_lines=True)

        def generate(*values: Any, progress: Any = gradio.Progress()) -> tuple[Any, str, str]:  # noqa: B008
            """What the button does with the values of the controls, in the order of `Controls`."""
            try:
                made = studio.generate(Controls(*values), progress)
            except UserError as error:
                raise gradio.Error(str(error), duration=None, print_exception=False) from None
            return made.picture, made.cost, made.command

        button.click(generate, controls, [picture, cost, command], concurrency_limit=1, api_name="generate")
    return page


def _controls(studio: Studio) -> list[Any]:
    """One control for each field of `Controls`, in their order."""
    import gradio

    first, choices = Controls(), studio.class_choices()
    few = len(studio.card.trained_classes) <= FEW_CLASSES and studio.card.classes_are_trained
    images = PER_CLASS * len(studio.card.trained_classes) if few else FIRST_IMAGES
    guided = studio.can_guide
    why = "1: no guidance" if guided else "this network was not trained both with classes and without"
    return [
        gradio.Dropdown(list(SAMPLERS), value=first.sampler, label="Sampler"),
        gradio.Slider(2, MOST_STEPS, value=first.steps, step=1, label="Steps"),
        gradio.Slider(0, MOST_GUIDANCE, value=1, step=0.1, label="Guidance", info=why, interactive=guided),
        gradio.Slider(0, 1, value=1, step=0.05, label="Guide up to t", info="1 is noise, 0 the image",
                      interactive=guided),
        gradio.Dropdown(choices, value=choices[0][1], label="Class"),
        gradio.Slider(1, MOST_IMAGES, value=images, step=1, label="Images"),
        gradio.Number(value=first.seed, label="Seed", precision=0, minimum=0),
    ]  # fmt: skip
