"""Videos of Wan with StableVS, beside those of UniPC, the solver that it replaces.

    python examples/stablevs_text_to_video.py --print-sigmas-only
    python examples/stablevs_text_to_video.py --prompt "A heron takes off from a lake" --cpu-offload
    torchrun --nproc_per_node 8 examples/stablevs_text_to_video.py --sampler custom \
        --prompts-dir T2V-CompBench/prompts --save-dir videos

Videos go to SAVE_DIR/SAMPLER, in the form that T2V-CompBench's evaluation reads: a folder for each category, with a
video for each prompt. Those that are there are not made again: repeat an interrupted command.
Needs pip install 'stablevm[pipelines]'.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from stablevm import UserError
from stablevm.integrations import benchmark_prompts as files
from stablevm.integrations import text_pipelines as pipelines
from stablevm.support.extras import need


@dataclass(frozen=True, kw_only=True)
class Options(pipelines.SamplingOptions):
    """Make videos from prompts."""

    model_id: str = pipelines.PIPELINES["wan"].source
    """A pipeline of Wan, in a folder or on the hub."""
    prompt: str = "A heron takes off from a lake at dawn"
    prompts_dir: Path | None = None
    """In place of one prompt: T2V-CompBench's folder of prompts, or one of its files."""
    categories: tuple[str, ...] = ()
    """Only these categories, such as consistent_attr."""
    save_dir: Path = Path("videos")
    height: int = 480
    width: int = 640
    num_frames: int = 81
    fps: int = 16
    guidance_scale: float = 4.0
    guidance_scale_2: float = 3.0
    """For the second of the two networks of Wan 2.2."""


def main(options):
    pipeline, height, width = pipelines.PIPELINES["wan"].at(options.model_id), options.height, options.width
    prompts = {"demo": [options.prompt]} if options.prompts_dir is None else files.read_compbench(options.prompts_dir)
    if unknown := set(options.categories) - set(prompts):
        raise UserError(f"categories {', '.join(sorted(unknown))}: expected any of {', '.join(prompts)}")
    prompts = {name: texts for name, texts in prompts.items() if name in (options.categories or prompts)}
    samplers = options.samplers("custom_unipc", pipeline, height, width)
    pipelines.show_noise_levels(samplers, pipeline, height, width)
    if options.print_sigmas_only:
        return
    need("writing videos", "imageio", "imageio_ffmpeg")
    from diffusers.utils import export_to_video

    names = ("height", "width", "num_frames", "guidance_scale", "guidance_scale_2", "negative_prompt")
    pipelines.generate_with_each(
        pipeline, samplers, files.compbench_samples(prompts, options.seed), options.save_dir,
        lambda frames, path: export_to_video(frames, str(path), fps=options.fps),
        {name: getattr(options, name) for name in names}, offload=options.cpu_offload,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
