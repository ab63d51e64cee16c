"""Pipelines of diffusers from text to images and videos, with StableVS or the solvers that it is compared with.

They need diffusers and transformers (`pip install 'stablevm[pipelines]'`).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stablevm.integrations.benchmark_prompts import Sample, missing, record_settings
from stablevm.integrations.diffusers_scheduler import (
    StableVSDPMSolverMultistepScheduler,
    StableVSFlowMatchScheduler,
    StableVSUniPCMultistepScheduler,
)
from stablevm.support.errors import UserError
from stablevm.support.files import replacing
from stablevm.support.hub import check_reachable
from stablevm.support.launcher import Place
from stablevm.support.processes import Process

# The published words for samplers; those with `custom` are StableVS.
SAMPLERS = {
    "euler": StableVSFlowMatchScheduler,
    "dpm": StableVSDPMSolverMultistepScheduler,
    "unipc": StableVSUniPCMultistepScheduler,
}
CUSTOM = "custom_"
_PIXELS_PER_TOKEN = 16  # along each side: 8 of the autoencoder, 2 of the patches


@dataclass(frozen=True)
class TextPipeline:
    """A pipeline: its folder or name on the hub, its scheduler's configuration, and the arguments of its calls."""

    source: str
    scheduler: Mapping[str, Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    gives_flow_sigmas: bool = False  # whether it chooses the sigmas before shifting for multistep schedulers too

    def at(self, source: str) -> "TextPipeline":
        """This kind of pipeline in a folder or elsewhere on the hub: the scheduler's configuration is read from there.

        UserError if there is none.
        """
        if source == self.source:
            return self
        source = _checked(source, "scheduler/scheduler_config.json")
        try:
            config = StableVSFlowMatchScheduler.load_config(source, subfolder="scheduler")
        except (OSError, ValueError) as error:
            raise _load_error(source, error) from None
        return replace(self, source=source, scheduler=config)


_DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "base_shift": 0.5}
_UNIPC = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
PIPELINES = {
    "sd35": TextPipeline("stabilityai/stable-diffusion-3.5-large", {"shift": 3.0}, {"guidance_scale": 4.5}),
    "sd3": TextPipeline("stabilityai/stable-diffusion-3-medium-diffusers", {"shift": 3.0}, {"guidance_scale": 5.0}),
    "flux": TextPipeline(
        "black-forest-labs/FLUX.1-dev",
        _DYNAMIC | {"shift": 3.0, "max_image_seq_len": 4096, "max_shift": 1.15},
        {"guidance_scale": 3.5},
    ),
    "qwen": TextPipeline(
        "Qwen/Qwen-Image-2512",
        _DYNAMIC | {"shift": 1.0, "max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02},
        {"true_cfg_scale": 4.0, "negative_prompt": " "},  # guidance needs a prompt to guide away from
        gives_flow_sigmas=True,
    ),
    "wan": TextPipeline("Wan-AI/Wan2.2-T2V-A14B-Diffusers", _UNIPC | {"flow_shift": 3.0}),
}


@dataclass(frozen=True)
class Sampler:
    """A solver with a number of requested steps: `euler`, `dpm` or `unipc`, and with `custom_` before it StableVS."""

    name: str
    steps: int
    split_time: float = 0.85
    steps_below: int = 9
    noise_factor: float = 0.0

    @property
    def is_stablevs(self) -> bool:
        return self.name.startswith(CUSTOM)

    @property
    def folder(self) -> str:
        """A name that tells samplers apart, in the published form."""
        name = f"{self.steps}steps-{self.name}"
        numbers = f"-sp{self.split_time:g}-sb{self.steps_below}-nf{self.noise_factor:g}"
        return name + numbers if self.is_stablevs else name

    def scheduler(self, config: Mapping[str, Any]) -> Any:
        """The scheduler, from a pipeline's configuration. UserError for an unknown name and values out of range."""
        kind = SAMPLERS.get(self.name.removeprefix(CUSTOM))
        if kind is None:
            words = ", ".join([*SAMPLERS, *(CUSTOM + name for name in SAMPLERS)])
            raise UserError(f"sampler {self.name}: expected one of {words}")
        given: dict[str, Any] = {
            "split_time": self.split_time,
            "steps_below": self.steps_below,
            "noise_factor": self.noise_factor,
        }
        try:
            return kind.from_config(dict(config), use_fast_low_schedule=self.is_stablevs, **given)
        except ValueError as error:
            raise UserError(str(error)) from None

    def noise_levels(self, pipeline: TextPipeline, height: int, width: int) -> list[float]:
        """The noise levels from 1 to 0 that the pipeline will ask for, with images of a size in pixels."""
        scheduler = self.scheduler(pipeline.scheduler)
        mu, sigmas = None, None
        if scheduler.config.get("use_dynamic_shifting"):
            mu = _shift(scheduler.config, (height // _PIXELS_PER_TOKEN) * (width // _PIXELS_PER_TOKEN))
            if pipeline.gives_flow_sigmas or not scheduler.config.get("use_flow_sigmas"):
                sigmas = np.linspace(1.0, 1 / self.steps, self.steps).tolist()
        scheduler.set_timesteps(self.steps if sigmas is None else None, sigmas=sigmas, mu=mu)
        return scheduler.sigmas.tolist()


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """The logarithm of the shift for an image of so many tokens: linear between two sizes (Esser et al., 2024)."""
    share = (tokens - config["base_image_seq_len"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + share * (config["max_shift"] - config["base_shift"])


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """What scripts for images and for videos have in common, under the published names."""

    sampler: str = "compare"
    """euler, dpm or unipc; custom_euler, custom_dpm or custom_unipc for StableVS; compare: StableVS and its base
    solver, with as many steps asked for and with as many evaluations."""
    num_steps: int = 30
    """Steps that are asked for; StableVS takes fewer."""
    seed: int = 0
    negative_prompt: str | None = None
    fast_low_split_point: float = 0.85
    """Noise level below which StableVS takes its large steps."""
    fast_low_low_substeps: int = 9
    """Large steps below the split."""
    low_region_noise_factor: float = 0.0
    """Fresh noise in the large steps, from 0 (none) to 1."""
    cpu_offload: bool = False
    """Parts of a pipeline wait in the memory of the host until they are used."""
    print_sigmas_only: bool = False
    """Print the noise levels, without loading weights."""

    def samplers(self, stablevs: str, pipeline: TextPipeline, height: int, width: int) -> list[Sampler]:
        """The samplers that `sampler` names; `stablevs` is the one that is compared with its base."""
        numbers = (self.fast_low_split_point, self.fast_low_low_substeps, self.low_region_noise_factor)
        if self.num_steps < 1:
            raise UserError(f"num_steps {self.num_steps}: expected 1 or more")
        if self.sampler != "compare":
            name = stablevs if self.sampler == "custom" else self.sampler
            return [Sampler(name, self.num_steps, *numbers)]
        sampler = Sampler(stablevs, self.num_steps, *numbers)
        base, taken = stablevs.removeprefix(CUSTOM), len(sampler.noise_levels(pipeline, height, width)) - 1
        return [*dict.fromkeys([Sampler(base, self.num_steps), Sampler(base, taken)]), sampler]  # one if none is saved


def show_noise_levels(samplers: Iterable[Sampler], pipeline: TextPipeline, height: int, width: int) -> None:
    """Print the noise levels of each sampler, with the number of evaluations of the network."""
    print(f"{pipeline.source}, {width} x {height} pixels")
    for sampler in samplers:
        levels = sampler.noise_levels(pipeline, height, width)
        print(f"  {sampler.folder}, {len(levels) - 1} evaluations: {' '.join(f'{level:.4f}' for level in levels)}")


def load_pipeline(source: str, process: Process, *, offload: bool = False) -> Any:
    """The pipeline in a folder or on the hub, on this process's device: bfloat16 on a GPU, its autoencoder float32.

    offload: parts wait in the memory of the host until they are used. UserError if it can't be loaded.
    """
    from diffusers import DiffusionPipeline

    on_gpu = process.device.type == "cuda"
    if offload and not on_gpu:
        raise UserError("cpu_offload: this machine has no GPU; leave it out")
    source = _checked(source, "model_index.json")
    kinds = {"default": torch.bfloat16, "vae": torch.float32} if on_gpu else torch.float32
    try:
        with torch.random.fork_rng(devices=[]):  # networks are first filled with random values
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=kinds, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _load_error(source, error) from None
    if offload:
        pipe.enable_model_cpu_offload(gpu_id=process.device.index)
    else:
        pipe.to(process.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _checked(source: str, file: str) -> str:
    """The folder or name on the hub; UserError unless the folder has the file, or the hub answers."""
    folder = Path(source).expanduser()
    if not folder.is_dir() and source.count("/") == 1 and source[0] not in "/.~":
        try:
            check_reachable(source, file)
        except OSError as error:
            raise _load_error(source, error) from None
        return source
    if not (folder / file).is_file():
        raise UserError(f"{source}: no {file}; expected the folder of a pipeline of diffusers, or a name on the hub")
    return str(folder)


def _load_error(source: str, error: Exception) -> UserError:
    cause = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(f"{source}: can't be loaded as a pipeline of diffusers: {cause}")


def generate(
    pipe: Any,
    samples: Iterable[Sample],
    folder: Path,
    write: Callable[[Any, Path], object],
    **call: Any,
) -> None:
    """Generate the samples one by one, each into its file, complete or absent.

    write: writes the first output of the pipeline into a file. call: the pipeline's other arguments. Noise depends on
    a sample's seed alone, that of StableVS's steps too, for which pipelines pass no generator on.
    """
    for sample in samples:
        with torch.random.fork_rng():
            torch.manual_seed(sample.seed)
            made = pipe(prompt=sample.prompt, generator=torch.Generator().manual_seed(sample.seed), **call)[0][0]
        with replacing(folder / sample.file) as temporary:
            write(made, temporary)
        print(folder / sample.file, flush=True)


def generate_with_each(
    pipeline: TextPipeline,
    samplers: Sequence[Sampler],
    samples: Sequence[Sample],
    folder: Path,
    write: Callable[[Any, Path], object],
    call: Mapping[str, Any],
    *,
    offload: bool = False,
) -> None:
    """Generate this process's share of what is missing, with each sampler into a folder of its own.

    The pipeline is loaded only if something is missing. UserError if a folder holds samples that were made otherwise.
    """
    prompts = hashlib.sha256("\n".join(dict.fromkeys(sample.prompt for sample in samples)).encode()).hexdigest()
    for sampler in samplers:
        made_with = {
            "pipeline": pipeline.source,
            "prompts": prompts,
            "seed": samples[0].seed,
            **asdict(sampler),
            **call,
        }
        record_settings(folder / sampler.folder, made_with)
    todo = {sampler: missing(samples, folder / sampler.folder, Place.from_environment()) for sampler in samplers}
    if not any(todo.values()):
        print(f"{folder}: all samples are there")
        return
    pipe = load_pipeline(pipeline.source, Process.from_environment(), offload=offload)
    call = dict(call)
    if getattr(pipe.config, "boundary_ratio", None) is None:  # one network, and so no second scale
        call.pop("guidance_scale_2", None)
    config = pipe.scheduler.config
    for sampler, rest in todo.items():
        pipe.scheduler = sampler.scheduler(config)
        generate(pipe, rest, folder / sampler.folder, write, **call)
