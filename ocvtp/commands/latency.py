"""`ocvtp latency`: time to the first token and to later ones, method by method."""

import argparse
import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ocvtp.commands import common, pruned_vlm
from ocvtp.errors import BadInput, NotAvailable


def add(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = common.add(
        subparsers, "latency", run, "measure how fast a pruned VLM answers",
        "Methods take turns, so that a slow minute of the machine hits all; the whole model and random tokens are "
        "always among them, and ratios to these are taken turn by turn. Medians with quartiles; phases of a first "
        "token add up to it, on a CPU in the same runs, elsewhere in runs in which the device is waited for between "
        "them.",
    )  # fmt: skip
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how it is told."""
    pruned_vlm.add_arguments(parser)
    parser.add_argument("--options", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="of each method that has them: layer=9 inside_tower=true")  # fmt: skip
    parser.add_argument("--random-weights", action="store_true", help="of a VLM of the catalogue: nothing is fetched, "
                        "and times are those of the real one; the image is noise")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="prompts at once, of one image each (default: 1)")
    parser.add_argument("--image", type=Path, default=None, help="an image (default: a synthetic scene)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of the answer (default: 16)")
    parser.add_argument("--repeats", type=int, default=10, help="measured runs of each method (default: 10)")
    parser.add_argument("--warmup", type=int, default=2, help="runs before them (default: 2)")
    parser.add_argument("--limits", action="store_true", help="measure what the device can do, too, and say how many "
                        "times the least time each phase takes")  # fmt: skip
    parser.add_argument("--figure", type=Path, default=None, help="draw the phases as bars: a .png or .svg file")
    parser.add_argument("--bars", type=Path, default=None, help="draw times in percent of the unpruned model's, as the "
                        "paper's Figure 3: a .png or .svg file")  # fmt: skip
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, tell and draw."""
    found = measured(args)
    code = tell(args, found)
    draw(args, found)
    return code


def draw(args: argparse.Namespace, found: "Measured") -> None:
    """Write the figures that were asked for."""
    if args.figure is not None and found.times:
        _draw(args.figure, args.vlm, found.times)
    if args.bars is not None and "vanilla" in found.times:
        _draw_bars(args.bars, found)


def tell(args: argparse.Namespace, found: "Measured") -> int:
    """Print; 1 if there are cases that could not be measured."""
    if args.json:
        common.print_json(found.as_dict())
    else:
        for table in found.tables():
            common.console().print(table)
    return 1 if found.failed else 0


def measured(args: argparse.Namespace) -> "Measured":
    """Measure all cases; `BadInput` for what none of them could be measured with."""
    if args.batch < 1:
        raise BadInput(f"--batch is {args.batch}: at least 1 is needed")
    for option, said in (("--image", args.image), ("--prompt", args.prompt)):
        if args.random_weights and said is not None:
            raise BadInput(f"{option} says nothing to random weights: leave one of the two out")
    if args.pruner is not None and "oc-vtp" not in args.methods:
        raise BadInput(f"--pruner is what oc-vtp prunes by, which is not among --methods {','.join(args.methods)}")
    for option, path in (("--figure", args.figure), ("--bars", args.bars)):
        if path is not None:
            if path.suffix not in (".png", ".svg"):
                raise BadInput(f"{option} {path}: a name that ends in .png or .svg is needed")
            common.writable(option, path)
    from ocvtp.methods import entry_of

    given = common.named_values("--options", args.options, "layer=9")
    entries = {method: entry_of(method) for method in dict.fromkeys(["random", *args.methods])}
    options = {m: {name: given[name] for name in given if name in entry.options} for m, entry in entries.items()}
    for name in given:
        if not any(name in own for own in options.values()):
            raise BadInput(f"--options {name}: none of {', '.join(entries)} has such an option")
    image = None if args.random_weights else pruned_vlm.read_image(args.image) if args.image else _scene()

    import torch

    from ocvtp import streams
    from ocvtp.efficiency.latency import measure
    from ocvtp.efficiency.roofline import Ceilings

    pruner = None if args.pruner is None else _fingerprint(args.pruner)
    device = pruned_vlm.device(args.device)
    with _memory(f"{args.vlm} and a batch of {args.batch}", device):
        model, inputs, process = _random(args, device) if image is None else _loaded(args, image, device)
    with _memory("what measures the device for --limits", device):
        ceilings = Ceilings.measured(model.device, model.dtype) if args.limits else None
    size = _Size.of(model, inputs)
    cells = [("vanilla", 1.0), *((method, keep) for keep in args.keep for method in entries if method != "vanilla")]
    names = {_name(*cell): cell for cell in cells}
    cases: dict[str, Any] = {
        name: lambda m=method, k=keep: pruned_vlm.pruned(model, m, k, args.pruner, **options.get(m, {}))
        for name, (method, keep) in names.items()
    }
    failed: dict[str, str] = {}
    times = measure(
        model, inputs, cases, new_tokens=args.new_tokens, repeats=args.repeats, warmup=args.warmup, process=process,
        failed=failed,
    )  # fmt: skip
    there = {name: cell for name, cell in names.items() if name in times}
    kept = {name: size.kept(*cell) for name, cell in there.items()}
    limits = None if ceilings is None else _limits(model, size, there, kept, args.new_tokens, options, ceilings)
    about = {
        "vlm": args.vlm, "random_weights": args.random_weights, "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."), "batch": size.batch, "new_tokens": args.new_tokens,
        "image": "noise" if image is None else hashlib.sha256(image.tobytes()).hexdigest()[:16],
        "image_size": None if image is None else list(image.size), "image_tokens": size.image,
        "prompt": None if image is None else pruned_vlm.question(args.prompt),
        "text_tokens": size.text, "pruner": pruner, "options": options, "side_stream": streams.wanted(),
        "threads": torch.get_num_threads(), "versions": _versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    return Measured(about, names, times, failed, kept, limits)


@dataclass(frozen=True)
class Measured:
    """What came of it.

    Attributes:
        about: all that was measured, beside method and budget: the VLM and whether its weights are random, where it ran
            and with what numbers, threads and versions, prompts at once, image (a digest) and prompt and their tokens,
            tokens of an answer, the pruner (its fingerprint), options by method; and the date.
        names: of each case method and budget.
        times: of those that could be measured.
        failed: why the others could not.
        kept: tokens of an image that stay of those; of methods inside the language model, on average over its layers.
        limits: the least time, if it was asked for.
    """

    about: dict[str, Any]
    names: dict[str, tuple[str, int | float]]
    times: dict[str, Any]
    failed: dict[str, str]
    kept: dict[str, int]
    limits: "_Limits | None"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        about, found = dict(self.about), dict[str, Any]()
        options = about.pop("options")
        for name, (method, keep) in self.names.items():
            found[name] = {"method": method, "keep": keep, "options": options.get(method, {})}
            if name in self.failed:
                found[name] |= {"failed": self.failed[name]}
                continue
            ratios = {"of_vanilla": self.ratio(name, "vanilla"), "of_random": self.ratio(name, self.beside(name))}
            found[name] |= {"kept": self.kept[name], **self.times[name].as_dict(), **ratios}
            if self.limits is not None:
                distances = self.limits.distances(self.times[name], name)
                found[name] |= {"least_ms": self.limits.least[name], "distance": distances}
        ceilings = {} if self.limits is None else {"ceilings": self.limits.ceilings.as_dict()}
        return {**about, **ceilings, "cases": found}

    def tables(self) -> list[Any]:
        """For people: answers, phases and distances; what could not be measured says why in its row."""
        if not self.times:
            return [self._answers()]
        limits = [] if self.limits is None else [self.limits.table(self.times)]
        return [self._answers(), _phases(self.times), *limits]

    def beside(self, name: str) -> str:
        """The case of random tokens with the budget of another one."""
        method, keep = self.names[name]
        return name if method == "vanilla" else _name("random", keep)

    def ratio(self, name: str, other: str) -> float | None:
        """Of two first tokens; None where the other one could not be measured."""
        if other not in self.times:
            return None
        found: float = self.times[name].against(self.times[other])
        return found

    def _answers(self) -> Any:
        numbers = ("kept", "first token", "of vanilla", "of random", "next token", "answer", "peak memory")
        of = f"{self.about['image_tokens']} tokens an image"
        title = f"{self.about['vlm']} on {self.about['device']}, {of}: milliseconds, median [quartiles]"
        table = common.table(title, "", *numbers, right=numbers)
        for case in self.names:
            if case in self.failed:
                table.add_row(f"{case}: {self.failed[case]}", *["-"] * len(numbers))
                continue
            took = self.times[case]
            table.add_row(
                case,
                str(self.kept[case]),
                _spread(took.first_token),
                _percent(self.ratio(case, "vanilla")),
                "-" if case == "vanilla" else _percent(self.ratio(case, self.beside(case))),
                _spread(took.next_token) if took.next_token else "-",
                _spread(took.total),
                "-" if took.peak_memory_bytes is None else f"{took.peak_memory_bytes / 1e9:.2f} GB",
            )
        return table


def _name(method: str, keep: int | float) -> str:
    return method if method == "vanilla" else f"{method}, keep {keep:g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


class _Limits:
    """The least time of each phase of each case on this device."""

    def __init__(self, ceilings: Any, least: dict[str, dict[str, float]]) -> None:
        self.ceilings, self.least = ceilings, least

    def distances(self, took: Any, name: str) -> dict[str, float | None]:
        """Measured over least time; None where nothing must be done."""
        from ocvtp.efficiency.roofline import distance

        measured = {phase: spread.median for phase, spread in took.phases.items()}
        measured |= {"first_token": took.first_token.median}
        measured |= {} if took.next_token is None else {"next_token": took.next_token.median}
        return distance(measured, self.least[name])

    def table(self, times: dict[str, Any]) -> Any:
        """As such."""
        found = {name: self.distances(took, name) for name, took in times.items()}
        phases = tuple(next(iter(found.values())))
        flops, size = self.ceilings.flops / 1e12, self.ceilings.bandwidth / 1e9
        title = f"Times the least time there is, at {flops:.2f} TFLOP/s and {size:.1f} GB/s as measured"
        table = common.table(title, "", *(phase.replace("_", " ") for phase in phases),
                             right=tuple(phase.replace("_", " ") for phase in phases))  # fmt: skip
        for name, row in found.items():
            table.add_row(name, *("-" if value is None else f"{value:.1f}x" for value in row.values()))
        return table


@dataclass(frozen=True)
class _Size:
    """Of what is asked: prompts, vision tokens of the image in each, and what else is in it."""

    batch: int
    image: int
    text: int

    @classmethod
    def of(cls, model: Any, inputs: dict[str, Any]) -> "_Size":
        from ocvtp.vlms.families import family_of

        family = family_of(model)
        images = family.images(inputs)
        assert images is not None  # noqa: S101 - each prompt has one
        batch, columns = inputs["input_ids"].shape
        return cls(batch, family.counts(images)[0], columns - family.spans(images)[0])

    def kept(self, method: str, keep: int | float) -> int:
        from ocvtp.methods import Budget

        return self.image if method == "vanilla" else Budget.parse(keep).at_most(self.image)


def _limits(
    model: Any, size: _Size, names: dict[str, tuple[str, int | float]], kept: dict[str, int], new_tokens: int,
    options: dict[str, dict[str, Any]], ceilings: Any,
) -> _Limits:  # fmt: skip
    from ocvtp.efficiency.flops import pruner_flops
    from ocvtp.efficiency.roofline import least
    from ocvtp.efficiency.shapes import shape_of
    from ocvtp.methods import entry_of
    from ocvtp.methods.inside_tower import begins
    from ocvtp.vlms.families import family_of

    depth, shape = family_of(model).facts.depth, shape_of(model.config)

    def of(method: str, budget: int) -> dict[str, float]:
        entry, given = entry_of(method), options.get(method, {})
        read = entry.by_layer(size.image, budget, shape.llm.layers, given)
        work = pruner_flops(size.image, shape.tower.width, budget) if method.startswith("oc-vtp") else 0
        found = least(
            shape, ceilings, image_tokens=size.image, kept=read, text_tokens=size.text, batch=size.batch, method=work,
            inside_tower=begins(entry, given, depth), bytes_per_number=model.dtype.itemsize,
        )  # fmt: skip
        return found if new_tokens > 1 else {name: value for name, value in found.items() if name != "next_token"}

    return _Limits(ceilings, {name: of(method, kept[name]) for name, (method, _) in names.items()})


def _draw(path: Path, vlm: str, times: dict[str, Any]) -> None:
    from ocvtp import figures

    bars = {name: {phase: spread.median for phase, spread in took.phases.items()} for name, took in times.items()}
    common.write(
        "--figure", path, figures.phases(bars, title=f"{vlm}: milliseconds to the first token", form=_form(path))
    )


def _draw_bars(path: Path, found: Measured) -> None:
    """Methods of one budget stand together: the first token and, where there is more, the whole answer."""
    from ocvtp import figures

    kinds = {"first token": lambda took: took.first_token.median}
    if found.about["new_tokens"] > 1:
        kinds[f"{found.about['new_tokens']} tokens"] = lambda took: took.total.median
    whole, groups = found.times["vanilla"], dict[str, dict[str, float]]()
    for name, (method, keep) in found.names.items():
        for kind, of in kinds.items() if method != "vanilla" and name in found.times else ():
            groups.setdefault(f"keep {keep:g},\n{kind}", {"vanilla": of(whole)})[method] = of(found.times[name])
    if groups:
        common.write("--bars", path, figures.times({found.about["vlm"]: groups}, form=_form(path)))


def _form(path: Path) -> Literal["png", "svg"]:
    return "svg" if path.suffix == ".svg" else "png"


def _random(args: argparse.Namespace, device: str) -> tuple[Any, dict[str, Any], None]:
    from ocvtp.efficiency.random_vlm import photograph, random_inputs, random_vlm

    model = random_vlm(args.vlm, device=device)
    return model, dict(random_inputs(model, args.batch, pixels=photograph(args.vlm))), None


def _loaded(args: argparse.Namespace, image: Any, device: str) -> tuple[Any, dict[str, Any], Any]:
    from ocvtp import vlms

    vlm = vlms.load(args.vlm, device=device)
    process = partial(pruned_vlm.inputs, vlm, image, args.prompt, args.batch)
    return vlm.model, dict(process()), process


@contextmanager
def _memory(what: str, device: str) -> Iterator[None]:
    """`NotAvailable` if there is too little memory for it."""
    from ocvtp.efficiency.latency import ran_out

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise NotAvailable(f"out of memory on {device}: there is too little for {what}") from error


def _fingerprint(pruner: str) -> str:
    from ocvtp.pruner import OCPruner

    return OCPruner.from_pretrained(pruner, decoder=False).fingerprint[:16]


def _versions() -> dict[str, str]:
    import torch

    numbers = {name: version(name) for name in ("ocvtp", "transformers")}
    return {"python": platform.python_version(), "torch": torch.__version__, **numbers}


def _phases(times: dict[str, Any]) -> Any:
    phases = tuple(next(iter(times.values())).phases)
    numbers = ("image processing", *phases, "of the whole")
    title = "Phases of a first token, what they make up of it, and what the processor does before it"
    table = common.table(title, "", *numbers, right=numbers)
    for case, took in times.items():
        processing = "-" if took.processing is None else _spread(took.processing)
        table.add_row(case, processing, *(_spread(took.phases[phase]) for phase in phases), _percent(took.accounted))
    return table


def _scene() -> Any:
    from PIL import Image

    from ocvtp.data.scenes import make_scene

    return Image.fromarray(make_scene(0, "benchmark", 0).pixels_HW3)


def _spread(spread: Any) -> str:
    return f"{spread.median:.1f} [{spread.low:.1f}, {spread.high:.1f}]"
