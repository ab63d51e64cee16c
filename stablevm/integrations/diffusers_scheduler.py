"""StableVS as schedulers for pipelines of diffusers.

    pipe.scheduler = StableVSFlowMatchScheduler.from_config(pipe.scheduler.config)

They need diffusers (`pip install 'stablevm[vae]'`).
"""

import sys
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

# diffusers loads a class of a saved pipeline by a base class that it finds in the class's module, which is this one.
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from stablevm.integrations.stablevs import (
    FLOW_PREDICTION,
    OWN_NAMES,
    PUBLISHED_NAMES,
    StableVSMixin,
    refuse_other_processes,
)

Generators = torch.Generator | list[torch.Generator]


class StableVSFlowMatchScheduler(StableVSMixin, FlowMatchEulerDiscreteScheduler):
    """StableVS (Yang et al., 2026) in place of a FlowMatchEulerDiscreteScheduler, with fewer steps.

    Down to `split_time` the sigmas and steps are those of the Euler scheduler, including shifts. Below it, only
    `steps_below` sigmas remain, and each step is that of `stable_velocity_step`. So 30 requested steps may become 20
    actual ones, `len(scheduler.timesteps)`.

    split_time: a sigma in (0, 1). steps_below: 1 or more. noise_factor: from 0 (none) to 1 (the largest possible).
    grid_below: "schedule", as published, takes a subset of the Euler scheduler's sigmas below the split, at evenly
    spaced indices; "even" replaces them by equal steps from `split_time` to 0. use_fast_low_schedule: False gives the
    Euler scheduler. `fast_low_split_point`, `fast_low_low_substeps` and `low_region_noise_factor` are the published
    names of the first three. The other arguments are those of the Euler scheduler.

    Pipelines that start in the middle use `timesteps[k:]` or `set_begin_index(k)`. There k counts the requested steps:
    the first noise level is that of the Euler scheduler, followed by our noise levels below it.

    Raises ValueError for values out of range, for `invert_sigmas`, whose time runs in the other direction, and for
    configurations of other methods than flow matching; TypeError for an unknown argument.
    """

    _base = FlowMatchEulerDiscreteScheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set sigmas and timesteps as the Euler scheduler does, then keep fewer of them below the split."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._thin()

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """Add noise to the sample up to the noise level of the timestep."""
        self._follow_slice(timestep)
        return super().scale_noise(sample, timestep, noise)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Take one step: the sample at the next sigma, in the dtype of `model_output`, which is a velocity.

        generator: the source of the noise. With `per_token_timesteps`, one for each token, all steps are those of the
        Euler scheduler. Pipelines pass no generator to `step`; with a `noise_factor` the noise then comes from torch's
        global generator.
        """
        if per_token_timesteps is not None or not self._is_below(timestep):
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
        ahead = self._large_step(model_output, sample, generator).to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=ahead) if return_dict else (ahead,)


class _Multistep(StableVSMixin):
    """What StableVS changes in a multistep scheduler: arguments for flow matching, and the history at the split."""

    _own_names = OWN_NAMES | {"keep_history"}
    _other_names = PUBLISHED_NAMES | {"shift": "flow_shift"}
    _other_sigmas: tuple[str, ...] = (
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
    )

    def __init__(self, *args: Any, keep_history: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(keep_history, bool | None):
            raise ValueError(f"keep_history {keep_history!r}: expected True, False or None")
        if keep_history and self.config.noise_factor > 0:
            raise ValueError(
                f"keep_history True: fresh noise (noise_factor {self.config.noise_factor}) makes a step independent of "
                "earlier predictions; set noise_factor to 0, or leave keep_history out"
            )
        self.register_to_config(keep_history=keep_history)

    def _is_below(self, timestep: Any) -> bool:
        kept = self.config.keep_history
        if kept is None:
            kept = self.config.noise_factor == 0
        return not kept and super()._is_below(timestep)

    @classmethod
    def _for_base(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        kwargs = {"prediction_type": FLOW_PREDICTION, "use_flow_sigmas": True, **kwargs}
        shift = kwargs.pop("shift", None)
        if shift is not None and kwargs.setdefault("flow_shift", shift) != shift:
            raise TypeError("shift: another name of flow_shift, which is given too; give one of them")
        refuse_other_processes(kwargs)
        for name in cls._other_sigmas:
            if kwargs.get(name):
                raise ValueError(f"{name} True: {cls.__name__} expects the sigmas of flow matching")
        return kwargs

    @classmethod
    def _of_flow_matching(cls, config: dict[str, Any]) -> dict[str, Any]:
        config = super()._of_flow_matching(config)
        return {**config, "flow_shift": config["shift"]} if "shift" in config else config

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to the samples up to the noise levels of the timesteps (B,)."""
        self._follow_slice(timesteps)
        return super().add_noise(original_samples, noise, timesteps)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, under the name that pipelines of flow matching call, with timesteps (B,)."""
        return self.add_noise(sample, noise, timestep)

    def _forget(self) -> None:
        """Clear the history, as `set_timesteps` does."""
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = 0

    def _step_below(
        self, model_output: Tensor, sample: Tensor, corrected: Tensor, generator: Any, noise: Tensor | None = None
    ) -> Tensor:
        """One large step from the corrected sample, with the x0 that the network predicted at `sample`; float32."""
        x0 = self.convert_model_output(model_output.float(), sample=sample.float())
        start = corrected.float()
        ahead = self._large_step((start - x0) / self.sigmas[self.step_index], start, generator, noise)
        self._forget()
        return ahead


class StableVSDPMSolverMultistepScheduler(_Multistep, DPMSolverMultistepScheduler):
    """StableVS in place of a DPMSolverMultistepScheduler for flow matching, with fewer steps.

    Above `split_time` sigmas and steps are those of DPM-Solver++ (Lu et al., 2022), of order `solver_order`. Below it
    remain fewer sigmas, as in StableVSFlowMatchScheduler, whose arguments this class has too. The other arguments are
    those of the base class; `shift` is another name of `flow_shift`, and `prediction_type` and `use_flow_sigmas` are
    those of flow matching.

    keep_history: whether the history of predictions goes on below the split. True takes the base class's steps there,
    with differences between the last prediction and those before it. False takes those of `stable_velocity_step`, as
    published, from the latest prediction only; then the history is empty, as after `set_timesteps`. The step that
    crosses the split is the base class's either way, of full order. None, the default, keeps the history unless there
    is a `noise_factor`: fresh noise makes a step independent of earlier predictions. Without it, the kept history was
    nearer to the exact flow in every measurement.

    Raises ValueError for values out of range, for other sigmas than those of flow matching (`use_karras_sigmas` and
    the like), for configurations of other methods, and for `keep_history` True with a `noise_factor`; TypeError for an
    unknown argument.
    """

    _base = DPMSolverMultistepScheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Set sigmas and timesteps as the base class does, then keep fewer of them below the split.

        mu: for `use_dynamic_shifting`, and without effect otherwise. sigmas: the noise levels before shifting, in
        place of a number of steps. ValueError for `timesteps`, which the base class cannot use with flow matching.
        """
        if timesteps is not None:
            raise ValueError("timesteps: flow matching has sigmas; give `sigmas`, timesteps / num_train_timesteps")
        if sigmas is None:
            super().set_timesteps(num_inference_steps, device, mu if self.config.use_dynamic_shifting else None)
        else:
            super().set_timesteps(len(sigmas), device)
            self._take(sigmas, mu)
        self._thin()

    def _take(self, sigmas: list[float], mu: float | None) -> None:
        """Shift the sigmas as UniPC's scheduler does, which differs in its steps only; our base class takes none."""
        names = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type")
        given = {name: self.config[name] for name in names}
        unipc = UniPCMultistepScheduler(
            prediction_type=FLOW_PREDICTION,
            use_flow_sigmas=True,
            flow_shift=self.config["flow_shift"],
            shift_terminal=self.config.get("shift_terminal"),
            **given,
        )
        unipc.set_timesteps(sigmas=np.array(sigmas, dtype=np.float64), mu=mu)
        self.sigmas = torch.cat([unipc.sigmas[:-1], self.sigmas[-1:]])
        self.timesteps = unipc.timesteps.to(self.timesteps.device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step: the sample at the next sigma, in the dtype of `model_output`, which is a velocity.

        generator: the source of the noise; `variance_noise`, if given, is the noise.
        """
        if self.num_inference_steps is None or not self._is_below(timestep):
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        ahead = self._step_below(model_output, sample, sample, generator, variance_noise).to(model_output.dtype)
        return SchedulerOutput(prev_sample=ahead) if return_dict else (ahead,)


class StableVSUniPCMultistepScheduler(_Multistep, UniPCMultistepScheduler):
    """StableVS in place of a UniPCMultistepScheduler for flow matching, such as Wan's, with fewer steps.

    Above `split_time` sigmas and steps are those of UniPC (Zhao et al., 2023), predictor and corrector. The rest is
    that of StableVSDPMSolverMultistepScheduler, `keep_history` too. Where the history ends at the split, the corrector
    acts once more at the first sigma below it, since it completes the last step from above with the prediction made
    there; after that there is nothing to correct.
    """

    _base = UniPCMultistepScheduler
    _other_sigmas = ("use_exponential_sigmas", "use_beta_sigmas")  # Karras's are turned into those of flow matching

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set sigmas and timesteps as the base class does, then keep fewer of them below the split.

        sigmas: the noise levels before shifting, in place of a number of steps.
        """
        given = None if sigmas is None else np.array(sigmas, dtype=np.float64)
        super().set_timesteps(num_inference_steps, device, given, mu)
        self._thin()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        generator: Generators | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step: the sample at the next sigma, in its dtype; `model_output` is a velocity.

        generator: the source of the noise below the split.
        """
        if self.num_inference_steps is None or not self._is_below(timestep):
            return super().step(model_output, timestep, sample, return_dict)
        corrected = self._corrected(model_output, sample)
        ahead = self._step_below(model_output, sample, corrected, generator).to(sample.dtype)
        return SchedulerOutput(prev_sample=ahead) if return_dict else (ahead,)

    def _corrected(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The sample, corrected by the new prediction if a step of UniPC led to it."""
        if self.last_sample is None or self.step_index - 1 in self.disable_corrector:
            return sample
        return self.multistep_uni_c_bh_update(
            this_model_output=self.convert_model_output(model_output, sample=sample),
            last_sample=self.last_sample,
            this_sample=sample,
            order=self.this_order,
        )

    def _forget(self) -> None:
        super()._forget()
        self.timestep_list = [None] * self.config.solver_order
        self.last_sample = None


# diffusers takes the parts of a pipeline on the hub from modules that are attributes of its own, as this one is now.
setattr(diffusers.pipelines, __name__, sys.modules[__name__])
