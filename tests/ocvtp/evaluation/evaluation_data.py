"""Question sets in the official columns, and someone who answers them without looking."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ocvtp.evaluation.answered import Answer, digest_of
from ocvtp.evaluation.generate import Prepared, PreparedMemory

Row = dict[str, Any]


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Row:
    """An image as `datasets` stores it."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def write_parquet(path: Path, rows: Sequence[Row], *, features: bool = True) -> Path:
    """Rows as parquet with the features of `datasets`, columns called image* being images."""
    table = pa.Table.from_pylist(list(rows))
    if features:
        described = {field.name: _feature(field) for field in table.schema}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": described}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def _feature(field: pa.Field) -> Any:
    if field.name in ("image", "image_1"):
        image = {"_type": "Image"}
        return {"feature": image, "_type": "List"} if pa.types.is_list(field.type) else image
    return _plain(field.type)


def _plain(kind: pa.DataType) -> Any:
    if pa.types.is_list(kind):
        return {"feature": _plain(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _plain(kind.field(i).type) for i in range(kind.num_fields)}
    return {"dtype": str(kind), "_type": "Value"}


def gqa(n: int) -> list[Row]:
    return [
        {"id": str(i), "imageId": f"n{i}", "question": f"What color is thing {i}?", "answer": ("red", "blue")[i % 2],
         "fullAnswer": "It is.", "image": picture(i)}
        for i in range(n)
    ]  # fmt: skip


def pope(n: int) -> list[Row]:
    return [
        {"id": str(i), "question_id": str(i), "question": f"Is there a dog {i}?", "answer": ("yes", "no")[i % 2],
         "image_source": "COCO", "image": picture(i), "category": ("random", "popular", "adversarial")[i // 2 % 3]}
        for i in range(n)
    ]  # fmt: skip


def mme(n: int) -> list[Row]:
    return [
        {"question_id": f"{i // 2}.jpg", "question": f"Is it {i}? Please answer yes or no.",
         "answer": ("Yes", "No")[i % 2], "category": ("existence", "count", "code_reasoning")[i // 2 % 3],
         "image": picture(i // 2)}
        for i in range(n)
    ]  # fmt: skip


def textvqa(n: int) -> list[Row]:
    return [
        {"image_id": f"a{i}", "question_id": i, "question": "what is written?", "question_tokens": ["what"],
         "image": picture(i), "image_width": 40, "image_height": 30, "answers": [str(i)] * 8 + ["other"] * 2,
         "image_classes": ["Sign"], "set_name": "val", "ocr_tokens": [str(i)]}
        for i in range(n)
    ]  # fmt: skip


def vqav2(n: int) -> list[Row]:
    answers = [{"answer": "cat", "answer_confidence": "yes", "answer_id": k} for k in range(10)]
    return [
        {"question_id": i, "question": f"What animal is {i}?", "answers": answers, "image": picture(i)}
        for i in range(n)
    ]


def vizwiz(n: int) -> list[Row]:
    return [
        {"question_id": f"VizWiz_{i}", "question": "what is it?", "answers": ["can"] * 10, "image": picture(i)}
        for i in range(n)
    ]


def scienceqa(n: int) -> list[Row]:
    return [
        {
            "question": f"Which {i}?",
            "choices": ["one", "two", "three"],
            "answer": i % 3,
            "hint": "",
            "image": picture(i),
        }
        for i in range(n)
    ]


def mmbench(n: int) -> list[Row]:
    """Each question twice: once more with its options turned around, under an index larger by a million."""
    options = {"A": "north", "B": "south", "C": "east", "D": "west"}
    rows = []
    for i in range(n // 2):
        rest = {"question": f"Where is {i}?", "hint": "nan", "category": "place", "L2-category": "space",
                "source": "made", "split": "dev", "image": picture(i)}  # fmt: skip
        rows.append({"index": i, **options, "answer": "B", **rest})
        rows.append(
            {
                "index": i + 1_000_000,
                **dict(zip("ABCD", reversed(options.values()), strict=True)),
                "answer": "C",
                **rest,
            }
        )
    return rows


def mmmu(n: int) -> list[Row]:
    return [
        {"id": f"validation_Art_{i}", "question": f"<image 1> Which {i}?", "options": "['red', 'green', 'blue']",
         "question_type": "multiple-choice", "answer": "ABC"[i % 3], "image_1": picture(i)}
        for i in range(n)
    ]  # fmt: skip


def seedbench(n: int) -> list[Row]:
    return [
        {"question_id": str(i), "question": f"What happens in {i}?", "choice_a": "run", "choice_b": "sit",
         "choice_c": "eat", "choice_d": "fly", "answer": "ABCD"[i % 4], "data_type": "video" if i % 5 == 4 else "image",
         "image": [picture(i)] * (2 if i % 5 == 4 else 1)}
        for i in range(n)
    ]  # fmt: skip


MAKERS = {f.__name__: f for f in (gqa, mmbench, mme, pope, scienceqa, textvqa, vqav2, vizwiz, mmmu, seedbench)}


def right_answers(name: str, rows: Sequence[Row]) -> list[str]:
    """What a perfect model says."""
    if name == "scienceqa":
        return ["ABCD"[row["answer"]] for row in rows]
    if name in ("textvqa", "vizwiz"):
        return [row["answers"][0] for row in rows]
    if name == "vqav2":
        return [row["answers"][0]["answer"] for row in rows]
    return [row["answer"] for row in rows]


class Parrot:
    """In place of `Answerer`: gives these answers, one after the other, and notes what it was asked."""

    device = torch.device("cpu")

    def __init__(self, answers: Sequence[str]) -> None:
        self._answers = iter(answers)
        self.asked: list[Any] = []
        self.options: list[Any] = []
        self.prepared = PreparedMemory()

    def prepare(self, conversations: Sequence[Any]) -> Prepared:
        return Prepared({"conversations": conversations}, [1], [digest_of(one) for one in conversations])

    def answer_prepared(self, batch: Prepared, options: Any = None) -> list[Answer]:
        return self.answer(batch.inputs["conversations"], options)

    def answer(self, conversations: Sequence[Any], options: Any = None) -> list[Answer]:
        self.asked.extend(conversations)
        self.options.append(options)
        return [Answer(next(self._answers), [[0, 1, 2]], 5, 1) for _ in conversations]

    def text(self, number: int) -> str:
        """The text of the question with this number."""
        return "".join(part["text"] for part in self.asked[number][0]["content"] if part["type"] == "text")
