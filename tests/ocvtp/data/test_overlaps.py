"""Pictures in two sets are found however they were encoded and scaled; different ones are not taken for each other."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from ocvtp.data.decoding import BadImage
from ocvtp.data.overlaps import DISTANCE, Fingerprint, Fingerprints, phash
from ocvtp.data.scenes import PLAIN, Style, jpeg, make_scene

STYLES = [PLAIN, Style(background="textured"), Style(background="natural", clutter=4)]


def encoded(image: Image.Image, quality: int = 92, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def picture(index: int, split: str = "benchmark", style: Style = PLAIN) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(make_scene(0, split, index, style)))).convert("RGB")  # type: ignore[arg-type]


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(factor * image.width), round(factor * image.height)), Image.Resampling.BICUBIC)


def bits(one: str, other: str) -> int:
    """In which two hashes differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_it_is_the_phash_of_the_field() -> None:
    """Signs of the 8 x 8 lowest frequencies of 32 x 32 pixels against their median, by another DCT."""
    image = picture(3)
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = dctn(grey, type=2)[:8, :8]
    bits = "".join(str(int(value)) for value in (low > np.median(low)).ravel())
    assert phash(image) == f"{int(bits, 2):016x}"


@pytest.mark.parametrize("style", STYLES, ids=["soft", "textured", "natural"])
def test_a_picture_is_found_again_and_others_are_not(style: Style) -> None:
    asked = [picture(index, style=style) for index in range(20)]
    seen = Fingerprints(Fingerprint.of(str(index), encoded(image)) for index, image in enumerate(asked))
    assert len(seen) == 20
    for index, image in enumerate(asked):
        same = seen.find(Fingerprint.of("x", encoded(image)))
        assert same is not None
        assert (same.other, same.by, same.distance) == (str(index), "sha256", 0)
        for changed in (encoded(image, 60), encoded(scaled(image, 0.6)), encoded(scaled(image, 3.5), kind="PNG")):
            found = seen.find(Fingerprint.of("x", changed))
            assert found is not None, index
            assert (found.image, found.other, found.by) == ("x", str(index), "phash")
            assert 0 <= found.distance <= DISTANCE
    others = [seen.find(Fingerprint.of("x", encoded(picture(index, "train", style)))) for index in range(60)]
    assert others == [None] * 60


def test_of_several_the_same_file_counts_and_else_the_nearest() -> None:
    image = picture(0)
    near, far = encoded(image), encoded(scaled(image, 0.4), 30)
    known = [Fingerprint.of("far", far), Fingerprint.of("near", near), Fingerprint.of("again", near)]
    found = Fingerprints(known).find(Fingerprint.of("x", near))
    assert found is not None
    assert (found.other, found.by) == ("near", "sha256")
    turned = Fingerprint.of("x", encoded(image.rotate(90)))
    assert Fingerprints(known).find(turned) is None
    assert Fingerprints([]).find(known[0]) is None
    png_hash = phash(image)
    png = Fingerprints(known).find(Fingerprint.of("x", encoded(image, kind="PNG")))
    assert png is not None
    assert (png.other, png.by) == ("near", "phash")
    assert png.distance == min(bits(png_hash, one.phash) for one in known)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"images/3\.jpg"):
        Fingerprint.of("images/3.jpg", b"no image")
