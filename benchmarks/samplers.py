"""What do the steps of a sampler cost, outside of the network, beside those of diffusers and MONAI?

    python benchmarks/samplers.py [--device cuda]

All walk the same times from the same noise with the same formula in place of a network, which costs almost nothing.
The note says how far the images of deterministic walks are apart. Ours draws noise from one generator for each image,
so that an image does not depend on its batch; diffusers and MONAI draw the noise of a batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from common import Options, Row, installed, main, quiet
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.schedule import NoiseSchedule, linear
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.ddpm import DDPM
from medseg_diffusion.sampling.dpm_solver import DPMSolver
from medseg_diffusion.sampling.loop import Sampler, sample, spaced


class Formula(nn.Module):
    """The exact noise of Gaussian data of standard deviation 0.5, in place of a network."""

    factor: Tensor

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        alpha_bar = schedule.alpha_bar[1:]
        self.register_buffer("factor", ((1 - alpha_bar).sqrt() / (0.25 * alpha_bar + 1 - alpha_bar)).float())

    def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
        return self.factor[timesteps].reshape(-1, 1, 1, 1) * x


def walk_of_diffusers(kind: str, formula: Formula, noise: Tensor, steps: int) -> Callable[[], Tensor]:
    """A walk with a scheduler of diffusers, whose "leading" timesteps, plus 1, are our times."""
    import diffusers

    scheduler = getattr(diffusers, kind)(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        timestep_spacing="leading",
        **({"final_sigmas_type": "zero"} if kind.startswith("DPM") else {"clip_sample": False}),
    )
    if kind.startswith("DPM"):  # its own grid is another one
        grid: dict[str, object] = {"timesteps": [t - 1 for t in spaced(linear(1000), steps, "leading")[:-1]]}
    else:
        grid = {"num_inference_steps": steps}

    def run() -> Tensor:
        scheduler.set_timesteps(**grid, device=noise.device)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(formula(x, t.expand(len(x))), t, x).prev_sample
        return x

    return run


def walk_of_monai(kind: str, formula: Formula, noise: Tensor, steps: int) -> Callable[[], Tensor]:
    """A walk with a scheduler of MONAI."""
    from monai.networks import schedulers

    scheduler = getattr(schedulers, kind)(num_train_timesteps=1000, schedule="linear_beta", clip_sample=False)

    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(formula(x, torch.full((len(x),), int(t), device=x.device)), t, x)[0]
        return x

    return run


def rows(options: Options) -> Iterator[Row]:
    device = torch.device(options.device)
    batch, side, steps = options.size(8, 2), options.size(64, 8), options.size(100, 10)
    schedule = linear(1000)
    formula = Formula(schedule).to(device)
    denoiser = NetworkDenoiser(formula, schedule, "eps")
    noise = gaussian((3, side, side), generators(range(batch))).to(device)
    times = spaced(schedule, steps, "leading")
    samplers: dict[str, tuple[Sampler, str, str]] = {
        "DDIM": (DDIM(), "DDIMScheduler", "DDIMScheduler"),
        "DDPM": (DDPM(), "DDPMScheduler", "DDPMScheduler"),
        "DPM-Solver++": (DPMSolver(), "DPMSolverMultistepScheduler", ""),
    }
    for name, (sampler, theirs, monai) in samplers.items():

        def ours(sampler: Sampler = sampler) -> Tensor:
            return sample(denoiser, sampler, noise, times, generators=generators(range(batch)))

        runs: dict[str, Callable[[], Tensor]] = {"ours": ours}
        if installed("diffusers"):
            runs["diffusers"] = walk_of_diffusers(theirs, formula, noise, steps)
        if monai:
            runs["MONAI"] = walk_of_monai(monai, formula, noise, steps)
        times_of = options.in_turns(runs)
        for peer in ("diffusers", *(["MONAI"] if monai else [])):
            note = "random steps"
            if peer in runs and name != "DDPM":
                note = f"images differ by {float((ours() - runs[peer]()).abs().max()):.0e}"
            text = f"{name}, {steps} steps of {batch} x 3 x {side}^2 without a network"
            yield Row(text, peer, times_of["ours"], times_of.get(peer), note=note)


if __name__ == "__main__":
    with quiet():
        main("samplers", __doc__, rows)
