"""What is said of images and of their tokens: facts of a VLM, layouts, and where tokens go in a prompt.

Letters: I images, N tokens of an image (CLS is none of them), C tower width, D width of the language model.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Grid = tuple[int, int]
Kind = Literal["image", "video"]
"""What an image is: one by itself, or a frame of a video."""


@dataclass(frozen=True)
class Facts:
    """What a config says of a VLM.

    Attributes:
        tokens: N; None where it depends on the image.
        grid: rows and columns of an image's tokens; None where they depend on the image, or are more than one grid.
        width: C.
        depth: encoder blocks of the tower.
        feature_layer: the layer that the language model is fed from, as index into `hidden_states`.
        cls: whether the tower has a CLS token.
        added: to what so many first layers of the language model make, vision features are added (DeepStack).
    """

    tokens: int | None
    grid: Grid | None
    width: int
    depth: int
    feature_layer: int
    cls: bool
    added: int = 0


@dataclass(frozen=True)
class Images:
    """Images as a processor made them.

    Attributes:
        pixels: LLaVA: [I, 3, height, width]. LLaVA-NeXT: [I, tiles, 3, height, width], missing tiles at the end.
            Qwen2.5-VL: [patches, numbers], those of all images in a row.
        sizes: LLaVA-NeXT: [I, 2] height and width of the originals. Qwen2.5-VL: [I, 3] frames, rows and columns of
            patches. LLaVA: None.
        videos: frames of each video; they stand behind the images, each as an image of its own.
        seconds: of each video, from frame to frame; None if nobody said.
    """

    pixels: Tensor
    sizes: Tensor | None = None
    videos: tuple[int, ...] = ()
    seconds: tuple[float, ...] | None = None

    def __len__(self) -> int:
        """I."""
        return len(self.pixels if self.sizes is None else self.sizes)

    @property
    def stills(self) -> int:
        """How many of them are no frames."""
        return len(self) - sum(self.videos)


@dataclass(frozen=True)
class Part:
    """Tokens of an image that follow one another and fill a grid, row by row.

    Attributes:
        start: number of the first of them.
        grid: their rows and columns.
        tile: rows and columns of tokens of what the tower sees at a time; None: all of the grid.
        offset: rows and columns of the first tile that come before the grid, where padding was cut off.
    """

    start: int
    grid: Grid
    tile: Grid | None = None
    offset: Grid = (0, 0)


Layout = tuple[Part, ...]
"""Where the tokens of an image stand: in one grid; LLaVA-NeXT has one of the whole image and one of its tiles."""


@dataclass(frozen=True)
class Placed:
    """What the language model reads of an image, and where among the image's placeholders it stands.

    Letters: X tokens that stay together with what stays for their sake.

    Attributes:
        features_XD: what is read.
        places_X: which of `whole` places, ascending; on the CPU.
        numbers_X: the number of the token there; -1 for what is no token, such as the end of a row. On the CPU.
        whole: places that the image would have with all tokens. If there are more than placeholders, the prompt is as
            if it had had so many.
        scores_X: a number for each token, if the method that chose it gave any; 0 for what is no token.
    """

    features_XD: Tensor
    places_X: Tensor
    numbers_X: Tensor
    whole: int
    scores_X: Tensor | None = field(default=None, kw_only=True)

    @property
    def kept(self) -> list[int]:
        """Numbers of the tokens that stay, ascending."""
        return [number for number in self.numbers_X.tolist() if number >= 0]


@dataclass(frozen=True)
class Map:
    """Tokens of an image over a picture of it, for drawing.

    Attributes:
        numbers_hw: the number of the token at each place.
        ratio: width by height that the picture is padded to on both sides; None: it is stretched over the places.
        name: of what the tower sees there; "" where it is all.
    """

    numbers_hw: Tensor
    ratio: float | None = None
    name: str = ""
