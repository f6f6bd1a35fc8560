"""What a VLM said to the questions of a benchmark, and what made it say so: the files between asking and scoring."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ocvtp.errors import BadInput, Corrupt, Incompatible
from ocvtp.evaluation.listing import clean, replace_text
from ocvtp.json_files import read_json

ANSWERS, ASKED = "answers.jsonl", "asked.json"


@dataclass(frozen=True)
class Answer:
    """What a VLM said.

    Attributes:
        text: the answer without special tokens and control characters, cut at what ends it.
        kept: of each image the indices of its kept tokens; unpruned: of each image the number of its tokens.
        prompt_tokens: length of the prompt, image tokens included, before pruning.
        new_tokens: tokens generated, without padding.
    """

    text: str
    kept: list[list[int]] | list[int]
    prompt_tokens: int
    new_tokens: int

    @property
    def image_tokens(self) -> list[int]:
        """How many tokens were kept of each image."""
        return [kept if isinstance(kept, int) else len(kept) for kept in self.kept]


@dataclass(frozen=True)
class Answered:
    """The answer to the question in row `row`, whose content has this digest (`digest_of`)."""

    row: int
    digest: str
    answer: Answer

    def to_dict(self) -> dict[str, Any]:
        """JSON of this."""
        return {"row": self.row, "digest": self.digest, **asdict(self.answer)}

    @classmethod
    def from_dict(cls, data: Any) -> "Answered":
        """From what `to_dict` gives; `ValueError` if it is something else."""
        try:
            row, digest, answer = data["row"], data["digest"], {name: data[name] for name in Answer.__annotations__}
        except (TypeError, KeyError) as error:
            raise ValueError(f"it is no answer: {error!r}") from None
        if not isinstance(row, int) or not isinstance(answer["text"], str) or not isinstance(answer["kept"], list):
            raise ValueError("it is no answer: row is no number, text no string, or kept no list")
        return cls(row, str(digest), Answer(**answer))


@dataclass(frozen=True)
class Shard:
    """One of `of` equal parts of a benchmark's questions, from 0."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise BadInput(f"shard {self.number} of {self.of}: shards are counted from 0 to {self.of - 1}")

    def rows(self, total: int) -> range:
        """Which of the rows are its own."""
        return range(total * self.number // self.of, total * (self.number + 1) // self.of)


@dataclass(frozen=True)
class Answers:
    """Answers to a shard of a benchmark's questions.

    Attributes:
        about: what made them: benchmark, setting, prompt, dtype, data, packages. Equal for all shards of a benchmark.
        total: questions of the benchmark that are asked, in all shards.
        answered: by row.
        batch_size: questions that were asked at once: as many as were wanted, or those that there was memory for.
    """

    about: Mapping[str, Any]
    total: int
    answered: Sequence[Answered] = field(repr=False)
    batch_size: int

    def write(self, folder: Path) -> None:
        """Write `answers.jsonl` and `asked.json`, the latter last; the same bytes for the same answers."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / ANSWERS, "".join(json.dumps(one.to_dict()) + "\n" for one in self.answered))
        about = clean({"total": self.total, "batch_size": self.batch_size, **self.about})
        replace_text(folder / ASKED, json.dumps(about, allow_nan=False, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Answers":
        """What `write` wrote.

        Raises:
            BadInput: it is not there.
            Corrupt: a line is none; names it.
        """
        for name in (ANSWERS, ASKED):
            if not (folder / name).is_file():
                raise BadInput(f"{folder / name} does not exist: there are no answers to score")
        about, answered = read_json(folder / ASKED), []
        for number, line in enumerate((folder / ANSWERS).read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                answered.append(Answered.from_dict(json.loads(line)))
            except ValueError as error:
                raise Corrupt(f"{folder / ANSWERS}, line {number}: {error}") from error
        return cls(about, int(about.pop("total")), answered, int(about.pop("batch_size")))


def joined(shards: Sequence[Answers]) -> Answers:
    """All answers to a benchmark, by row.

    Raises:
        Incompatible: shards were not made by the same; names what differs.
        BadInput: a question is answered twice, or not at all.
    """
    first = shards[0]
    for other in shards[1:]:
        if (first.about, first.total) != (other.about, other.total):
            names = [name for name in first.about if first.about[name] != other.about.get(name)] or ["total"]
            raise Incompatible(f"answers of one benchmark were made in different ways: {', '.join(names)} differ")
    answered = sorted((one for shard in shards for one in shard.answered), key=lambda one: one.row)
    rows = [one.row for one in answered]
    if rows != list(range(first.total)):
        missing = sorted(set(range(first.total)) - set(rows))
        what = f"question {missing[0]} has no answer" if missing else "a question is answered twice"
        raise BadInput(f"{first.about['benchmark']}: {what}; {len(rows)} answers to {first.total} questions")
    return Answers(first.about, first.total, answered, min(shard.batch_size for shard in shards))


def digest_of(messages: Any) -> str:
    """A fingerprint of a question as it is asked: its texts, and the pixels of its images, in their order."""
    digest = hashlib.sha256()
    for message in messages:
        content = message["content"]
        parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                digest.update(b"text\0" + part["text"].encode("utf-8", "surrogatepass") + b"\0")
            else:
                image: Any = part.get("image", part.get("url"))
                digest.update(f"image {image.mode} {image.size}\0".encode() + image.tobytes())
    return digest.hexdigest()[:32]
