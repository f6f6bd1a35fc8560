"""The clock: what it runs, how often, and whether it tells a slow part from a fast one."""

import mmap
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import ocvtp
from ocvtp.efficiency.latency import Latency, Spread, measure
from ocvtp.errors import BadInput

PAUSE = 0.05
SIZE = 1 << 27


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=60,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=59, image_seq_length=16)
    ).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    ids = torch.full((1, 20), 7)
    ids[:, 2:18] = 59
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.zeros(1, 3, 32, 32),
    }


def test_a_pause_is_found_in_the_part_where_it_is(model, inputs) -> None:
    @contextmanager
    def slow(module: torch.nn.Module) -> Iterator[None]:
        hook = module.register_forward_pre_hook(lambda *_: time.sleep(PAUSE))
        yield
        hook.remove()

    cases = {
        "plain": lambda: slow(torch.nn.Identity()),
        "tower": lambda: slow(model.model.vision_tower),
        "head": lambda: slow(model.lm_head),
    }
    times = measure(model, inputs, cases, new_tokens=3, repeats=3, warmup=1)
    pause = 1000 * PAUSE
    assert list(times) == ["plain", "tower", "head"]
    assert times["tower"].vision.median >= pause
    assert times["tower"].first_token.median >= times["tower"].vision.median
    assert times["plain"].vision.median < pause
    assert times["head"].vision.median < pause
    assert times["head"].next_token is not None
    assert times["head"].next_token.median >= 0.9 * pause
    assert times["tower"].next_token.median < 0.9 * pause
    assert times["plain"].processing is None


def test_what_the_processor_does_and_memory_are_of_their_own(model, inputs) -> None:
    def hold(*_: object) -> None:
        # Pages from the system: an allocator would first give what earlier tests freed, which the process still holds.
        torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.uint8).fill_(1)

    @contextmanager
    def hungry() -> Iterator[None]:
        hook = model.lm_head.register_forward_pre_hook(hold)
        yield
        hook.remove()

    cases = {"plain": nullcontext, "hungry": hungry}
    times = measure(
        model, inputs, cases, new_tokens=1, repeats=2, warmup=1, process=lambda: time.sleep(PAUSE) or inputs
    )
    plain, eager = times["plain"], times["hungry"]
    assert plain.processing.median >= 1000 * PAUSE > plain.first_token.median
    if sys.platform != "linux":  # nobody tells how much memory a process had at most
        assert plain.peak_memory_bytes is None
        return
    assert 0.7 < (eager.peak_memory_bytes - plain.peak_memory_bytes) / SIZE < 1.3


def test_phases_add_up_to_the_whole(model, inputs) -> None:
    """Each part waits as long, so that what one of them missed, or two of them counted, would be a fifth."""

    @contextmanager
    def slow() -> Iterator[None]:
        parts = [model.model.vision_tower, model.model.multi_modal_projector, model.get_decoder(), model.lm_head]
        hooks = [part.register_forward_pre_hook(lambda *_: time.sleep(2 * PAUSE)) for part in parts]
        with ocvtp.prune(model, "css", 4, layer=1):
            yield
        for hook in hooks:
            hook.remove()

    found = measure(model, inputs, {"slow": slow}, new_tokens=1, repeats=5, warmup=0)["slow"]
    assert found.accounted == pytest.approx(1, abs=0.05)
    assert found.accounted == found.as_dict()["accounted"]
    # Phases are mean shares of the median run: on a busy machine one that waits 100 ms may be told with a little less.
    assert {name for name, took in found.phases.items() if took.median > 1000 * PAUSE} == {
        "tower", "projector", "prefill", "other"}  # fmt: skip
    assert 0 < found.phases["method"].median < 1000 * PAUSE


def test_phases_are_of_the_runs_whose_whole_is_measured(model, inputs) -> None:
    """Another machine's work changes single runs by more than 5 %, but not the sum of a run's own phases."""
    calls: list[int] = []

    @contextmanager
    def slower_and_slower() -> Iterator[None]:
        def wait(*_: object) -> None:
            calls.append(1)
            time.sleep(0.01 * len(calls))

        hook = model.get_decoder().register_forward_pre_hook(wait)
        with ocvtp.prune(model, "css", 4, layer=1):
            yield
        hook.remove()

    found = measure(model, inputs, {"slower": slower_and_slower}, new_tokens=1, repeats=5, warmup=0)["slower"]
    assert len(calls) == 5 * 3, "two calls until all is set up, and one that is measured"
    assert found.accounted == pytest.approx(1, abs=0.05)
    assert found.turns == sorted(found.turns)
    assert found.turns[-1] - found.turns[0] > 100


def test_parts_add_up_where_medians_do_not() -> None:
    parts = [[1.0, 2.0, 9.0, 1.0, 1.5], [5.0, 1.0, 1.0, 1.0, 2.5]]
    wholes = [sum(run) for run in zip(*parts, strict=True)]  # 6, 3, 10, 2, 4: the third and the fourth do not count
    found = [Spread.of_part(part, wholes) for part in parts]
    shares = [(1 / 6 + 2 / 3 + 1.5 / 4) / 3, (5 / 6 + 1 / 3 + 2.5 / 4) / 3]
    assert [each.median for each in found] == pytest.approx([4000 * share for share in shares])
    assert sum(each.median for each in found) == pytest.approx(4000), "the median whole"
    assert [each.low for each in found] == [1000, 1000]


def test_cases_are_compared_turn_by_turn() -> None:
    def took(*turns: float) -> Latency:
        spread = Spread.of([turn / 1000 for turn in turns])
        return Latency(spread, spread, {}, None, spread, 1, len(turns), "cpu", None, list(turns))

    slowed = took(10.0, 30.0, 20.0)
    assert took(11.0, 33.0, 60.0).against(slowed) == pytest.approx(1.1), "in the last turn something else ran"
    assert slowed.against(slowed) == 1


def test_a_case_that_fails_is_noted_and_the_others_go_on(model, inputs) -> None:
    def pruned(keep: int):
        return lambda: ocvtp.prune(model, "random", keep)

    @contextmanager
    def hungry() -> Iterator[None]:
        hook = model.lm_head.register_forward_pre_hook(lambda *_: torch.empty(1 << 56) and None)
        try:
            yield
        finally:
            hook.remove()

    cases = {"whole": nullcontext, "too many": pruned(17), "hungry": hungry, "few": pruned(2)}
    failed: dict[str, str] = {}
    times = measure(model, inputs, cases, new_tokens=1, repeats=2, warmup=1, failed=failed)
    assert list(times) == ["whole", "few"]
    assert times["few"].repeats == 2
    assert failed == {
        "too many": "keep is 17, but an image has 16 tokens: at most 16 can stay", "hungry": "out of memory on cpu"
    }  # fmt: skip
    with pytest.raises(BadInput, match="keep is 17"):
        measure(model, inputs, cases, new_tokens=1, repeats=1, warmup=0)
    with pytest.raises(RuntimeError, match="a mistake"):
        measure(model, inputs, {"wrong": wrong}, new_tokens=1, repeats=1, warmup=0, failed=failed)


@contextmanager
def wrong() -> Iterator[None]:
    """What is no lack of memory is nobody's row."""
    raise RuntimeError("a mistake")
    yield


def test_cases_take_turns(model, inputs) -> None:
    seen: list[str] = []

    def case(name: str):
        @contextmanager
        def entered() -> Iterator[None]:
            seen.append(name)
            yield

        return entered

    got = measure(model, inputs, {"a": case("a"), "b": case("b")}, new_tokens=1, repeats=2, warmup=1)
    assert seen == ["a", "b"] * 3
    assert got["a"].repeats == 2
    assert got["a"].next_token is None


def test_median_and_quartiles() -> None:
    assert Spread.of([0.004, 0.001, 0.002, 0.003, 0.005]) == Spread(3.0, 2.0, 4.0)


def test_counts_below_one_are_refused(model, inputs) -> None:
    with pytest.raises(BadInput, match="new_tokens is 0"):
        measure(model, inputs, new_tokens=0)
