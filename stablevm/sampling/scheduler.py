"""StableVS for pipelines of diffusers:

    pipe.scheduler = StableVSFlowMatchScheduler.from_config(pipe.scheduler.config)

Needs diffusers (`pip install 'stablevm[vae]'`); no other module imports this one, so nothing else waits for it.
"""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stablevm.interpolant import LINEAR
from stablevm.sampling.solvers import ode_times, stable_velocity_step


class StableVSFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """Stands wherever a FlowMatchEulerDiscreteScheduler does, and takes fewer steps (Yang et al., 2026).

    Above `split_time` its sigmas and steps are those of the Euler scheduler, shifts and all. The sigmas below it are
    replaced by `steps_below` even steps to 0 by the Gaussian posterior of `stable_velocity_step`, or by as many as
    there were, if there were fewer. So 30 steps asked for may be 20 steps made: `len(scheduler.timesteps)`.

    split_time: a sigma in (0, 1). steps_below: 1 or more. noise_factor: 0 (none) to 1 (as much as the path permits).
    The other arguments are the Euler scheduler's. Raises ValueError for values outside their range and for
    `invert_sigmas`, whose time runs the other way.
    """

    sigmas: Tensor  # (steps + 1,), the last one 0
    timesteps: Tensor  # (steps,), what the network is asked at

    def __init__(
        self, *args: Any, split_time: float = 0.85, steps_below: int = 9, noise_factor: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < split_time < 1:
            raise ValueError(f"split_time {split_time}: expected a sigma between 0 and 1")
        if steps_below < 1:
            raise ValueError(f"steps_below {steps_below}: expected at least 1")
        if not 0 <= noise_factor <= 1:
            raise ValueError(f"noise_factor {noise_factor}: expected a number in [0, 1]")
        if self.config.invert_sigmas:
            raise ValueError("invert_sigmas True: StableVS expects sigmas that fall to 0")
        self.register_to_config(split_time=split_time, steps_below=steps_below, noise_factor=noise_factor)
        self._steps_above = len(self.sigmas)  # before `set_timesteps`, the sigmas are those of training

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Which entries of a configuration are arguments: those that `__init__` hands on count too."""
        euler = FlowMatchEulerDiscreteScheduler
        return (euler._get_init_keys(input_class) | euler._get_init_keys(euler)) - {"args", "kwargs"}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As the Euler scheduler's, then with the sigmas below the split replaced."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        start = self.sigmas[0].clamp(max=self.config.split_time)
        self._steps_above = int((self.sigmas[:-1] > start).sum())
        replaced = len(self.timesteps) - self._steps_above
        if replaced == 0:
            return
        steps_below = min(self.config.steps_below, replaced)
        below = start * ode_times(steps_below).to(self.sigmas)
        self.sigmas = torch.cat([self.sigmas[: self._steps_above], below])
        self.timesteps = torch.cat([self.timesteps[: self._steps_above], below[:-1] * self.config.num_train_timesteps])
        self.num_inference_steps = len(self.timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The sample at the next sigma, in the dtype of `model_output`, a velocity; `generator` is for the noise.

        `per_token_timesteps`, one per token, take the Euler scheduler's steps at all times.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        if per_token_timesteps is not None or self.step_index < self._steps_above:
            return super().step(
                model_output,
                timestep,
                sample,
                s_churn,
                s_tmin,
                s_tmax,
                s_noise,
                generator,
                per_token_timesteps,
                return_dict,
            )

        def noise() -> Tensor:
            return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=torch.float32)

        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        velocity, x = model_output.float(), sample.float()
        ahead = stable_velocity_step(velocity, x, sigma, sigma_next, LINEAR, noise, self.config.noise_factor)
        self._step_index += 1
        ahead = ahead.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=ahead) if return_dict else (ahead,)
