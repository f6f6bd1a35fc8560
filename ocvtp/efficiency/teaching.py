"""What a training with the loss `answers` costs, in closed form: a frozen VLM reads all tokens, then the kept ones.

Letters: N tokens of an image, k kept, t tokens of a prompt beside the image's, a places of its answer, R prompts of a
step, d width of the language model, m of its MLP, q and g its queries and keys (heads times a head's size).
"""

from dataclasses import asdict, dataclass

from ocvtp.efficiency.flops import MAC, llm_layer_flops, prefill_flops, pruner_flops
from ocvtp.efficiency.shapes import LlmShape, VlmShape, parameters
from ocvtp.errors import BadInput


@dataclass(frozen=True)
class Teaching:
    """Of one step.

    Attributes:
        teacher: operations of the passes with all tokens; none in later epochs where its answers fit into memory.
        student: of the passes with the kept tokens: forward and back to their embeddings, or forward of each sample.
        pruner: of the pruner, forward and backward.
        weights_bytes: of the VLM.
        student_bytes: what the passes with the kept tokens hold for the way back; none where kept sets are sampled.
        held_bytes: of what is held an image that has been seen: features, and the distributions of one prompt.
    """

    teacher: int
    student: int
    pruner: int
    weights_bytes: int
    student_bytes: int
    held_bytes: int

    @property
    def total(self) -> int:
        """Operations of all parts."""
        return self.teacher + self.student + self.pruner

    def as_dict(self) -> dict[str, int]:
        """JSON of this."""
        return {**asdict(self), "total": self.total}


def teaching(
    shape: VlmShape,
    *,
    image_tokens: int,
    kept: int,
    images: int,
    prompts: int = 2,
    text_tokens: int = 32,
    places: int = 1,
    samples: int = 0,
    bytes_per_number: int = 2,
) -> Teaching:
    """What a step costs.

    Backward the weights are frozen, so that each matrix is passed once, not twice: a layer costs two forward passes.
    The two products of attention come back as five, one of them computed anew: its attention costs 3.5.

    Args:
        shape: of the VLM.
        image_tokens: N.
        kept: k.
        images: of a step.
        prompts: of an image in a step.
        text_tokens: t.
        places: a.
        samples: kept sets of `answers_gradient: sampled`; 0 is `straight_through`.
        bytes_per_number: of the VLM's type.

    Raises:
        BadInput: counts below 1, or more kept than there are.
    """
    for name, value in (("images", images), ("prompts", prompts), ("places", places), ("kept", kept)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"{name} is {value!r}: a whole number of at least 1 is needed")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise BadInput(f"samples is {samples!r}: a whole number of at least 0 is needed")
    if kept > image_tokens:
        raise BadInput(f"kept is {kept} of {image_tokens} tokens: at most all can stay")
    llm, rows, length = shape.llm, images * prompts, kept + text_tokens
    whole = prefill_flops(shape, image_tokens=image_tokens, text_tokens=text_tokens)
    head = MAC * places * llm.width * llm.vocabulary
    once = whole.tower + whole.projector
    forward = llm.layers * llm_layer_flops(llm, length)
    pairs = llm.layers * MAC * 2 * length**2 * llm.queries
    return Teaching(
        teacher=images * once + rows * (whole.llm + head),
        student=rows * (samples * (forward + head) if samples else 2 * (forward + head) + 3 * pairs // 2),
        pruner=3 * images * pruner_flops(image_tokens, shape.tower.width, kept),
        weights_bytes=bytes_per_number * parameters(shape),
        student_bytes=0 if samples else rows * length * llm.layers * _kept_bytes(llm, bytes_per_number),
        held_bytes=image_tokens * llm.width * bytes_per_number + 4 * places * llm.vocabulary,
    )


def _kept_bytes(llm: LlmShape, size: int) -> int:
    """Of one token in one layer, what autograd keeps: weights are frozen, so that inputs of matrices are not needed.

    Two norms keep what they read in single precision; attention its queries, keys, values and output; the MLP its gate
    before and after the activation, and what that is multiplied with.
    """
    return 2 * llm.width * 4 + (2 * llm.queries + 2 * llm.keys + 3 * llm.mlp) * size
