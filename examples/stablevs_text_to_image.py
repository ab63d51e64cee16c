"""Images of Stable Diffusion 3.5, Flux and Qwen-Image with StableVS, beside those of the solver that it replaces.

    python examples/stablevs_text_to_image.py --print-sigmas-only
    python examples/stablevs_text_to_image.py --models sd35,flux --prompt "A lighthouse in a storm"
    torchrun --nproc_per_node 8 examples/stablevs_text_to_image.py --models flux=FOLDER --sampler custom_euler \
        --prompts evaluation_metadata.jsonl --num-images 4 --output-dir samples

A model is given as NAME, which is loaded from the hub, or as NAME=FOLDER. Images go to OUTPUT_DIR/MODEL/SAMPLER, in
the form that GenEval's evaluation reads. Those that are there are not made again: repeat an interrupted command.
Needs pip install 'stablevm[pipelines]'.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from stablevm import UserError
from stablevm.integrations import benchmark_prompts as files
from stablevm.integrations import text_pipelines as pipelines


@dataclass(frozen=True, kw_only=True)
class Options(pipelines.SamplingOptions):
    """Make images from prompts."""

    models: str = "sd35,flux,qwen"
    """Any of sd35, sd3, flux and qwen, with commas between them."""
    prompt: str = "A lighthouse on a cliff in a storm, seen from a small boat"
    prompts: Path | None = None
    """A file in place of one prompt: GenEval's JSONL, or a text with a prompt on each line."""
    num_images: int = 1
    """Images for each prompt; GenEval's evaluation expects 4."""
    resolution: int = 1024
    output_dir: Path = Path("figures")


def main(options):
    records = files.read_geneval(options.prompts) if options.prompts else [{"prompt": options.prompt}]
    samples = files.geneval_samples(records, options.num_images, options.seed)
    if not samples:
        raise UserError("nothing to make: no prompts, or no images for each")
    for model in options.models.split(","):
        name, _, folder = model.strip().partition("=")
        known, side = pipelines.PIPELINES.get(name), options.resolution
        if known is None or name == "wan":
            raise UserError(f"models {options.models}: expected sd35, sd3, flux or qwen, with commas between them")
        pipeline = known.at(folder or known.source)
        samplers = options.samplers("custom_euler", pipeline, side, side)
        pipelines.show_noise_levels(samplers, pipeline, side, side)
        if options.print_sigmas_only:
            continue
        call = {**pipeline.call, "height": side, "width": side}
        if options.negative_prompt is not None:
            call["negative_prompt"] = options.negative_prompt
        for sampler in samplers:
            files.write_geneval_metadata(options.output_dir / name / sampler.folder, records)
        pipelines.generate_with_each(
            pipeline, samplers, samples, options.output_dir / name, write, call, offload=options.cpu_offload
        )


def write(image, path):
    image.save(path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
