"""lora_fused with its choice taken away: by one backend, or by one strategy of one backend.

Both directions run by the strategy; dx by the library where the strategy has no kernel for it
(`decode` of the backend `cuda`). Such a call skips the look-up of its choice (a few microseconds of
Python) and is otherwise what the library runs. On GPUs the tiles are those that the cost model
thinks best for the strategy.
"""

import torch
from torch import Tensor

from benchmarks.providers.loralib import filled
from benchmarks.providers.provider import Call, NotServed
from benchmarks.tensors import CaseTensors
from lora_fused import FusedLoRALinear, backends
from lora_fused.autograd import LoRALinearFunction, lora_forward
from lora_fused.backends import cpu
from lora_fused.backends.cpu_rule import thread_count
from lora_fused.config import Call as Arguments
from lora_fused.config import Config, Problem, Route
from lora_fused.functional import draw_seed, make_mask
from lora_fused.gpu_choice import Option, best_candidate, options, parts_of
from lora_fused.reference import effective_scaling
from lora_fused.request import gpu_facts, problem_of

STRATEGIES = {
    "cpu": ("own", "hybrid", "packed"),
    "triton": ("split", "one_pass", "decode"),
    "cuda": ("split", "s_first", "decode"),
}
"""By backend. The strategy `library` is all that the backend `torch` has."""


def lacks(backend: str, device: str) -> str | None:
    """Why the backend cannot run on the device."""
    if backend in ("triton", "cuda") and device != "cuda":
        return "it is for GPUs"
    return None if backends.load(backend) else backends.why_missing(backend)


def by_backend(backend: str, t: CaseTensors, dropout: float) -> Call:
    """FusedLoRALinear(backend=...): which of its strategies runs is the backend's own choice."""
    _refuse(backend, _problem(t.x, (t.w, t.a, t.b, t.bias), dropout, None))
    layer = filled(FusedLoRALinear, t, dropout)
    layer.backend = backend
    called: Call = layer
    return called


def by_strategy(backend: str, strategy: str, t: CaseTensors, dropout: float) -> Call:
    return _Forced(backend, strategy, t, dropout)


class _Forced:
    """The layer by one strategy. Its routes, with autograd and without, are made at first use."""

    def __init__(self, backend: str, strategy: str, t: CaseTensors, dropout: float) -> None:
        self.backend, self.strategy = backend, strategy
        self.scaling, self.dropout = t.scaling, dropout
        self.params = (t.w, t.a, t.b, t.bias)
        self.packed = cpu.pack(t.w, torch.get_num_threads()) if strategy == "packed" else None
        self.routes: dict[bool, Route] = {}

    def __call__(self, x: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled()
        if recorded not in self.routes:
            self.routes[recorded] = self._route(x)
        route, mask, scale = self.routes[recorded], None, self.scaling
        if self.dropout:
            mask = make_mask(draw_seed(x.device), self.dropout)
            scale = effective_scaling(scale, self.dropout)
        arguments = Arguments(route, scale, mask, self.packed)
        if not route.needs:
            return lora_forward(arguments, x, *self.params)[0]
        y: Tensor = LoRALinearFunction.apply(x, *self.params, arguments)
        return y

    def _route(self, x: Tensor) -> Route:
        problem = _problem(x, self.params, self.dropout, self.packed)
        return Route(
            problem=problem,
            config=config_for(problem, self.backend, self.strategy),
            compute=x.dtype,
            cast=False,
            needs=problem.needs,
            x_shape=tuple(x.shape),
            y_shape=(*x.shape[:-1], problem.N),
            param_dtypes=tuple(None if p is None else p.dtype for p in self.params),
        )


def _problem(
    x: Tensor,
    params: tuple[Tensor, Tensor, Tensor, Tensor | None],
    dropout: float,
    packed: cpu.PackedWeight | None,
) -> Problem:
    on_gpu = (*gpu_facts(x, *params[:3]), False) if x.is_cuda else None
    return problem_of(x, params, dropout > 0, packed, None, False, on_gpu)


def config_for(problem: Problem, backend: str, strategy: str) -> Config:
    """Forward by this strategy, and dx if it can. Raises NotServed where forward has no kernel."""
    _refuse(backend, problem)
    if backend == "cpu":
        return Config(backend, strategy, strategy, cpu.isa(), thread_count(problem))
    best = {
        part: _best(problem, part, backend, "reduce" if part == "reduce" else strategy)
        for part in parts_of(problem)
    }
    if best["forward"] is None:
        raise NotServed(f"{backend} has no {strategy} kernel for {problem}")
    tiles = {part: option.tiles for part, option in best.items() if option is not None}
    shrink = best_candidate(problem, "shrink", backend)
    return Config(
        backend,
        strategy,
        strategy if "dx" in tiles else "library",
        forward_tiles=tiles.get("forward"),
        dx_tiles=tiles.get("dx"),
        shrink_tiles=shrink.tiles if shrink else None,
        reduce_tiles=tiles.get("reduce"),
    )


def _refuse(backend: str, problem: Problem) -> None:
    module = backends.load(backend)
    reasons = module.not_supported_reasons(problem) if module else [backends.why_missing(backend)]
    if reasons:
        raise NotServed(f"{backend} cannot run {problem}: {'; '.join(reasons)}")


def _best(problem: Problem, part: str, backend: str, strategy: str) -> Option | None:
    """The option that the cost model thinks fastest."""
    fitting = (
        option
        for option in options(problem, part, (backend,))
        if (option.backend, option.strategy) == (backend, strategy)
    )
    return next(fitting, None)
