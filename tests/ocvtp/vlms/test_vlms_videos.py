"""Videos: frames are pruned one by one, with a budget a frame, a video or a second, beside images and text."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ocvtp
from ocvtp.errors import BadInput
from ocvtp.methods import Encoded, Kept, Method
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruning.videos import VideoBudget
from ocvtp.vlms import family_of

Picture = Callable[..., Image.Image]
NEW = {"max_new_tokens": 4, "do_sample": False}
MARKS = {
    "qwen2_5_vl": " <vision> <video> </vision>",
    "qwen3_vl": " <vision> <video> </vision>",
    "llava_onevision": " <video>",
}


@pytest.fixture(scope="module", params=list(MARKS))
def moving(request: pytest.FixtureRequest, make_vlm: Any) -> Any:
    return make_vlm(request.param, 0)


class OwnPass(Method):
    """Runs the tower in a way of its own."""

    def encode(self, family: Any, images: Any, keeps: Any) -> Any:
        return family.encode(images, ())

    def choose(self, encoded: Encoded) -> Kept:
        return Kept(torch.arange(encoded.keep).expand(len(encoded.members), -1))


def film(picture_of: Picture, seed: int, frames: int, width: int, height: int) -> Tensor:
    pictures = [np.array(picture_of(100 * seed + i, width, height)) for i in range(frames)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def rows(moving: Any, picture_of: Picture) -> list[tuple[str, list[Any], list[Tensor]]]:
    """Text, images and videos of four prompts: a video; an image and a video; neither; two videos."""
    video = MARKS[moving.model.config.model_type]
    one = "onevision" in moving.model.config.model_type  # which wants videos of as many frames, and sees each
    films = [film(picture_of, i, 6 if i % 2 and not one else 4, 84, 84) for i in range(4)]
    return [
        (f"<s>{video} what is this ?", [], films[:1]),
        (f"<s>{moving.mark} is{video} red ?", [picture_of(7, 80, 60)], films[1:2]),
        ("<s> what ?", [], []),
        (f"<s>{video} and{video} ?", [], films[2:]),
    ]


def prompts(moving: Any, some: Any) -> Any:
    images, videos = [i for _, row, _ in some for i in row], [v for _, _, row in some for v in row]
    if "onevision" in moving.model.config.model_type:
        nested = [row for _, row, _ in some] if images else None
        return moving.processor(
            text=[text for text, _, _ in some], images=nested, videos=videos or None, return_tensors="pt", padding=True
        )
    about = [
        {"fps": 2.0, "total_num_frames": len(video), "frames_indices": list(range(len(video)))} for video in videos
    ]
    return moving.processor(
        text=[text for text, _, _ in some], images=images or None, videos=videos or None, return_tensors="pt",
        padding=True, **({"video_metadata": about, "do_sample_frames": False} if videos else {}),
    )  # fmt: skip


def read(moving: Any, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """What the language model is given, call by call."""
    seen: list[dict[str, Any]] = []
    hook = moving.model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    call()
    hook.remove()
    return seen


@torch.no_grad()
def test_keeping_everything_changes_nothing(moving: Any, picture_of: Picture) -> None:
    inputs = prompts(moving, rows(moving, picture_of))
    logits, answer = moving.model(**inputs).logits, moving.model.generate(**inputs, **NEW)
    real = inputs["attention_mask"].bool()
    for options in ({}, {"video_keep": "100%/video"}):
        with ocvtp.prune(moving.model, "random", 1.0, **options):
            torch.testing.assert_close(moving.model(**inputs).logits[real], logits[real], atol=1e-5, rtol=1e-5)
            assert torch.equal(moving.model.generate(**inputs, **NEW), answer)
    assert torch.equal(moving.model(**inputs).logits, logits)


@pytest.mark.parametrize("method", ["random", "oc-vtp-untrained", "visionzip"])
@torch.no_grad()
def test_a_batch_is_what_its_rows_are_alone(moving: Any, picture_of: Picture, method: str) -> None:
    some = rows(moving, picture_of)
    options = {"layer": 2} if method == "oc-vtp-untrained" else {}
    with ocvtp.prune(moving.model, method, 2, **options) as handle:
        inputs = prompts(moving, some)
        logits, kept = moving.model(**inputs).logits, handle.last_kept
        answer = moving.model.generate(**inputs, **NEW)[:, inputs["input_ids"].shape[1] :]
        images, frames = list[list[int]](), list[list[int]]()
        for row, one in enumerate(some):
            mine = prompts(moving, [one])
            alone = moving.model(**mine).logits[0]
            torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)
            assert torch.equal(moving.model.generate(**mine, **NEW)[0, mine["input_ids"].shape[1] :], answer[row])
            images += handle.last_kept[: len(one[1])]
            frames += handle.last_kept[len(one[1]) :]
    assert kept == images + frames
    assert all(len(numbers) == 2 for numbers in kept)


@pytest.mark.parametrize("group", [1, 2])
@torch.no_grad()
def test_a_pruned_video_is_one_that_never_had_the_tokens(moving: Any, picture_of: Picture, group: int) -> None:
    """Each prompt without the columns that go, in front of the language model; all others stay where they were in time
    and place."""
    for one in rows(moving, picture_of):
        inputs = prompts(moving, [one])
        whole, then, *_ = read(moving, lambda inputs=inputs: moving.model.generate(**inputs, **NEW))
        with ocvtp.prune(
            moving.model, "random", 2, video_keep="1/frame", video_group=group, seed=3, positions="original"
        ) as handle:
            output = moving.model.generate(**inputs, **NEW, return_dict_in_generate=True, output_logits=True)
            columns = handle.last_columns[0].tolist() if handle.last_columns is not None else None
            kept = handle.last_kept
        ids = inputs["input_ids"][0]
        columns = list(range(len(ids))) if columns is None else columns
        config = moving.model.config
        vision = (ids == config.image_token_id) | (ids == config.video_token_id)
        newlines = (
            0 if config.model_type != "llava_onevision" else sum(bool(vision[c]) for c in columns) - sum(map(len, kept))
        )
        assert sum(bool(vision[column]) for column in columns) == sum(map(len, kept)) + newlines
        assert (newlines > 0) == (config.model_type == "llava_onevision" and bool(kept))
        assert [column for column in range(len(ids)) if not vision[column]] == [c for c in columns if not vision[c]]
        answer = output.sequences[0, len(ids) :]
        embeds = torch.cat(
            [whole["inputs_embeds"][:, columns], moving.model.get_input_embeddings()(answer[None, :-1])], 1
        )
        places, more = whole["position_ids"], {}
        if places is None:
            places = torch.arange(len(ids)).expand(3, 1, -1)
        places = places[-3:][..., columns]
        following = int(then["position_ids"].flatten()[-1])
        after = torch.arange(following, following + len(answer) - 1).expand(*places.shape[:-1], -1)
        if whole.get("deepstack_visual_embeds") is not None:
            numbers = [int(vision[:column].sum()) for column in columns if vision[column]]
            flags = [bool(vision[column]) for column in columns] + [False] * (len(answer) - 1)
            more = {
                "visual_pos_masks": torch.tensor([flags]),
                "deepstack_visual_embeds": [plane[numbers] for plane in whole["deepstack_visual_embeds"]],
            }
        hidden = moving.model.get_decoder()(
            inputs_embeds=embeds, position_ids=torch.cat([places, after], -1),
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), **more,
        ).last_hidden_state  # fmt: skip
        expected = moving.model.lm_head(hidden)[0, len(columns) - 1 :]
        found = torch.stack([step[0] for step in output.logits])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("moving", [name for name in MARKS if name.startswith("qwen")], indirect=True)
@torch.no_grad()
def test_time_goes_on_as_in_the_whole_video(moving: Any, picture_of: Picture) -> None:
    """Of families whose positions have an axis of time."""
    inputs = prompts(moving, rows(moving, picture_of)[:1])
    whole = read(moving, lambda: moving.model(**inputs))[0]["position_ids"][-3:]
    with ocvtp.prune(moving.model, "random", 1) as handle:
        pruned = read(moving, lambda: moving.model(**inputs))[0]["position_ids"][-3:]
        columns = handle.last_columns[0]
    assert torch.equal(pruned, whole[..., columns])
    frames = (inputs["input_ids"][0, columns] == moving.model.config.video_token_id).nonzero()[:, 0]
    assert len(frames) == 2
    first, second = (int(pruned[0, 0, frame]) for frame in frames)
    assert second > first


@torch.no_grad()
def test_budgets(moving: Any, picture_of: Picture) -> None:
    inputs = prompts(moving, rows(moving, picture_of))
    with ocvtp.prune(moving.model, "random", 1.0) as handle:
        moving.model(**inputs)
        _, *frames = (len(kept) for kept in handle.last_kept)
    each = [4] * 4 if moving.model.config.model_type == "llava_onevision" else [2, 3, 2, 3]
    assert len(frames) == sum(each)
    for given, expected in (
        ({"video_keep": "2/frame"}, [2] * len(frames)),
        ({"video_keep": 2}, [2] * len(frames)),
        ({"video_keep": "5/video"}, [n for count in each for n in {2: [3, 2], 3: [2, 2, 1], 4: [2, 1, 1, 1]}[count]]),
        ({"video_keep": "999/video"}, frames),
        ({}, [1] * len(frames)),
    ):
        with ocvtp.prune(moving.model, "random", 1, **given) as handle:
            moving.model(**inputs)
            assert [len(kept) for kept in handle.last_kept] == [1, *expected]
    if "second_per_grid_ts" in inputs:  # two frames a patch, two frames a second: a second from one to the next
        with ocvtp.prune(moving.model, "random", 1, video_keep="2/second") as handle:
            moving.model(**inputs)
            assert [len(kept) for kept in handle.last_kept] == [1] + [2] * 10
    else:
        with ocvtp.prune(moving.model, "random", 1, video_keep="2/second"), pytest.raises(BadInput, match="how long"):
            moving.model(**inputs)


@torch.no_grad()
def test_pairs_of_frames_are_chosen_from_together(moving: Any, picture_of: Picture) -> None:
    """By OC-VTP, whose slots attend to the tokens of both; the last frame of an odd number is alone."""
    one = "onevision" in moving.model.config.model_type
    video = film(picture_of, 1, 3 if one else 6, 84, 84)
    inputs = prompts(moving, [(f"<s>{MARKS[moving.model.config.model_type]} what ?", [], [video])])
    family = family_of(moving.model)
    torch.manual_seed(0)
    pruner = OCPruner(PrunerConfig(family.facts.width, grid=(4, 4), decoder=None, queries="qr")).eval()
    tokens = family.encode(family.images(inputs), {2}, values=False).tokens(2, range(3))
    size = tokens.shape[1]
    with ocvtp.prune(moving.model, "oc-vtp", 1.0, pruner, layer=2, video_keep="2/frame", video_group=2) as handle:
        assert moving.model(**inputs).logits.isfinite().all()
        slots = handle.slots(**inputs)
    both = pruner.select(torch.cat([tokens[0], tokens[1]])[None], 4)[0]
    alone = pruner.select(tokens[2:], 2)[0]
    expected = [both[both < size], both[both >= size] - size, alone]
    assert handle.last_kept == [each.tolist() for each in expected]
    assert [tuple(each.shape) for each in slots] == [(4, size), (4, size), (2, size)]
    torch.testing.assert_close(torch.cat(slots[:2], 1).sum(0), torch.ones(2 * size))


@torch.no_grad()
def test_a_pair_may_spend_all_on_one_frame(moving: Any, picture_of: Picture) -> None:
    """And the other frame then has no token; of a batch each has what it has alone."""
    some = rows(moving, picture_of)
    each = [4] * 4 if "onevision" in moving.model.config.model_type else [2, 3, 2, 3]
    with ocvtp.prune(moving.model, "random", 1, video_group=2, seed=1) as handle:
        inputs = prompts(moving, some)
        logits, kept = moving.model(**inputs).logits, handle.last_kept
        frames, alone = kept[1:], list[list[int]]()
        for row, one in enumerate(some):
            mine = moving.model(**prompts(moving, [one])).logits[0]
            torch.testing.assert_close(logits[row, -len(mine) :], mine, atol=1e-4, rtol=1e-4)
            alone += handle.last_kept[len(one[1]) :]
    assert frames == alone
    assert [] in frames
    for count in each:
        video, frames = frames[:count], frames[count:]
        assert [sum(map(len, video[i : i + 2])) for i in range(0, count, 2)] == [2] * (count // 2) + [1] * (count % 2)


def test_budgets_are_read() -> None:
    for keep, per, counts in (
        (4, "frame", [4, 4, 3]),
        ("50%", "frame", [3, 3, 2]),
        ("50%/video", "video", [3, 3, 2]),
        ("7 / video", "video", [3, 2, 2]),
    ):
        budget = VideoBudget.parse(keep)
        assert (budget.per, budget.keeps([6, 6, 3], None, 0)) == (per, counts)
    assert VideoBudget.parse("4/second").keeps([9, 9, 9], 0.5, 0) == [2, 2, 2]
    for keep, message in (
        ("4/hour", "a budget a frame, a video or a second is needed"),
        ("10%/second", "of a second a count is needed"),
        ("0/frame", "at least 1 token"),
        ("x/frame", "keep is 'x'"),
    ):
        with pytest.raises(BadInput, match=message):
            VideoBudget.parse(keep)
    with pytest.raises(BadInput, match="video 3 may keep 2 tokens, but has 3 frames"):
        VideoBudget.parse("2/video").keeps([6, 6, 3], None, 3)


@torch.no_grad()
def test_what_cannot_be_is_refused(moving: Any, llava: Any, picture_of: Picture) -> None:
    with pytest.raises(BadInput, match="fastv drops tokens inside the LLM by keep alone"):
        ocvtp.prune(moving.model, "fastv", 0.9, k=2, video_keep="4/frame")
    for options in ({"video_keep": "4/frame"}, {"video_group": 2}):
        with pytest.raises(BadInput, match=f"{next(iter(options))} is .* videos of this family are not pruned"):
            ocvtp.prune(llava.model, "random", 2, **options)
    with pytest.raises(BadInput, match="video_group is 2, but fastv drops tokens inside the LLM"):
        ocvtp.prune(moving.model, "fastv", 0.9, k=2, video_group=2)
    for group in (0, 1.5, True):
        with pytest.raises(BadInput, match=f"video_group is {group}: a whole number of frames"):
            ocvtp.prune(moving.model, "random", 2, video_group=group)
    with pytest.raises(BadInput, match="video_group is 2, but OwnPass runs the tower itself, frame by frame"):
        ocvtp.prune(moving.model, OwnPass(), 2, video_group=2)
    with (
        ocvtp.prune(llava.model, "random", 2),
        pytest.raises(BadInput, match="cannot take pixel_values_videos: videos"),
    ):
        llava.model(input_ids=torch.tensor([[5]]), pixel_values_videos=torch.zeros(1))
    inputs = prompts(moving, rows(moving, picture_of)[:1])
    if moving.model.config.model_type == "llava_onevision":
        with ocvtp.prune(moving.model, "random", 2), pytest.raises(BadInput, match=r"\[videos, frames, 3, H, W\]"):
            moving.model(**{**inputs, "pixel_values_videos": torch.zeros(1, 0, 3, 56, 56)})
        return
    none = {**inputs, "video_grid_thw": torch.tensor([[0, 6, 6]]), "pixel_values_videos": torch.zeros(0, 1176)}
    with ocvtp.prune(moving.model, "random", 2):
        with pytest.raises(BadInput, match=r"videos of \[0\] frames: one at least is needed"):
            moving.model(**none)
        with pytest.raises(BadInput, match="needs video_grid_thw beside pixel_values_videos"):
            moving.model(**{name: value for name, value in inputs.items() if name != "video_grid_thw"})
    with (
        ocvtp.prune(moving.model, "random", 2, positions="compact"),
        pytest.raises(BadInput, match="compact' cannot be had with videos"),
    ):
        moving.model(**inputs)


@torch.no_grad()
def test_inside_the_llm(moving: Any, picture_of: Picture) -> None:
    inputs = prompts(moving, rows(moving, picture_of))
    with ocvtp.prune(moving.model, "fastv", 0.8, k=2) as handle:
        moving.model.generate(**inputs, **NEW)
        assert len(handle.last_kept) == (17 if moving.model.config.model_type == "llava_onevision" else 11)
        assert handle.last_layers[3] < handle.last_layers[0]
