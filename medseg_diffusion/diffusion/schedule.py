"""Variance-preserving noise schedules.

A schedule is a table of ``alpha_bar[t]`` for t = 0..T, and the forward process is

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I),   alpha_t = sqrt(alpha_bar[t]),   sigma_t = sqrt(1 - alpha_bar[t])

(Ho et al. 2020, arXiv 2006.11239, eq. 4). Time is an integer: 0 is clean, 1..T are noisy. The only constraint on a
schedule is that ``alpha_bar`` starts at 1 and decreases, and only its last entry may be 0. A schedule is chosen once,
for training. Sampling with fewer steps takes another list of times (`medseg_diffusion.sampling.loop`), never another
schedule.

Tables are on the CPU, whatever torch's default device is, because their values are needed as numbers. Times on another
device are looked up in a copy there: reading them back would wait for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The table ``alpha_bar``: shape (T + 1,), float64, ``alpha_bar[0] == 1``, strictly decreasing, not negative.

    Only ``alpha_bar[T]`` can be 0: x_T is then pure noise (`ends_in_noise`).
    """

    alpha_bar: Tensor
    _values: tuple[float, ...] = field(default=(), init=False, repr=False)
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        ab = self.alpha_bar
        if ab.dtype != torch.float64 or ab.ndim != 1 or len(ab) < 2:
            raise ValueError(f"alpha_bar must be float64 of shape (T + 1,), got {ab.dtype} of shape {tuple(ab.shape)}")
        if float(ab[0]) != 1.0:
            raise ValueError(f"alpha_bar[0] is the clean image and must be 1, got {float(ab[0])}")
        if not bool((ab[1:] < ab[:-1]).all()) or not float(ab[-1]) >= 0:
            raise ValueError("alpha_bar must decrease strictly to 0 or above: some beta is 0 or beyond 1")
        object.__setattr__(self, "_values", tuple(ab.tolist()))

    @property
    def num_steps(self) -> int:
        """T, the number of noise levels that the model was trained on."""
        return len(self.alpha_bar) - 1

    @property
    def ends_in_noise(self) -> bool:
        """Whether x_T is pure noise, alpha_bar[T] = 0 ("zero terminal SNR", Lin et al. 2023, arXiv 2305.08891).

        x_T = eps then says nothing of x0. A network has to predict x0, v or the flow there, not eps, and
        `guidance.ClassifierGuided`, which changes eps alone, is undefined. All the rest works, samplers included.
        """
        return self.value(self.num_steps) == 0

    def value(self, t: int) -> float:
        """``alpha_bar[t]`` as a number; also works where tensors have no values (tracing, fake tensors)."""
        return self._values[t]

    def scales(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each (B, 1, ..., 1) in the dtype and on the device of ``like`` (B, C, *S).

        ``t`` is (B,) int64, or one int for the whole batch.
        """
        ab = self.at(t)
        return expand(ab.sqrt(), like), expand((1 - ab).sqrt(), like)

    def at(self, t: Tensor | int) -> Tensor:
        """``alpha_bar[t]`` in float64, shape (B,) on the device of ``t``, or (1,) on the CPU for an int.

        MPS has no float64: there the result is on the CPU as well.
        """
        if isinstance(t, int):
            return torch.tensor([self.value(t)], dtype=torch.float64)
        if t.device.type == "mps":
            t = t.cpu()
        return self._on(t.device)[t.reshape(-1)]

    def _on(self, device: torch.device) -> Tensor:
        """The table on ``device``, copied once."""
        if device == self.alpha_bar.device:
            return self.alpha_bar
        copy = self._copies.get(device)
        if copy is None:
            copy = sent(self.alpha_bar, device)
            if type(copy) is Tensor:  # not the fake tensor of a trace, which means nothing outside it
                self._copies[device] = copy
        return copy

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | int) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps, shape of ``x0`` (B, C, *S)."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0 + sigma * eps

    def snr(self, t: Tensor | int) -> Tensor:
        """Signal-to-noise ratio alpha_t^2 / sigma_t^2, float64 (B,); infinite at t = 0."""
        ab = self.at(t)
        return ab / (1 - ab)

    def times_between(self, low: float, high: float, scale: float = 1.0) -> tuple[int, int]:
        """The first and the last of the times 1..T at which log(scale^2 alpha^2 / sigma^2) is from ``low`` to ``high``.

        Raises:
            ValueError: there is no such time.
        """
        log_snr = 2 * (self.half_log_snr()[1:] + math.log(scale))
        inside = ((log_snr >= low) & (log_snr <= high)).nonzero().flatten()
        if not len(inside):
            ends = f"{float(log_snr[-1]):.3g} to {float(log_snr[0]):.3g}"
            raise ValueError(f"no time has a log-SNR between {low:g} and {high:g}; the schedule's are {ends}")
        return 1 + int(inside[0]), 1 + int(inside[-1])

    def half_log_snr(self) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t) for t = 0..T, float64 (T + 1,).

        lambda_0 is infinite, and lambda_T minus infinity if the schedule `ends_in_noise`.
        """
        return 0.5 * (self.alpha_bar / (1 - self.alpha_bar)).log()


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-element values (B,) or (1,) as (B, 1, ..., 1), in the dtype and on the device of ``like`` (B, C, *S)."""
    return sent(values.to(like.dtype), like.device).reshape(-1, *[1] * (like.ndim - 1))


def sent(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device``. From the CPU to a GPU it goes through pinned memory, without waiting for the GPU."""
    if device.type == "cuda" and value.device.type == "cpu" and torch.cuda.is_available():
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def precise(device: torch.device) -> torch.dtype:
    """The widest floating-point type on ``device``: float64, but float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def from_betas(betas: Tensor) -> NoiseSchedule:
    """The schedule of a list of ``betas`` (T,), alpha_bar_t = prod_{i <= t} (1 - beta_i).

    Raises:
        ValueError: a beta does not lie in (0, 1).
    """
    betas = betas.to(torch.float64)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(
            f"every beta must lie in (0, 1), got {float(betas.min()):.4g} to {float(betas.max()):.4g} "
            f"over {len(betas)} steps; use more steps or another schedule (cosine works for any number)"
        )
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), (1 - betas).cumprod(0)]))


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2) -> NoiseSchedule:
    """Linear betas of Ho et al. 2020, rescaled by 1000 / T so that x_T is noise for any T.

    The rescaling is that of Nichol & Dhariwal's public code and of SegDiff (T = 100). Below T = 21 the last beta of
    the default range would reach 1, which raises a ValueError.
    """
    scale = 1000 / num_steps
    # The ends are checked separately, because linspace of a single step contains only the first.
    from_betas(torch.tensor([scale * beta_start, scale * beta_end], device="cpu"))
    return from_betas(
        torch.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=torch.float64, device="cpu")
    )


def scaled_linear(num_steps: int = 1000, beta_start: float = 1.5e-3, beta_end: float = 1.95e-2) -> NoiseSchedule:
    """Betas linear in their square root, rescaled by 1000 / T: "linear" in latent diffusion (Rombach et al. 2022)."""
    root = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64, device="cpu")
    return from_betas(root**2 * (1000 / num_steps))


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2) (Nichol & Dhariwal 2021, 2102.09672, eq. 17)."""
    u = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    f = ((u + offset) / (1 + offset) * math.pi / 2).cos() ** 2
    return from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def sigmoid(num_steps: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> NoiseSchedule:
    """alpha_bar(u) = (g(end) - g(u)) / (g(end) - g(start)), g a sigmoid of (start + u (end - start)) / tau, u = t / T.

    Jabri et al. 2022 (arXiv 2212.11972). The last entry would be exactly 0 and is kept at 1e-9, as published.
    """
    u = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    g = ((start + u * (end - start)) / tau).sigmoid()
    alpha_bar = (g[-1] - g) / (g[-1] - g[0])
    return NoiseSchedule(alpha_bar.clamp(min=1e-9))


def rectified_flow(num_steps: int = 1000) -> NoiseSchedule:
    """The path z = (1 - u) x0 + u eps, u = t / T, divided by its norm: alpha = (1 - u) / n, sigma = u / n.

    n = sqrt((1 - u)^2 + u^2). Liu et al. 2022 (arXiv 2209.03003), Lipman et al. 2022 (arXiv 2210.02747, eq. 20 to 23
    with sigma_min = 0). The division keeps the variance; z = x_t / (alpha + sigma) and u = sigma / (alpha + sigma)
    undo it. x_T is pure noise.
    """
    u = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
    return NoiseSchedule((1 - u) ** 2 / ((1 - u) ** 2 + u**2))
