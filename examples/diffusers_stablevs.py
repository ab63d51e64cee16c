"""StableVS in a pipeline of diffusers: fewer steps for nearly the same images, without training.

    pip install 'stablevm[all]'
    python examples/diffusers_stablevs.py

This pipeline is a small one. In any pipeline with a FlowMatchEulerDiscreteScheduler (Stable Diffusion 3, Flux, Lumina,
Wan, ...), the marked line is the whole change. The defaults are the published ones, for images with thousands of
dimensions. Digits have 64, where the velocity changes at smaller times, so there is no gain here: the distance to the
converged images is 0.041 with 20 steps of StableVS (0.030 with grid_below="even" and 19 steps), 0.035 with 20 Euler
steps, and 0.020 with 30 Euler steps.
"""

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers_unet import train

from stablevm import StableVSFlowMatchScheduler


class DigitsPipeline(DiffusionPipeline):
    """The loop of every flow-matching pipeline, with the network for digits of diffusers_unet.py."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels, num_inference_steps, generator):
        x = torch.randn(len(labels), 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            velocity = self.unet(x, t.expand(len(x)), labels).sample
            x = self.scheduler.step(velocity, t, x, generator=generator).prev_sample
        return x


def main(training_steps=300, reference_steps=200):
    pipeline = DigitsPipeline(train(training_steps), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.set_progress_bar_config(disable=True)

    def draw(steps):
        images = pipeline(torch.arange(10).repeat(5), steps, torch.Generator().manual_seed(1))
        return images, len(pipeline.scheduler.timesteps)

    converged, _ = draw(reference_steps)
    results = {f"Euler, {taken} steps": images for images, taken in (draw(30), draw(20))}
    pipeline.scheduler = StableVSFlowMatchScheduler.from_config(pipeline.scheduler.config)  # the whole change
    images, taken = draw(30)
    results[f"StableVS, {taken} steps"] = images
    errors = {name: (images - converged).square().mean().sqrt().item() for name, images in results.items()}
    for name, error in errors.items():
        print(f"{name}: {error:.3f} away from {reference_steps} Euler steps (root mean square; pixels lie in [-1, 1])")
    return errors


if __name__ == "__main__":
    main()
