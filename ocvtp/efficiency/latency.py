"""What pruning saves in time: first token, later tokens, and each phase before the first one, measured.

Cases are measured in turns, one run of each after the other, so that a machine that slows down slows all of
them, and compared turn by turn. Medians are given with quartiles. Times are not deterministic: nothing here is part of
the pipeline's results.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from ocvtp.errors import BadInput, OcvtpError
from ocvtp.phases import LISTENS, PHASES, Stopwatch, now, phase
from ocvtp.vlms.families import family_of

Case = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which the model is pruned, such as `lambda: ocvtp.prune(model, ...)`."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        """Of several times in seconds."""
        quartiles = torch.tensor(seconds, dtype=torch.float64).quantile(
            torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        )
        median, low, high = (1000 * quartiles).tolist()
        return cls(median, low, high)

    @classmethod
    def of_part(cls, seconds: list[float], wholes: list[float]) -> "Spread":
        """Of what is a part of something in each of several runs: what it makes up of the median whole.

        Medians of parts do not add up to the median of their sums. So it is the share that the part has on average in
        the middle half of the runs, by their whole, and shares add up. Quartiles are the part's own.
        """
        quarter, order = len(wholes) // 4, sorted(range(len(wholes)), key=wholes.__getitem__)
        share = mean(seconds[run] / wholes[run] for run in order[quarter : len(order) - quarter])
        return replace(cls.of(seconds), median=1000 * share * median(wholes))


@dataclass(frozen=True)
class Latency:
    """Times of one case.

    Attributes:
        first_token: from the call of `generate` to the first token.
        vision: the part of it before the language model starts: tower, method, projector.
        phases: each of `ocvtp.phases.PHASES` of a first token, as parts that add up (`Spread.of_part`). On a CPU they
            are of the same runs as `first_token`; elsewhere of runs of their own, in which the device is waited for
            between phases, so that their sum may exceed it.
        next_token: each further token.
        total: the whole answer.
        peak_memory_bytes: during the whole answer: what was allocated of an accelerator, or what the process held on
            a CPU, with what its allocator keeps of earlier work; None where the system does not tell.
        turns: milliseconds of `first_token` in each turn.
        processing: what the processor makes of images and text before `generate` is called; None where nobody says how.
    """

    first_token: Spread
    vision: Spread
    phases: dict[str, Spread]
    next_token: Spread | None
    total: Spread
    new_tokens: int
    repeats: int
    device: str
    peak_memory_bytes: int | None
    turns: list[float]
    processing: Spread | None = None

    @property
    def accounted(self) -> float:
        """Of the median time to the first token: what the phases make up."""
        return sum(spread.median for spread in self.phases.values()) / self.first_token.median

    def against(self, other: "Latency") -> float:
        """How many times another case's time to the first token: median of the ratios of each turn."""
        return median(mine / its for mine, its in zip(self.turns, other.turns, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "accounted": self.accounted}


def measure(
    model: Any,
    inputs: Mapping[str, Any],
    cases: Mapping[str, Case] | None = None,
    *,
    new_tokens: int = 16,
    repeats: int = 10,
    warmup: int = 2,
    process: Callable[[], Any] | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, Latency]:
    """Measure `model.generate(**inputs)` in every case, greedy, with exactly `new_tokens` new tokens.

    Args:
        model: a VLM of a supported family.
        inputs: what its processor made, on the model's device.
        cases: a context for each case; None measures the model as it is, as `vanilla`.
        new_tokens: tokens of an answer; 1 measures the first token only.
        repeats: measured runs of each case.
        warmup: runs of each case before them.
        process: makes such inputs of images and text; timed by itself in each run.
        failed: gets the cases that cannot be measured, such as those for which there is too little memory, and why; the
            others go on. None: the first of them ends it.

    Returns:
        A `Latency` for every case that did not fail, in the order of `cases`.

    Raises:
        BadInput: counts that are too small.
    """
    for name, value, low in (("new_tokens", new_tokens, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < low:
            raise BadInput(f"{name} is {value}: at least {low} is needed")
    cases = cases or {"vanilla": nullcontext}
    device, runs = next(model.parameters()).device, {name: _Runs() for name in cases}
    for turn in range(warmup + repeats):
        for name in list(runs):
            try:
                with cases[name]():
                    _run(runs[name] if turn >= warmup else _Runs(), model, inputs, new_tokens, process)
            except (OcvtpError, RuntimeError, MemoryError) as error:
                if failed is None or not (isinstance(error, OcvtpError) or ran_out(error)):
                    raise
                failed[name] = str(error) if isinstance(error, OcvtpError) else f"out of memory on {device}"
                del runs[name]
            if device.type == "cuda" and name not in runs:
                torch.cuda.empty_cache()  # for the others, once nothing holds what the failed one had
    return {name: run.latency(new_tokens, str(device)) for name, run in runs.items()}


def ran_out(error: Exception) -> bool:
    """Whether there was too little memory: of CPUs torch tells by a message alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@dataclass
class _Runs:
    """Seconds and bytes of the measured runs of one case."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    phases: list[Mapping[str, float]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    processing: list[float] = field(default_factory=list)

    def latency(self, new_tokens: int, device: str) -> Latency:
        steps = (
            [max(0.0, t - f) / (new_tokens - 1) for t, f in zip(self.total, self.first, strict=True)]
            if (new_tokens > 1)
            else []
        )
        watched = [sum(run.values()) for run in self.phases]
        vision = [sum(run[name] for name in ("tower", "method", "projector")) for run in self.phases]
        return Latency(
            first_token=Spread.of(self.first),
            vision=Spread.of_part(vision, watched),
            phases={name: Spread.of_part([run[name] for run in self.phases], watched) for name in PHASES},
            next_token=Spread.of(steps) if steps else None,
            total=Spread.of(self.total),
            new_tokens=new_tokens,
            repeats=len(self.first),
            device=device,
            peak_memory_bytes=max(self.memory) if self.memory else None,
            turns=[1000 * first for first in self.first],
            processing=Spread.of(self.processing) if self.processing else None,
        )


_SETTLED = 2
"""Calls after which a handle has set up what later ones use: a CUDA graph is recorded at the second."""


@torch.inference_mode()
def _run(
    runs: _Runs, model: Any, inputs: Mapping[str, Any], new_tokens: int, process: Callable[[], Any] | None
) -> None:
    device = next(model.parameters()).device

    def seconds(tokens: int) -> float:
        start = now(device)
        _generate(model, inputs, tokens)
        return now(device) - start

    for _ in range(_SETTLED):
        _generate(model, inputs, 1)
    if process is not None:
        start = now(device)
        process()
        runs.processing.append(now(device) - start)
    counts = _count_memory(device)
    with timed(model, device) as phases:
        watched = seconds(1)
    runs.phases.append(phases)
    # To wait for a CPU costs nothing; elsewhere phases could overlap, and what that saves is in a run of its own.
    runs.first.append(watched if device.type == "cpu" else seconds(1))
    runs.total.append(seconds(new_tokens) if new_tokens > 1 else runs.first[-1])
    if counts:
        runs.memory.append(_most_memory(device))


_SELF = Path("/proc/self")
"""Where Linux tells a process of itself."""


def _count_memory(device: torch.device) -> bool:
    """From now on note the most memory that is held; whether that can be had."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu":
        return False
    try:
        (_SELF / "clear_refs").write_text("5")
        return "VmHWM" in (_SELF / "status").read_text()
    except OSError:  # another system
        return False


def _most_memory(device: torch.device) -> int:
    """Bytes, since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = (_SELF / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@contextmanager
def timed(model: Any, device: torch.device) -> Iterator[Mapping[str, float]]:
    """Seconds of each of `PHASES` of what a model does within; complete when the context is left.

    The device is waited for at both ends of a phase, so nothing overlaps: elsewhere than on a CPU the sum may exceed
    what the same call takes unwatched.

    Raises:
        BadInput: a model of no supported family.
    """
    family, watch = family_of(model), Stopwatch(device)
    parts = {"tower": [family.tower], "projector": family.projectors, "prefill": [model.get_decoder()]}
    with ExitStack() as undo:
        for name, modules in parts.items():
            for module in modules:
                before = module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name), prepend=True)
                # Always: towers are left by an exception after the deepest layer that is needed.
                after = module.register_forward_hook(lambda *_: watch.leave(), always_call=True)
                undo.callback(before.remove)
                undo.callback(after.remove)
        token = LISTENS.set(watch)
        undo.callback(LISTENS.reset, token)
        with phase("other"):
            yield watch.seconds


def _generate(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> None:
    model.generate(**inputs, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
